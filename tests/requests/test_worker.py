"""The worker with a fake engine: fairness, failures, memory, cancelling, closing, and what is logged."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

import pytest

from local_rerank.errors import EngineFailure, ModelUnavailable, OutOfMemory, Overloaded
from local_rerank.requests.pair import Pair, TokenizedRequest, num_batch_tokens
from local_rerank.requests.pending import OnScored, PendingRequest
from local_rerank.requests.scheduler import GOOD_BATCHES
from local_rerank.requests.worker import BatchReport, Worker
from local_rerank.types import RerankRequest, RerankResult

BUDGET = 2048
FAILING, HUGE, NAN, LOST = 901, 902, 903, 904  # tokens: the engine fails, runs out of memory, returns NaN, no score


class CountedEngine:
    """Scores a pair by its document's first token. A test can hold it, and some tokens make it fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.num_tokens: list[int] = []  # of each forward pass
        self.memory = 1 << 30  # tokens
        self.fails_at: int | None = None  # number of the forward pass that fails

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        num_tokens = num_batch_tokens(pairs)
        self.num_tokens.append(num_tokens)
        self.entered.release()
        assert self.gate.wait(30)
        if len(self.num_tokens) == self.fails_at:
            raise RuntimeError("it failed once")
        firsts = [pair.document_ids[0] for pair in pairs if pair.document_ids[0] != LOST]
        if num_tokens > self.memory or HUGE in firsts:
            raise OutOfMemory(num_tokens=num_tokens)
        if FAILING in firsts:
            raise RuntimeError("a kernel failed\nCompile with TORCH_USE_CUDA_DSA")
        return [math.nan if first == NAN else float(first) for first in firsts]


class Gpu(CountedEngine):
    """Computes a batch when its scores are fetched, or when it is launched with `computes_at_launch`."""

    def __init__(self, *, computes_at_launch: bool = False) -> None:
        super().__init__()
        self.computes_at_launch = computes_at_launch
        self.log: list[str] = []

    def launch(self, pairs: Sequence[Pair]) -> Callable[[], list[float]]:
        name = f"batch of {len(pairs)}"
        self.log.append(f"launched {name}")
        early = self.score(pairs) if self.computes_at_launch else None

        def wait() -> list[float]:
            assert self.gate.wait(30)
            self.log.append(f"fetched {name}")
            return self.score(pairs) if early is None else early

        return wait


Start = Callable[..., tuple[Worker, CountedEngine]]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[tuple[Worker, CountedEngine]] = []

    def start(gpu: Gpu | None = None, **options: Any) -> tuple[Worker, CountedEngine]:
        engine, limits = gpu or CountedEngine(), {"max_batch_tokens": BUDGET, "max_queued_tokens": 500_000} | options
        made.append((Worker(engine.score, **limits, launch=None if gpu is None else gpu.launch), engine))
        return made[-1]

    yield start
    for worker, engine in made:
        engine.gate.set()
        worker.close()


def pending(
    prefix: int, *firsts: int, length: int = 70, name: str | None = None, num_chunks: int = 1,
    on_scored: OnScored | None = None, **options: Any,
) -> PendingRequest:  # fmt: skip
    """A request with a pair of `length` tokens for each first token, after ten prefix tokens."""
    pairs = tuple(Pair.of((prefix,) * 10, (first,) + (1,) * (length - 1)) for first in firsts)
    num = len(pairs) // num_chunks
    tokenized = TokenizedRequest(
        pairs=pairs,
        pairs_of_document=tuple(range(i * num_chunks, (i + 1) * num_chunks) for i in range(num)),
        bounds=((0, 1),) * len(pairs) if options.get("spans") else None,
        num_truncated_tokens=(0,) * num,
        num_query_tokens=1,
        num_query_truncated_tokens=0,
        num_suffix_tokens=0,
        num_unbilled_tokens=0,
        total_tokens=num,
        has_default_instruction=True,
        unwrapped=False,
    )
    request = RerankRequest(query="q", documents=tuple(map(str, firsts[::num_chunks])), **options)
    return PendingRequest(
        request, tokenized, model_id="counted", started=time.perf_counter(), name=name, on_scored=on_scored,
        span_pairs=lambda document, bounds, pair: [((0, 1), pair)],
    )  # fmt: skip


