"""Decoder layers for CPUs: transformers' own weights and steps, with fewer passes over memory between the GEMMs.

The GEMMs take all tokens of a batch at once; what comes between two of them is done for a block of tokens at a time,
small enough for the cache, so that memory is read and written once where transformers' layer does so six times in an
RMSNorm and seven times in a rotary embedding.

`replace_layers` takes all layers but the last, which the engine drives by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local_rerank.int8 import Int8Linear, Int8Operand

BLOCK_TOKENS = 256  # 3 MB of the widest activation of the 0.6B model
Blocks = list[slice]


class CpuLayer(nn.Module):
    """Stands in for a Qwen3DecoderLayer, holding its modules; called as transformers calls one."""

    def __init__(self, layer: Any, attend: Callable[..., tuple[Tensor, None]]) -> None:
        """`attend`: the function that transformers' attention modules call."""
        super().__init__()
        self.self_attn: Any = layer.self_attn
        self.mlp: Any = layer.mlp
        self.input_layernorm: Any = layer.input_layernorm
        self.post_attention_layernorm: Any = layer.post_attention_layernorm
        self._attend = attend

    def forward(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **options: Any) -> Tensor:
        """(1, tokens, hidden) to the same."""
        hidden = hidden_states[0]
        blocks = [slice(start, start + BLOCK_TOKENS) for start in range(0, hidden.shape[0], BLOCK_TOKENS)]
        attended = self._attention(hidden, blocks, position_embeddings, options)
        return self._mlp(hidden, attended, blocks).unsqueeze(0)

    def _attention(
        self, hidden: Tensor, blocks: Blocks, position_embeddings: tuple[Tensor, Tensor], options: dict[str, Any]
    ) -> Tensor:
        """(tokens, hidden) to (tokens, heads x head_dim), before the output projection."""
        attention = self.self_attn
        x = operand(attention.q_proj, hidden.shape[0], hidden.dtype)
        for rows in blocks:
            x.store(rows, rms_norm(hidden[rows], self.input_layernorm))
        q, k, v = (x.multiply(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        # both halves of cos and sin are the same: (tokens, 1, head_dim / 2)
        cos, sin = (part[0, :, : attention.head_dim // 2].unsqueeze(1) for part in position_embeddings)
        for rows in blocks:
            for product, norm in ((q, attention.q_norm), (k, attention.k_norm)):
                heads = product.finish(rows).unflatten(-1, (-1, attention.head_dim))
                rotate(rms_norm(heads, norm), cos[rows], sin[rows], out=heads)
            v.finish(rows)
        by_head = (
            product.values.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1).unsqueeze(0) for product in (q, k, v)
        )
        attended: Tensor = self._attend(attention, *by_head, scaling=attention.scaling, **options)[0]
        return attended[0].flatten(1)

    def _mlp(self, hidden: Tensor, attended: Tensor, blocks: Blocks) -> Tensor:
        """Output projection, residual and MLP: (tokens, hidden)."""
        o_proj, mlp = self.self_attn.o_proj, self.mlp
        x = operand(o_proj, hidden.shape[0], hidden.dtype)
        for rows in blocks:
            x.store(rows, attended[rows])
        projected = x.multiply(o_proj)
        x = operand(mlp.gate_proj, hidden.shape[0], hidden.dtype)
        for rows in blocks:
            x.store(rows, rms_norm(projected.finish(rows).add_(hidden[rows]), self.post_attention_layernorm))
        gate, up = x.multiply(mlp.gate_proj), x.multiply(mlp.up_proj)
        x = operand(mlp.down_proj, hidden.shape[0], hidden.dtype)
        for rows in blocks:
            x.store(rows, F.silu(gate.finish(rows), inplace=True).mul_(up.finish(rows)))
        out = x.multiply(mlp.down_proj)
        for rows in blocks:
            out.finish(rows).add_(projected.values[rows])
        values: Tensor = out.values
        return values


class Operand:
    """What linear layers multiply, (tokens, inputs), stored block by block."""

    def __init__(self, num_tokens: int, num_inputs: int, dtype: torch.dtype) -> None:
        self._values = torch.empty(num_tokens, num_inputs, dtype=dtype)

    def store(self, rows: slice, x: Tensor) -> None:
        self._values[rows] = x

    def multiply(self, linear: nn.Module) -> Product:
        return Product(linear(self._values))


class Product:
    """What came of a multiplication, (tokens, outputs); `finish` is a view of some rows."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def finish(self, rows: slice) -> Tensor:
        return self.values[rows]


def operand(linear: Any, num_tokens: int, dtype: torch.dtype) -> Any:
    """The kind that a layer takes."""
    if isinstance(linear, Int8Linear):
        return Int8Operand(num_tokens, linear.in_features)
    return Operand(num_tokens, linear.weight.shape[1], dtype)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """As transformers' RMSNorm: the mean of squares in fp32, rounded to x's dtype before the weight."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    scale = squares.div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return torch.mul(x, scale).to(x.dtype).mul_(norm.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor) -> None:
    """Rotary embedding of (tokens, heads, head_dim)."""
    (first, second), (a, b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=a).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=b).addcmul_(first, sin)


def replace_layers(backbone: Any, attend: Callable[..., tuple[Tensor, None]]) -> None:
    """All layers but the last; a model with another activation keeps its own."""
    if backbone.config.hidden_act == "silu":
        for index in range(len(backbone.layers) - 1):
            backbone.layers[index] = CpuLayer(backbone.layers[index], attend)
