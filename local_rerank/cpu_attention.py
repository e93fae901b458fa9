"""The row of the attention table for CPUs: tiles of queries as matrix products and a softmax.

A tile is some queries of one group, whatever documents they belong to: several short documents, one of middle length,
or a piece of a long one. Its keys, those of the prefix and then those of its documents up to its last query, are
gathered in one piece, so that logits, softmax and weighted sum are one operator each, over data that the cache holds.

torch's flash operator for CPUs multiplies bf16 no faster than fp32; whole matrices run at the speed of the other
products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from local_rerank.packing import Group, PackedBatch

TOKENS_PER_TILE = 64  # of several documents: each query multiplies the keys of all, to see its own alone
QUERIES_PER_TILE = 128  # of a long document: the more, the more keys behind a query are multiplied for nothing
KEYS_OF_LAST_TOKENS = 512  # of several documents, each of which has one query then
LOGITS_PER_QUERY_HEAD = 2**17  # at most in a tile, unless one query has more


@dataclass(frozen=True, slots=True)
class Tile:
    """Ranges of queries and keys, first and one past the last."""

    queries: tuple[int, int]
    prefix: tuple[int, int]  # the same twice, where a prefix looks at itself
    own: tuple[int, int]  # keys
    mask: Tensor | None  # (queries, m) fp32, added to the logits of the last m keys: 0 or minus infinity


@dataclass(frozen=True, slots=True)
class TilesLayout:
    """The tiles of a batch; every query is in one."""

    tiles: tuple[Tile, ...]


def cpu_tiles_layout(batch: PackedBatch, last_tokens_only: bool) -> TilesLayout:
    """Queries in packed order: all tokens, or each document's last."""
    tiles: list[Tile] = []
    for group in batch.groups:
        if last_tokens_only:
            tiles += _tiles_of_last_tokens(group)
        else:
            tiles += _tiles_of_segment(group.start, group.prefix_length, (group.start, group.start))
            tiles += _tiles_of_documents(group)
    return TilesLayout(tuple(tiles))


def _tiles_of_documents(group: Group) -> Iterator[Tile]:
    prefix = (group.start, group.start + group.prefix_length)
    for start, lengths in _joined(group, TOKENS_PER_TILE):
        if len(lengths) == 1:
            yield from _tiles_of_segment(start, lengths[0], prefix)
        else:
            own = (start, start + sum(lengths))
            document = np.repeat(np.arange(len(lengths)), lengths)
            yield Tile(own, prefix, own, _mask((document[:, None] == document) & _not_after(own[1] - own[0])))


def _tiles_of_segment(start: int, length: int, prefix: tuple[int, int]) -> Iterator[Tile]:
    """A prefix, or one document behind its own."""
    most_keys = prefix[1] - prefix[0] + length
    most = max(1, min(QUERIES_PER_TILE, LOGITS_PER_QUERY_HEAD // most_keys))
    count = -(-length // most)
    bounds = [start + length * index // count for index in range(count + 1)]
    for first, end in itertools.pairwise(bounds):
        yield Tile((first, end), prefix, (start, end), _triangle(end - first))


def _tiles_of_last_tokens(group: Group) -> Iterator[Tile]:
    prefix = (group.start, group.start + group.prefix_length)
    first = group.first_document
    for start, lengths in _joined(group, KEYS_OF_LAST_TOKENS):
        document = np.repeat(np.arange(len(lengths)), lengths)
        mask = _mask(document == np.arange(len(lengths))[:, None]) if len(lengths) > 1 else None
        yield Tile((first, first + len(lengths)), prefix, (start, start + sum(lengths)), mask)
        first += len(lengths)


def _joined(group: Group, most_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Neighbouring documents, as many as have so many tokens: first token, and the length of each."""
    start, lengths = group.start + group.prefix_length, list[int]()
    for length in (run.length for run in group.runs for _ in range(run.count)):
        if lengths and sum(lengths) + length > most_tokens:
            yield start, lengths
            start, lengths = start + sum(lengths), []
        lengths.append(length)
    yield start, lengths


def _not_after(length: int) -> np.ndarray:
    return np.tri(length, dtype=bool)


@cache
def _triangle(length: int) -> Tensor | None:
    return _mask(_not_after(length)) if length > 1 else None


def _mask(visible: np.ndarray) -> Tensor:
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32(-math.inf)))


def attend_cpu_tiles(q: Tensor, k: Tensor, v: Tensor, layout: TilesLayout, scale: float) -> Tensor:
    """Logits and softmax in fp32 from any q and k; the weighted sum in the dtype of v, which is that of the result."""
    num_heads, num_queries, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    out = q.new_empty(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim, dtype=v.dtype)
    q = q[0].view(num_kv_heads, -1, num_queries, head_dim)  # heads that share keys side by side
    k, v = k[0], v[0]
    for tile in layout.tiles:
        first, end = tile.queries
        asking = q[:, :, first:end]
        rows = torch.empty(asking.shape)
        torch.mul(asking, scale, out=rows)  # in one piece
        logits = torch.bmm(rows.flatten(1, 2), _keys(k, tile).float().transpose(1, 2))
        if tile.mask is not None:
            logits.view(*asking.shape[:3], -1)[..., -tile.mask.shape[1] :].add_(tile.mask)
        weights = torch.softmax(logits, dim=-1).to(v.dtype)
        attended = torch.bmm(weights, _keys(v, tile))  # (kv_heads, heads of each x queries, head_dim)
        out[first:end] = attended.view(asking.shape).permute(2, 0, 1, 3)
    return out.flatten(1, 2).unsqueeze(0)


def _keys(x: Tensor, tile: Tile) -> Tensor:
    """Those of prefix and documents side by side: (kv_heads, keys, head_dim)."""
    return torch.cat([x[:, slice(*tile.prefix)], x[:, slice(*tile.own)]], dim=1)
