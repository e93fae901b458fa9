"""What a load plan asks about the GPU: its fastest dtype, whether it multiplies fp8, and whether our decoder runs."""

from __future__ import annotations

import torch

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.config import EngineConfig
from local_rerank.engine.cuda.layers import why_not_fused
from local_rerank.engine.stored_weights import model_config


def preferred_dtype() -> tuple[torch.dtype, str]:
    """bf16 if the GPU multiplies it natively."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU multiplies it natively"
    return torch.float32, "this GPU does not multiply bf16 natively"


def why_not_fused_here(
    config: EngineConfig, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why the GPU decoder cannot run this model; None if it can."""
    if dtype == torch.float32:
        return "the model is in fp32"
    if config.no_compile:
        return "no_compile is set"
    return why_not_fused(model_config(checkpoint), device, dtype, fp8=config.dtype == "fp8")
