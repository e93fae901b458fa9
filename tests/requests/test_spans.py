"""Spans in the worker: they are queued when their request has been scored, whatever the queue holds by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from local_rerank.errors import Overloaded
from local_rerank.requests.pair import Pair
from local_rerank.requests.pending import PendingRequest
from local_rerank.requests.worker import Worker
from tests.requests.test_worker import BUDGET, CountedEngine, Gpu, log_odds, pending, submit, until


@pytest.fixture(params=["cpu", "gpu", "at launch"])
def engine(request: pytest.FixtureRequest) -> CountedEngine:
    return CountedEngine() if request.param == "cpu" else Gpu(computes_at_launch=request.param == "at launch")


@contextmanager
def working(engine: CountedEngine, max_queued_tokens: int) -> Iterator[Worker]:
    launch = engine.launch if isinstance(engine, Gpu) else None
    worker = Worker(engine.score, max_batch_tokens=BUDGET, max_queued_tokens=max_queued_tokens, launch=launch)
    try:
        yield worker
    finally:
        engine.gate.set()
        worker.close()


def with_spans(in_callback: Callable[[], object], num_spans: int) -> PendingRequest:
    """A request for the spans of two documents; `in_callback` runs when both were scored, before spans are queued."""
    plain = pending(1, 10, 11)
    spans = [((i, i + 1), Pair.of((1,) * 10, (20 + i,) + (1,) * 69)) for i in range(num_spans)]

    def span_pairs(document: str, bounds: tuple[int, int], pair: Pair) -> list[tuple[tuple[int, int], Pair]]:
        in_callback()
        return spans

    request = replace(plain.request, spans=True, top_n=1)
    tokenized = replace(plain.tokenized, bounds=((0, 1), (0, 1)))
    return PendingRequest(request, tokenized, model_id="counted", started=0, span_pairs=span_pairs)


def test_spans_are_scored_behind_a_full_queue_which_counts_them(engine: CountedEngine) -> None:
    with working(engine, max_queued_tokens=1000) as worker:
        others = pending(2, *range(10, 23))  # 920 tokens

        def fill_the_queue() -> None:
            engine.gate.clear()
            worker.submit(others)

        submit(worker, request := with_spans(fill_the_queue, num_spans=80))
        until(lambda: worker.num_queued_tokens > 1000)
        with pytest.raises(Overloaded):
            worker.submit(pending(3, 10))
        engine.gate.set()
        (item,) = request.future.result(10)
        assert item.index == 1
        assert item.spans is not None
        assert [span.start for span in item.spans[-2:]] == [1, 0], "best first"
        assert request.future.result().total_tokens == 2 + 80 * 80
        assert len(log_odds(others)) == 13


def test_a_request_is_cancelled_while_its_spans_are_queued(engine: CountedEngine) -> None:
    with working(engine, max_queued_tokens=500_000) as worker:
        submit(worker, gone := with_spans(engine.gate.clear, num_spans=80))  # three batches
        until(lambda: 0 < worker.num_queued_tokens < 80 * 70)
        assert gone.future.cancel()  # as a server does at the deadline
        assert worker.num_queued_tokens == worker.num_queued_requests == 0
        engine.gate.set()
        submit(worker, after := pending(2, 33))
        assert log_odds(after) == {0: 33.0}
