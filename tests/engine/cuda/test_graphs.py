"""CUDA graphs give the same scores; without a GPU, only the capture is a stand-in."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from local_rerank import Reranker
from local_rerank.engine.cuda import graphs as cuda_graphs
from local_rerank.engine.cuda.graphs import MAX_TOKENS, GraphRunner, shapes_up_to
from local_rerank.engine.engine import Engine
from local_rerank.engine.out_of_memory import release_cached
from local_rerank.engine.packing import pack
from local_rerank.errors import OutOfMemory
from local_rerank.requests.pair import Pair
from local_rerank.requests.scheduler import Scheduler
from tests.engine.cuda.test_layers import engine_of, near
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
    """Graphs that are captured."""
    graphs = GraphRunner(engine.run_decoder, CPU, max_tokens=max_tokens, capture=capture)
    with torch.inference_mode():
        graphs.capture_all()
    return graphs


def run(graphs: GraphRunner, pairs: list[Pair]) -> list[float] | None:
    """Log-odds in the order of `pairs`, if a graph ran them."""
    batch = pack(pairs)
    with torch.inference_mode():
        scores = graphs.run(batch)
    return None if scores is None else torch.empty_like(scores).scatter_(0, batch.pair_order, scores).tolist()


def pairs_of(*lengths: int, prefix: int = 5) -> list[Pair]:
    return [Pair.of(tuple(range(1, 1 + prefix)), tuple(7 + i % 200 for i in range(n))) for n in lengths]


def roughly(ours: list[float], expected: list[float]) -> bool:
    """In bf16."""
    return ours == pytest.approx(expected, abs=0.05 * max(map(abs, expected)))


UP_TO_512 = [512, 512, 256, 128, 64, 384]  # in the order of their capture: the largest, twice, then powers of two


def test_graphs_are_captured_at_load_and_batches_of_one_shape_leave_nothing_for_the_next(engine: Engine) -> None:
    graphs = runner(engine)
    assert graphs.sizes == UP_TO_512
    other = [*pairs_of(3, 9, 9), Pair.of((4, 4), (5, 6, 7))]
    for batch in (other, *(pairs_of(*each) for each in ([20, 20, 10], [1], [2] * 5, [20, 20, 10], [40], [300]))):
        scores = run(graphs, batch)
        assert scores is not None
        assert near(scores, engine.score(batch))
    assert graphs.sizes == UP_TO_512
    assert run(graphs, pairs_of(600)) is None


@pytest.mark.slow
def test_a_graph_of_the_kernels_themselves_gives_the_same_scores(loaded: Engine) -> None:
    engine = loaded.with_kernel(loaded.kernel)
    batch = [*pairs_of(3, 9, 9), Pair.of((4, 4), (5, 6, 7))]
    scores = run(runner(engine, max_tokens=64), batch)
    assert scores is not None
    assert near(scores, engine.score(batch))


class NoCompute:
    """A device that computes nothing, and counts captures."""

    num_captures = 0

    def __call__(self, run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        self.num_captures += 1
        return lambda: None, torch.zeros(MAX_TOKENS)


@pytest.mark.parametrize("num_clients", [1, 4, 16])
def test_no_batch_waits_for_a_capture(num_clients: int, engine: Engine) -> None:
    """Of requests with 1 to 100 documents of some 180 tokens. When a shape was captured as it recurred, 8 to 63 did."""
    device, drawn, scheduler = NoCompute(), random.Random(num_clients), Scheduler(MAX_TOKENS)
    graphs = runner(engine, device, max_tokens=MAX_TOKENS)
    assert device.num_captures == 38
    for number in range(60):
        while scheduler.num_queued_requests < max(1, round(num_clients * drawn.uniform(0.3, 1))):
            prefix, count = drawn.choice((75, 85, 110)), drawn.choice((1, 3, 10, 10, 20, 100))
            lengths = [12 + int(drawn.lognormvariate(5, 0.5)) for _ in range(count)]
            scheduler.add(drawn.random(), [Pair.of([number] * prefix, [2] * n) for n in lengths])  # type: ignore[arg-type]
        assert graphs.run(pack([entry.pair for entry in scheduler.next_batch()])) is not None
    assert device.num_captures == 38


def test_captures_that_take_long_leave_gaps_that_larger_graphs_fill(engine: Engine) -> None:
    graphs = GraphRunner(engine.run_decoder, CPU, capture=NoCompute())
    graphs.capture_all(seconds=0)
    for size in (1, 70, 1030, 5000, 9000, 16000):
        assert graphs.run(pack(pairs_of(size))) is not None
    assert graphs.sizes == [MAX_TOKENS, *(2**n for n in range(14, 5, -1))]


def test_the_pool_is_new_whenever_there_is_no_graph(engine: Engine) -> None:
    first: list[bool] = []

    def noted(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        first.append(is_first)
        return rerun(run, is_first)

    graphs = runner(engine, noted, max_tokens=64)
    assert graphs.forget_all()
    for _ in range(3):
        run(graphs, pairs_of(3))
    assert first == [True, False, True, False]


def test_forgotten_graphs_are_captured_again_one_a_batch_and_smaller_after_halving(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    graphs, batch = runner(engine), pairs_of(3)
    for largest in (512, 256, 128):
        for number in range(1, 1 + len(shapes_up_to(largest))):
            scores = run(graphs, batch)
            assert len(graphs.sizes) == number or largest == 512
        assert scores is not None
        assert near(scores, engine.score(batch))
        assert graphs.sizes == [shape.num_tokens for shape in shapes_up_to(largest)]
        run(graphs, pairs_of(largest - 20))  # to the buffers of the next captures these values are no indices
        assert graphs.forget_all()
        assert not graphs.forget_all()  # there is none
        graphs.halve()
    assert run(graphs, pairs_of(100)) is None
    assert graphs.forget_all()
    with caplog.at_level(logging.WARNING):
        graphs.halve()
    assert [run(graphs, batch) for _ in range(3)] == [None] * 3
    said = [record.getMessage().removeprefix("memory is short: CUDA graphs ") for record in caplog.records]
    assert said == [f"have at most {most} tokens from here on" for most in (256, 128, 64)] + ["are off from here on"]


def test_graphs_are_smaller_if_memory_runs_out_in_a_capture(engine: Engine) -> None:
    tried: list[None] = []

    def short_of_memory(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        tried.append(None)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(tried) == 2:  # as the end of a capture fails after an error in it
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        return rerun(run, is_first)

    batch = pairs_of(20, 20)
    expected = engine.score(batch)
    engine.graphs = runner(engine, short_of_memory)
    assert engine.graphs.sizes == [128, 128, 64]
    assert near(engine.score(batch), expected)


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

    with caplog.at_level(logging.WARNING):
        graphs = runner(engine, fails)
        assert [run(graphs, pairs_of(3)) for _ in range(5)] == [None] * 5
    assert caplog.text.count("CUDA graphs are off") == 1
    assert graphs.sizes == []


@pytest.mark.parametrize(("fails_in", "closed"), [("pass", []), ("end", ["end", "release"])])
def test_a_pool_that_a_failed_capture_leaves_open_is_closed(
    fails_in: str, closed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = NoDevice(fails_at_end=fails_in != "pass")
    for name, value in device.functions.items():
        monkeypatch.setattr(f"torch.{name}", value, raising=False)

    def run() -> Tensor:
        if device.is_open and fails_in == "pass":
            raise RuntimeError("failed in the pass")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match=f"failed in the {fails_in}"):
        cuda_graphs.cuda_capture(CPU)(run, True)
    assert device.closed == closed
    assert not device.is_open


class NoDevice:
    """What a capture calls of torch. The pool is open until a capture ends well or the pool is closed."""

    def __init__(self, *, fails_at_end: bool) -> None:
        self.is_open, self.fails_at_end = False, fails_at_end
        self.closed: list[str] = []
        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.functions = {
            "cuda.Stream": lambda device: stream,
            "cuda.stream": nullcontext,
            "cuda.current_stream": lambda device: stream,
            "cuda.current_device": lambda: 0,
            "cuda.graph_pool_handle": lambda: (0, 7),
            "cuda.CUDAGraph": object,
            "cuda.graph": self.recording,
            "_C._cuda_endAllocateToPool": self.end,
            "_C._cuda_releasePool": lambda device, pool: self.closed.append("release"),
        }

    @contextmanager
    def recording(self, graph: object, *, pool: tuple[int, int], **_: object) -> Iterator[None]:
        self.is_open = True
        try:
            yield
        finally:
            if self.fails_at_end:
                raise RuntimeError("failed in the end")
            self.is_open = False

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if not self.is_open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.is_open = False
        self.closed.append("end")


@pytest.mark.parametrize(("times", "largest_later"), [(1, 256), (2, 512)])
def test_when_memory_runs_out_the_engine_releases_its_graphs_and_retries(
    times: int, largest_later: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that is not enough, the graphs are not what is too large."""
    engine.graphs = graphs = runner(engine)
    batch = pairs_of(600)  # no graph has as many tokens
    expected = engine.with_kernel(engine.kernel).score(batch)
    monkeypatch.setattr(engine, "run_decoder", taken := OutOfMemoryOnce(engine.run_decoder, times=times))
    if times == 1:
        assert near(engine.score(batch), expected)
    else:
        with pytest.raises(OutOfMemory):
            engine.score(batch)
    assert taken.calls == 2
    assert graphs.sizes == []
    run(graphs, batch)
    assert graphs.sizes == [largest_later]


