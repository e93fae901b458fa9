"""The attention kernel for CPUs: tiles of queries as matrix products and a softmax.

A tile holds queries of one group: several short documents, one medium document, or a piece of a long one. The keys of
the prefix and of the documents after it are gathered in one tensor, and each tile reads that tensor up to its last key.
Logits, softmax and weighted sum are one operator each, on data that fits in the CPU's cache.

torch's flash attention for CPUs multiplies bf16 no faster than fp32, whereas matrix products run at full speed. oneDNN
generates code for each new shape, which costs about 0.3 ms and 500 KiB, and texts rarely have equal lengths. So tiles
that oneDNN multiplies are padded to recurring shapes with zero queries and masked keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from local_rerank.engine.packing import Group, PackedBatch

TOKENS_PER_TILE = 64  # of several documents; each query multiplies the keys of all of them and masks the others'
QUERIES_PER_TILE = 128  # of one long document; a larger tile multiplies more keys that the causal mask hides
KEYS_OF_LAST_TOKENS = 512  # of several documents in the last layer, where each has one query
LOGITS_PER_HEAD = 2**18  # maximum in a tile, unless QUERY_STEP queries alone have more
QUERY_STEP = 16  # queries are padded to a multiple of this for oneDNN; 8 is up to 9 % slower, 32 no faster


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries and the keys that they see."""

    queries: tuple[int, int]  # first and one past the last
    num_keys: int  # of prefix and documents, up to the last that a query sees
    num_common_keys: int  # leading keys that every query sees
    mask: Tensor  # (queries, other keys + padding up to `padded_keys`) fp32, 0 or -inf


@dataclass(frozen=True, slots=True)
class Part:
    """Adjacent documents whose keys are gathered together; no documents if the prefix attends to itself."""

    own: tuple[int, int]  # first token and one past the last
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class GroupTiles:
    """A prefix and the documents after it."""

    prefix: tuple[int, int]  # first token and one past the last
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class TilesLayout:
    """The tiles of a batch; each query is in exactly one tile."""

    groups: tuple[GroupTiles, ...]
    pads: bool  # whether queries and keys are padded to recurring shapes


def cpu_tiles_layout(batch: PackedBatch, last_tokens_only: bool, *, pads: bool = True) -> TilesLayout:
    """Queries in packed order: all tokens, or each document's last. oneDNN needs padding (`pads`), MKL does not."""
    parts_of = _parts_of_last_tokens if last_tokens_only else _parts
    return TilesLayout(
        tuple(
            GroupTiles((group.start, group.start + group.prefix_length), tuple(parts_of(group)))
            for group in batch.groups
        ),
        pads,
    )


def _parts(group: Group) -> Iterator[Part]:
    start, prefix_length = group.start, group.prefix_length
    yield Part((start, start), tuple(_tiles_of_segment(start, prefix_length, 0)))
    most_tokens = _most_queries(TOKENS_PER_TILE, prefix_length + TOKENS_PER_TILE)
    for start, lengths in _document_runs(group, lambda lengths: sum(lengths) <= most_tokens):
        length = sum(lengths)
        own = (start, start + length)
        if len(lengths) == 1:
            yield Part(own, tuple(_tiles_of_segment(start, length, prefix_length)))
        else:
            document = np.repeat(np.arange(len(lengths)), lengths)
            visible = (document[:, None] == document) & np.tri(length, dtype=bool)
            yield Part(own, (_tile_of_documents(own, prefix_length, visible),))


