"""The model's thread with a counted engine in the model's place: fairness, faults, memory, and who is told of them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError

import pytest

from local_rerank.errors import EngineFailure, OutOfMemory, Overloaded
from local_rerank.requests.pending import PendingRequest
from local_rerank.requests.scheduler import GOOD_BATCHES
from local_rerank.requests.tokenization import Pair, TokenizedRequest, num_batch_tokens
from local_rerank.requests.worker import BatchReport, Worker
from local_rerank.types import RerankRequest, RerankResult

BUDGET = 2048
GUILTY, HUGE, NAN = 901, 902, 903  # tokens that make the engine fail, run out of memory, or answer no number


class CountedEngine:
    """Scores a pair by its document's first token; a test holds it, and certain tokens make it fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.num_tokens: list[int] = []  # of each forward pass
        self.memory = 1 << 30  # tokens that fit
        self.fails_at: int | None = None  # number of the forward pass that fails

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        num_tokens = num_batch_tokens(pairs)
        self.num_tokens.append(num_tokens)
        self.entered.release()
        assert self.gate.wait(30)
        if len(self.num_tokens) == self.fails_at:
            raise RuntimeError("it failed once")
        firsts = [pair.document_ids[0] for pair in pairs]
        if num_tokens > self.memory or HUGE in firsts:
            raise OutOfMemory(num_tokens=num_tokens)
        if GUILTY in firsts:
            raise RuntimeError("a kernel failed")
        return [math.nan if first == NAN else float(first) for first in firsts]


class Gpu(CountedEngine):
    """Launches a batch and computes it as its scores are fetched; or fails as it is launched."""

    def __init__(self, *, fails_early: bool = False) -> None:
        super().__init__()
        self.fails_early = fails_early
        self.log: list[str] = []

    def launch(self, pairs: Sequence[Pair]) -> Callable[[], list[float]]:
        name = f"batch of {len(pairs)}"
        self.log.append(f"launched {name}")
        early = self.score(pairs) if self.fails_early else None

        def wait() -> list[float]:
            assert self.gate.wait(30)
            self.log.append(f"fetched {name}")
            return self.score(pairs) if early is None else early

        return wait


Start = Callable[..., tuple[Worker, CountedEngine]]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[tuple[Worker, CountedEngine]] = []

    def start(gpu: Gpu | None = None, **options: int) -> tuple[Worker, CountedEngine]:
        engine, limits = gpu or CountedEngine(), {"max_batch_tokens": BUDGET, "max_queued_tokens": 500_000} | options
        made.append((Worker(engine.score, **limits, launch=None if gpu is None else gpu.launch), engine))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for worker, engine in made:
        engine.gate.set()
        worker.close()


def job(prefix: int, *firsts: int, length: int = 70, name: str | None = None) -> PendingRequest:
    """A job of one document per first token, each of `length` tokens, after ten prefix tokens."""
    pairs = tuple(Pair((prefix,) * 10, (first,) + (1,) * (length - 1)) for first in firsts)
    num = len(pairs)
    tokenized = TokenizedRequest(
        pairs=pairs,
        pair_of_document=tuple(range(num)),
        num_truncated_tokens=(0,) * num,
        num_query_tokens=1,
        num_query_truncated_tokens=0,
        num_suffix_tokens=0,
        total_tokens=num,
    )
    request = RerankRequest(query="q", documents=("d",) * num)
    return PendingRequest(request, tokenized, model_id="counted", started=time.perf_counter(), name=name)


def submit(worker: Worker, *jobs: PendingRequest) -> None:
    for one in jobs:
        worker.submit(one)


def odds(one: PendingRequest) -> dict[int, float]:
    result: RerankResult = one.future.result(10)
    return {item.index: item.log_odds for item in result}


def test_a_small_request_behind_a_large_one_waits_for_one_batch_at_most(start: Start) -> None:
    worker, engine = start()
    engine.gate.clear()
    large, small = job(1, *range(10, 510), length=300), job(2, *range(10, 18))
    submit(worker, large)
    assert engine.entered.acquire(timeout=10)  # its first batch runs
    submit(worker, small)
    batches_seen: list[int] = []
    small.future.add_done_callback(lambda _: batches_seen.append(len(engine.num_tokens)))
    engine.gate.set()
    assert odds(small) == {index: 10.0 + index for index in range(8)}
    assert batches_seen == [2], "the batch that ran as it came, and its own"
    assert odds(large) == {index: 10.0 + index for index in range(500)}
    assert len(engine.num_tokens) > 70


