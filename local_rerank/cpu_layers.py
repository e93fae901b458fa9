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
        hidden, mlp = hidden_states[0], self.mlp
        (out,), scales = project(self._attention(hidden, position_embeddings, options), self.self_attn.o_proj)
        x = scaled(out, scales).add_(hidden)
        (gate, up), scales = project(rms_norm(x, self.post_attention_layernorm), mlp.gate_proj, mlp.up_proj)
        product = F.silu(scaled(gate, scales), inplace=True).mul_(up)  # still without the scales of `up`
        (out,), scales = project(product, mlp.down_proj, scales=scales)
        return scaled(out, scales).add_(x).unsqueeze(0)

    def _attention(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], options: dict[str, Any]) -> Tensor:
        """(tokens, hidden) to (tokens, heads x head_dim), before the output projection."""
        attention = self.self_attn
        x = rms_norm(hidden, self.input_layernorm)
        parts, scales = project(x, attention.q_proj, attention.k_proj, attention.v_proj)
        scales = None if scales is None else scales.unsqueeze(-1)  # (tokens, 1, 1)
        by_token = [part.view(part.shape[0], -1, attention.head_dim) for part in parts]
        # attention reads heads one by one, a quarter faster where each is in one piece: (heads, tokens, head_dim)
        q, k, v = (torch.empty_like(part.transpose(0, 1), memory_format=torch.contiguous_format) for part in by_token)
        # both halves of cos and sin are the same: (tokens, 1, head_dim / 2)
        cos, sin = (part[0, :, : attention.head_dim // 2].unsqueeze(1) for part in position_embeddings)
        rotate(rms_norm(by_token[0], attention.q_norm, scales), cos, sin, out=q.transpose(0, 1))
        rotate(rms_norm(by_token[1], attention.k_norm, scales), cos, sin, out=k.transpose(0, 1))
        if scales is None:
            v.copy_(by_token[2].transpose(0, 1))
        else:
            torch.mul(by_token[2], scales, out=v.transpose(0, 1))
        by_head = (part.unsqueeze(0) for part in (q, k, v))
        attended: Tensor = self._attend(attention, *by_head, scaling=attention.scaling, **options)[0]
        return attended[0].flatten(1)


def scaled(x: Tensor, scales: Tensor | None) -> Tensor:
    """In place, where there are scales."""
    return x if scales is None else x.mul_(scales)


def rms_norm(x: Tensor, norm: Any, scales: Tensor | None = None) -> Tensor:
    """As transformers' RMSNorm: the mean of squares in fp32, rounded to x's dtype before the weight.

    `scales`: what x is still to be multiplied by, which only the epsilon notices.
    """
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    epsilon = norm.variance_epsilon if scales is None else norm.variance_epsilon / scales.square()
    scale = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
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