def _tiles_of_segment(start: int, length: int, prefix_length: int) -> Iterator[Tile]:
    """Tiles of a prefix, or of one document after its prefix; the more keys, the fewer queries per tile."""
    most = _most_queries(QUERIES_PER_TILE, prefix_length + length)
    size = _rounded_up(-(-length // -(-length // most)), QUERY_STEP)  # equal sizes, as few tiles as `most` allows
    for first in range(0, length, size):
        end = min(first + size, length)
        yield _tile_of_segment((start + first, start + end), prefix_length + end)


def _most_queries(most: int, num_keys: int) -> int:
    """At most `most` queries whose logits fit in a tile, a multiple of QUERY_STEP."""
    most = min(most, LOGITS_PER_HEAD // padded_keys(num_keys))
    return max(QUERY_STEP, most - most % QUERY_STEP)


def _tile_of_segment(queries: tuple[int, int], num_keys: int) -> Tile:
    """Adjacent queries under a causal mask: the last one sees all keys."""
    num_queries = queries[1] - queries[0]
    mask = _triangle(_key_step(num_keys))[:num_queries, 1:]
    return Tile(queries, num_keys, num_keys - num_queries + 1, mask)


def _tile_of_documents(queries: tuple[int, int], prefix_length: int, visible: np.ndarray) -> Tile:
    """Queries of several documents; `visible`: (queries, keys of the documents) bool."""
    num_keys = prefix_length + visible.shape[1]
    return Tile(queries, num_keys, prefix_length, _mask(visible, padded_keys(num_keys) - num_keys))


def _parts_of_last_tokens(group: Group) -> Iterator[Part]:
    def fits(lengths: list[int]) -> bool:
        num_own = sum(lengths)
        most = _most_queries(LOGITS_PER_HEAD, group.prefix_length + num_own)
        return num_own <= KEYS_OF_LAST_TOKENS and len(lengths) <= most

    first, prefix_length = group.first_document, group.prefix_length
    for start, lengths in _document_runs(group, fits):
        queries, num_own = (first, first + len(lengths)), sum(lengths)
        if len(lengths) == 1:
            tile = _tile_of_segment(queries, prefix_length + num_own)
        else:
            document = np.repeat(np.arange(len(lengths)), lengths)
            tile = _tile_of_documents(queries, prefix_length, document == np.arange(len(lengths))[:, None])
        yield Part((start, start + num_own), (tile,))
        first = queries[1]


def _document_runs(group: Group, fits: Callable[[list[int]], bool]) -> Iterator[tuple[int, list[int]]]:
    """Split a group's documents into runs that fit, of at least one document: first token, and lengths."""
    start, lengths = group.start + group.prefix_length, list[int]()
    for length in (run.length for run in group.runs for _ in range(run.count)):
        if lengths and not fits([*lengths, length]):
            yield start, lengths
            start, lengths = start + sum(lengths), []
        lengths.append(length)
    yield start, lengths


@cache
def _triangle(num_hidden: int) -> Tensor:
    """(QUERIES_PER_TILE, QUERIES_PER_TILE + num_hidden): causal; the last `num_hidden` columns are masked."""
    return _mask(np.tri(QUERIES_PER_TILE, dtype=bool), num_hidden)


def _mask(visible: np.ndarray, num_hidden: int) -> Tensor:
    """(queries, keys) bool to fp32, 0 or -inf, with `num_hidden` masked columns appended."""
    hidden = np.pad(~visible, ((0, 0), (0, num_hidden)), constant_values=True)
    return torch.from_numpy(np.where(hidden, np.float32(-math.inf), np.float32(0)))


def padded_keys(num_keys: int) -> int:
    """`num_keys` rounded up to a recurring size: about 16 sizes per octave, at least 16 apart.

    Without it, nearly all of the 256 tiles of a prompt of 8,192 tokens have different numbers of keys.
    """
    return _rounded_up(num_keys, _key_step(num_keys))


def _key_step(num_keys: int) -> int:
    return 1 << max(4, num_keys.bit_length() - 5)


def attend_cpu_tiles(q: Tensor, k: Tensor, v: Tensor, layout: TilesLayout, scale: float) -> Tensor:
    """Logits and softmax in fp32, weighted sum and result in the dtype of v. Shapes as in `engine/attention.py`."""
    num_heads, num_queries, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    out = q.new_empty(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim, dtype=v.dtype)
    q = q[0].view(num_kv_heads, -1, num_queries, head_dim)  # (kv_heads, heads per KV head, queries, head_dim)
    k, v = k[0], v[0]
    for group in layout.groups:
        for part in group.parts:
            num_keys = sum(end - start for start, end in (group.prefix, part.own))
            zeros = k.new_zeros(num_kv_heads, padded_keys(num_keys) - num_keys if layout.pads else 0, head_dim)
            keys, values = (
                torch.cat([x[:, slice(*group.prefix)], x[:, slice(*part.own)], zeros.to(x.dtype)], dim=1)
                for x in (k, v)
            )
            keys = keys.float()
            for tile in part.tiles:
                seen = slice(padded_keys(tile.num_keys) if layout.pads else tile.num_keys)
                # contiguous, because oneDNN copies strided keys more slowly
                attended = _attend_tile(
                    q, keys[:, seen].contiguous(), values[:, seen], tile, scale, QUERY_STEP if layout.pads else 1
                )
                out[slice(*tile.queries)] = attended.permute(2, 0, 1, 3)
    return out.flatten(1, 2).unsqueeze(0)


def _attend_tile(q: Tensor, keys: Tensor, values: Tensor, tile: Tile, scale: float, step: int) -> Tensor:
    """q: (kv_heads, heads per KV head, all queries, head_dim); keys and values: (kv_heads, keys, head_dim).

    Returns the shape of q for the tile's queries, which are padded to a multiple of `step` meanwhile.
    """
    queries = q[:, :, slice(*tile.queries)]
    num_queries = queries.shape[2]
    size = (*queries.shape[:2], _rounded_up(num_queries, step), queries.shape[3])
    rows = torch.empty(size, dtype=torch.float32)  # contiguous
    torch.mul(queries, scale, out=rows[:, :, :num_queries])
    rows[:, :, num_queries:] = 0
    logits = torch.bmm(rows.flatten(1, 2), keys.transpose(1, 2))
    if num_masked := keys.shape[1] - tile.num_common_keys:
        logits.view(*size[:3], -1)[:, :, :num_queries, -num_masked:].add_(tile.mask[:, :num_masked])
    weights = torch.softmax(logits, dim=-1).to(values.dtype)
    return torch.bmm(weights, values).view(size)[:, :, :num_queries]


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
