"""The CPU's tiles against the dense definition, on batches with every kind of tile."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from local_rerank.engine.cpu import attention as cpu_attention
from local_rerank.engine.cpu.attention import (
    KEYS_OF_LAST_TOKENS,
    QUERIES_PER_TILE,
    TOKENS_PER_TILE,
    cpu_tiles_layout,
)
from local_rerank.engine.cpu.process_setup import CACHE_VARIABLES
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.engine.packing import PackedBatch, pack
from local_rerank.requests.tokenization import Pair

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
LENGTHS = (
    *(1, 1, 2, 3, 5),  # several in a tile
    *(TOKENS_PER_TILE - 1, TOKENS_PER_TILE, TOKENS_PER_TILE + 1),
    *(QUERIES_PER_TILE, QUERIES_PER_TILE + 1, 3 * QUERIES_PER_TILE - 1),  # in pieces
    KEYS_OF_LAST_TOKENS + 1,
)


def a_batch() -> PackedBatch:
    prefixes = [tuple(range(length)) for length in (1, 70, QUERIES_PER_TILE + 70)]
    return pack([Pair(prefix, tuple(range(length))) for prefix in prefixes for length in LENGTHS])


def attended(
    batch: PackedBatch, kernel: str, last_tokens_only: bool, *, dtype: torch.dtype, pads: bool = True
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    num_queries = batch.num_pairs if last_tokens_only else batch.num_tokens
    q = torch.randn(1, num_queries, HEADS, HEAD_DIM, generator=generator).transpose(1, 2)
    k, v = (torch.randn(1, batch.num_tokens, KV_HEADS, HEAD_DIM, generator=generator).transpose(1, 2) for _ in "kv")
    row = KERNELS[kernel]
    layout = partial(cpu_tiles_layout, pads=pads) if kernel == "cpu-tiles" else row.layout
    return row.attend(q, k, v.to(dtype), layout(batch, last_tokens_only), 0.7)


@pytest.mark.parametrize("last_tokens_only", [False, True])
@pytest.mark.parametrize("logits", [pytest.param(cpu_attention.LOGITS_PER_HEAD, marks=pytest.mark.numeric), 1000, 1])
@pytest.mark.parametrize("pads", [False, True])
def test_tiles_of_every_kind_attend_as_the_dense_definition(
    pads: bool, logits: int, last_tokens_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`logits`: the fewer a tile may have, the smaller the pieces of a long document."""
    monkeypatch.setattr(cpu_attention, "LOGITS_PER_HEAD", logits)
    batch, dtype = a_batch(), torch.float32
    tiles = attended(batch, "cpu-tiles", last_tokens_only, dtype=dtype, pads=pads)
    dense = attended(batch, "dense", last_tokens_only, dtype=dtype)
    assert torch.allclose(tiles, dense, atol=2e-6)


@pytest.mark.parametrize("pads", [False, True])
def test_padded_tiles_have_recurring_shapes(pads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    products = list[tuple[int, ...]]()

    def recorded(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        products.append((*first.shape, second.shape[2]))
        return torch.matmul(first, second)

    monkeypatch.setattr(torch, "bmm", recorded)
    for last_tokens_only in (False, True):
        attended(a_batch(), "cpu-tiles", last_tokens_only, dtype=torch.float32, pads=pads)
    logits = products[::2]  # (kv_heads, heads of each x queries, head_dim, keys); every other one sums up values
    pads_queries = {rows // (HEADS // KV_HEADS) % cpu_attention.QUERY_STEP == 0 for _, rows, _, _ in logits}
    pads_keys = {keys == cpu_attention.padded_keys(keys) for *_, keys in logits}
    assert pads_queries == pads_keys == ({True} if pads else {True, False})


@pytest.mark.parametrize("num_tokens", [2560, 5000, 8192])
def test_a_pass_has_fewer_shapes_than_onednn_keeps(num_tokens: int) -> None:
    """Otherwise oneDNN would generate their code again in each layer."""
    batch = pack([Pair(tuple(range(60)), tuple(range(num_tokens)))])
    layout = KERNELS["cpu-tiles"].layout(batch, False)
    shapes = {
        (-(-(tile.queries[1] - tile.queries[0]) // cpu_attention.QUERY_STEP), cpu_attention.padded_keys(tile.num_keys))
        for group in layout.groups
        for part in group.parts
        for tile in part.tiles
    }
    num_linear = 40  # entries for linear layers
    assert 2 * len(shapes) + num_linear < int(CACHE_VARIABLES["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])


@pytest.mark.parametrize("last_tokens_only", [False, True])
@pytest.mark.parametrize("kernel", ["cpu-tiles", "sdpa", "dense"])
def test_values_in_bf16_give_bf16_from_queries_and_keys_in_fp32(kernel: str, last_tokens_only: bool) -> None:
    batch = a_batch()
    exact = attended(batch, "dense", last_tokens_only, dtype=torch.float32)
    rounded = attended(batch, kernel, last_tokens_only, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("last_tokens_only", [False, True])
@pytest.mark.parametrize(
    ("prefix_length", "lengths"), [(100, [4000]), (60, [5400]), (4000, [60] * 40), (4000, [5] * 100), (10, [700, 3])]
)
def test_no_tile_of_several_queries_has_more_logits_than_it_may(
    prefix_length: int, lengths: list[int], last_tokens_only: bool
) -> None:
    batch = pack([Pair(tuple(range(prefix_length)), tuple(range(length))) for length in lengths])
    layout = KERNELS["cpu-tiles"].layout(batch, last_tokens_only)
    tiles = [tile for group in layout.groups for part in group.parts for tile in part.tiles]
    step = cpu_attention.QUERY_STEP
    sizes = [
        -(-(tile.queries[1] - tile.queries[0]) // step) * step * cpu_attention.padded_keys(tile.num_keys)
        for tile in tiles
    ]
    assert max(sizes) <= cpu_attention.LOGITS_PER_HEAD
    num_queries = batch.num_pairs if last_tokens_only else batch.num_tokens
    assert sorted(query for tile in tiles for query in range(*tile.queries)) == list(range(num_queries))
