"""The CPU's attention tiles compared with the dense kernel, on batches with every kind of tile."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from local_rerank.engine.cpu import attention as cpu_attention
from local_rerank.engine.cpu.attention import (
    KEYS_OF_LAST_TOKENS,
    QUERIES_PER_TILE,
    TOKENS_PER_TILE,
    Tile,
    cpu_tiles_layout,
)
from local_rerank.engine.cpu.process_setup import CACHE_VARIABLES
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.engine.packing import PackedBatch, pack
from local_rerank.requests.pair import Pair

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
LENGTHS = (
    *(1, 1, 2, 3, 5),  # several documents per tile
    *(TOKENS_PER_TILE - 1, TOKENS_PER_TILE, TOKENS_PER_TILE + 1),
    *(QUERIES_PER_TILE, QUERIES_PER_TILE + 1, 3 * QUERIES_PER_TILE - 1),  # several tiles per document
    KEYS_OF_LAST_TOKENS + 1,
)


def a_batch() -> PackedBatch:
    prefixes = [tuple(range(length)) for length in (1, 70, QUERIES_PER_TILE + 70)]
    return pack([Pair(prefix, tuple(range(length))) for prefix in prefixes for length in LENGTHS])


def attended(batch: PackedBatch, kernel: str, last_tokens_only: bool, *, pads: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    num_queries = batch.num_pairs if last_tokens_only else batch.num_tokens
    q = torch.randn(1, num_queries, HEADS, HEAD_DIM, generator=generator).transpose(1, 2)
    k, v = (torch.randn(1, batch.num_tokens, KV_HEADS, HEAD_DIM, generator=generator).transpose(1, 2) for _ in "kv")
    row = KERNELS[kernel]
    layout = partial(cpu_tiles_layout, pads=pads) if kernel == "cpu-tiles" else row.layout
    return row.attend(q, k, v, layout(batch, last_tokens_only), 0.7)


def tiles_of(batch: PackedBatch, last_tokens_only: bool = False) -> list[Tile]:
    layout = cpu_tiles_layout(batch, last_tokens_only)
    return [tile for group in layout.groups for part in group.parts for tile in part.tiles]


def padded_shape(tile: Tile) -> tuple[int, int]:
    """Queries and keys of a tile with padding."""
    step = cpu_attention.QUERY_STEP
    return -(-(tile.queries[1] - tile.queries[0]) // step) * step, cpu_attention.padded_keys(tile.num_keys)


@pytest.mark.parametrize("last_tokens_only", [False, True])
@pytest.mark.parametrize("logits", [pytest.param(cpu_attention.LOGITS_PER_HEAD, marks=pytest.mark.numeric), 1000, 1])
@pytest.mark.parametrize("pads", [False, True])
def test_every_kind_of_tile_agrees_with_the_dense_kernel(
    pads: bool, logits: int, last_tokens_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`logits`: the maximum per tile; a lower one splits documents into more tiles."""
    monkeypatch.setattr(cpu_attention, "LOGITS_PER_HEAD", logits)
    batch = a_batch()
    tiles = attended(batch, "cpu-tiles", last_tokens_only, pads=pads)
    dense = attended(batch, "dense", last_tokens_only)
    assert torch.allclose(tiles, dense, atol=2e-6)


@pytest.mark.parametrize("pads", [False, True])
def test_padded_tiles_have_recurring_shapes(pads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    products = list[tuple[int, ...]]()

    def recorded(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        products.append((*first.shape, second.shape[2]))
        return torch.matmul(first, second)

    monkeypatch.setattr(torch, "bmm", recorded)
    for last_tokens_only in (False, True):
        attended(a_batch(), "cpu-tiles", last_tokens_only, pads=pads)
    logits = products[::2]  # (kv_heads, heads per KV head * queries, head_dim, keys); the others are weighted sums
    pads_queries = {rows // (HEADS // KV_HEADS) % cpu_attention.QUERY_STEP == 0 for _, rows, _, _ in logits}
    pads_keys = {keys == cpu_attention.padded_keys(keys) for *_, keys in logits}
    assert pads_queries == pads_keys == ({True} if pads else {True, False})


@pytest.mark.parametrize("num_tokens", [2560, 5000, 8192])
def test_the_shapes_of_a_pass_fit_in_onednns_kernel_cache(num_tokens: int) -> None:
    """Otherwise oneDNN would generate their code again in each layer."""
    shapes = {padded_shape(tile) for tile in tiles_of(pack([Pair(tuple(range(60)), tuple(range(num_tokens)))]))}
    num_linear = 40  # entries for linear layers
    assert 2 * len(shapes) + num_linear < int(CACHE_VARIABLES["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])


@pytest.mark.parametrize("last_tokens_only", [False, True])
@pytest.mark.parametrize(
    ("prefix_length", "lengths"), [(100, [4000]), (60, [5400]), (4000, [60] * 40), (4000, [5] * 100), (10, [700, 3])]
)
def test_no_tile_exceeds_the_maximum_number_of_logits(
    prefix_length: int, lengths: list[int], last_tokens_only: bool
) -> None:
    batch = pack([Pair(tuple(range(prefix_length)), tuple(range(length))) for length in lengths])
    tiles = tiles_of(batch, last_tokens_only)
    assert max(math.prod(padded_shape(tile)) for tile in tiles) <= cpu_attention.LOGITS_PER_HEAD
    num_queries = batch.num_pairs if last_tokens_only else batch.num_tokens
    assert sorted(query for tile in tiles for query in range(*tile.queries)) == list(range(num_queries))
