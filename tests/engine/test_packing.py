"""Packing, and the attention kernels compared with the dense reference on packed batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from local_rerank.engine import attention
from local_rerank.engine.kernel_table import KERNELS, choose_kernel
from local_rerank.engine.packing import block_bytes, pack, stage, views
from local_rerank.errors import ConfigError
from local_rerank.requests.pair import Pair, num_batch_tokens

PREFIXES = ((1, 2, 3), (4,), (5, 6, 7, 8, 9))
some_pairs = st.lists(
    st.builds(Pair.of, st.sampled_from(PREFIXES), st.lists(st.integers(10, 99), min_size=1, max_size=9).map(tuple)),
    min_size=1,
    max_size=15,
)


@given(pairs=some_pairs)
def test_a_batch_holds_each_prefix_once_and_every_document(pairs: list[Pair]) -> None:
    batch = pack(pairs)
    ids, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    assert batch.num_tokens == len(ids) == num_batch_tokens(pairs)
    assert len(batch.groups) == len({pair.prefix_ids for pair in pairs})
    seen = {}
    for group in batch.groups:
        lengths = [run.length for run in group.runs]
        assert lengths == sorted(set(lengths))
        assert group.num_documents == sum(run.count for run in group.runs)
        prefix = tuple(ids[group.start : group.start + group.prefix_length])
        assert positions[group.start : group.start + group.prefix_length] == list(range(len(prefix)))
        for run in group.runs:
            for packed, start in enumerate(run.starts, run.first_document):
                document = tuple(ids[start : start + run.length])
                assert positions[start : start + run.length] == list(range(len(prefix), len(prefix) + run.length))
                assert batch.last_token_index[packed] == start + run.length - 1
                seen[int(batch.pair_order[packed])] = (prefix, document)
    assert seen == {i: (pair.prefix_ids, pair.document_ids) for i, pair in enumerate(pairs)}


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_a_block_holds_its_tensors_padded_and_aligned(sizes: list[int]) -> None:
    kinds = [torch.int64, torch.int32, torch.bool]
    tensors = [torch.ones(size, 3, dtype=kinds[number % 3]) for number, size in enumerate(sizes)]
    fields = [((size + number % 2, 3), kinds[number % 3]) for number, size in enumerate(sizes)]
    block = stage(tensors, fields, pinned=False)
    assert len(block) == block_bytes(fields)
    for copied, tensor in zip(views(block, fields), tensors, strict=True):
        assert torch.equal(copied[: len(tensor)], tensor)
        assert not copied[len(tensor) :].any()
        assert copied.dtype == tensor.dtype
        assert copied.storage_offset() * copied.itemsize % 16 == 0


def agrees_with_dense(
    kernel: str, pairs: list[Pair], *, last_tokens_only: bool, seed: int = 0, num_kv_heads: int = 2, **changes: Any
) -> bool:
    """Whether a kernel computes what the dense one computes, on random queries, keys and values.

    `changes`: of the batch.
    """
    torch.manual_seed(seed)
    batch = replace(pack(pairs), **changes)
    q = torch.randn(1, batch.num_pairs if last_tokens_only else batch.num_tokens, 4, 8).transpose(1, 2)
    k, v = (torch.randn(1, batch.num_tokens, num_kv_heads, 8).transpose(1, 2) for _ in range(2))
    ours, dense = (
        row.attend(q, k, v, row.layout(batch, last_tokens_only), 0.7) for row in (KERNELS[kernel], KERNELS["dense"])
    )
    return ours.shape == dense.shape and torch.allclose(ours, dense, atol=2e-6)


@pytest.mark.parametrize("last_tokens_only", [False, True])
@pytest.mark.parametrize("kernel", ["cpu-tiles", "sdpa"])
@given(pairs=some_pairs, seed=st.integers(0, 9))
def test_each_kernel_agrees_with_the_dense_one(
    kernel: str, last_tokens_only: bool, pairs: list[Pair], seed: int
) -> None:
    assert agrees_with_dense(kernel, pairs, last_tokens_only=last_tokens_only, seed=seed)


@pytest.mark.parametrize("last_tokens_only", [False, True])
def test_sdpa_is_called_with_what_fused_kernels_take(last_tokens_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many key heads as query heads, else a GPU stores all logits; few keys and rows of a mask at a time."""
    pairs = [Pair.of((1,) * 9, (2,) * length) for length in (1, *[2] * 20, 11)]
    batch, sdpa, calls = pack(pairs), F.scaled_dot_product_attention, []

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q.shape[1] == k.shape[1] == v.shape[1], k.shape[0] * k.shape[2], options))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(attention, "QUERIES_PER_CALL", 4)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert agrees_with_dense("sdpa", pairs, last_tokens_only=last_tokens_only)
    *calls, (*_, dense) = calls
    assert dense["enable_gqa"]
    for has_equal_heads, num_keys, options in calls:
        assert has_equal_heads
        assert num_keys <= batch.num_tokens
        assert not options.get("enable_gqa")
        assert (mask := options.get("attn_mask")) is None or mask.shape[0] <= 4


def test_auto_takes_the_first_kernel_that_runs_and_others_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no optional package is installed
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_kernel("auto", cpu, torch.float32)[0] == "cpu-tiles"
    assert choose_kernel("auto", cuda, torch.bfloat16)[0] == "cuda-merged"
    assert choose_kernel("auto", cuda, torch.float32)[0] == "sdpa"
    with pytest.raises(ConfigError, match=r"'cuda-tiles' needs the package triton, which is not installed"):
        choose_kernel("cuda-tiles", cuda, torch.bfloat16)
