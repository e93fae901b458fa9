"""The CPU's tiles against the dense definition, on batches with every kind of tile."""

from __future__ import annotations

import pytest
import torch

from local_rerank import cpu_attention
from local_rerank.attention import KERNELS
from local_rerank.cpu_attention import KEYS_OF_LAST_TOKENS, QUERIES_PER_TILE, TOKENS_PER_TILE
from local_rerank.packing import PackedBatch, pack
from local_rerank.tokenization import Pair

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


def attended(batch: PackedBatch, kernel: str, last_tokens_only: bool, *, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    num_queries = batch.num_pairs if last_tokens_only else batch.num_tokens
    q = torch.randn(1, num_queries, HEADS, HEAD_DIM, generator=generator).transpose(1, 2)
    k, v = (torch.randn(1, batch.num_tokens, KV_HEADS, HEAD_DIM, generator=generator).transpose(1, 2) for _ in "kv")
    row = KERNELS[kernel]
    return row.attend(q, k, v.to(dtype), row.layout(batch, last_tokens_only), 0.7)


@pytest.mark.parametrize("last_tokens_only", [False, True])
@pytest.mark.parametrize("logits", [cpu_attention.LOGITS_PER_HEAD, 1000, 1])
@pytest.mark.parametrize("rounds_up", [False, True])
def test_tiles_of_every_kind_attend_as_the_dense_definition(
    rounds_up: bool, logits: int, last_tokens_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`logits`: the fewer a tile may have, the smaller the pieces of a long document, down to one query."""
    monkeypatch.setattr(cpu_attention, "LOGITS_PER_HEAD", logits)
    monkeypatch.setattr(cpu_attention, "are_fp32_products_routed", lambda: rounds_up)
    batch = a_batch()
    tiles, dense = (attended(batch, kernel, last_tokens_only, dtype=torch.float32) for kernel in ("cpu-tiles", "dense"))
    assert torch.allclose(tiles, dense, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "is_routed", "rounds_up"),
    [(torch.float32, False, False), (torch.float32, True, True), (torch.bfloat16, False, True)],
)
def test_tiles_are_rounded_up_where_onednn_multiplies_them(
    dtype: torch.dtype, is_routed: bool, rounds_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = set[int]()

    def recorded(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        sizes.update({first.shape[1], *second.shape[1:]} - {HEAD_DIM})
        return torch.matmul(first, second)

    monkeypatch.setattr(cpu_attention, "are_fp32_products_routed", lambda: is_routed)
    monkeypatch.setattr(torch, "bmm", recorded)
    for last_tokens_only in (False, True):
        attended(a_batch(), "cpu-tiles", last_tokens_only, dtype=dtype)
    assert {size % cpu_attention.SHAPE_STEP == 0 for size in sizes} == ({True} if rounds_up else {True, False})
    assert len(sizes) > 5


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
    ("prefix_length", "lengths"), [(100, [4000]), (4000, [60] * 40), (4000, [5] * 100), (10, [700, 3])]
)
def test_no_tile_of_several_queries_has_more_logits_than_it_may(
    prefix_length: int, lengths: list[int], last_tokens_only: bool
) -> None:
    batch = pack([Pair(tuple(range(prefix_length)), tuple(range(length))) for length in lengths])
    layout = KERNELS["cpu-tiles"].layout(batch, last_tokens_only)
    tiles = [tile for group in layout.groups for part in group.parts for tile in part.tiles]
    sizes = [(tile.queries[1] - tile.queries[0]) * tile.num_keys for tile in tiles]
    assert max(sizes) <= cpu_attention.LOGITS_PER_HEAD
    num_queries = batch.num_pairs if last_tokens_only else batch.num_tokens
    assert sorted(query for tile in tiles for query in range(*tile.queries)) == list(range(num_queries))
