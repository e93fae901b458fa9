"""The scheduling policy: budgets, order, fairness, and that each pair is batched exactly once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_rerank.requests.pair import Pair
from local_rerank.requests.scheduler import GOOD_BATCHES, DrainRate, Scheduler


def pairs(prefix: int, lengths: list[int], prefix_length: int = 10) -> list[Pair]:
    return [Pair((prefix,) * prefix_length, (1,) * length) for length in lengths]


def drain(scheduler: Scheduler) -> list[list[tuple[int, int]]]:
    batches = []
    while batch := scheduler.next_batch():
        batches.append([(entry.request_id, entry.position) for entry in batch])
    return batches


def cost(batch: list[Pair]) -> int:
    return sum(len(prefix) for prefix in {pair.prefix_ids for pair in batch}) + sum(
        len(pair.document_ids) for pair in batch
    )


@given(
    requests=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=12), min_size=1, max_size=8),
    budget=st.integers(20, 500),
)
def test_every_pair_is_batched_once_and_no_batch_exceeds_the_budget(requests: list[list[int]], budget: int) -> None:
    scheduler = Scheduler(budget)
    for request_id, lengths in enumerate(requests):
        scheduler.add(request_id, pairs(request_id, lengths))
    taken = []
    while batch := scheduler.next_batch():
        assert len(batch) == 1 or cost([entry.pair for entry in batch]) <= budget
        taken += [(entry.request_id, entry.position) for entry in batch]
    assert sorted(taken) == [(i, j) for i, lengths in enumerate(requests) for j in range(len(lengths))]
    assert scheduler.num_queued_tokens == scheduler.num_queued_requests == 0


def test_a_small_request_behind_a_large_one_is_in_the_next_batch() -> None:
    scheduler = Scheduler(2048)
    scheduler.add(0, pairs(0, [300] * 500))
    scheduler.next_batch()
    scheduler.add(1, pairs(1, [70] * 8))
    assert {entry.position for entry in scheduler.next_batch() if entry.request_id == 1} == set(range(8))


def test_the_oldest_request_advances_in_every_batch() -> None:
    scheduler = Scheduler(2048)
    scheduler.add(0, pairs(0, [300] * 10))
    taken_from_oldest = arrival = 0
    while taken_from_oldest < 10:
        for _ in range(5):  # 5 x 8 x 70 tokens: more than a batch
            arrival += 1
            scheduler.add(arrival, pairs(arrival, [70] * 8))
        batch = scheduler.next_batch()
        now = sum(entry.request_id == 0 for entry in batch)
        assert 0 < now < len(batch), "others advance too"
        taken_from_oldest += now


def test_a_prefix_shared_by_requests_counts_once() -> None:
    scheduler = Scheduler(100)
    for request_id in range(3):
        scheduler.add(request_id, pairs(0, [20], prefix_length=40))
    assert drain(scheduler) == [[(0, 0), (1, 0), (2, 0)]]


def test_queued_tokens_count_the_prefix_once_and_each_queued_document() -> None:
    scheduler = Scheduler(60)
    lengths = random.Random(0).choices(range(1, 50), k=10)
    scheduler.add(0, pairs(0, lengths, prefix_length=10))
    assert scheduler.num_queued_tokens == 10 + sum(lengths)
    batch = scheduler.next_batch()
    assert scheduler.num_queued_tokens == 10 + sum(lengths) - sum(len(entry.pair.document_ids) for entry in batch)


def test_a_lowered_budget_is_raised_after_enough_batches() -> None:
    scheduler = Scheduler(2000)
    scheduler.lower_budget(1800)
    assert scheduler.max_batch_tokens == 900
    scheduler.lower_budget(5000)  # larger than any batch can be now: the budget is halved
    assert scheduler.max_batch_tokens == 450
    for _ in range(GOOD_BATCHES - 1):
        scheduler.raise_budget()
    assert scheduler.max_batch_tokens == 450
    for _ in range(10 * GOOD_BATCHES):
        scheduler.raise_budget()
    assert scheduler.max_batch_tokens == 2000
    for _ in range(20):
        scheduler.lower_budget(1)
    assert scheduler.max_batch_tokens == 1


def test_the_drain_rate_follows_the_last_batches() -> None:
    rate = DrainRate()
    assert rate.tokens_per_second is None
    assert rate.seconds_for(1_000_000) == 1.0
    rate.add(2000, 2.0)
    assert rate.tokens_per_second == pytest.approx(1000)
    assert rate.seconds_for(500) == pytest.approx(0.5)
    for _ in range(100):
        rate.add(2000, 0.5)
    assert rate.tokens_per_second == pytest.approx(4000, rel=0.01)
