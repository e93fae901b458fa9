"""What a load plan asks about the CPU: its fastest dtype, whether its kernels are right, and which to use."""

from __future__ import annotations

import torch

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.config import EngineConfig
from local_rerank.engine.cpu.process_setup import owns_process
from local_rerank.engine.cpu.products import fp32_precision, has_int8, is_right, require, saturates, seconds_of_products
from local_rerank.engine.dtypes import name_of
from local_rerank.errors import ConfigError


def preferred_dtype() -> tuple[torch.dtype, str]:
    """bf16 if this CPU multiplies it at least 1.2 times as fast as fp32, because bf16 costs precision.

    It is measured because instruction sets do not tell: with AVX512-BF16, a Zen 4 ran bf16 2.5 times as fast as fp32,
    but a Sapphire Rapids whose AMX was hidden by the hypervisor 0.54 times. Wrong bf16 kernels are never chosen.
    """
    seconds = seconds_of_products()
    if seconds["bf16"] * 1.2 >= seconds["fp32"]:
        return torch.float32, "this CPU multiplies bf16 no faster"
    if not (any(map(is_right, ("blocked bf16", "bf16"))) and is_right("attention bf16")):
        return torch.float32, "this CPU's bf16 kernels are wrong"
    return torch.bfloat16, f"this CPU multiplies it {seconds['fp32'] / seconds['bf16']:.1f} times as fast as fp32"


def check(config: EngineConfig, arithmetic: torch.dtype) -> None:
    """Raise ConfigError if this CPU has no right kernel for the dtype."""
    if config.dtype == "int8":
        if not has_int8():
            raise ConfigError("dtype is 'int8', which needs a torch build with oneDNN; this one has none")
        require("int8", "int8", "int8, limited pairs")
    name = name_of(arithmetic)
    require("fp32", "fp32")  # multiplies the head for every dtype
    require("fp32", "attention fp32")
    require(name, *(["blocked bf16", "bf16"] if name == "bf16" and config.device_map is None else [name]))
    require(name, f"attention {name}")


def choose_linear(config: EngineConfig, weights: torch.dtype, arithmetic: torch.dtype) -> tuple[str, str]:
    """The row of `PRODUCTS` for linear layers, and the reason. With `deterministic` no measurement decides."""
    name = name_of(arithmetic)
    if config.dtype == "int8":
        if saturates():
            return "int8, limited pairs", "full-range int8 saturates on this CPU"
        return "int8", "set by the user"
    if weights != arithmetic:
        return name, f"{name_of(weights)} weights are widened"
    if not (config.deterministic and arithmetic == torch.float32) and blocks_weights(arithmetic):
        return f"blocked {name}", "this CPU multiplies weights in oneDNN's layout faster"
    return name, "torch's default"


def blocks_weights(arithmetic: torch.dtype) -> bool:
    """Whether this CPU multiplies weights in oneDNN's layout faster: always for bf16, measured for fp32."""
    if arithmetic == torch.float32:
        seconds = seconds_of_products()
        return seconds["blocked fp32"] < seconds["fp32"] and is_right("blocked fp32")
    return arithmetic == torch.bfloat16 and is_right("blocked bf16")


def values_dtype(config: EngineConfig, checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype of values in attention, or None for that of the hidden states.

    With int8 it is bf16 on CPUs that multiply it faster: bf16 rounds less than int8.
    """
    is_bf16 = config.dtype == "int8" and not checkpoint.needs_fp32 and preferred_dtype()[0] == torch.bfloat16
    return torch.bfloat16 if is_bf16 else None


def routes_fp32(config: EngineConfig, arithmetic: torch.dtype) -> bool:
    """Whether oneDNN instead of MKL should multiply the fp32 matrices of attention, in the whole process.

    oneDNN is faster on some CPUs for large matrices, but slower for small ones such as the built-in model's in fp32.
    """
    if fp32_precision() == "bf16":  # already set for another model of this process
        return True
    if not owns_process() or config.deterministic or (config.dtype != "int8" and arithmetic == torch.float32):
        return False
    seconds = seconds_of_products()
    return seconds["fp32"] >= 1.2 * seconds["blocked fp32"] and is_right("routed fp32")