def submit(worker: Worker, *requests: PendingRequest) -> None:
    for request in requests:
        worker.submit(request)


def submit_and_hold(worker: Worker, engine: CountedEngine) -> None:
    """Submit a request and hold the engine while it runs, so that later requests queue."""
    engine.gate.clear()
    submit(worker, pending(9, 5))
    assert engine.entered.acquire(timeout=10)


def submit_without_end(worker: Worker) -> None:
    while True:
        worker.submit(pending(3, 30))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def log_odds(request: PendingRequest) -> dict[int, float]:
    result: RerankResult = request.future.result(10)
    return {item.index: item.log_odds for item in result}


def logged_requests(caplog: pytest.LogCaptureFixture) -> list[list[str]]:
    """The names of the requests of each logged error."""
    return [record.__dict__["request_ids"] for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_small_request_behind_a_large_one_waits_for_one_batch(start: Start) -> None:
    worker, engine = start()
    engine.gate.clear()
    large, small = pending(1, *range(10, 510), length=300), pending(2, *range(10, 18))
    submit(worker, large)
    assert engine.entered.acquire(timeout=10)
    submit(worker, small)
    batches_seen: list[int] = []
    small.future.add_done_callback(lambda _: batches_seen.append(len(engine.num_tokens)))
    engine.gate.set()
    assert log_odds(small) == {index: 10.0 + index for index in range(8)}
    assert batches_seen == [2], "the running batch and its own"
    assert log_odds(large) == {index: 10.0 + index for index in range(500)}
    assert len(engine.num_tokens) > 70


def test_only_the_failing_request_of_a_batch_gets_the_error_and_it_is_logged_once(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker, engine = start()
    submit_and_hold(worker, engine)
    good = [pending(number, 10 + number, name=f"good-{number}") for number in range(5)]
    bad = pending(7, 10, FAILING, name="bad")
    submit(worker, *good[:3], bad, *good[3:])
    engine.gate.set()
    with pytest.raises(EngineFailure, match="a kernel failed"):
        bad.future.result(10)
    assert [log_odds(request) for request in good] == [{0: 10.0 + number} for number in range(5)]
    assert logged_requests(caplog) == [["bad"]]
    assert "RuntimeError: a kernel failed" in caplog.text, "with its traceback"
    submit(worker, after := pending(3, 33))
    assert log_odds(after) == {0: 33.0}


def test_a_batch_that_fails_once_succeeds_in_halves_and_is_logged_with_all_its_requests(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker, engine = start()
    submit_and_hold(worker, engine)
    both = [pending(1, 11, name="a"), pending(2, 12, name="b")]
    submit(worker, *both)
    engine.fails_at = 2
    engine.gate.set()
    assert [log_odds(request) for request in both] == [{0: 11.0}, {0: 12.0}]
    assert len(engine.num_tokens) == 4
    worker.close()  # waits until the error is logged
    assert logged_requests(caplog) == [["a", "b"]]
    assert "it failed once" in caplog.text


def test_a_score_of_nan_fails_only_its_request(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    worker, engine = start()
    submit_and_hold(worker, engine)
    bad, good = pending(1, 10, NAN, 12, name="bad"), pending(2, 20, 21, name="good")
    submit(worker, bad, good)
    engine.gate.set()
    with pytest.raises(EngineFailure, match="nan as log-odds"):
        bad.future.result(10)
    assert log_odds(good) == {0: 20.0, 1: 21.0}
    assert logged_requests(caplog) == [["bad"]]


def test_a_missing_score_fails_the_requests_of_the_batch_and_no_later_one(start: Start) -> None:
    worker, _ = start()
    submit(worker, lost := pending(1, 10, LOST))
    with pytest.raises(EngineFailure, match="scoring failed"):
        lost.future.result(10)
    submit(worker, after := pending(1, 10))
    assert log_odds(after) == {0: 10.0}


@pytest.mark.parametrize("gpu_options", [None, {}, {"computes_at_launch": True}], ids=["cpu", "gpu", "at launch"])
def test_out_of_memory_makes_batches_smaller_and_every_request_succeeds(
    gpu_options: dict[str, bool] | None, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker, engine = start(None if gpu_options is None else Gpu(**gpu_options))
    engine.memory = 600
    requests = [pending(number, *range(10, 30)) for number in range(5)]
    submit(worker, *requests)
    assert all(log_odds(request) == {index: 10.0 + index for index in range(20)} for request in requests)
    assert worker.max_batch_tokens <= 600
    num_batches = len(engine.num_tokens)
    submit(worker, again := pending(1, *range(10, 30)))
    assert len(log_odds(again)) == 20
    assert max(engine.num_tokens[num_batches:]) <= 600
    assert "out of memory" in caplog.text
    assert logged_requests(caplog) == []


@pytest.mark.parametrize("computes_at_launch", [False, True])
def test_a_batch_that_runs_out_of_memory_is_not_tried_in_full_again(computes_at_launch: bool, start: Start) -> None:
    worker, engine = start(Gpu(computes_at_launch=computes_at_launch))
    engine.memory = 400
    submit(worker, request := pending(1, *range(10, 20)))
    log_odds(request)
    assert engine.num_tokens == [710, 360, 360]


def test_a_lowered_budget_is_raised_after_many_batches(start: Start) -> None:
    worker, engine = start()
    engine.memory = 600
    submit(worker, first := pending(1, *range(10, 40)))
    assert len(log_odds(first)) == 30
    lowered = worker.max_batch_tokens
    engine.memory = 1 << 30
    for _ in range(4 * GOOD_BATCHES):
        submit(worker, small := pending(1, 10))
        log_odds(small)
    assert lowered < worker.max_batch_tokens == BUDGET


def test_a_pair_that_does_not_fit_into_memory_fails_only_its_request(start: Start) -> None:
    worker, engine = start()
    submit_and_hold(worker, engine)
    huge, good = pending(1, 10, HUGE), pending(2, 20, 21)
    submit(worker, huge, good)
    engine.gate.set()
    with pytest.raises(OutOfMemory):
        huge.future.result(10)
    assert log_odds(good) == {0: 20.0, 1: 21.0}


def test_a_cancelled_request_leaves_the_queue_at_once(start: Start) -> None:
    worker, engine = start(max_queued_tokens=1000)
    submit_and_hold(worker, engine)
    submit(worker, gone := pending(1, *range(10, 22)))
    with pytest.raises(Overloaded):
        worker.submit(pending(2, *range(10, 22)))
    assert gone.future.cancel()
    assert worker.num_queued_tokens == worker.num_queued_requests == 0
    submit(worker, stays := pending(2, *range(10, 22)))
    engine.gate.set()
    assert len(log_odds(stays)) == 12
    assert len(engine.num_tokens) == 2
    with pytest.raises(CancelledError):
        gone.future.result()


def test_retry_after_is_the_measured_time_until_the_queue_has_room(start: Start) -> None:
    worker, engine = start(max_queued_tokens=1000)
    submit_and_hold(worker, engine)
    time.sleep(0.2)  # part of the batch's duration
    engine.gate.set()
    while worker.tokens_per_second is None:
        time.sleep(0.001)
    rate = worker.tokens_per_second
    assert rate < 70 / 0.2
    submit_and_hold(worker, engine)
    submit(worker, pending(1, *range(10, 22)))  # 850 tokens
    message = "850 tokens are queued, this request has 220 or more; at most 1000 can be queued"
    with pytest.raises(Overloaded, match=message) as caught:
        worker.submit(pending(2, 10, 11, 12))
    assert caught.value.retry_after == pytest.approx((850 + 220 - 1000) / rate)
    with pytest.raises(Overloaded) as caught:
        worker.submit(pending(2, *range(10, 500)))
    assert caught.value.retry_after == pytest.approx(850 / rate), "an empty queue accepts any request"
    assert worker.retry_after() == pytest.approx(850 / rate)


@pytest.mark.parametrize(("one_pair_at_a_time", "passes"), [(False, [220]), (True, [80, 80, 80])])
def test_a_batch_report_has_the_prefix_tokens_that_sharing_saved(
    one_pair_at_a_time: bool, passes: list[int], start: Start
) -> None:
    worker, engine = start(one_pair_at_a_time=one_pair_at_a_time)
    reports: list[BatchReport] = []
    worker.on_batch = reports.append
    submit(worker, request := pending(1, 10, 11, 12))
    assert log_odds(request) == {0: 10.0, 1: 11.0, 2: 12.0}
    assert engine.num_tokens == passes
    while not reports:
        time.sleep(0.001)
    (report,) = reports
    assert (report.num_requests, report.num_pairs, report.num_tokens) == (1, 3, sum(passes))
    assert report.num_prefix_tokens_saved == 240 - sum(passes)
    assert report.seconds > 0


def test_a_gpu_gets_the_next_batch_before_the_scores_of_the_running_one_are_fetched(start: Start) -> None:
    gpu = Gpu()
    worker, _ = start(gpu, clock=itertools.count(step=1e-3).__next__)  # a batch takes milliseconds
    submit(worker, first := pending(1, 10))
    log_odds(first)
    gpu.gate.clear()
    submit(worker, running := pending(2, 20))
    until(lambda: len(gpu.log) == 3)
    submit(worker, ahead := pending(3, 30))  # while the worker waits
    until(lambda: len(gpu.log) == 4)
    submit(worker, *(late := [pending(4, 40), pending(5, 50)]))
    gpu.gate.set()
    assert [log_odds(request)[0] for request in (running, ahead, *late)] == [20.0, 30.0, 40.0, 50.0]
    assert gpu.log[2:5] == ["launched batch of 1", "launched batch of 1", "fetched batch of 1"]
    assert "launched batch of 2" in gpu.log[5:]


@pytest.mark.parametrize("computes_at_launch", [False, True])
def test_a_failing_batch_on_a_gpu_fails_no_other(
    start: Start, computes_at_launch: bool, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _ = start(Gpu(computes_at_launch=computes_at_launch), max_batch_tokens=300)
    requests = [pending(number, 10 + number, FAILING if number == 3 else 20, name=str(number)) for number in range(8)]
    submit(worker, *requests)
    with pytest.raises(EngineFailure, match="a kernel failed"):
        requests.pop(3).future.result(10)
    assert all(log_odds(request)[1] == 20.0 for request in requests)
    assert logged_requests(caplog) == [["3"]]


def test_closing_finishes_the_running_batch_and_fails_queued_requests(start: Start) -> None:
    worker, engine = start()
    engine.gate.clear()
    running, queued = pending(1, 10), pending(2, 20)
    submit(worker, running)
    assert engine.entered.acquire(timeout=10)
    submit(worker, queued)
    closing = threading.Thread(target=worker.close)
    closing.start()
    with pytest.raises(ModelUnavailable):
        submit_without_end(worker)  # some requests are queued before the worker is closing
    engine.gate.set()
    closing.join(10)
    assert log_odds(running) == {0: 10.0}
    with pytest.raises(ModelUnavailable):
        queued.future.result(10)


def test_closing_waits_for_a_launched_batch(start: Start) -> None:
    gpu = Gpu()
    worker, _ = start(gpu)
    gpu.gate.clear()
    submit(worker, request := pending(1, 10))
    while not gpu.log:
        time.sleep(0.001)
    closing = threading.Thread(target=worker.close)
    closing.start()
    gpu.gate.set()
    closing.join(10)
    assert log_odds(request) == {0: 10.0}


def test_a_callback_of_a_request_may_close_the_worker(start: Start) -> None:
    def close(_: object) -> None:
        worker.close()
        closed.set()

    (worker, _), request, closed = start(), pending(1, 10), threading.Event()
    request.future.add_done_callback(close)
    submit(worker, request)
    assert closed.wait(10)
