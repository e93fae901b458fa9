"""The token budget that fits a GPU's memory, and the typed error where memory runs out."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3Model

from local_rerank import Reranker
from local_rerank.engine.attention import SegmentLayout
from local_rerank.engine.cuda import prepare as cuda
from local_rerank.engine.out_of_memory import MIN_BATCH_TOKENS, LayerShape, bytes_per_token, fitted_budget
from local_rerank.errors import EngineFailure, OutOfMemory
from local_rerank.requests.tokenization import Pair

GIB = 2**30
SMALL = LayerShape(hidden=1024, queries=2048, keys=1024, intermediate=3072)  # Qwen3-Reranker-0.6B
LARGE = LayerShape(hidden=4096, queries=4096, keys=1024, intermediate=12288)  # Qwen3-Reranker-8B
BATCH = [Pair((1, 2, 3), (4, 5, 6)), Pair((1, 2, 3), (7,))]


def test_a_roomy_gpu_gets_the_whole_budget_and_a_full_one_less() -> None:
    for shape in (SMALL, LARGE):
        assert fitted_budget(60 * GIB, bytes_per_token(shape, 2), at_most=16384) == 16384
    small, large = (fitted_budget(GIB // 2, bytes_per_token(shape, 2), at_most=16384) for shape in (SMALL, LARGE))
    assert MIN_BATCH_TOKENS < large < small < 16384


def test_graphs_take_room_for_a_batch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen3Config(num_hidden_layers=1)
    model, device = SimpleNamespace(parameters=list, config=config, dtype=torch.bfloat16), torch.device("cuda")
    monkeypatch.setattr(cuda, "free_bytes", lambda devices: 2**30)
    plain, with_graphs = (cuda.token_budget(model, device, at_most=10**6, graphs=graphs) for graphs in (False, True))
    assert abs(plain - 2 * with_graphs) <= 1
    assert cuda.token_budget(model, device, at_most=1000, graphs=True) == 1000


def test_a_gpu_without_room_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert fitted_budget(1000, bytes_per_token(SMALL, 2), at_most=16384) == MIN_BATCH_TOKENS
    assert "1000 bytes are free" in caplog.text


@given(free=st.integers(0, 200 * GIB), element_size=st.sampled_from([2, 4]))
def test_more_memory_never_means_a_smaller_budget_and_what_fits_is_never_passed(free: int, element_size: int) -> None:
    per_token = bytes_per_token(LARGE, element_size)
    budget = fitted_budget(free, per_token, at_most=16384)
    assert budget <= fitted_budget(free + GIB, per_token, at_most=16384)
    assert budget == MIN_BATCH_TOKENS or budget * per_token <= free


def test_the_estimate_covers_what_a_layer_holds_at_once() -> None:
    """Counted in a plain forward pass on the CPU, whose eager layers hold more than those for a GPU."""
    from torch.profiler import ProfilerActivity, profile

    config = Qwen3Config(
        vocab_size=100, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128,
    )  # fmt: skip
    model = Qwen3Model(config).to(torch.bfloat16).eval()
    ids = torch.ones(1, 1000, dtype=torch.int64)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model(ids, use_cache=False, attention_mask={"full_attention": None})
    held, peak = 0, 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0.5 * peak < 1000 * bytes_per_token(LayerShape.of(config), 2) < 3 * peak


def test_out_of_memory_is_an_error_of_its_own_and_the_engine_goes_on(tiny_reranker: Reranker) -> None:
    engine = tiny_reranker.engine
    expected = engine.score(BATCH)
    kernel = engine.kernel

    def too_large(q: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.empty(2**59, dtype=torch.uint8, device=q.device)  # a real failure of the real allocator

    engine.kernel = replace(kernel, attend=too_large)
    try:
        with pytest.raises(OutOfMemory, match="out of memory in a batch of 7 tokens") as caught:
            engine.score(BATCH)
    finally:
        engine.kernel = kernel
    assert caught.value.num_tokens == 7
    assert caught.value.__context__ is None  # a chained error would keep the failed pass's tensors alive
    assert isinstance(caught.value, EngineFailure)
    assert engine.score(BATCH) == expected


def test_another_fault_stays_what_it_is(tiny_reranker: Reranker) -> None:
    engine = tiny_reranker.engine
    kernel = engine.kernel

    def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SegmentLayout, scale: float) -> torch.Tensor:
        raise RuntimeError("a kernel failed")

    engine.kernel = replace(kernel, attend=broken)
    try:
        with pytest.raises(RuntimeError, match="a kernel failed"):
            engine.score(BATCH)
    finally:
        engine.kernel = kernel
