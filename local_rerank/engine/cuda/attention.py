"""Attention kernels for CUDA in bf16 and fp16. Nothing here blocks on the device.

*Tiles* is our own Triton kernel. A tile holds queries of one group, possibly of several short documents. It reads their
prefix and then the keys of these documents, of which each query sees its own. No keys are copied, no results merged.

*Merged* and *varlen* call torch's `varlen_attn`, which runs Flash Attention. *Merged* attends to the document itself
and to the prefix in two calls and merges the results by log-sum-exp; it copies only the prefixes' keys. *Varlen* is one
call on gathered keys, prefix + document for each document; an encoder's pairs have no prefix, so nothing is gathered.
In the last layer there is one query per document, so there is nothing to share, and *merged* gathers keys too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from local_rerank.engine.packing import PackedBatch, ranges

QUERIES_PER_TILE = 32
QUERIES_OF_LAST_TOKENS = 16  # per tile in the last layer; smaller tiles, because more of them run in parallel
CAUSAL, ALL = (-1, 0), (-1, -1)  # windows of varlen_attn
TILE_FIELDS = 6  # columns of TileLayout.tiles


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """Segments of queries and the keys that each one reads. A prefix is a segment that reads its own keys."""

    # (num_keys,) int64: tokens whose keys the segments read, segment by segment; None: all tokens, in packed order
    key_index: Tensor | None
    cu_seqlens_q: Tensor  # (num_segments + 1,) int32
    cu_seqlens_k: Tensor  # (num_segments + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    window: tuple[int, int]  # keys that a query sees before and after its own; -1: all


@dataclass(frozen=True, slots=True)
class MergedLayout:
    """Two calls. Own part: each segment attends to itself. Prefix part: each group attends to its prefix."""

    cu_seqlens: Tensor  # (num_segments + 1,) int32: prefixes and documents, in packed order
    max_seqlen: int
    prefix_index: Tensor  # (num_prefix_tokens,) int64: tokens of all prefixes, group by group
    cu_seqlens_group: Tensor  # (num_groups + 1,) int32: all tokens of a group, including its prefix
    cu_seqlens_prefix: Tensor  # (num_groups + 1,) int32
    max_seqlen_group: int
    max_seqlen_prefix: int
    is_document: Tensor  # (num_tokens,) bool: false for prefix tokens, which ignore the prefix part


@dataclass(frozen=True, slots=True)
class TileLayout:
    """Tiles of queries that share a prefix. Padding is tiles without queries."""

    # (num_tiles, 6) int32: first query, number of queries, first token and length of the prefix (0, 0 if the queries
    # are a prefix), first own key and one past the last
    tiles: Tensor
    first_own: Tensor  # (num_queries,) int32: first token of the query's segment
    last_own: Tensor  # (num_queries,) int32: the query's token
    queries_per_tile: int


def tile_layout(batch: PackedBatch, last_tokens_only: bool, *, queries_per_tile: int | None = None) -> TileLayout:
    """Queries in packed order: all tokens, or each document's last."""
    per_tile = queries_per_tile or (QUERIES_OF_LAST_TOKENS if last_tokens_only else QUERIES_PER_TILE)
    parts: list[tuple[int, int, int, int]] = []  # first query, number of queries, first token and length of the prefix
    starts: list[int] = []  # of the segments that have queries
    lengths: list[int] = []
    for group in batch.groups:
        documents = group.start + group.prefix_length
        if last_tokens_only:
            parts.append((group.first_document, group.num_documents, group.start, group.prefix_length))
        else:
            parts.append((group.start, group.prefix_length, 0, 0))
            parts.append((documents, group.end - documents, group.start, group.prefix_length))
            starts.append(group.start)
            lengths.append(group.prefix_length)
        for run in group.runs:
            starts += run.starts
            lengths += [run.length] * run.count
    if last_tokens_only:
        first_own, last_own = np.asarray(starts), batch.last_token_index.numpy()
    else:
        first_own, last_own = np.repeat(starts, lengths), np.arange(batch.num_tokens)
    first, num_queries, prefix, prefix_length = np.asarray(parts).T
    counts = -(-num_queries // per_tile)
    offsets = ranges([0] * len(counts), counts).numpy() * per_tile
    first = np.repeat(first, counts) + offsets
    num_queries = np.minimum(np.repeat(num_queries, counts) - offsets, per_tile)
    prefix, prefix_length = np.repeat(prefix, counts), np.repeat(prefix_length, counts)
    end_own = last_own[first + num_queries - 1] + 1
    tiles = np.stack([first, num_queries, prefix, prefix_length, first_own[first], end_own], axis=1)
    on_host = [torch.from_numpy(numbers.astype(np.int32)) for numbers in (tiles, first_own, last_own)]
    return TileLayout(on_host[0], on_host[1], on_host[2], per_tile)


def varlen_layout(batch: PackedBatch, last_tokens_only: bool) -> VarlenLayout:
    """Queries in packed order: all tokens, or each document's last."""
    starts: list[int] = []  # of ranges of keys: a document reads one range of its prefix and one of its own
    lengths: list[int] = []
    lengths_q: list[int] = []
    lengths_k: list[int] = []
    for group in batch.groups:
        if not last_tokens_only:
            starts.append(group.start)
            lengths.append(group.prefix_length)
            lengths_q.append(group.prefix_length)
            lengths_k.append(group.prefix_length)
        for run in group.runs:
            for start in run.starts:
                starts += (group.start, start)
                lengths += (group.prefix_length, run.length)
            lengths_q += [1 if last_tokens_only else run.length] * run.count
            lengths_k += [group.prefix_length + run.length] * run.count
    window = -1 if batch.window is None else batch.window
    return VarlenLayout(
        key_index=ranges(starts, lengths) if any(group.prefix_length for group in batch.groups) else None,
        cu_seqlens_q=_cumulative(lengths_q),
        cu_seqlens_k=_cumulative(lengths_k),
        max_seqlen_q=max(lengths_q),
        max_seqlen_k=max(lengths_k),
        window=CAUSAL if batch.is_causal and not last_tokens_only else (window, window),
    )


def merged_layout(batch: PackedBatch, last_tokens_only: bool) -> MergedLayout | VarlenLayout:
    """For last tokens it is the varlen layout, because one query per document leaves nothing to share."""
    if last_tokens_only:
        return varlen_layout(batch, last_tokens_only)
    segments: list[int] = []
    for group in batch.groups:
        segments.append(group.prefix_length)
        for run in group.runs:
            segments += [run.length] * run.count
    groups = [group.end - group.start for group in batch.groups]
    prefixes = [group.prefix_length for group in batch.groups]
    prefix_index = ranges([group.start for group in batch.groups], prefixes)
    is_document = torch.ones(batch.num_tokens, dtype=torch.bool)
    is_document[prefix_index] = False
    return MergedLayout(
        cu_seqlens=_cumulative(segments),
        max_seqlen=max(segments),
        prefix_index=prefix_index,
        cu_seqlens_group=_cumulative(groups),
        cu_seqlens_prefix=_cumulative(prefixes),
        max_seqlen_group=max(groups),
        max_seqlen_prefix=max(prefixes),
        is_document=is_document,
    )


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, layout: TileLayout, scale: float) -> Tensor:
    """One Triton kernel for prefix and documents. Shapes as in `engine/attention.py`, here and in all `attend_*`."""
    from local_rerank.engine.cuda import triton_kernels  # needs triton, which CPU builds of torch lack

    q, k, v = _by_token(q, k, v)
    tiles = (layout.tiles, layout.first_own, layout.last_own, layout.queries_per_tile)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        return triton_kernels.attend_tiles(q, k, v, *tiles, scale).unsqueeze(0)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
    """One call on gathered keys. The causal mask is aligned to the last key, so a document sees its whole prefix."""
    q, k, v = _by_token(q, k, v)
    if layout.key_index is not None:
        k, v = k[layout.key_index], v[layout.key_index]  # (num_keys, num_kv_heads, head_dim)
    cu, longest = (layout.cu_seqlens_q, layout.cu_seqlens_k), (layout.max_seqlen_q, layout.max_seqlen_k)
    return torch_varlen(q, k, v, cu, longest, window=layout.window, scale=scale)[0].unsqueeze(0)


