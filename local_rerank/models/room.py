"""Memory: what a model needs, before its weights are read, and what it holds."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import torch

from local_rerank.engine.cpu.process_setup import return_freed_memory
from local_rerank.engine.dtypes import DTYPES, QUANTIZED_DTYPES
from local_rerank.engine.out_of_memory import MIN_BATCH_TOKENS, LayerShape, bytes_per_token, release_cached
from local_rerank.engine.plan import LoadPlan
from local_rerank.reranker import Reranker


def needed_bytes(plan: LoadPlan) -> int:
    """Peak bytes of a load as planned: the weights in the dtype in which they are read, and a batch.

    Quantization comes after reading, so it saves nothing here. On a GPU the batch is the smallest one, because loading
    fits its size to what is free.
    """
    return plan.checkpoint.num_parameters * plan.weights.itemsize + batch_bytes(plan)


def held_bytes(reranker: Reranker) -> int:
    """Bytes of the weights of a loaded model. int8 and fp8 leave the embeddings as they are stored."""
    info, config = reranker.info, reranker.checkpoint.config
    if info.dtype not in QUANTIZED_DTYPES:
        return info.num_parameters * int(DTYPES[info.dtype].itemsize)
    num_embedded = int(config["vocab_size"] * config["hidden_size"])
    itemsize = 2 if reranker.checkpoint.stored_dtype in ("bfloat16", "float16") else 4
    return num_embedded * itemsize + info.num_parameters - num_embedded


def batch_bytes(plan: LoadPlan) -> int:
    """Peak bytes of the activations of a batch."""
    config: dict[str, Any] = {"num_key_value_heads": plan.checkpoint.config.get("num_attention_heads")}
    config |= plan.checkpoint.config
    num_tokens = MIN_BATCH_TOKENS if plan.fits_memory else plan.max_batch_tokens
    per_token = bytes_per_token(LayerShape.of(SimpleNamespace(**config)), plan.arithmetic.itemsize)
    return num_tokens * per_token * (2 if plan.cuda_graphs else 1)


def device_name(device: torch.device) -> str:
    """The same name for every spelling of a device: cuda is cuda:0, as a rule, and cpu:0 is cpu."""
    if device.type != "cuda":
        return device.type
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def release_memory() -> None:
    """Give the memory of a model without references back: Python's cycles, torch's cache, malloc's heap."""
    gc.collect()
    release_cached()
    return_freed_memory()
