"""Which precision weights are loaded in, which one they are multiplied in, and how a CPU does that fastest.

EngineConfig -> two dtypes. What the features of a CPU do not tell is measured, once in a process (`products.py`).
"""

from __future__ import annotations

import torch

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.config import EngineConfig
from local_rerank.engine.cpu.products import fp32_precision, is_right, seconds_of_products, set_fp32_precision
from local_rerank.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
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
    if arithmetic == torch.float32:
        seconds = seconds_of_products()
        return seconds["blocked fp32"] < seconds["fp32"] and is_right("blocked fp32")
    return arithmetic == torch.bfloat16 and is_right("blocked bf16")


def route_fp32_products() -> None:
    """Let oneDNN multiply all fp32 matrices of this process where it is faster than MKL: those of attention, which no
    layer can put into a layout of its own. Small ones lose, as the built-in model's, so that it is for larger models.

    The setting stays.
    """
    seconds = seconds_of_products()
    if seconds["fp32"] >= 1.2 * seconds["blocked fp32"] and is_right("routed fp32"):
        set_fp32_precision("bf16")


def are_fp32_products_routed() -> bool:
    """Whether oneDNN multiplies the fp32 matrices of this process."""
    return fp32_precision() == "bf16"


def multiplies_bf16_faster() -> bool:
    """Of two CPUs with the same AVX512-BF16, Zen 4 ran bf16 2.5x as fast as fp32 and a Sapphire Rapids whose AMX a
    hypervisor hides .54x. bf16 costs exactness, so that it has to be clearly faster. False where it is wrong."""
    seconds = seconds_of_products()
    is_faster = seconds["bf16"] * 1.2 < seconds["fp32"]  # as weights of 16 bits are multiplied otherwise
    return is_faster and any(map(is_right, ("blocked bf16", "bf16"))) and is_right("attention bf16")


def name_of(dtype: torch.dtype) -> str:
    names = DTYPES | QUANTIZED_DTYPES
    return next((name for name, value in names.items() if value == dtype), str(dtype))
