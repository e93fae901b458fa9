"""The row of the attention table for CPUs: tiles of queries as matrix products and a softmax.

A tile is some queries of one group, whatever documents they belong to: several short documents, one of middle length,
or a piece of a long one. The keys of the prefix and those of the documents behind it are gathered in one piece, of
which a tile reads the first: logits, softmax and weighted sum are one operator each, over data that the cache holds.

torch's flash operator for CPUs multiplies bf16 no faster than fp32; whole matrices run at the speed of the other
products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from local_rerank.packing import Group, PackedBatch

TOKENS_PER_TILE = 64  # of several documents: each query multiplies the keys of all, to see its own alone
QUERIES_PER_TILE = 128  # of a long document: the more, the more keys behind a query are multiplied for nothing
KEYS_OF_LAST_TOKENS = 512  # of several documents, each of which has one query then
LOGITS_PER_HEAD = 3 * 2**16  # at most in a tile, unless a single query has more


@dataclass(frozen=True, slots=True)
class Tile:
    """Some queries and what they see."""

    queries: tuple[int, int]  # first and one past the last
    num_keys: int  # of the prefix and of the documents, up to the last that a query sees
    mask: Tensor | None  # (queries, m) fp32, added to the logits of the last m keys: 0 or minus infinity


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring documents whose keys are gathered together; none where a prefix looks at itself."""

    own: tuple[int, int]  # first token and one past the last
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class GroupTiles:
    """A prefix and what stands behind it."""

    prefix: tuple[int, int]  # first token and one past the last
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class TilesLayout:
    """The tiles of a batch; every query is in one."""

    groups: tuple[GroupTiles, ...]


def cpu_tiles_layout(batch: PackedBatch, last_tokens_only: bool) -> TilesLayout:
    """Queries in packed order: all tokens, or each document's last."""
    parts_of = _parts_of_last_tokens if last_tokens_only else _parts
    return TilesLayout(
        tuple(
            GroupTiles((group.start, group.start + group.prefix_length), tuple(parts_of(group)))
            for group in batch.groups
        )
    )


def _parts(group: Group) -> Iterator[Part]:
    start, prefix_length = group.start, group.prefix_length
    yield Part((start, start), tuple(_tiles_of_segment(start, prefix_length, 0)))
    most_tokens = min(TOKENS_PER_TILE, LOGITS_PER_HEAD // (prefix_length + TOKENS_PER_TILE))
    for start, lengths in _joined(group, lambda lengths: sum(lengths) <= most_tokens):
        length = sum(lengths)
        own = (start, start + length)
        if len(lengths) == 1:
            yield Part(own, tuple(_tiles_of_segment(start, length, prefix_length)))
        else:
            document = np.repeat(np.arange(len(lengths)), lengths)
            mask = _mask((document[:, None] == document) & _not_after(length))
            yield Part(own, (Tile(own, prefix_length + length, mask),))


def _tiles_of_segment(start: int, length: int, prefix_length: int) -> Iterator[Tile]:
    """A prefix, or one document behind its own; the more keys, the fewer queries."""
    most = max(1, min(QUERIES_PER_TILE, LOGITS_PER_HEAD // (prefix_length + length)))
    count = -(-length // most)
    bounds = [length * index // count for index in range(count + 1)]
    for first, end in itertools.pairwise(bounds):
        yield Tile((start + first, start + end), prefix_length + end, _triangle(end - first))


def _parts_of_last_tokens(group: Group) -> Iterator[Part]:
    def fits(lengths: list[int]) -> bool:
        num_keys = sum(lengths)
        return num_keys <= KEYS_OF_LAST_TOKENS and len(lengths) * (group.prefix_length + num_keys) <= LOGITS_PER_HEAD

    first = group.first_document
    for start, lengths in _joined(group, fits):
        document = np.repeat(np.arange(len(lengths)), lengths)
        mask = _mask(document == np.arange(len(lengths))[:, None]) if len(lengths) > 1 else None
        tile = Tile((first, first + len(lengths)), group.prefix_length + len(document), mask)
        yield Part((start, start + len(document)), (tile,))
        first += len(lengths)


def _joined(group: Group, fits: Callable[[list[int]], bool]) -> Iterator[tuple[int, list[int]]]:
    """Neighbouring documents, as many as fit, or one: first token, and the length of each."""
    start, lengths = group.start + group.prefix_length, list[int]()
    for length in (run.length for run in group.runs for _ in range(run.count)):
        if lengths and not fits([*lengths, length]):
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
    for group in layout.groups:
        for part in group.parts:
            keys, values = (torch.cat([x[:, slice(*group.prefix)], x[:, slice(*part.own)]], dim=1) for x in (k, v))
            keys = keys.float()
            for tile in part.tiles:
                asking = q[:, :, slice(*tile.queries)]
                # in one piece: oneDNN is slower at making them so
                seen = keys[:, : tile.num_keys].contiguous()
                attended = _attend_tile(asking, seen, values[:, : tile.num_keys], tile.mask, scale)
                out[slice(*tile.queries)] = attended.permute(2, 0, 1, 3)
    return out.flatten(1, 2).unsqueeze(0)


def _attend_tile(asking: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(kv_heads, heads of each, queries, head_dim) over (kv_heads, keys, head_dim) to the same."""
    rows = torch.empty(asking.shape, dtype=torch.float32)
    torch.mul(asking, scale, out=rows)  # in one piece
    logits = torch.bmm(rows.flatten(1, 2), keys.transpose(1, 2))
    if mask is not None:
        logits.view(*asking.shape[:3], -1)[..., -mask.shape[1] :].add_(mask)
    weights = torch.softmax(logits, dim=-1).to(values.dtype)
    return torch.bmm(weights, values).view(asking.shape)
