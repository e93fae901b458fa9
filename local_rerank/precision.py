"""Which precision weights are loaded in, and which one they are multiplied in: EngineConfig -> two dtypes."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import nn

from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError
from local_rerank.models import Checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
NUM_ROUNDS = 8
_STORED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtypes(
    config: EngineConfig, checkpoint: Checkpoint, device: torch.device
) -> tuple[torch.dtype, torch.dtype]:
    """Of the weights as they are loaded, and of what is computed with them where that is not quantized.

    On a CPU, 16-bit weights are multiplied in fp32 unless bf16 is the faster there. Raises ConfigError.
    """
    name = "fp32" if config.dtype == "auto" and checkpoint.needs_fp32 else config.dtype
    fastest = choose_dtype(name, device)
    if device.type != "cpu" or config.device_map is not None:
        return fastest, fastest
    if name in ("auto", "int8"):
        stored = _STORED_DTYPES.get(checkpoint.stored_dtype, torch.float32)
        return (fastest, fastest) if fastest == torch.bfloat16 else (stored, torch.float32)
    return fastest, fastest if fastest == choose_dtype("auto", device) else torch.float32


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of what is not quantized. `auto`: bf16 where a GPU multiplies it natively or this CPU multiplies it faster."""
    if name in DTYPES:
        return DTYPES[name]
    if name in QUANTIZED_DTYPES:
        return torch.bfloat16 if name == "fp8" else torch.float32
    if name != "auto":
        raise ConfigError(f"dtype is {name!r}; it must be auto, {', '.join([*DTYPES, *QUANTIZED_DTYPES])}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_bf16_faster() else torch.float32


@cache
def _cpu_multiplies_bf16_faster() -> bool:
    """Measured, some 30 milliseconds: of two CPUs with the same AVX512-BF16, Zen 4 ran bf16 2.5x as fast as fp32 and a
    Sapphire Rapids whose AMX a hypervisor hides .54x. bf16 costs exactness, so that it has to be clearly faster."""
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    # in turn, and the best of each, so that other work on the cores does not decide
    rounds = [[_seconds_of_product(dtype) for dtype in (torch.float32, torch.bfloat16)] for _ in range(NUM_ROUNDS)]
    fp32, bf16 = (min(times) for times in zip(*rounds, strict=True))
    return bool(bf16 * 1.2 < fp32)


def _seconds_of_product(dtype: torch.dtype) -> float:
    x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    start = time.perf_counter()
    nn.functional.linear(x, weight)
    return time.perf_counter() - start


def name_of(dtype: torch.dtype) -> str:
    names = DTYPES | QUANTIZED_DTYPES
    return next((name for name, value in names.items() if value == dtype), str(dtype))