def attend_merged(q: Tensor, k: Tensor, v: Tensor, layout: MergedLayout | VarlenLayout, scale: float) -> Tensor:
    """Two calls, merged by log-sum-exp."""
    if isinstance(layout, VarlenLayout):
        return attend_varlen(q, k, v, layout, scale)
    q, k, v = _by_token(q, k, v)
    own_cu, own_longest = (layout.cu_seqlens, layout.cu_seqlens), (layout.max_seqlen, layout.max_seqlen)
    own, own_lse = torch_varlen(q, k, v, own_cu, own_longest, window=CAUSAL, scale=scale)
    prefix_k, prefix_v = k[layout.prefix_index], v[layout.prefix_index]  # (num_prefix_tokens, num_kv_heads, head_dim)
    cu = (layout.cu_seqlens_group, layout.cu_seqlens_prefix)
    longest = (layout.max_seqlen_group, layout.max_seqlen_prefix)
    shared, shared_lse = torch_varlen(q, prefix_k, prefix_v, cu, longest, window=ALL, scale=scale)
    # joint softmax = both parts, weighted by their share of the joint normalizer; a prefix has only the own part
    weight = (torch.sigmoid(shared_lse - own_lse) * layout.is_document).T.unsqueeze(-1)  # (num_queries, heads, 1)
    return own.lerp(shared, weight.to(own.dtype)).unsqueeze(0)


def torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    window: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """torch's `varlen_attn`: (num_queries, heads, head_dim) and the log-sum-exp, (heads, num_queries) fp32.

    q: (num_queries, heads, head_dim); k and v: (num_keys, KV heads, head_dim). `cu` and `longest`: cumulative lengths
    and longest segment of queries and keys. A segment's queries are its last tokens. torch documents the
    log-sum-exp as (num_queries, heads), but returns the transpose.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    out, lse = varlen_attn(
        q, k, v, *cu, *longest, return_aux=AuxRequest(lse=True), scale=scale, window_size=window, **gqa_option()
    )
    return out, lse if lse.shape == (q.shape[1], q.shape[0]) else lse.T


@cache
def gqa_option() -> dict[str, Any]:
    """torch 2.12 and later require `enable_gqa` if keys have fewer heads than queries; 2.11 has no such option."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _by_token(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1, heads, tokens, head_dim) to (tokens, heads, head_dim).

    A view if the last dimension is contiguous, which is all that the operators need.
    """
    by_token = [x[0].transpose(0, 1) for x in (q, k, v)]
    queries, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in by_token)
    return queries, keys, values


def _cumulative(lengths: list[int]) -> Tensor:
    """(len(lengths) + 1,) int32, starting with 0."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