def test_the_large_request_advances_while_small_ones_keep_coming(start: Start) -> None:
    worker, engine = start()
    engine.gate.clear()
    large = job(1, *range(10, 40), length=300)
    submit(worker, job(9, 5), large)  # the first holds the engine while the others queue
    small = [job(100 + number, *range(10, 18)) for number in range(60)]
    submit(worker, *small)
    engine.gate.set()
    answered: list[str] = []
    large.future.add_done_callback(lambda _: answered.append("large"))
    small[-1].future.add_done_callback(lambda _: answered.append("last small"))
    assert len(odds(large)) == 30
    assert all(len(odds(one)) == 8 for one in small)
    assert max(engine.num_tokens) <= BUDGET
    assert len(engine.num_tokens) <= 1 + -(-(60 * 570 + 30 * 300) // (BUDGET - 570)) + 1, "batches are filled"


def test_only_the_guilty_request_of_a_batch_fails_and_that_is_logged_once(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker, engine = start()
    engine.gate.clear()
    submit(worker, job(9, 5))
    assert engine.entered.acquire(timeout=10)
    innocent = [job(number, 10 + number, name=f"innocent-{number}") for number in range(5)]
    guilty = job(7, 10, GUILTY, name="guilty-1")
    submit(worker, *innocent[:3], guilty, *innocent[3:])
    engine.gate.set()
    with pytest.raises(EngineFailure, match="a kernel failed"):
        guilty.future.result(10)
    assert [odds(one) for one in innocent] == [{0: 10.0 + number} for number in range(5)]
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.__dict__["request_ids"] for record in errors] == [["guilty-1"]]
    assert errors[0].exc_info
    submit(worker, after := job(3, 33))
    assert odds(after) == {0: 33.0}


def test_a_batch_that_fails_once_is_served_in_halves_and_logged_with_all_its_requests(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker, engine = start()
    engine.gate.clear()
    submit(worker, job(9, 5))
    assert engine.entered.acquire(timeout=10)
    both = [job(1, 11, name="a"), job(2, 12, name="b")]
    submit(worker, *both)
    engine.fails_at = 2
    engine.gate.set()
    assert [odds(one) for one in both] == [{0: 11.0}, {0: 12.0}]
    assert len(engine.num_tokens) == 4
    worker.close()  # by then it has been logged
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.__dict__["request_ids"] for record in errors] == [["a", "b"]]
    assert "it failed once" in caplog.text


def test_a_score_that_is_no_number_is_an_error_of_its_request_only(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker, engine = start()
    engine.gate.clear()
    submit(worker, job(9, 5))
    assert engine.entered.acquire(timeout=10)
    bad, good = job(1, 10, NAN, 12, name="bad"), job(2, 20, 21, name="good")
    submit(worker, bad, good)
    engine.gate.set()
    with pytest.raises(EngineFailure, match="nan as log-odds"):
        bad.future.result(10)
    assert odds(good) == {0: 20.0, 1: 21.0}
    assert [record.__dict__["request_ids"] for record in caplog.records if record.levelno >= logging.ERROR] == [["bad"]]


def test_out_of_memory_makes_batches_smaller_and_every_request_is_answered(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker, engine = start()
    engine.memory = 600
    jobs = [job(number, *range(10, 30)) for number in range(5)]
    submit(worker, *jobs)
    assert all(odds(one) == {index: 10.0 + index for index in range(20)} for one in jobs)
    assert worker.max_batch_tokens <= 600
    tried = len(engine.num_tokens)
    submit(worker, again := job(1, *range(10, 30)))
    assert len(odds(again)) == 20
    assert max(engine.num_tokens[tried:]) <= 600, "what did not fit is not tried again"
    assert "out of memory" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_after_many_batches_that_fit_larger_ones_are_tried_again(start: Start) -> None:
    worker, engine = start()
    engine.memory = 600
    submit(worker, first := job(1, *range(10, 40)))
    assert len(odds(first)) == 30
    lowered = worker.max_batch_tokens
    engine.memory = 1 << 30
    for _ in range(4 * GOOD_BATCHES):
        submit(worker, one := job(1, 10))
        odds(one)
    assert lowered < worker.max_batch_tokens == BUDGET


def test_a_pair_that_does_not_fit_at_all_fails_alone(start: Start) -> None:
    worker, engine = start()
    engine.gate.clear()
    submit(worker, job(9, 5))
    assert engine.entered.acquire(timeout=10)
    huge, good = job(1, 10, HUGE), job(2, 20, 21)
    submit(worker, huge, good)
    engine.gate.set()
    with pytest.raises(OutOfMemory):
        huge.future.result(10)
    assert odds(good) == {0: 20.0, 1: 21.0}


def test_a_cancelled_job_frees_its_place_in_the_queue_at_once(start: Start) -> None:
    worker, engine = start(max_queued_tokens=1000)
    engine.gate.clear()
    submit(worker, job(9, 5))
    assert engine.entered.acquire(timeout=10)
    submit(worker, gone := job(1, *range(10, 22)))
    with pytest.raises(Overloaded):
        worker.submit(job(2, *range(10, 22)))
    assert gone.future.cancel()
    assert worker.num_queued_tokens == worker.num_queued_requests == 0
    submit(worker, stays := job(2, *range(10, 22)))
    engine.gate.set()
    assert len(odds(stays)) == 12
    assert len(engine.num_tokens) == 2
    with pytest.raises(CancelledError):
        gone.future.result()


def test_retry_after_is_the_measured_time_until_there_is_room(start: Start) -> None:
    worker, engine = start(max_queued_tokens=1000)
    engine.gate.clear()
    submit(worker, job(9, 5))
    assert engine.entered.acquire(timeout=10)
    time.sleep(0.2)  # the engine's own time, which is what is measured
    engine.gate.set()
    while worker.tokens_per_second is None:
        time.sleep(0.001)
    rate = worker.tokens_per_second
    assert rate < 70 / 0.2
    engine.gate.clear()
    submit(worker, job(9, 5))
    assert engine.entered.acquire(timeout=10)
    submit(worker, job(1, *range(10, 22)))  # 850 tokens
    with pytest.raises(Overloaded) as caught:
        worker.submit(job(2, 10, 11, 12))  # 220 tokens
    assert caught.value.retry_after == pytest.approx((850 + 220 - 1000) / rate)
    with pytest.raises(Overloaded) as caught:
        worker.submit(job(2, *range(10, 500)))
    assert caught.value.retry_after == pytest.approx(850 / rate), "an empty queue takes any request"
    assert worker.retry_after() == pytest.approx(850 / rate)


def test_one_pair_at_a_time_gives_every_pair_a_pass_of_its_own(start: Start) -> None:
    worker, engine = start(one_pair_at_a_time=True)
    reports: list[BatchReport] = []
    worker.on_batch = reports.append
    submit(worker, one := job(1, 10, 11, 12))
    assert odds(one) == {0: 10.0, 1: 11.0, 2: 12.0}
    assert engine.num_tokens == [80, 80, 80]
    while not reports:
        time.sleep(0.001)
    assert (reports[0].num_tokens, reports[0].num_prefix_tokens_saved) == (240, 0)


def test_a_batch_is_reported_with_the_prefix_tokens_that_sharing_saved(start: Start) -> None:
    worker, _ = start()
    reports: list[BatchReport] = []
    worker.on_batch = reports.append
    submit(worker, one := job(1, 10, 11, 12))
    odds(one)
    while not reports:
        time.sleep(0.001)
    (report,) = reports
    assert (report.num_requests, report.num_pairs, report.num_tokens) == (1, 3, 10 + 3 * 70)
    assert report.num_prefix_tokens_saved == 2 * 10
    assert report.seconds > 0


def test_a_gpu_gets_its_next_batch_before_the_scores_of_the_last_are_fetched(start: Start) -> None:
    gpu = Gpu()
    worker, _ = start(gpu, max_batch_tokens=100)
    gpu.gate.clear()
    submit(worker, first := job(1, 10))
    while gpu.log != ["launched batch of 1"]:
        time.sleep(0.001)
    submit(worker, second := job(2, 20), third := job(3, 30))
    gpu.gate.set()
    assert [odds(one) for one in (first, second, third)] == [{0: 10.0}, {0: 20.0}, {0: 30.0}]
    first_fetched = gpu.log.index("fetched batch of 1")
    assert first_fetched == 1, "it waited for the only batch there was"
    assert gpu.log[2:4] == ["launched batch of 1", "launched batch of 1"]
    assert len(gpu.log) == 6


@pytest.mark.parametrize("fails_early", [False, True])
def test_a_gpu_that_fails_one_batch_answers_all_the_others(
    start: Start, fails_early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu(fails_early=fails_early)
    worker, _ = start(gpu, max_batch_tokens=300)
    jobs = [job(number, 10 + number, GUILTY if number == 3 else 20, name=f"job-{number}") for number in range(8)]
    submit(worker, *jobs)
    with pytest.raises(EngineFailure, match="a kernel failed"):
        jobs.pop(3).future.result(10)
    assert all(odds(one)[1] == 20.0 for one in jobs)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.__dict__["request_ids"] for record in errors] == [["job-3"]]


@pytest.mark.parametrize("fails_early", [False, True])
def test_a_gpu_that_runs_out_of_memory_gets_smaller_batches(start: Start, fails_early: bool) -> None:
    gpu = Gpu(fails_early=fails_early)
    gpu.memory = 600
    worker, _ = start(gpu)
    jobs = [job(number, *range(10, 30)) for number in range(5)]
    submit(worker, *jobs)
    assert all(odds(one) == {index: 10.0 + index for index in range(20)} for one in jobs)
    assert worker.max_batch_tokens <= 600


def test_closing_waits_for_what_a_gpu_computes(start: Start) -> None:
    gpu = Gpu()
    worker, _ = start(gpu)
    gpu.gate.clear()
    submit(worker, one := job(1, 10))
    while not gpu.log:
        time.sleep(0.001)
    closing = threading.Thread(target=worker.close)
    closing.start()
    gpu.gate.set()
    closing.join(10)
    assert odds(one) == {0: 10.0}