def test_a_graph_whose_launch_runs_out_of_memory_is_released(engine: Engine) -> None:
    def launched_in_vain(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        def replay() -> None:
            raise RuntimeError("CUDA error: out of memory")  # torch's message for an error of a CUDA call

        return replay, run()

    batch = pairs_of(3, 4)
    expected = engine.score(batch)
    engine.graphs = graphs = runner(engine, launched_in_vain)
    assert near(engine.score(batch), expected)
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
    waits = [engine.launch(first), engine.launch(second)]
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
            assert roughly(engine.score(batch), plain.score(batch))
        assert len(engine.graphs.sizes) > 10


@needs_gpu
@pytest.mark.gpu
def test_a_gpu_captures_released_graphs_again_and_keeps_consecutive_batches_apart(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", head_dim=64, hidden_size=128, seed=13)
    with Reranker(str(folder), device="cuda", dtype="bf16", max_batch_tokens=1024) as reranker:
        engine = reranker.engine
        graphs = engine.graphs
        assert graphs is not None
        assert graphs.sizes[:2] == [1024, 1024]  # before any batch
        batches = [pairs_of(20, 20, 10), pairs_of(9, 4, 30)]
        expected = [engine.with_kernel(engine.kernel).score(batch) for batch in batches]
        for largest in (1024, 512):
            for _ in range(10):
                waits = [engine.launch(batch) for batch in batches]
                for wait, scores in zip(waits, expected, strict=True):
                    assert roughly(wait(), scores)
            assert graphs.sizes[0] == largest
            assert graphs.forget_all()
            graphs.halve()
            release_cached()


@needs_gpu
@pytest.mark.gpu
def test_a_thread_that_waits_for_scores_leaves_its_core_idle(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", head_dim=64, hidden_size=128, seed=13)
    with Reranker(str(folder), device="cuda", dtype="bf16") as reranker:
        reranker.engine.score(pairs_of(3))  # allocates pinned memory, which may wait for the device
        torch.cuda._sleep(10**9)  # cycles: half a second or more
        wait = reranker.engine.launch(pairs_of(3))
        start, busy = time.perf_counter(), time.thread_time()
        wait()
        assert time.thread_time() - busy < 0.2 * (time.perf_counter() - start)


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
