"""What every attention kernel computes, and the two kernels that run on any device.

Tokens of a prefix attend causally to their prefix. Tokens of a document attend to the whole prefix of their group and
causally to their own document, never to another document. With `last_tokens_only` there is one query per document: its
last token, in packed order. In an encoder's batch, which is not causal, there are no prefixes, and tokens attend to all
of their document or to a window of it.

A kernel is two functions. `layout` runs once per batch, on the host, and computes what every layer needs. `attend` runs
in each layer. Shapes: query (1, num_heads, num_queries, head_dim); key and value (1, num_kv_heads, num_tokens,
head_dim), as in transformers; the result is (1, num_queries, num_heads, head_dim) in the dtype of value. On a CPU,
query and key may be fp32 where value is 16-bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from local_rerank.engine.packing import Group, PackedBatch, copy_to

QUERIES_PER_CALL = 512  # of SDPA, so that its mask grows with a document's length, not with the square of it

Layout = Any  # the result of a kernel's `layout`: each kernel has its own type
Attend = Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]
"""(query, key, value, layout, scale) to the result; shapes as above."""


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """`last_tokens_only`: only the last token of each document is a query. The others: see `PackedBatch`."""

    groups: tuple[Group, ...]
    last_tokens_only: bool
    is_causal: bool
    window: int | None


def layout_to(layout: Layout, device: torch.device) -> Layout:
    """The layout with its tensors on `device`; a copy from the host to a GPU does not block."""
    if isinstance(layout, Tensor):
        return copy_to([layout], device)[0]
    values = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    moved = dict(zip(tensors, copy_to(list(tensors.values()), device), strict=True))
    return dataclasses.replace(layout, **moved) if moved else layout


def segment_layout(batch: PackedBatch, last_tokens_only: bool) -> SegmentLayout:
    """Runs are split so that the prefix and keys of all their documents are no more tokens than the batch."""

    def within_batch(group: Group) -> Group:
        parts = (run.split(batch.num_tokens // (group.prefix_length + run.length)) for run in group.runs)
        return dataclasses.replace(group, runs=tuple(chain.from_iterable(parts)))

    return SegmentLayout(tuple(map(within_batch, batch.groups)), last_tokens_only, batch.is_causal, batch.window)


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
                mask[own, own] = visible_within(run.length, batch.is_causal, batch.window)
    return mask[batch.last_token_index] if last_tokens_only else mask


def visible_within(length: int, is_causal: bool, window: int | None) -> Tensor:
    """Which keys of a document its queries see, (length, length) bool."""
    visible = torch.ones(length, length, dtype=torch.bool)
    if is_causal:
        return visible.tril()
    return visible if window is None else visible.tril(window).triu(-window)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """One mask over all tokens, quadratic in the batch: the reference for the other kernels."""
    out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).to(v.dtype)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
    """torch's SDPA, one call for each run of equally long documents; prefix and document keys are concatenated.

    Memory stays proportional to the batch. Keys and values are copied for each query head, because on CUDA many
    versions of torch have no fused kernel for fewer of them in fp32, with a mask, or before Ampere, and the unfused one
    stores all logits: 4.3 GB for a document of 8,192 tokens and 16 heads in fp32.
    """
    out, v = torch.empty_like(q.transpose(1, 2), dtype=v.dtype), v.to(q.dtype)  # (1, num_queries, num_heads, head_dim)
    by_head = out.transpose(1, 2)
    if not layout.is_causal:
        for run in chain.from_iterable(group.runs for group in layout.groups):
            own = (run.start, run.count, run.length)
            at = (run.first_document, run.count, 1) if layout.last_tokens_only else own
            queries, k_own, v_own = _segments(q, *at), _segments(k, *own), _segments(v, *own)
            _sdpa_of_window(_segments(by_head, *at), queries, k_own, v_own, layout.window, scale)
        return out
    for group in layout.groups:
        prefix = (group.start, 1, group.prefix_length)
        if not layout.last_tokens_only:
            keys, values = ([_segments(x, *prefix)] for x in (k, v))
            _sdpa(_segments(by_head, *prefix), _segments(q, *prefix), keys, values, scale)
        for run in group.runs:
            own = (run.start, run.count, run.length)
            at = (run.first_document, run.count, 1) if layout.last_tokens_only else own
            keys, values = ([_segments(x, *prefix).expand(run.count, -1, -1, -1), _segments(x, *own)] for x in (k, v))
            _sdpa(_segments(by_head, *at), _segments(q, *at), keys, values, scale)
    return out


def _sdpa(target: Tensor, q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> None:
    """Attention of the last tokens of sequences to all before them, into `target`, shaped like q.

    q: (count, num_heads, num_queries, head_dim); keys and values: parts (count, num_kv_heads, length, head_dim) of the
    sequences.
    """
    k, v = (_for_query_heads(parts, q.shape[1]) for parts in (keys, values))
    num_queries, num_before = q.shape[2], k.shape[2] - q.shape[2]
    if num_queries <= 1 or num_before == 0:  # needs no mask
        target.copy_(F.scaled_dot_product_attention(q, k, v, is_causal=num_before == 0, scale=scale))
        return
    for first in range(0, num_queries, QUERIES_PER_CALL):
        rows = slice(first, min(first + QUERIES_PER_CALL, num_queries))
        seen = slice(num_before + rows.stop)
        mask = torch.ones(rows.stop - first, seen.stop, dtype=torch.bool, device=q.device).tril(num_before + first)
        part = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, seen], v[:, :, seen], attn_mask=mask, scale=scale)
        target[:, :, rows] = part


def _sdpa_of_window(target: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> None:
    """Attention of sequences to themselves, or to `window` tokens on each side, into `target`; all are shaped alike."""
    if window is None:
        target.copy_(F.scaled_dot_product_attention(q, k, v, scale=scale))
        return
    for first in range(0, q.shape[2], QUERIES_PER_CALL):
        rows = slice(first, min(first + QUERIES_PER_CALL, q.shape[2]))
        near = slice(max(0, first - window), min(rows.stop + window, q.shape[2]))
        before = first - near.start
        ones = torch.ones(rows.stop - first, near.stop - near.start, dtype=torch.bool, device=q.device)
        mask = ones.tril(before + window).triu(before - window)
        part = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, near], v[:, :, near], attn_mask=mask, scale=scale)
        target[:, :, rows] = part


def _segments(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """`count` adjacent segments of x (1, heads, tokens, head_dim), as a view (count, heads, length, head_dim)."""
    tokens = x[0, :, start : start + count * length]  # (heads, count * length, head_dim)
    return tokens.view(tokens.shape[0], count, length, -1).transpose(0, 1)


def _for_query_heads(parts: list[Tensor], num_heads: int) -> Tensor:
    """Parts (count, num_kv_heads, length, head_dim), joined by length and repeated to (count, num_heads, ...)."""
    repeated = [part.unsqueeze(2).expand(-1, -1, num_heads // part.shape[1], -1, -1) for part in parts]
    return torch.cat(repeated, dim=3).flatten(1, 2)
