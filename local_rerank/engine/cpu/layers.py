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

from local_rerank.engine.cpu.int8 import project


class CpuLayer(nn.Module):
    """Stands in for a Qwen3DecoderLayer, holding its modules; called as transformers calls one."""

    def __init__(
        self, layer: Any, attend: Callable[..., tuple[Tensor, None]], values: torch.dtype | None = None
    ) -> None:
        """`attend`: the function that transformers' attention modules call; `values`: see `replace_layers`."""
        super().__init__()
        self.self_attn: Any = layer.self_attn
        self.mlp: Any = layer.mlp
        self.input_layernorm: Any = layer.input_layernorm
        self.post_attention_layernorm: Any = layer.post_attention_layernorm
        self._attend = attend
        self._values = values

    def forward(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **options: Any) -> Tensor:
        """(1, tokens, hidden) to the same."""
        hidden, mlp = hidden_states[0], self.mlp
        (out,), scales = project(self._attention(hidden, position_embeddings, options), self.self_attn.o_proj)
        x = scaled(out, scales).add_(hidden)
        (gate, up), scales = project(rms_norm(x, self.post_attention_layernorm).to(x.dtype), mlp.gate_proj, mlp.up_proj)
        product = F.silu(scaled(gate, scales), inplace=True).mul_(up)  # still without the scales of `up`
        (out,), scales = project(product, mlp.down_proj, scales=scales)
        return scaled(out, scales).add_(x).unsqueeze(0)

    def _attention(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], options: dict[str, Any]) -> Tensor:
        """(tokens, hidden) to (tokens, heads x head_dim), before the output projection."""
        attention = self.self_attn
        x = rms_norm(hidden, self.input_layernorm).to(hidden.dtype)
        parts, scales = project(x, attention.q_proj, attention.k_proj, attention.v_proj)
        scales = None if scales is None else scales.unsqueeze(-1)  # (tokens, 1, 1)
        q, k, v = (part.view(part.shape[0], -1, attention.head_dim) for part in parts)  # (tokens, heads, head_dim)
        cos, sin = (part[0].unsqueeze(1).float() for part in position_embeddings)  # (tokens, 1, head_dim)
        q = rotate_(rms_norm(q, attention.q_norm, scales), cos, sin)
        k = rotate_(rms_norm(k, attention.k_norm, scales), cos, sin)
        v = scaled(v, scales).to(self._values or v.dtype)
        by_head = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        attended: Tensor = self._attend(attention, *by_head, scaling=attention.scaling, **options)[0]
        return attended[0].flatten(1).to(hidden.dtype)


def scaled(x: Tensor, scales: Tensor | None) -> Tensor:
    """In place, where there are scales."""
    return x if scales is None else x.mul_(scales)


def rms_norm(x: Tensor, norm: Any, scales: Tensor | None = None) -> Tensor:
    """As transformers' RMSNorm, in fp32 to the end, where transformers rounds before the weight.

    `scales`: what x is still to be multiplied by, which only the epsilon notices.
    """
    wide = x.float()
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    epsilon = norm.variance_epsilon if scales is None else norm.variance_epsilon / scales.square()
    scale = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return torch.mul(wide, scale, out=None if wide is x else wide).mul_(norm.weight)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (tokens, heads, head_dim) by (tokens, 1, head_dim), whose halves are the same; in place."""
    (first, second), (cos, _), (sin, _) = (part.chunk(2, dim=-1) for part in (x, cos, sin))
    of_first = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(of_first)
    return x


def replace_layers(
    backbone: Any, attend: Callable[..., tuple[Tensor, None]], *, values: torch.dtype | None = None
) -> None:
    """All layers but the last; a model with another activation keeps its own.

    `values`: the dtype in which attention sums them up, where that is not the one of the hidden states.
    """
    if backbone.config.hidden_act == "silu":
        for index in range(len(backbone.layers) - 1):
            for norm in (module for name, module in backbone.layers[index].named_modules() if name.endswith("norm")):
                norm.float()  # which is how they are multiplied
            backbone.layers[index] = CpuLayer(backbone.layers[index], attend, values)
