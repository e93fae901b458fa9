"""What is done to a loaded model on NVIDIA GPUs before its first batch: layers fused, fp8, the token budget.

Nothing here is needed for right scores: each step is left out where it does not apply, and the log says which and why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from local_rerank import cuda_layers, fp8
from local_rerank.attention import KernelRow
from local_rerank.config import EngineConfig
from local_rerank.cuda_attention import merged_layout
from local_rerank.errors import ConfigError
from local_rerank.memory import LayerShape, bytes_per_token, fitted_budget, free_bytes

logger = logging.getLogger(__name__)


def prepare(
    backbone: Any, config: EngineConfig, attend: Callable[..., tuple[Tensor, None]], device: torch.device
) -> None:
    """Fuse the layers of a half-precision model on one GPU, then quantize them if fp8 is asked for."""
    if config.device_map is not None or backbone.norm.weight.dtype == torch.float32:
        logger.info("layers are transformers' own: the model is spread over devices, or in fp32")
        return
    can_compile = not config.no_compile
    logger.info(cuda_layers.fuse(backbone, attend, compiled=can_compile, device=device))
    if config.dtype == "fp8":
        can_compile = can_compile and cuda_layers.can_compile(device)
        fp8.quantize_model(backbone, torch.compile(fp8.quantize) if can_compile else fp8.quantize)


def check_fp8(config: EngineConfig, device: torch.device) -> None:
    """Raises ConfigError where fp8 is asked for and cannot be had."""
    if config.device_map is not None:
        raise ConfigError("dtype is 'fp8' and device_map is set; fp8 takes a model on one GPU")
    fp8.require_fp8(device)


def uses_graphs(config: EngineConfig, kernel: KernelRow, device: torch.device) -> bool:
    """Whether small batches are captured: on one GPU, with a kernel whose layout can be padded."""
    if device.type != "cuda" or config.no_cuda_graphs:
        return False
    if config.device_map is not None or kernel.layout is not merged_layout:
        logger.info("CUDA graphs are off: the model is spread over devices, or its kernel gathers keys")
        return False
    return True


def token_budget(model: Any, device: torch.device, *, at_most: int) -> int:
    """Tokens of a batch that fit beside the weights, on the fullest of the model's GPUs."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    per_token = bytes_per_token(LayerShape.of(model.config), model.dtype.itemsize)
    free = free_bytes(devices or {device})  # none where accelerate keeps all weights outside
    budget = fitted_budget(free, per_token, at_most=at_most)
    logger.info("%d tokens a batch: %.1f GB free, about %d bytes a token", budget, free / 1e9, per_token)
    return budget
