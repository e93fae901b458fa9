"""The decoder for CPUs: transformers' computation with fewer passes over memory between the matrix products.

transformers allocates a tensor in each of the six steps of an RMSNorm and the seven of a rotary embedding. Here a norm
is one reduction and two products, and rotation, activation and residual additions work in place. Norms run in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local_rerank import forks
from local_rerank.engine.attention import Attend, Layout
from local_rerank.engine.cpu.int8 import project
from local_rerank.engine.kernel_table import KernelRow
from local_rerank.engine.packing import PackedBatch

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of a rotary embedding, (num_tokens, 1, head_dim) fp32 each."""


class CpuLayer(nn.Module):
    """A decoder layer, built from the modules of a Qwen3DecoderLayer."""

    def __init__(self, layer: Any, values_dtype: torch.dtype | None = None) -> None:
        """`values_dtype`: dtype of values in attention; None means that of the hidden states."""
        super().__init__()
        self.self_attn: Any = layer.self_attn
        self.mlp: Any = layer.mlp
        self.input_layernorm: Any = layer.input_layernorm
        self.post_attention_layernorm: Any = layer.post_attention_layernorm
        is_silu = layer.mlp.config.hidden_act == "silu"
        self._activate: Callable[[Tensor], Tensor] = _silu_ if is_silu else layer.mlp.act_fn
        self._values_dtype = values_dtype

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        attend: Attend,
        layout: Layout,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """(num_tokens, hidden) to (num_queries, hidden). Without `query_positions` every token is a query."""
        mlp, residual = self.mlp, hidden if query_positions is None else hidden[query_positions]
        attended = self._attention(hidden, rotation, attend, layout, query_positions)
        (out,), scales = project(attended, self.self_attn.o_proj)
        x = scaled(out, scales).add_(residual)
        (gate, up), scales = project(rms_norm(x, self.post_attention_layernorm).to(x.dtype), mlp.gate_proj, mlp.up_proj)
        product = self._activate(scaled(gate, scales)).mul_(up)  # up's scales stay pending until down_proj
        (out,), scales = project(product, mlp.down_proj, scales=scales)
        return scaled(out, scales).add_(x)

    def _attention(
        self, hidden: Tensor, rotation: Rotation, attend: Attend, layout: Layout, query_positions: Tensor | None
    ) -> Tensor:
        """(num_tokens, hidden) to (num_queries, heads * head_dim), before the output projection."""
        attention = self.self_attn
        x = rms_norm(hidden, self.input_layernorm).to(hidden.dtype)
        if query_positions is None:
            (q, k, v), scales = project(x, attention.q_proj, attention.k_proj, attention.v_proj)
            q_scales, q_rotation = scales, rotation
        else:
            (q,), q_scales = project(x[query_positions], attention.q_proj)
            (k, v), scales = project(x, attention.k_proj, attention.v_proj)
            q_rotation = (rotation[0][query_positions], rotation[1][query_positions])
        q, k, v = (part.view(part.shape[0], -1, attention.head_dim) for part in (q, k, v))  # (tokens, heads, head_dim)
        q_scales, scales = (None if each is None else each.unsqueeze(-1) for each in (q_scales, scales))
        q = rotate_(rms_norm(q, attention.q_norm, q_scales), *q_rotation)
        k = rotate_(rms_norm(k, attention.k_norm, scales), *rotation)
        v = scaled(v, scales).to(self._values_dtype or v.dtype)
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))  # (1, heads, tokens, head_dim)
        return attend(q, k, v, layout, attention.scaling)[0].flatten(1).to(hidden.dtype)


class CpuDecoder(nn.Module):
    """Embedding, layers and final norm of a model that is entirely on the CPU."""

    def __init__(self, backbone: Any, *, values_dtype: torch.dtype | None = None) -> None:
        """`backbone`: a Qwen3Model, whose modules we share. `values_dtype`: see `CpuLayer`."""
        super().__init__()
        self.embed_tokens = backbone.embed_tokens
        self.rotary_emb = backbone.rotary_emb
        self.norm = backbone.norm
        self.layers: Any = nn.ModuleList(CpuLayer(layer, values_dtype) for layer in backbone.layers)
        for norm in (module for name, module in self.named_modules() if name.endswith("norm")):
            norm.float()

    def forward(
        self, batch: PackedBatch, kernel: KernelRow, layout: Layout, last_layout: Callable[[], Layout]
    ) -> Tensor:
        """See `Decoder`."""
        hidden = self.embed_tokens(batch.input_ids[0])  # (num_tokens, hidden)
        cos, sin = (part[0].unsqueeze(1).float() for part in self.rotary_emb(hidden, batch.position_ids))
        for layer in self.layers[:-1]:
            forks.between_layers()
            hidden = layer(hidden, (cos, sin), kernel.attend, layout)
        hidden = self.layers[-1](hidden, (cos, sin), kernel.attend, last_layout(), batch.last_token_index)
        return rms_norm(hidden, self.norm)


def scaled(x: Tensor, scales: Tensor | None) -> Tensor:
    """x times its pending scales, in place; x itself if there are none."""
    return x if scales is None else x.mul_(scales)


def rms_norm(x: Tensor, norm: Any, scales: Tensor | None = None) -> Tensor:
    """RMSNorm of (..., width) in fp32; transformers rounds to x's dtype before it multiplies by the weight.

    `scales`: pending on x, (..., 1). RMSNorm cancels them, except for the effect of epsilon.
    """
    wide = x.float()
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    epsilon = norm.variance_epsilon if scales is None else norm.variance_epsilon / scales.square()
    scale = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return torch.mul(wide, scale, out=None if wide is x else wide).mul_(norm.weight)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (tokens, heads, head_dim), in place; cos and sin: (tokens, 1, head_dim), equal halves."""
    (first, second), (cos, _), (sin, _) = (part.chunk(2, dim=-1) for part in (x, cos, sin))
    first_sin = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(first_sin)
    return x


def _silu_(x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)
