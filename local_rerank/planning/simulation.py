"""Arrivals, document lengths, replicas and a token budget -> latencies: a discrete-event simulation of a server.

It runs the real `Scheduler` for each replica; what is modelled is time: a forward pass costs a fixed part and a part
per token, a request a fixed part outside the engine, and an ingress takes one request after the other. Requests come at
random (Poisson), go to the replica with the fewest tokens to work off, and their documents' lengths are log-normal.
Needs neither torch nor Ray. benchmarks/simulation_vs_server.py compares it with a real server.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from local_rerank.requests.scheduler import Scheduler
from local_rerank.requests.tokenization import Pair, num_batch_tokens

MAX_REPLICAS = 4096


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What comes in."""

    requests_per_second: float
    num_documents: int  # of a request
    document_tokens: float  # mean of a document, its suffix counted
    document_spread: float = 0.3  # standard deviation of the logarithm of a document's length
    prefix_tokens: int = 69  # template, instruction and query: once per request


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What an engine and an ingress take, in seconds."""

    token_seconds: float  # of the engine, per token of a batch
    batch_seconds: float = 0.0  # of the engine, per batch
    request_seconds: float = 0.0  # that a request waits outside engine and queues: HTTP, tokenizing, rendering
    ingress_seconds: float = 0.0  # that an ingress is busy with a request, and takes no other
    max_batch_tokens: int = 16384


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Latencies in milliseconds, and how busy the engines were."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    utilisation: float  # share of the time in which an engine worked, mean over replicas
    requests_per_second: float  # that were answered


@dataclass(frozen=True, slots=True)
class _Arrival:
    seconds: float  # at the ingress
    at_replica: float
    pairs: tuple[Pair, ...]


class _Replica:
    """A scheduler and the batch that runs."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.scheduler = Scheduler(max_batch_tokens)
        self.num_tokens = 0  # sent to it and not answered
        self.busy = False
        self.busy_seconds = 0.0


def simulate(
    workload: Workload, speed: Speed, *, num_replicas: int, num_requests: int, num_ingresses: int = 1, seed: int = 0
) -> Outcome:
    """Let `num_requests` come in and be answered; the first tenth, in which queues fill, is not counted."""
    arrivals = list(itertools.islice(_arrivals(workload, speed, num_ingresses, seed), num_requests))
    replicas = [_Replica(speed.max_batch_tokens) for _ in range(num_replicas)]
    done = [0.0] * num_requests
    pairs_left = [len(arrival.pairs) for arrival in arrivals]
    tokens = [num_batch_tokens(arrival.pairs) for arrival in arrivals]
    running: list[tuple[float, int, list[int]]] = []  # end of a batch, its replica, the requests of its pairs

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


def replicas_for(workload: Workload, speed: Speed, *, p99_ms: float, num_ingresses: int = 1) -> tuple[int, Outcome]:
    """The fewest replicas whose p99 is at most that, found by halving; raises ValueError where no number is enough."""
    least = max(1, math.ceil(workload.requests_per_second * _engine_seconds(workload, speed)))
    most = least
    while (outcome := _run(workload, speed, most, num_ingresses)).p99_ms > p99_ms:
        if most >= MAX_REPLICAS or outcome.utilisation < 0.02:
            raise ValueError(f"p99 stays at {outcome.p99_ms:.0f} ms however many replicas there are")
        most *= 2
    low, found = most // 2, (most, outcome)  # `low` is not enough, unless it is below the least
    while most - max(low, least - 1) > 1:
        middle = (max(low, least - 1) + most) // 2
        outcome = _run(workload, speed, middle, num_ingresses)
        if outcome.p99_ms <= p99_ms:
            most, found = middle, (middle, outcome)
        else:
            low = middle
    return found


def _run(workload: Workload, speed: Speed, num_replicas: int, num_ingresses: int) -> Outcome:
    num_requests = max(2000, 20 * num_replicas)
    return simulate(workload, speed, num_replicas=num_replicas, num_requests=num_requests, num_ingresses=num_ingresses)


def _engine_seconds(workload: Workload, speed: Speed) -> float:
    """Work of one request, its batches full."""
    num_tokens = workload.prefix_tokens + workload.num_documents * workload.document_tokens
    return num_tokens * (speed.token_seconds + speed.batch_seconds / speed.max_batch_tokens)


def _arrivals(workload: Workload, speed: Speed, num_ingresses: int, seed: int) -> Iterator[_Arrival]:
    draw = random.Random(seed)
    free = [0.0] * num_ingresses  # when each ingress is
    now = 0.0
    for number in itertools.count():
        now += draw.expovariate(workload.requests_per_second)
        ingress = number % num_ingresses
        free[ingress] = max(free[ingress], now) + speed.ingress_seconds
        yield _Arrival(now, free[ingress], tuple(_pairs(workload, draw, number)))


def _pairs(workload: Workload, draw: random.Random, number: int) -> Iterator[Pair]:
    """Pairs that have lengths and no ids: the scheduler looks at nothing else, but for whose prefix is whose."""
    spread = workload.document_spread
    location = math.log(workload.document_tokens) - spread**2 / 2  # so that the mean is `document_tokens`
    prefix_ids = cast("tuple[int, ...]", range(number, number + workload.prefix_tokens))
    for _ in range(workload.num_documents):
        length = max(1, round(draw.lognormvariate(location, spread)))
        yield Pair(prefix_ids, cast("tuple[int, ...]", range(length)))


def _outcome(arrivals: list[_Arrival], done: list[float], busy_seconds: float, speed: Speed) -> Outcome:
    skipped = len(arrivals) // 10
    latencies = sorted(
        end - arrival.seconds + speed.request_seconds
        for arrival, end in zip(arrivals[skipped:], done[skipped:], strict=True)
    )
    seconds = max(done)
    return Outcome(
        p50_ms=_quantile(latencies, 0.5) * 1e3,
        p95_ms=_quantile(latencies, 0.95) * 1e3,
        p99_ms=_quantile(latencies, 0.99) * 1e3,
        utilisation=busy_seconds / seconds,
        requests_per_second=len(done) / seconds,
    )


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
