"""What is done to a loaded model on NVIDIA GPUs before its first batch: layers fused, fp8, the token budget.

Nothing here is needed for right scores: each step is left out where it does not apply, and the log says which and why.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from local_rerank.config import EngineConfig
from local_rerank.engine.cuda import fp8
from local_rerank.engine.cuda import layers as cuda_layers
from local_rerank.engine.cuda.attention import tile_layout
from local_rerank.engine.cuda.layers import FusedDecoder
from local_rerank.engine.kernel_table import KernelRow
from local_rerank.engine.out_of_memory import LayerShape, bytes_per_token, fitted_budget, free_bytes
from local_rerank.errors import ConfigError

logger = logging.getLogger(__name__)


def prepare(model: Any, config: EngineConfig, device: torch.device) -> bool:
    """Put a decoder of ours into a half-precision model on one GPU, then quantize it if fp8 is asked for.

    Returns whether it is there. Raises ConfigError for fp8 or our attention kernel without it.
    """
    reason = _why_not_fused(model, config, device)
    if reason is not None:
        if config.dtype == "fp8":
            raise ConfigError(f"dtype is 'fp8', which needs fused layers, and these are left out: {reason}")
        if config.attention == "cuda-tiles":
            raise ConfigError(f"attention is 'cuda-tiles', which is compiled here, and that is left out: {reason}")
        logger.info("layers are transformers' own: %s", reason)
        return False
    model.model = FusedDecoder(model.model)
    logger.info("layers are fused")
    if config.dtype == "fp8":
        fp8.quantize_model(model.model)
    return True


def _why_not_fused(model: Any, config: EngineConfig, device: torch.device) -> str | None:
    if config.device_map is not None:
        return "the model is spread over devices"
    if model.dtype == torch.float32:
        return "the model is in fp32"
    return (
        "as asked for"
        if config.no_compile
        else cuda_layers.why_not_fused(model.config, device, model.dtype, fp8=config.dtype == "fp8")
    )


def check_fp8(config: EngineConfig, device: torch.device) -> None:
    """Raises ConfigError where fp8 is asked for and cannot be had."""
    if config.device_map is not None:
        raise ConfigError("dtype is 'fp8' and device_map is set; fp8 takes a model on one GPU")
    fp8.require_fp8(device)


def uses_graphs(config: EngineConfig, kernel: KernelRow, decoder: Any) -> bool:
    """Whether batches are captured: those of a fused decoder, with the kernel whose layout can be padded.

    Not where scores must be equal to the bit: a first pass is no graph, and products of padded sizes sum otherwise.
    """
    can = isinstance(decoder, FusedDecoder) and kernel.layout is tile_layout
    return can and not (config.no_cuda_graphs or config.deterministic)


def token_budget(model: Any, device: torch.device, *, at_most: int, graphs: bool = False) -> int:
    """Tokens of a batch that fit beside the weights, on the fullest of the model's GPUs.

    `graphs`: with CUDA graphs, whose pool of memory has room for a batch of its own.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    per_token = bytes_per_token(LayerShape.of(model.config), model.dtype.itemsize) * (2 if graphs else 1)
    free = free_bytes(devices or {device})  # none where accelerate keeps all weights outside
    budget = fitted_budget(free, per_token, at_most=at_most)
    logger.info("%d tokens a batch: %.1f GB free, about %d bytes a token", budget, free / 1e9, per_token)
    return budget
