"""What a load plan asks about the GPU: why torch sees none, its fastest dtype, and whether our decoder runs."""

from __future__ import annotations

import torch

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.config import EngineConfig
from local_rerank.engine.cuda.layers import why_not_fused
from local_rerank.engine.stored_weights import model_config
from local_rerank.errors import ConfigError

BUILDS = "https://pytorch.org/get-started/locally/"  # where PyTorch chooses the build by system, package tool and CUDA


def why_no_gpu() -> str:
    """Why torch sees no GPU, in torch's own words if its build could use one."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # no driver, a driver older than the build, no device
        return f"torch {torch.__version__} sees no GPU: {str(error).partition('. ')[0].rstrip('.')}"
    return f"torch {torch.__version__} sees no GPU"


def require_gpu(name: str, index: int) -> None:
    """Raises ConfigError if torch does not see the GPU of that index; `name` is what the user wrote."""
    number = torch.cuda.device_count()
    if index < number:
        return
    if number:
        raise ConfigError(f"device is {name!r}, but torch sees {number} CUDA devices, up to 'cuda:{number - 1}'")
    without = torch.version.cuda is None and torch.version.hip is None
    fix = "install a build with CUDA" if without else "update the driver, install a build for its CUDA version"
    raise ConfigError(f"device is {name!r}, but {why_no_gpu()}; {fix} ({BUILDS}), or set device to cpu")


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
