"""What a load plan asks about the GPU: its fastest dtype, whether it has a dtype, and whether our decoder runs."""

from __future__ import annotations

import torch

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.config import EngineConfig
from local_rerank.engine.cuda.gpu import Gpu
from local_rerank.engine.cuda.layers import why_not_fused
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.engine.stored_weights import model_config
from local_rerank.errors import ConfigError

BF16_CAPABILITY = (8, 0)  # Ampere
FP16_CAPABILITY = (7, 0)  # Volta, the first with tensor cores: before it fp16 is no faster than fp32


def preferred_dtype(gpu: Gpu | None) -> tuple[torch.dtype, str]:
    """bf16 if the GPU multiplies it, else fp16 if it has tensor cores.

    The model card recommends fp16. It rounds less than bf16 but ends at 65,504; the self-test sees an overflow.
    """
    assert gpu is not None
    if gpu.capability >= BF16_CAPABILITY:
        return torch.bfloat16, f"{gpu} multiplies it natively"
    if gpu.capability >= FP16_CAPABILITY:
        limits = "fp16 rounds less (11 bits instead of 8) but overflows beyond 65,504; if it does, use --dtype fp32"
        return torch.float16, f"{gpu} has no bf16; {limits}"
    return torch.float32, f"{gpu} multiplies fp16 no faster and has no bf16"


def check(arithmetic: torch.dtype, gpu: Gpu) -> None:
    """Raise ConfigError for bf16 on a GPU without it.

    torch emulates it there: slower than fp32, and without a fused attention kernel, so that attention's memory grows
    with the square of a document's length.
    """
    if arithmetic == torch.bfloat16 and (why_not := gpu.why_too_old(BF16_CAPABILITY)) is not None:
        raise ConfigError(f"dtype is 'bf16', which needs {why_not}, where torch only emulates it; use fp16 or fp32")


def why_not_fused_here(
    config: EngineConfig, checkpoint: Checkpoint, device: torch.device, gpu: Gpu, dtype: torch.dtype
) -> str | None:
    """Why the GPU decoder cannot run this model; None if it can."""
    if dtype == torch.float32:
        return "the model is in fp32"
    if config.no_compile:
        return "no_compile is set"
    if (why_not := gpu.why_too_old(KERNELS["cuda-tiles"].least_capability)) is not None:
        return f"its kernels need {why_not}"
    return why_not_fused(model_config(checkpoint), device, dtype, fp8=config.dtype == "fp8")
