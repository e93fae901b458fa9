"""Carry out a load plan on the CPU: linear layers, decoder and int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from local_rerank.engine.cpu.int8_search import MAX_SEARCHED_PARAMETERS, facts_of, quantize_layers
from local_rerank.engine.cpu.layers import CpuDecoder
from local_rerank.engine.cpu.linears import block_layers, widen
from local_rerank.engine.cpu.products import set_fp32_precision
from local_rerank.engine.encoder import Encoder
from local_rerank.engine.engine import Engine
from local_rerank.engine.plan import LoadPlan
from local_rerank.requests.pair import Pair


def prepare(model: Any, plan: LoadPlan) -> CpuDecoder:
    """Make the CPU decoder from a transformers model as planned, except for int8, which `quantize` does later."""
    if plan.weights != plan.arithmetic:
        widen(model.model.layers, model.model, "embed_tokens")
    if plan.linear is not None and plan.linear.startswith("blocked"):
        block_layers(model.model.layers)
    if plan.routes_fp32:
        set_fp32_precision("bf16")
    return CpuDecoder(model.model, values_dtype=plan.values)


def prepare_encoder(model: Any, plan: LoadPlan) -> Encoder:
    """Make an encoder from a transformers model, on any device, except for int8, which `quantize` does later."""
    encoder = Encoder(model, plan.checkpoint.architecture)
    if plan.weights != plan.arithmetic:
        words = "tok_embeddings" if encoder.parts.rotary else "word_embeddings"
        widen(encoder.layers, encoder.embeddings, words)
        for module in encoder.modules():
            if isinstance(module, (nn.LayerNorm, nn.Embedding)):
                module.float()
    if plan.linear is not None and plan.linear.startswith("blocked"):
        block_layers(encoder.layers)
        for layer in encoder.layers:
            layer.join_activation()
    return encoder


def quantize(engine: Engine, plan: LoadPlan, num_parameters: int, known: Callable[[], list[Pair]]) -> list[str]:
    """Quantize the decoder's linear layers to int8; returns the names of those that stay in fp32."""
    layers = engine.decoder.layers
    if num_parameters > MAX_SEARCHED_PARAMETERS:
        return quantize_layers(layers)
    pairs = known()
    facts = facts_of(
        engine.weights,
        pairs,
        config=plan.checkpoint.config,
        attention=plan.kernel,
        values=str(plan.values),
        deterministic=plan.config.deterministic,
    )
    return quantize_layers(layers, lambda: engine.score(pairs), facts)
