"""What a result says about itself, and what is ranked at a deadline. No score is made up."""

from __future__ import annotations

import math
from typing import Any

import pytest

from local_rerank.errors import DeadlineExceeded, InvalidRequest
from local_rerank.requests.pending import PendingRequest
from local_rerank.requests.scores import blend
from local_rerank.requests.worker import Worker
from local_rerank.types import RankedDocument, RerankRequest, status_of
from tests.requests.test_worker import CountedEngine, Start, log_odds, pending, start, submit, until

__all__ = ["start"]

PARTIAL: Any = {"timeout": 60, "on_deadline": "partial"}


class Held:
    """Takes the documents of a request, and holds the engine after the first batch."""

    def __init__(self, engine: CountedEngine) -> None:
        self.engine = engine
        self.lists: list[list[RankedDocument]] = []

    def __call__(self, documents: list[RankedDocument]) -> None:
        self.lists.append(documents)
        self.engine.gate.clear()


def submitted_and_held(worker: Worker, engine: CountedEngine, *firsts: int, **options: Any) -> PendingRequest:
    """A request of several batches, of which the first one is delivered and the second one runs."""
    request = pending(1, *firsts, on_scored=Held(engine), **options)
    submit(worker, request)
    assert engine.entered.acquire(timeout=10)
    assert engine.entered.acquire(timeout=10)
    return request


@pytest.mark.parametrize("timeout", [0.3, 60])
def test_at_the_deadline_what_is_scored_is_ranked_and_the_rest_is_removed(timeout: float, start: Start) -> None:
    worker, engine = start()
    request = submitted_and_held(worker, engine, *range(10, 110), **PARTIAL | {"timeout": timeout})
    request.expire(timeout) if timeout == 60 else request.start_timer()
    result = request.future.result(10)  # the batch that runs is not awaited
    assert [item.log_odds for item in result] == sorted((10.0 + item.index for item in result), reverse=True)
    assert 0 < len(result) < 100
    assert sorted([item.index for item in result] + list(result.not_scored)) == list(range(100))
    assert (result.status, result.status_counts) == (
        f"partial={len(result.not_scored)}",
        {"partial": 100 - len(result)},
    )
    assert (worker.num_queued_tokens, worker.num_queued_requests) == (0, 0)
    engine.gate.set()
    submit(worker, later := pending(2, 33))
    assert log_odds(later) == {0: 33.0}
    assert request.future.result() is result
    assert len(engine.num_tokens) == 3, "the rest of the request was not scored"


@pytest.mark.parametrize(("on_deadline", "is_any_scored"), [("error", True), ("error", False), ("partial", False)])
def test_a_deadline_is_an_error_by_default_and_when_nothing_is_scored(
    on_deadline: Any, is_any_scored: bool, start: Start
) -> None:
    worker, engine = start()
    if is_any_scored:
        request = submitted_and_held(worker, engine, *range(10, 110))
        request.expire(0.05)
    else:
        engine.gate.clear()
        submit(worker, request := pending(1, 10, 11, timeout=0.05, on_deadline=on_deadline))
        request.start_timer()
    remedy = "raise the timeout, .*, or take what is scored" if is_any_scored else "no document was scored by then"
    with pytest.raises(DeadlineExceeded, match=f"not answered within 50 ms; {remedy}"):
        request.future.result(10)
    until(lambda: worker.num_queued_tokens == 0)
    engine.gate.set()
    submit(worker, later := pending(2, 33))
    assert log_odds(later) == {0: 33.0}


def test_a_document_counts_as_scored_when_all_its_chunks_have_finite_log_odds() -> None:
    """At the deadline a NaN may be there that the worker has not refused yet."""
    request = pending(1, 1, 2, 3, 4, 5, 6, num_chunks=2, **PARTIAL)
    request.log_odds.update({0: 1.0, 2: 3.0, 3: math.nan, 4: 5.0, 5: 6.0})
    request.expire(1)
    result = request.future.result(0)
    assert [(item.index, item.log_odds) for item in result] == [(2, 6.0)]
    assert result.not_scored == (0, 1)


