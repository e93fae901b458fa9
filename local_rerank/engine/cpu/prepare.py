"""What is done to a model loaded on a CPU before its first batch: layers of ours, and the fastest products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.config import EngineConfig
from local_rerank.engine.cpu.compute_thread import owns_process
from local_rerank.engine.cpu.layers import replace_layers
from local_rerank.engine.cpu.onednn_linear import block_layers
from local_rerank.engine.cpu.products import has_int8, require, saturates
from local_rerank.engine.cpu.widened_linear import widen
from local_rerank.engine.dtypes import (
    are_fp32_products_routed,
    blocks_weights,
    multiplies_bf16_faster,
    name_of,
    route_fp32_products,
)
from local_rerank.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check(config: EngineConfig, device: torch.device, arithmetic: torch.dtype) -> None:
    """Raises ConfigError where the dtype cannot run here or its products are wrong, before any weight is loaded."""
    is_spread = config.device_map is not None
    if config.dtype == "int8":
        if device.type != "cpu" or is_spread:
            raise ConfigError(f"dtype int8 runs on a CPU; the device is {config.device_map or device}")
        if not has_int8():
            raise ConfigError("dtype int8 needs a torch with oneDNN; this one has none")
        require("int8", "int8", "int8, limited pairs")
    if device.type == "cpu":
        name = name_of(arithmetic)
        require("fp32", "fp32")  # multiplies the head, whatever the dtype
        require("fp32", "attention fp32")
        require(name, *(["blocked bf16", "bf16"] if name == "bf16" and not is_spread else [name]))
        require(name, f"attention {name}")


def prepare(
    model: PreTrainedModel,
    config: EngineConfig,
    checkpoint: Checkpoint,
    weights: torch.dtype,
    arithmetic: torch.dtype,
    attend: Callable[..., tuple[Tensor, None]],
) -> tuple[str, ...]:
    """Replace the layers of a model that is on the CPU as a whole; int8 comes after it.

    `weights` and `arithmetic` are those of `choose_dtypes`; `attend` is what transformers' attention modules call.
    Returns the names of the kernels that then multiply linear layers and attention, as in `PRODUCTS`.
    """
    if weights != arithmetic:
        widen(model.model)
    values = values_dtype(config, checkpoint)
    replace_layers(model.model, attend, values=values)
    linear = _choose_product(model, config, weights, arithmetic)
    is_fp32 = arithmetic == torch.float32
    if owns_process() and not config.deterministic and (config.dtype == "int8" or not is_fp32):
        route_fp32_products()
    attention = ["routed fp32" if are_fp32_products_routed() else "attention fp32"]
    return (*linear, *attention, *(["attention bf16"] if values is not None or not is_fp32 else []))


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


def _choose_product(
    model: PreTrainedModel, config: EngineConfig, weights: torch.dtype, arithmetic: torch.dtype
) -> list[str]:
    """The fastest way to multiply on this CPU; with `deterministic` none that a measurement decides."""
    name = name_of(arithmetic)
    if config.dtype == "int8":
        return ["int8, limited pairs" if saturates() else "int8", name]
    may_block = weights == arithmetic and not (config.deterministic and arithmetic == torch.float32)
    if may_block and blocks_weights(arithmetic):
        block_layers(model.model.layers)
        return [f"blocked {name}"]
    return [name]
