"""CUDA graphs give the same scores; without a GPU, only the capture is a stand-in."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from local_rerank import Reranker
from local_rerank.engine.cuda import graphs as cuda_graphs
from local_rerank.engine.cuda.attention import tile_layout
from local_rerank.engine.cuda.graphs import CAPTURE_AT, CHANCE, MAX_TOKENS, GraphRunner, padded, shape_of
from local_rerank.engine.engine import Engine
from local_rerank.engine.out_of_memory import release_cached
from local_rerank.engine.packing import pack
from local_rerank.errors import OutOfMemory
from local_rerank.requests.pair import Pair
from tests.engine.cuda.test_layers import engine_of, near
from tests.engine.test_packing import some_pairs
from tests.gpu import needs_gpu
from tests.tiny_checkpoints import make_checkpoint
from tests.triton_reference import in_torch

CPU = torch.device("cpu")
# padding rows hold uninitialized memory, about which numpy warns in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def rerun(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
    """Takes the place of a capture: a replay repeats the forward pass with the same buffers and output."""
    output = run()
    output.fill_(float("nan"))  # a capture computes nothing

    def replay() -> None:
        output.copy_(run())

    return replay, output


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Engine:
    return engine_of(tiny_checkpoint, fused=True, kernel="cuda-tiles")


@pytest.fixture
def engine(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The tiny model with the fused decoder, kernels in torch and no graphs."""
    in_torch(monkeypatch)
    return loaded.with_kernel(loaded.kernel)


def runner(engine: Engine, capture: cuda_graphs.Capture = rerun, *, max_tokens: int = 512) -> GraphRunner:
    return GraphRunner(engine.run_decoder, CPU, max_tokens=max_tokens, capture=capture)


def run(graphs: GraphRunner, pairs: list[Pair]) -> list[float] | None:
    """Log-odds in the order of `pairs`, if a graph ran them."""
    batch = pack(pairs)
    with torch.inference_mode():
        scores = graphs.run(batch)
    return None if scores is None else torch.empty_like(scores).scatter_(0, batch.pair_order, scores).tolist()


def pairs_of(*lengths: int, prefix: int = 5) -> list[Pair]:
    return [Pair(tuple(range(1, 1 + prefix)), tuple(range(7, 7 + n))) for n in lengths]


def captured(graphs: GraphRunner, pairs: list[Pair]) -> list[float]:
    """Log-odds of pairs, run until their shape is captured."""
    for _ in range(CAPTURE_AT - 1):
        run(graphs, pairs)
    scores = run(graphs, pairs)
    assert scores is not None
    return scores


def roughly(ours: list[float], expected: list[float]) -> bool:
    """In bf16."""
    return ours == pytest.approx(expected, abs=0.05 * max(map(abs, expected)))


def test_a_shape_is_captured_when_it_comes_again_with_the_same_scores(engine: Engine) -> None:
    graphs = runner(engine)
    batch = [*pairs_of(3, 9, 9), Pair((4, 4), (5, 6, 7))]
    assert run(graphs, batch) is None
    assert graphs.sizes == []
    scores = run(graphs, batch)
    assert graphs.sizes == [512, 64]  # the largest first, so that others reuse its pool
    assert scores is not None
    assert near(scores, engine.score(batch))


@pytest.mark.slow
def test_a_graph_of_the_kernels_themselves_gives_the_same_scores(loaded: Engine) -> None:
    engine = loaded.with_kernel(loaded.kernel)
    batch = [*pairs_of(3, 9, 9), Pair((4, 4), (5, 6, 7))]
    scores = captured(runner(engine, max_tokens=64), batch)
    assert near(scores, engine.score(batch))


def test_batches_of_one_shape_share_a_graph_and_nothing_of_the_previous_one_remains(engine: Engine) -> None:
    graphs = runner(engine)
    batches = [pairs_of(*lengths) for lengths in ([20, 20, 10], [1], [2, 2, 2, 2, 2], [20, 20, 10], [40])]
    for batch in batches:
        scores = captured(graphs, batch)
        assert near(scores, engine.score(batch))
    assert graphs.sizes == [512, 64]


@given(pairs=some_pairs)
def test_padding_changes_sizes_and_nothing_that_a_tile_reads(pairs: list[Pair]) -> None:
    batch = pack(pairs)
    shape = shape_of(batch)
    assert shape is not None
    wide, *layouts = padded(batch, shape)
    assert wide.num_tokens == shape.num_tokens >= batch.num_tokens
    assert torch.equal(wide.input_ids[:, : batch.num_tokens], batch.input_ids)
    assert torch.equal(wide.last_token_index[: batch.num_pairs], batch.last_token_index)
    sizes = ((shape.num_tiles, shape.num_tokens), (shape.num_last_tiles, shape.num_pairs))
    for ours, last_tokens_only, (num_tiles, num_queries) in zip(layouts, (False, True), sizes, strict=True):
        layout = tile_layout(batch, last_tokens_only)
        assert ours.tiles.shape == (num_tiles, 6)
        assert ours.first_own.shape == ours.last_own.shape == (num_queries,)
        for name in ("tiles", "first_own", "last_own"):
            before, after = getattr(layout, name), getattr(ours, name)
            assert torch.equal(after[: len(before)], before)
            assert not after[len(before) :].any()  # a tile without queries
            assert after.dtype == torch.int32


