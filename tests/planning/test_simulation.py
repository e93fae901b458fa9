"""The simulation, compared with queueing theory and with itself."""

from __future__ import annotations

import pytest

from local_rerank.planning.simulation import Speed, Traffic, replicas_for, simulate


def test_the_latency_of_a_single_request_is_the_sum_of_its_times() -> None:
    traffic = Traffic(
        requests_per_second=0.001, num_documents=10, document_tokens=90, document_spread=0.0, prefix_tokens=100
    )
    speed = Speed(token_seconds=1e-3, batch_seconds=0.1, request_seconds=0.05, ingress_seconds=0.01)
    outcome = simulate(traffic, speed, num_replicas=1, num_requests=50)
    assert outcome.p50_ms == pytest.approx(1e3 * (0.01 + 0.05 + 0.1 + 1000 * 1e-3))


def test_waiting_matches_an_m_d_1_queue() -> None:
    """At half load the mean wait is half a job, and the median latency between 1 and 1.5 jobs."""
    traffic = Traffic(
        requests_per_second=5.0, num_documents=1, document_tokens=60, document_spread=0.0, prefix_tokens=40
    )
    speed = Speed(token_seconds=1e-3, max_batch_tokens=100)  # a job of 100 ms; no two share a batch
    outcome = simulate(traffic, speed, num_replicas=1, num_requests=20_000)
    assert outcome.utilisation == pytest.approx(0.5, abs=0.02)
    assert 100 <= outcome.p50_ms < 150
    assert outcome.p95_ms == pytest.approx(300, rel=0.15)  # from the known series of the distribution


def test_throughput_grows_with_replicas_until_the_ingress_limits_it() -> None:
    traffic = Traffic(requests_per_second=1000.0, num_documents=10, document_tokens=90, prefix_tokens=100)
    speed = Speed(token_seconds=1e-5, ingress_seconds=0.002)
    one, four, many = (simulate(traffic, speed, num_replicas=number, num_requests=2000) for number in (1, 4, 64))
    assert four.requests_per_second == pytest.approx(4 * one.requests_per_second, rel=0.05)
    assert many.requests_per_second == pytest.approx(500, rel=0.05)
    two = simulate(traffic, speed, num_replicas=64, num_requests=2000, num_ingresses=2)
    assert two.requests_per_second == pytest.approx(1000, rel=0.1)


def test_the_smallest_number_of_replicas_is_found() -> None:
    traffic = Traffic(requests_per_second=50.0, num_documents=20, document_tokens=100, prefix_tokens=69)
    speed = Speed(token_seconds=2e-5)
    number, outcome = replicas_for(traffic, speed, p99_ms=80)
    assert outcome.p99_ms <= 80
    assert number > 1
    assert simulate(traffic, speed, num_replicas=number - 1, num_requests=2000).p99_ms > 80


def test_a_latency_below_that_of_one_request_is_rejected() -> None:
    traffic = Traffic(requests_per_second=1.0, num_documents=20, document_tokens=100)
    with pytest.raises(ValueError, match="with any number of replicas"):
        replicas_for(traffic, Speed(token_seconds=1e-3), p99_ms=10)
