"""Carry out a load plan on a GPU: our decoder, fp8, and the token budget that fits in free memory."""

from __future__ import annotations

import logging
from typing import Any

import torch

from local_rerank.engine.cuda import fp8
from local_rerank.engine.cuda.layers import FusedDecoder
from local_rerank.engine.out_of_memory import LayerShape, bytes_per_token, fitted_budget, free_bytes
from local_rerank.engine.plan import LoadPlan

logger = logging.getLogger(__name__)


def prepare(model: Any, plan: LoadPlan) -> FusedDecoder:
    """Make the GPU decoder from a transformers model, quantized if the plan says fp8."""
    decoder = FusedDecoder(model.model)
    if plan.quantization == "fp8":
        fp8.quantize_model(decoder)
    return decoder


def keep_sums_in_fp32(plan: LoadPlan) -> None:
    """Sum products of fp16 matrices in fp32, in the whole process: torch lets cuBLAS add partial sums in fp16, which
    may overflow.
    """
    if plan.device.type == "cuda" and plan.arithmetic == torch.float16:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def token_budget(model: Any, device: torch.device, *, at_most: int, graphs: bool = False) -> int:
    """Tokens per batch that fit beside the weights, on the fullest of the model's GPUs.

    `graphs`: leave room for the memory pool of CUDA graphs, which is as large as a batch.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    per_token = bytes_per_token(LayerShape.of(model.config), model.dtype.itemsize) * (2 if graphs else 1)
    free = free_bytes(devices or {device})  # `devices` is empty if accelerate keeps all weights on the host
    budget = fitted_budget(free, per_token, at_most=at_most)
    logger.info("%d tokens per batch: %.1f GB free, about %d bytes per token", budget, free / 1e9, per_token)
    return budget
