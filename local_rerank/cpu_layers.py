"""Decoder layers for CPUs: transformers' own weights and steps, with fewer passes over memory between the GEMMs.

transformers writes a new tensor in each of the six steps of an RMSNorm and the seven of a rotary embedding; here norms
take one reduction and two products, and rotation, activation and residuals are done in place.

`replace_layers` takes all layers but the last, which the engine drives by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local_rerank.int8 import project


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
        attention, mlp = self.self_attn, self.mlp
        half = attention.head_dim // 2
        # both halves of cos and sin are the same: (1, tokens, 1, head_dim / 2)
        cos, sin = (part[..., :half].unsqueeze(2) for part in position_embeddings)
        x = rms_norm(hidden_states, self.input_layernorm)
        parts: list[Any] = project(x, attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in parts)  # (1, tokens, heads, head_dim)
        q, k = rotate(rms_norm(q, attention.q_norm), cos, sin), rotate(rms_norm(k, attention.k_norm), cos, sin)
        by_head = (part.transpose(1, 2) for part in (q, k, v))
        attended, _ = self._attend(attention, *by_head, scaling=attention.scaling, **options)
        (hidden,) = project(attended.flatten(2), attention.o_proj)
        hidden = hidden.add_(hidden_states)
        gate, up = project(rms_norm(hidden, self.post_attention_layernorm), mlp.gate_proj, mlp.up_proj)
        (out,) = project(F.silu(gate, inplace=True).mul_(up), mlp.down_proj)
        return out.add_(hidden)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """As transformers' RMSNorm: the mean of squares in fp32, rounded to x's dtype before the weight."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    scale = squares.div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return torch.mul(x, scale).to(x.dtype).mul_(norm.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (1, tokens, heads, head_dim)."""
    out = torch.empty_like(x)
    (first, second), (a, b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=a).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=b).addcmul_(first, sin)
    return out


def replace_layers(backbone: Any, attend: Callable[..., tuple[Tensor, None]]) -> None:
    """All layers but the last; a model with another activation keeps its own."""
    if backbone.config.hidden_act == "silu":
        for index in range(len(backbone.layers) - 1):
            backbone.layers[index] = CpuLayer(backbone.layers[index], attend)
