"""Simulate the latencies of a server with replicas, as discrete events.

Each replica runs the real `Scheduler`; only time is modelled. A forward pass costs a fixed time plus a time per token,
a request costs a fixed time outside the engine, and an ingress handles one request at a time. Arrivals are Poisson,
document lengths log-normal, and a request goes to the replica with the fewest pending tokens.
docs/scale.md compares the simulation with a real server.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from local_rerank.requests.pair import Pair, num_batch_tokens
from local_rerank.requests.scheduler import Scheduler

MAX_REPLICAS = 4096


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The incoming requests."""

    requests_per_second: float
    num_documents: int  # per request
    document_tokens: float  # mean, including the suffix
    document_spread: float = 0.3  # standard deviation of the log of a document's length
    prefix_tokens: int = 69  # template, instruction and query, once per request


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The times of an engine and an ingress."""

    token_seconds: float  # in the engine, per token of a batch
    batch_seconds: float = 0.0  # in the engine, per batch
    request_seconds: float = 0.0  # latency outside engine and queues: HTTP, tokenization, rendering
    ingress_seconds: float = 0.0  # during which an ingress is busy with a request
    max_batch_tokens: int = 16384


@dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """The latencies of the requests and the load of the engines."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    utilisation: float  # share of the time that an engine is busy, mean over replicas
    requests_per_second: float  # completed


@dataclass(frozen=True, slots=True)
class _Arrival:
    seconds: float  # at the ingress
    at_replica: float
    pairs: tuple[Pair, ...]


class _Replica:
    """A scheduler and its running batch."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.scheduler = Scheduler(max_batch_tokens)
        self.num_tokens = 0  # pending or running
        self.busy = False
        self.busy_seconds = 0.0


def simulate(
    traffic: Traffic, speed: Speed, *, num_replicas: int, num_requests: int, num_ingresses: int = 1, seed: int = 0
) -> SimulationResult:
    """Simulate `num_requests`; the first tenth, during which queues fill, is not counted."""
    arrivals = list(itertools.islice(_arrivals(traffic, speed, num_ingresses, seed), num_requests))
    replicas = [_Replica(speed.max_batch_tokens) for _ in range(num_replicas)]
    done = [0.0] * num_requests
    pairs_left = [len(arrival.pairs) for arrival in arrivals]
    tokens = [num_batch_tokens(arrival.pairs) for arrival in arrivals]
    running: list[tuple[float, int, list[int]]] = []  # end of a batch, its replica, its request ids

    def start(number: int, now: float) -> None:
        replica = replicas[number]
        batch = replica.scheduler.next_batch()
        replica.busy = bool(batch)
        if batch:
            num_tokens = num_batch_tokens(entry.pair for entry in batch)
            took = speed.batch_seconds + num_tokens * speed.token_seconds
            replica.busy_seconds += took
            heapq.heappush(running, (now + took, number, [entry.request_id for entry in batch]))

    def finish_until(now: float) -> None:
        while running and running[0][0] <= now:
            end, number, request_ids = heapq.heappop(running)
            for request_id in request_ids:
                pairs_left[request_id] -= 1
                if not pairs_left[request_id]:
                    replicas[number].num_tokens -= tokens[request_id]
                    done[request_id] = end
            start(number, end)

    for request_id, arrival in enumerate(arrivals):
        finish_until(arrival.at_replica)
        number = min(range(num_replicas), key=lambda i: replicas[i].num_tokens)
        replica = replicas[number]
        replica.num_tokens += tokens[request_id]
        replica.scheduler.add(request_id, arrival.pairs)
        if not replica.busy:
            start(number, arrival.at_replica)
    finish_until(math.inf)
    return _outcome(arrivals, done, sum(replica.busy_seconds for replica in replicas) / num_replicas, speed)


def replicas_for(traffic: Traffic, speed: Speed, *, p99_ms: float) -> tuple[int, SimulationResult]:
    """Find the smallest number of replicas with that p99 by bisection; raises ValueError if no number is enough."""
    least = max(1, math.ceil(traffic.requests_per_second * _engine_seconds(traffic, speed)))
    most = least
    while (outcome := _run(traffic, speed, most)).p99_ms > p99_ms:
        if most >= MAX_REPLICAS or outcome.utilisation < 0.02:
            raise ValueError(f"p99 is {outcome.p99_ms:.0f} ms with any number of replicas")
        most *= 2
    low, found = most // 2, (most, outcome)  # `low` is too few, or below the minimum
    while most - max(low, least - 1) > 1:
        middle = (max(low, least - 1) + most) // 2
        outcome = _run(traffic, speed, middle)
        if outcome.p99_ms <= p99_ms:
            most, found = middle, (middle, outcome)
        else:
            low = middle
    return found


def _run(traffic: Traffic, speed: Speed, num_replicas: int) -> SimulationResult:
    return simulate(traffic, speed, num_replicas=num_replicas, num_requests=max(2000, 20 * num_replicas))


def _engine_seconds(traffic: Traffic, speed: Speed) -> float:
    """Return the engine time of one request in full batches."""
    num_tokens = traffic.prefix_tokens + traffic.num_documents * traffic.document_tokens
    return num_tokens * (speed.token_seconds + speed.batch_seconds / speed.max_batch_tokens)


def _arrivals(traffic: Traffic, speed: Speed, num_ingresses: int, seed: int) -> Iterator[_Arrival]:
    draw = random.Random(seed)
    free = [0.0] * num_ingresses  # when each ingress is free
    now = 0.0
    for number in itertools.count():
        now += draw.expovariate(traffic.requests_per_second)
        ingress = number % num_ingresses
        free[ingress] = max(free[ingress], now) + speed.ingress_seconds
        yield _Arrival(now, free[ingress], tuple(_pairs(traffic, draw, number)))


def _pairs(traffic: Traffic, draw: random.Random, number: int) -> Iterator[Pair]:
    """Make pairs without token ids; the scheduler only needs lengths and which pairs share a prefix."""
    spread = traffic.document_spread
    location = math.log(traffic.document_tokens) - spread**2 / 2  # gives a mean of `document_tokens`
    prefix_ids = cast("tuple[int, ...]", range(number, number + traffic.prefix_tokens))
    for _ in range(traffic.num_documents):
        length = max(1, round(draw.lognormvariate(location, spread)))
        yield Pair(prefix_ids, cast("tuple[int, ...]", range(length)))


def _outcome(arrivals: list[_Arrival], done: list[float], busy_seconds: float, speed: Speed) -> SimulationResult:
    skipped = len(arrivals) // 10
    latencies = sorted(
        end - arrival.seconds + speed.request_seconds
        for arrival, end in zip(arrivals[skipped:], done[skipped:], strict=True)
    )
    seconds = max(done)
    return SimulationResult(
        p50_ms=_quantile(latencies, 0.5) * 1e3,
        p95_ms=_quantile(latencies, 0.95) * 1e3,
        p99_ms=_quantile(latencies, 0.99) * 1e3,
        utilisation=busy_seconds / seconds,
        requests_per_second=len(done) / seconds,
    )


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