@pytest.mark.parametrize(("max_tokens", "largest"), [(64, 64), (100, 128), (16_000, MAX_TOKENS), (90_000, MAX_TOKENS)])
def test_the_largest_graph_is_that_of_the_token_budget(engine: Engine, max_tokens: int, largest: int) -> None:
    graphs = runner(engine, lambda run, is_first: (lambda: None, torch.zeros(16)), max_tokens=max_tokens)
    captured(graphs, pairs_of(3))
    assert graphs.sizes == ([64] if largest == 64 else [largest, 64])


def test_the_pool_is_new_whenever_there_is_no_graph(engine: Engine) -> None:
    first: list[bool] = []

    def noted(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        first.append(is_first)
        return rerun(run, is_first)

    graphs = runner(engine, noted)
    for num_tokens in (3, 100):
        captured(graphs, pairs_of(num_tokens))
    assert graphs.forget_all()
    captured(graphs, pairs_of(3))
    assert first == [True, False, False, True, False]


def test_forgotten_graphs_are_captured_again_and_smaller_after_halving(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    graphs, batch = runner(engine), pairs_of(3)
    assert not graphs.forget_all()  # there is none
    for largest in (512, 256, 128):
        scores = captured(graphs, batch)
        assert near(scores, engine.score(batch))
        assert graphs.sizes == [largest, 64]
        assert graphs.forget_all()
        assert graphs.sizes == []
        assert run(graphs, batch) is None
        graphs.halve()
    assert [run(graphs, pairs_of(100)) for _ in range(3)] == [None] * 3
    with caplog.at_level(logging.WARNING):
        graphs.halve()
    assert [run(graphs, batch) for _ in range(3)] == [None] * 3
    said = [record.getMessage().removeprefix("memory is short: CUDA graphs ") for record in caplog.records]
    assert said == [f"have at most {most} tokens from here on" for most in (256, 128, 64)] + ["are off from here on"]


def test_the_largest_can_be_captured_before_the_first_batch(engine: Engine) -> None:
    graphs = runner(engine)
    with torch.inference_mode():
        graphs.capture_largest()
    assert graphs.sizes == [512]
    captured(graphs, pairs_of(3))
    assert graphs.sizes == [512, 64]


def test_a_batch_runs_without_a_graph_if_memory_runs_out_in_the_capture(engine: Engine) -> None:
    tried: list[None] = []

    def short_of_memory(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        tried.append(None)
        if len(tried) <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rerun(run, is_first)

    engine.graphs = graphs = runner(engine, short_of_memory)
    batch = pairs_of(20, 20)
    expected = engine.with_kernel(engine.kernel).score(batch)
    held = []
    for _ in range(6):
        assert near(engine.score(batch), expected)
        held.append(graphs.sizes)
    assert held == [[], [], [], [], [], [128, 64]]  # 512 and 256 tokens found no room


def test_a_shape_replaces_one_that_has_become_rare(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    graphs = runner(engine, max_tokens=64)
    often, before, now = (pairs_of(*[1] * count) for count in (1, 20, 40))
    for _ in range(20):
        run(graphs, often)
    for _ in range(4):
        run(graphs, before)
    assert [run(graphs, now) for _ in range(8 + CHANCE)] == [None] * (8 + CHANCE)
    assert run(graphs, now) is not None
    assert run(graphs, often) is not None
    assert [run(graphs, before), run(graphs, before)] == [None, None]
    assert len(graphs.sizes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("num_before", [0, 300])
def test_equally_frequent_shapes_do_not_evict_each_other(
    num_before: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random draws make one shape more frequent for a while; also long after others took all places."""
    monkeypatch.setattr(cuda_graphs, "FORGET_AFTER", 24)
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 4)
    captures: list[bool] = []

    def counted(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        captures.append(is_first)
        return lambda: None, torch.zeros(256)

    graphs = runner(engine, counted, max_tokens=256)
    shapes = [pairs_of(*[1] * count) for count in (1, 20, 40, 60, 100, 150)]
    drawn = random.Random(3)
    for number in range(1500):
        of = shapes[:4] if number < num_before else shapes
        run(graphs, drawn.choice(of))
    assert len(captures) <= 10


@pytest.mark.parametrize("fails_first", [True, False])
def test_a_failed_capture_turns_graphs_off_and_releases_the_earlier_ones(
    fails_first: bool, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    class TritonError(Exception):
        """Like Triton's errors, no RuntimeError."""

    def fails(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        if is_first and not fails_first:
            return rerun(run, is_first)
        raise TritonError("out of resource: shared memory")

    graphs = runner(engine, fails)
    with caplog.at_level(logging.WARNING):
        assert [run(graphs, pairs_of(3)) for _ in range(5)] == [None] * 5
    assert caplog.text.count("CUDA graphs are off") == 1
    assert graphs.sizes == []


def test_when_memory_runs_out_the_engine_releases_its_graphs_and_retries(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.graphs = graphs = runner(engine)
    batch, other = pairs_of(3), pairs_of(100)
    expected = captured(graphs, batch)
    monkeypatch.setattr(engine, "run_decoder", taken := OutOfMemoryOnce(engine.run_decoder, times=1))
    assert near(engine.score(other), engine.with_kernel(engine.kernel).score(other))
    assert graphs.sizes == []
    assert taken.calls == 3
    assert near(captured(graphs, batch), expected)
    assert graphs.sizes == [256, 64]


def test_memory_that_also_runs_out_without_graphs_is_an_error_and_does_not_shrink_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.graphs = graphs = runner(engine)
    captured(graphs, pairs_of(3))
    monkeypatch.setattr(engine, "run_decoder", taken := OutOfMemoryOnce(engine.run_decoder, times=2))
    with pytest.raises(OutOfMemory):
        engine.score(pairs_of(100))
    assert taken.calls == 2
    captured(graphs, pairs_of(3))
    assert graphs.sizes == [512, 64]


def test_a_graph_whose_launch_runs_out_of_memory_is_released(engine: Engine) -> None:
    def launched_in_vain(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        def replay() -> None:
            raise RuntimeError("CUDA error: out of memory")  # torch's message for an error of a CUDA call

        return replay, run()

    batch = pairs_of(3, 4)
    expected = engine.score(batch)
    engine.graphs = graphs = runner(engine, launched_in_vain)
    assert all(near(engine.score(batch), expected) for _ in range(CAPTURE_AT))
    assert graphs.sizes == []


class OutOfMemoryOnce:
    """A forward pass whose first calls run out of memory."""

    def __init__(self, compute: cuda_graphs.Compute, *, times: int) -> None:
        self.calls, self._compute, self._times = 0, compute, times

    def __call__(self, *arguments: Any) -> Tensor:
        self.calls += 1
        if self.calls <= self._times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._compute(*arguments)


def test_a_batch_launched_ahead_does_not_change_the_scores_of_the_previous_one(engine: Engine) -> None:
    first, second = pairs_of(20, 20, 10), pairs_of(9, 4, 30)
    expected = [engine.score(first), engine.score(second)]
    engine.graphs = runner(engine)
    captured(engine.graphs, first)
    waits = [engine.launch(first), engine.launch(second)]
    assert engine.graphs.sizes == [512, 64]
    assert all(near(wait(), scores) for wait, scores in zip(waits, expected, strict=True))
    assert not near(*expected)


@needs_gpu
@pytest.mark.gpu
def test_a_graph_on_a_gpu_gives_the_scores_without_one(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", head_dim=64, hidden_size=128, seed=13)
    with Reranker(str(folder), device="cuda", dtype="bf16") as reranker:
        engine = reranker.engine
        assert engine.graphs is not None
        plain = engine.with_kernel(engine.kernel)
        for lengths in ([3, 9, 9], [200, 10], [1] * 20, [3, 9, 9]):
            batch = pairs_of(*lengths)
            expected = plain.score(batch)
            for _ in range(CAPTURE_AT + 1):
                scores = engine.score(batch)
            assert roughly(scores, expected)
        assert engine.graphs.sizes


@needs_gpu
@pytest.mark.gpu
def test_a_gpu_captures_released_graphs_again_and_keeps_consecutive_batches_apart(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", head_dim=64, hidden_size=128, seed=13)
    with Reranker(str(folder), device="cuda", dtype="bf16", max_batch_tokens=1024) as reranker:
        engine = reranker.engine
        graphs = engine.graphs
        assert graphs is not None
        assert graphs.sizes == [1024]  # before any batch
        batches = [pairs_of(20, 20, 10), pairs_of(9, 4, 30)]
        expected = [engine.with_kernel(engine.kernel).score(batch) for batch in batches]
        for largest in (1024, 512):
            for batch in batches * CAPTURE_AT:
                engine.score(batch)
            assert graphs.sizes == [largest, 64]
            for _ in range(10):
                waits = [engine.launch(batch) for batch in batches]
                for wait, scores in zip(waits, expected, strict=True):
                    assert roughly(wait(), scores)
            assert graphs.forget_all()
            graphs.halve()
            release_cached()


@needs_gpu
@pytest.mark.gpu
def test_a_capture_that_runs_out_of_gpu_memory_costs_no_scores(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", head_dim=64, hidden_size=128, seed=13)
    with Reranker(str(folder), device="cuda", dtype="bf16", max_batch_tokens=MAX_TOKENS) as reranker:
        engine, batch = reranker.engine, pairs_of(20, 20, 10)
        graphs, stream = engine.graphs, torch.cuda.current_stream()
        assert graphs is not None
        expected = engine.with_kernel(engine.kernel).score(batch)
        graphs.forget_all()
        release_cached()
        total = torch.cuda.get_device_properties(engine.device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**22) / total)
        try:
            for _ in range(20):
                scores = engine.score(batch)
                assert roughly(scores, expected)
                assert torch.cuda.current_stream() == stream
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert max(graphs.sizes, default=0) < MAX_TOKENS
