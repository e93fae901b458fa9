"""Which precision weights are loaded in, which one they are multiplied in, and how a CPU does that fastest.

EngineConfig -> two dtypes. What the features of a CPU do not tell is measured, once in a process.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from local_rerank.blocked_linear import BlockedLinear, can_block
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
    return torch.bfloat16 if device.type == "cpu" and multiplies_bf16_faster() else torch.float32


def blocks_weights(arithmetic: torch.dtype) -> bool:
    """Whether this CPU multiplies weights in oneDNN's layout faster: bf16 on every CPU, fp32 where measured."""
    if not can_block() or arithmetic == torch.float16:
        return False
    if arithmetic == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return _seconds_of_products()["blocked fp32"] < _seconds_of_products()["fp32"]


def route_fp32_products() -> None:
    """Let oneDNN multiply all fp32 matrices of this process where it is faster than MKL: those of attention, which no
    layer can put into a layout of its own. Small ones lose, as the built-in model's, so that it is for larger models.

    The setting is called bf16 and lets AMX round; without AMX oneDNN multiplies in fp32, which is checked. It stays.
    """
    seconds = _seconds_of_products()
    if seconds["fp32"] < 1.2 * seconds["blocked fp32"] or torch.cpu._is_amx_tile_supported():
        return
    onednn: Any = torch.backends.mkldnn
    before, onednn.matmul.fp32_precision = onednn.matmul.fp32_precision, "bf16"
    x = torch.full((256, 256), 1 + 2**-12, dtype=torch.float32)  # a number that bf16 rounds to 1
    if not torch.allclose(x @ x, 256 * x.square(), rtol=1e-5):
        onednn.matmul.fp32_precision = before


def are_fp32_products_routed() -> bool:
    """Whether oneDNN multiplies the fp32 matrices of this process."""
    onednn: Any = torch.backends.mkldnn
    return bool(onednn.matmul.fp32_precision == "bf16")


def multiplies_bf16_faster() -> bool:
    """Of two CPUs with the same AVX512-BF16, Zen 4 ran bf16 2.5x as fast as fp32 and a Sapphire Rapids whose AMX a
    hypervisor hides .54x. bf16 costs exactness, so that it has to be clearly faster."""
    seconds = _seconds_of_products()
    return seconds["bf16"] * 1.2 < seconds["fp32"]  # as weights of 16 bits are multiplied otherwise


@cache
def _seconds_of_products() -> dict[str, float]:
    """One product of 256 tokens in each way, measured for some 40 milliseconds; infinite where there is no such way."""
    x = torch.ones(256, 1024, dtype=torch.float32)
    linear = nn.Linear(1024, 1024, bias=False, device="meta", dtype=torch.float32).to_empty(device="cpu")
    nn.init.ones_(linear.weight)
    calls: dict[str, Callable[[], Tensor]] = {"fp32": lambda: linear(x)}
    if can_block():
        blocked = BlockedLinear(linear)
        calls["blocked fp32"] = lambda: blocked(x)
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        half, x_half = copy.deepcopy(linear).bfloat16(), x.bfloat16()
        multiply = BlockedLinear(half) if can_block() else half
        calls["bf16"] = lambda: multiply(x_half)
    best = dict.fromkeys(("fp32", "blocked fp32", "bf16"), math.inf)
    if len(calls) == 1:
        return best
    with torch.inference_mode():
        for _ in range(NUM_ROUNDS):  # in turn, and the best of each, so that other work on the cores does not decide
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def name_of(dtype: torch.dtype) -> str:
    names = DTYPES | QUANTIZED_DTYPES
    return next((name for name, value in names.items() if value == dtype), str(dtype))
