"""Choose the dtypes of a model's weights and arithmetic. The platform says which dtype it multiplies fastest."""

from __future__ import annotations

from collections.abc import Callable

import torch

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_STORED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Preferred = Callable[[], tuple[torch.dtype, str]]
"""The dtype that a device multiplies fastest without quantization, and the reason."""


def choose_dtypes(
    name: str, checkpoint: Checkpoint, preferred: Preferred, *, can_widen: bool
) -> tuple[torch.dtype, torch.dtype, str]:
    """The dtype of the weights, the dtype in which unquantized layers compute, and the reason.

    `can_widen`: whether the platform can multiply 16-bit weights in fp32. Raises ConfigError if `name` is unknown.
    """
    if name == "auto" and checkpoint.needs_fp32:
        return torch.float32, torch.float32, "this model's scores are wrong in lower precision"
    if name in DTYPES:
        dtype, reason = DTYPES[name], "set by the user"
        if can_widen and dtype != torch.float32 and dtype != preferred()[0]:
            return dtype, torch.float32, f"{reason}; multiplied in fp32, which is faster here"
        return dtype, dtype, reason
    if name == "fp8":
        return torch.bfloat16, torch.bfloat16, "dtype of the layers that fp8 does not quantize"
    if name == "int8":
        dtype, reason = torch.float32, "dtype of the layers that int8 does not quantize"
    elif name == "auto":
        dtype, reason = preferred()
    else:
        raise ConfigError(f"dtype is {name!r}; it must be auto, {', '.join([*DTYPES, *QUANTIZED_DTYPES])}")
    if can_widen and dtype == torch.float32:
        return _STORED_DTYPES.get(checkpoint.stored_dtype, dtype), dtype, reason
    return dtype, dtype, reason


def name_of(dtype: torch.dtype) -> str:
    """The option's name for a dtype, such as "bf16"."""
    names = DTYPES | QUANTIZED_DTYPES
    return next((name for name, value in names.items() if value == dtype), str(dtype))
