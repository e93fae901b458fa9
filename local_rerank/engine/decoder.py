"""The decoder protocol, and the decoder that runs transformers' own layers.

A decoder turns a packed batch into one hidden state per pair. All decoders prune the last layer: only each document's
last token needs a query, an output projection and an MLP there. The fast decoders are in `cpu/layers.py` and
`cuda/layers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from local_rerank import forks
from local_rerank.engine.attention import Layout, layout_to
from local_rerank.engine.kernel_table import KernelRow
from local_rerank.engine.packing import PackedBatch

ATTENTION_NAME = "local_rerank"  # our key in transformers' table of attention functions


class Decoder(Protocol):
    """Everything between token ids and the last hidden state; an nn.Module."""

    layers: Any  # nn.ModuleList

    def __call__(
        self, batch: PackedBatch, kernel: KernelRow, layout: Layout, last_layout: Callable[[], Layout]
    ) -> Tensor:
        """The normed hidden state of each pair's last token: (num_pairs, hidden_size), in packed order.

        `batch` is on the device where token ids enter the model; layouts may be on the host. `layout` is for all
        tokens. `last_layout` makes the one for each document's last token; it is called after the other layers are
        launched.
        """

    def modules(self) -> Any: ...

    def state_dict(self) -> dict[str, Tensor]: ...


class TransformersDecoder(nn.Module):
    """transformers' forward pass with our attention: for any device, and for a model spread over several."""

    def __init__(self, backbone: Any) -> None:
        """`backbone`: a Qwen3Model loaded with `ATTENTION_NAME`. We run its last layer and its final norm ourselves."""
        super().__init__()
        self.backbone = backbone
        self.layers = backbone.layers
        self.norm = backbone.norm
        backbone.norm = nn.Identity()
        backbone.config.num_hidden_layers = len(backbone.layers) - 1

    def forward(
        self, batch: PackedBatch, kernel: KernelRow, layout: Layout, last_layout: Callable[[], Layout]
    ) -> Tensor:
        """See `Decoder`."""
        hidden: Tensor = self.backbone(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask={"full_attention": None},  # a dict keeps transformers from building masks
            use_cache=False,
            packed_attention=PackedAttention(kernel, layout),
        ).last_hidden_state
        return self._last_layer(hidden, batch, kernel, last_layout())

    def _last_layer(self, hidden: Tensor, batch: PackedBatch, kernel: KernelRow, layout: Layout) -> Tensor:
        """The last layer for each last token, and the norm: (1, num_tokens, hidden) to (num_pairs, hidden)."""
        layer: Any = self.layers[-1]
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)  # accelerate moves it to this layer's device
        hidden = hidden.to(x.device)
        last = batch.last_token_index.to(x.device)
        rotation = self.backbone.rotary_emb(hidden, batch.position_ids.to(x.device))
        cos, sin = (part.to(x.device) for part in rotation)  # (1, num_tokens, head_dim)
        heads = (1, -1, attention.head_dim)
        q = attention.q_norm(attention.q_proj(x[:, last]).unflatten(-1, heads[1:])).transpose(1, 2)
        k = attention.k_norm(attention.k_proj(x).unflatten(-1, heads[1:])).transpose(1, 2)
        v = attention.v_proj(x).unflatten(-1, heads[1:]).transpose(1, 2)
        q = _rotate(q, cos[:, last], sin[:, last])
        k = _rotate(k, cos, sin)
        out = kernel.attend(q, k, v, layout_to(layout, q.device), attention.scaling)
        hidden = hidden[:, last] + attention.o_proj(out.flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        normed: Tensor = self.norm(hidden)[0]
        return normed


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """The argument that transformers' forward pass hands to `_attend`."""

    row: KernelRow
    layout: Layout
    moved: dict[torch.device, Layout] = field(default_factory=dict)

    def layout_on(self, device: torch.device) -> Layout:
        """The layout on a layer's device; copied once per device."""
        if device not in self.moved:
            self.moved[device] = layout_to(self.layout, device)
        return self.moved[device]


def register_attention() -> None:
    """Add our attention to transformers' table."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed_attention: PackedAttention,
    **_: Any,
) -> tuple[Tensor, None]:
    """Called by transformers' attention modules; shapes as in `attention.py`."""
    forks.between_layers()
    layout = packed_attention.layout_on(key.device)
    return packed_attention.row.attend(query, key, value, layout, scaling), None


def linear_layers(layers: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each nn.Linear in `layers`, as its parent module and its name there.

    The list holds no reference to a layer, so that its weight is freed as soon as it is replaced.
    """
    return [
        (parent, name)
        for parent in layers.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (1, heads, tokens, head_dim) by (1, tokens, head_dim), as transformers' Qwen3 computes it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
