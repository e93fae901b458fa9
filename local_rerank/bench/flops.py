"""Count the useful operations of a request and measure the GEMM ceiling of this machine.

Useful operations assume that the prefix is computed once per request and the last layer only for the tokens that give
scores. An encoder has no prefix, and attends in both directions. They count two operations per weight and token in the
projections, plus attention. The ceiling is the throughput of the same matrix
products in the same run; on a CPU, of plain or oneDNN-blocked weights, whichever is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from local_rerank.checkpoints.encoder_tensors import ENCODER_SHAPES
from local_rerank.engine.cpu.choices import blocks_weights
from local_rerank.engine.cpu.compute_thread import compute
from local_rerank.engine.cpu.int8 import Int8Linear, quantize
from local_rerank.engine.cpu.linears import BlockedLinear
from local_rerank.engine.cpu.products import saturates
from local_rerank.engine.cuda import fp8
from local_rerank.requests.pair import Pair

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The sizes of a decoder or an encoder, from its config.json."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_mlp_products: int = 3  # 2 in BERT and XLM-RoBERTa
    is_encoder: bool = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DecoderShape:
        num_heads = config["num_attention_heads"]
        is_encoder = config.get("architectures", [""])[0] in ENCODER_SHAPES
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads", num_heads),
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            num_mlp_products=2 if is_encoder and not config["architectures"][0].startswith("Modern") else 3,
            is_encoder=is_encoder,
        )

    @property
    def kv_weights(self) -> int:
        """Weights of a layer's key and value projections, which the last layer applies to every token too."""
        return 2 * self.hidden_size * self.num_kv_heads * self.head_dim

    @property
    def other_weights(self) -> int:
        """Weights of a layer's query and output projections and of its MLP."""
        mlp = self.num_mlp_products * self.hidden_size * self.intermediate_size
        return 2 * self.hidden_size * self.num_heads * self.head_dim + mlp

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in_features, out_features) of a layer's projections."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        up = [(self.hidden_size, self.intermediate_size)] * (self.num_mlp_products - 1)
        mlp = [*up, (self.intermediate_size, self.hidden_size)]
        return [(self.hidden_size, q), (self.hidden_size, kv), (self.hidden_size, kv), (q, self.hidden_size), *mlp]


def useful_flops(shape: DecoderShape, pairs: Sequence[Pair]) -> float:
    """Return the floating-point operations of a batch in which equal prefixes are computed once."""
    prefixes = list({pair.prefix: pair.num_prefix_tokens for pair in pairs}.values())
    lengths = [(pair.num_prefix_tokens, pair.num_document_tokens) for pair in pairs]
    num_tokens = sum(prefixes) + sum(length for _, length in lengths)
    own = (lambda length: length * length) if shape.is_encoder else _causal  # (query, key) pairs of a segment
    attended = sum(map(own, prefixes)) + sum(length * prefix + own(length) for prefix, length in lengths)
    last_attended = sum(prefix + length for prefix, length in lengths)
    products = num_tokens * (shape.num_layers - 1) * (shape.kv_weights + shape.other_weights)
    products += num_tokens * shape.kv_weights + len(pairs) * shape.other_weights
    attention = 2 * shape.num_heads * shape.head_dim * ((shape.num_layers - 1) * attended + last_attended)
    return 2.0 * (products + attention)


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def gemm_ceiling(shape: DecoderShape, *, arithmetic: str, num_tokens: int, device: torch.device) -> float:
    """Measure operations per second over a layer's projections of `num_tokens` tokens."""
    return compute(lambda: _ceiling(shape, arithmetic, num_tokens, device))


def _ceiling(shape: DecoderShape, arithmetic: str, num_tokens: int, device: torch.device) -> float:
    flops = seconds = 0.0
    for inputs, outputs in shape.matrices:
        variants = _products(arithmetic, num_tokens, inputs, outputs, device)
        for multiply in variants:
            multiply()
        seconds += min(_timed(multiply, device) for multiply in variants for _ in range(REPEATS))
        flops += 2.0 * num_tokens * inputs * outputs
    return flops / seconds


def _products(
    arithmetic: str, num_tokens: int, inputs: int, outputs: int, device: torch.device
) -> list[Callable[[], Tensor]]:
    linear = torch.nn.Linear(inputs, outputs, bias=False, device=device).requires_grad_(False)
    x = torch.randn(num_tokens, inputs, device=device)
    if arithmetic == "int8":
        layer = Int8Linear(linear, limit_pairs=saturates())
        quantized, scales = quantize(x)
        return [lambda: layer.multiply(quantized, scales).mul_(scales)]
    if arithmetic == "fp8":
        return [partial(fp8.Fp8Linear(linear), fp8.quantize(x))]
    dtype = DTYPES[arithmetic]
    linear, x = linear.to(dtype), x.to(dtype)
    modules: list[torch.nn.Module] = [linear]
    if device.type == "cpu" and blocks_weights(dtype):
        modules.append(BlockedLinear(linear))
    return [partial(module, x) for module in modules]


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