def test_a_partial_ranking_is_blended_and_counted_over_what_is_scored() -> None:
    """Another document's first-stage score, however high, must not move those that are ranked."""
    lines: list[RankedDocument] = []
    options = PARTIAL | {"first_stage_scores": (0.0, 9.0, 5.0, 1e6), "min_score": 0.5}
    request = pending(1, 1, 2, 3, 4, on_scored=lines.extend, **options)
    request.log_odds.update({0: 2.0, 1: -2.0, 2: 1.0})
    request.report()
    assert [(item.index, item.blended_score) for item in lines] == [(0, None), (2, None)]
    request.expire(1)
    result = request.future.result(0)
    expected = blend([2.0, -2.0, 1.0], [0.0, 9.0, 5.0], 1.0)
    ranked = [(item.index, item.blended_score) for item in result]
    assert ranked == sorted(((i, expected[i]) for i in (0, 2)), key=lambda pair: -(pair[1]))
    assert (result.not_scored, result.num_below_min_score, result.status) == ((3,), 1, "partial=1; below=1")


def test_the_first_of_result_error_and_deadline_counts() -> None:
    request = pending(1, 1, 2, **PARTIAL)
    request.log_odds.update({0: 1.0, 1: 2.0})
    request.answer()
    request.expire(1)
    assert request.future.result(0).status == "ok"
    late = pending(1, 1, 2)
    late.expire(1)
    late.log_odds.update({0: 1.0, 1: 2.0})
    late.answer()
    assert isinstance(late.future.exception(0), DeadlineExceeded)


def test_spans_that_came_too_late_are_absent_and_counted() -> None:
    request = pending(1, 1, 2, spans=True, **PARTIAL)
    request.log_odds.update({0: 1.0, 1: 2.0})
    assert len(request.more_pairs()) == 2
    request.log_odds[2] = 2.0
    request.expire(1)
    result = request.future.result(0)
    assert [item.spans is None for item in result] == [False, True]
    assert (result.not_scored, result.num_without_spans, result.status) == ((), 1, "partial=1")


@pytest.mark.parametrize(
    ("documents", "log_odds", "top_n", "status"),
    [
        ((1, 2, 3), (0.5, 0.5, 0.5), None, "constant"),
        ((1, 2, 3), (0.5, 0.5, 0.5), 1, "constant"),
        ((1, 2), (-4.3125353, -4.3125357), None, "constant"),  # rounding: the rest of the batch differed
        ((1, 2), (-4.3120, -4.3125), None, "ok"),
        ((1, 2, 3), (0.5, 0.5, 0.6), 1, "ok"),
        ((1, 1), (0.5, 0.5), None, "ok"),
        ((1,), (0.5,), None, "ok"),
    ],
)
def test_equal_scores_of_distinct_documents_are_reported(
    documents: tuple[int, ...], log_odds: tuple[float, ...], top_n: int | None, status: str
) -> None:
    request = pending(1, *documents, top_n=top_n)
    request.log_odds.update(enumerate(log_odds))
    request.answer()
    result = request.future.result(0)
    assert result.status == status
    assert [item.index for item in result] == ([2] if log_odds[-1] == 0.6 else list(range(top_n or len(documents))))
    assert status_of([result, result]) == status


def test_each_document_is_reported_once_as_soon_as_its_score_is_known(start: Start) -> None:
    worker, engine = start()
    request = submitted_and_held(worker, engine, *range(10, 110))
    (first,) = request._on_scored.lists  # type: ignore[union-attr]
    assert 0 < len(first) < 100
    assert not request.future.done()
    request._on_scored.engine = CountedEngine()  # type: ignore[union-attr]  # which nobody waits for
    engine.gate.set()
    result = request.future.result(10)
    reported = [item for documents in request._on_scored.lists for item in documents]  # type: ignore[union-attr]
    assert sorted(reported, key=lambda item: -item.log_odds) == list(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout is 0; give a positive number of seconds"),
        ({"timeout": math.nan}, "timeout is nan"),
        ({"timeout": 10**400}, "a positive number of seconds, at most 1,000,000,000"),
        ({"timeout": "1"}, "timeout must be a number of seconds or None, not str"),
        ({"timeout": True}, "timeout must be a number of seconds or None, not bool"),
        ({"on_deadline": "some"}, "on_deadline must be one of error, partial, not str"),
    ],
)
def test_a_deadline_is_checked_when_the_request_is_created(options: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        RerankRequest(query="q", documents=("d",), **options)
