"""What every attention kernel computes, and the two kernels that run on any device.

Tokens of a prefix attend causally to their prefix. Tokens of a document attend to the whole prefix of their group and
causally to their own document, never to another document. With `last_tokens_only` there is one query per document: its
last token, in packed order.

A kernel is two functions. `layout` runs once per batch, on the host, and computes what every layer needs. `attend` runs
in each layer. Shapes: query (1, num_heads, num_queries, head_dim); key and value (1, num_kv_heads, num_tokens,
head_dim), as in transformers; the result is (1, num_queries, num_heads, head_dim) in the dtype of value. On a CPU,
query and key may be fp32 where value is 16-bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from local_rerank.engine.packing import Group, PackedBatch, copy_to

Layout = Any  # the result of a kernel's `layout`: each kernel has its own type
Attend = Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]
"""(query, key, value, layout, scale) to the result; shapes as above."""


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """`last_tokens_only`: only the last token of each document is a query."""

    groups: tuple[Group, ...]
    last_tokens_only: bool


def layout_to(layout: Layout, device: torch.device) -> Layout:
    """The layout with its tensors on `device`; a copy from the host to a GPU does not block."""
    if isinstance(layout, Tensor):
        return copy_to([layout], device)[0]
    values = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    moved = dict(zip(tensors, copy_to(list(tensors.values()), device), strict=True))
    return dataclasses.replace(layout, **moved) if moved else layout


def segment_layout(batch: PackedBatch, last_tokens_only: bool) -> SegmentLayout:
    return SegmentLayout(batch.groups, last_tokens_only)


def dense_layout(batch: PackedBatch, last_tokens_only: bool) -> Tensor:
    """The mask that defines attention, (num_queries, num_tokens) bool: true where a query sees a key."""
    mask = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    for group in batch.groups:
        prefix = slice(group.start, group.start + group.prefix_length)
        mask[prefix, prefix] = torch.ones_like(mask[prefix, prefix]).tril()
        for run in group.runs:
            for start in run.starts:
                own = slice(start, start + run.length)
                mask[own, prefix] = True
                mask[own, own] = torch.ones_like(mask[own, own]).tril()
    return mask[batch.last_token_index] if last_tokens_only else mask


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """One mask over all tokens, quadratic in the batch: the reference for the other kernels."""
    out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).to(v.dtype)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
    """torch's SDPA, one call for each run of equally long documents; prefix and document keys are concatenated."""
    out, v = torch.empty_like(q.transpose(1, 2), dtype=v.dtype), v.to(q.dtype)  # (1, num_queries, num_heads, head_dim)
    for group in layout.groups:
        prefix_k, prefix_v = (_segments(x, group.start, 1, group.prefix_length) for x in (k, v))
        if not layout.last_tokens_only:
            prefix_q = _segments(q, group.start, 1, group.prefix_length)
            prefix_out = F.scaled_dot_product_attention(
                prefix_q, prefix_k, prefix_v, is_causal=True, scale=scale, enable_gqa=True
            )
            _store(out, group.start, prefix_out)
        for run in group.runs:
            start, length = (run.first_document, 1) if layout.last_tokens_only else (run.start, run.length)
            mask = None if layout.last_tokens_only else _prefix_causal_mask(group.prefix_length, length, q.device)
            keys, values = (
                torch.cat([prefix.expand(run.count, -1, -1, -1), _segments(x, run.start, run.count, run.length)], dim=2)
                for prefix, x in ((prefix_k, k), (prefix_v, v))
            )
            queries = _segments(q, start, run.count, length)
            run_out = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            )
            _store(out, start, run_out)
    return out


def _segments(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """`count` adjacent segments of x (1, heads, tokens, head_dim), as a view (count, heads, length, head_dim)."""
    tokens = x[0, :, start : start + count * length]  # (heads, count * length, head_dim)
    return tokens.view(tokens.shape[0], count, length, -1).transpose(0, 1)


def _store(out: Tensor, start: int, segments: Tensor) -> None:
    """Write (count, heads, length, head_dim) into out (1, num_queries, heads, head_dim), starting at query `start`."""
    count, heads, length, head_dim = segments.shape
    target = out[0, start : start + count * length].view(count, length, heads, head_dim)
    target.copy_(segments.transpose(1, 2))


def _prefix_causal_mask(prefix_length: int, length: int, device: torch.device) -> Tensor:
    """(length, prefix_length + length) bool: the whole prefix, causal over the document."""
    return torch.ones(length, prefix_length + length, dtype=torch.bool, device=device).tril(prefix_length)
