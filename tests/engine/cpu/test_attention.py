"""The CPU's tiles against the dense definition, on batches with every kind of tile."""

from __future__ import annotations

import pytest
import torch

from local_rerank.engine.cpu import attention as cpu_attention
from local_rerank.engine.cpu.attention import KEYS_OF_LAST_TOKENS, QUERIES_PER_TILE, TOKENS_PER_TILE
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


def attended(batch: PackedBatch, kernel: str, last_tokens_only: bool, *, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    num_queries = batch.num_pairs if last_tokens_only else batch.num_tokens
    q = torch.randn(1, num_queries, HEADS, HEAD_DIM, generator=generator).transpose(1, 2)
    k, v = (torch.randn(1, batch.num_tokens, KV_HEADS, HEAD_DIM, generator=generator).transpose(1, 2) for _ in "kv")
    row = KERNELS[kernel]
    return row.attend(q, k, v.to(dtype), row.layout(batch, last_tokens_only), 0.7)


@pytest.mark.parametrize("last_tokens_only", [False, True])
@pytest.mark.parametrize("logits", [pytest.param(cpu_attention.LOGITS_PER_HEAD, marks=pytest.mark.numeric), 1000, 1])
@pytest.mark.parametrize("fills_up", [False, True])
def test_tiles_of_every_kind_attend_as_the_dense_definition(
    fills_up: bool, logits: int, last_tokens_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`logits`: the fewer a tile may have, the smaller the pieces of a long document."""
    monkeypatch.setattr(cpu_attention, "LOGITS_PER_HEAD", logits)
    monkeypatch.setattr(cpu_attention, "are_fp32_products_routed", lambda: fills_up)
    batch = a_batch()
    tiles, dense = (attended(batch, kernel, last_tokens_only, dtype=torch.float32) for kernel in ("cpu-tiles", "dense"))
    assert torch.allclose(tiles, dense, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "is_routed", "fills_up"),
    [(torch.float32, False, False), (torch.float32, True, True), (torch.bfloat16, False, True)],
)
def test_tiles_are_filled_up_where_onednn_multiplies_them(
    dtype: torch.dtype, is_routed: bool, fills_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = list[tuple[int, ...]]()

    def recorded(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        products.append((*first.shape, second.shape[2]))
        return torch.matmul(first, second)

    monkeypatch.setattr(cpu_attention, "are_fp32_products_routed", lambda: is_routed)
    monkeypatch.setattr(torch, "bmm", recorded)
    for last_tokens_only in (False, True):
        attended(a_batch(), "cpu-tiles", last_tokens_only, dtype=dtype)
    logits = products[::2]  # (kv_heads, heads of each x queries, head_dim, keys); every other one sums up values
    queries_filled_up = {rows // (HEADS // KV_HEADS) % cpu_attention.QUERY_STEP == 0 for _, rows, _, _ in logits}
    keys_filled_up = {keys == cpu_attention.padded_keys(keys) for *_, keys in logits}
    assert queries_filled_up == keys_filled_up == ({True} if fills_up else {True, False})


@pytest.mark.parametrize("num_tokens", [2560, 5000, 8192])
def test_a_pass_has_fewer_shapes_than_onednn_keeps(num_tokens: int) -> None:
    """Else each layer would have their code generated anew."""
    batch = pack([Pair(tuple(range(60)), tuple(range(num_tokens)))])
    layout = KERNELS["cpu-tiles"].layout(batch, False)
    shapes = {
        (-(-(tile.queries[1] - tile.queries[0]) // cpu_attention.QUERY_STEP), cpu_attention.padded_keys(tile.num_keys))
        for group in layout.groups
        for part in group.parts
        for tile in part.tiles
    }
    assert (
        2 * len(shapes) < int(CACHE_VARIABLES["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) - 40
    )  # which linear layers may have


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
