"""What is done to a model loaded on a CPU before its first batch: layers of ours, and the fastest products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from local_rerank.blocked_linear import block_layers
from local_rerank.config import EngineConfig
from local_rerank.cpu_layers import replace_layers
from local_rerank.errors import ConfigError
from local_rerank.int8 import saturates
from local_rerank.models import Checkpoint
from local_rerank.openmp import owns_process
from local_rerank.precision import blocks_weights, multiplies_bf16_faster, route_fp32_products
from local_rerank.wide_layers import widen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_int8(config: EngineConfig, device: torch.device) -> None:
    """Raises ConfigError where int8 cannot run or is wrong, before any weight is loaded."""
    if device.type != "cpu" or config.device_map is not None:
        raise ConfigError(f"dtype int8 runs on a CPU; the device is {config.device_map or device}")
    if not torch._C._has_mkldnn:
        raise ConfigError("dtype int8 needs a torch with oneDNN; this one has none")
    saturates()


def prepare(
    model: PreTrainedModel,
    config: EngineConfig,
    checkpoint: Checkpoint,
    weights: torch.dtype,
    arithmetic: torch.dtype,
    attend: Callable[..., tuple[Tensor, None]],
) -> None:
    """Replace the layers of a model that is on the CPU as a whole; int8 comes after it.

    `weights` and `arithmetic` are those of `choose_dtypes`; `attend` is what transformers' attention modules call.
    """
    if weights != arithmetic:
        widen(model.model)
    replace_layers(model.model, attend, values=values_dtype(config, checkpoint))
    _choose_products(model, config, weights, arithmetic)


def values_dtype(config: EngineConfig, checkpoint: Checkpoint) -> torch.dtype | None:
    """In which attention sums values up, where that is not the one of the hidden states: bf16 rounds less than int8."""
    is_bf16 = config.dtype == "int8" and not checkpoint.needs_fp32 and multiplies_bf16_faster()
    return torch.bfloat16 if is_bf16 else None


def choices(config: EngineConfig, checkpoint: Checkpoint, kernel: str) -> dict[str, Any]:
    """What changes int8's scores beside weights, prompts and CPU, as JSON can hold it."""
    return {
        "config": checkpoint.config,
        "attention": kernel,
        "values": str(values_dtype(config, checkpoint)),
        "deterministic": config.deterministic,
    }


def _choose_products(
    model: PreTrainedModel, config: EngineConfig, weights: torch.dtype, arithmetic: torch.dtype
) -> None:
    """The fastest way to multiply on this CPU; with `deterministic` none that a measurement decides."""
    is_fp32 = arithmetic == torch.float32
    if config.deterministic and is_fp32:
        return
    if config.dtype != "int8" and weights == arithmetic and blocks_weights(arithmetic):
        block_layers(model.model.layers)
    if owns_process() and not config.deterministic and (config.dtype == "int8" or not is_fp32):
        route_fp32_products()
