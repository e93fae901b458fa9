"""How far is `local_rerank.simulation` from a real server? Calibrate it on one request at a time, then compare.

    python benchmarks/simulation_vs_server.py --seconds 30

A server with an engine of one thread, or replicas of one (--replicas 2), gets requests of 16 documents of 100 tokens in
the mean (log-normal, spread 0.3) at random times, at three shares of what its engines can do. The simulation knows
three numbers, from requests sent one after the other: seconds per token, per batch, and per request outside the engine.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import statistics
import time
from dataclasses import dataclass

import numpy as np
from serving_load import body, open_loop, post, server

from local_rerank.scheduler import Scheduler
from local_rerank.simulation import Outcome, Speed, Workload, simulate
from local_rerank.tokenization import Pair

DOCUMENTS, WORDS, SPREAD = 16, 100, 0.3
CALIBRATION = (1, 4, 16, 48)  # documents
BUDGET = 2048  # tokens of a batch on a CPU


@dataclass(frozen=True)
class Timing:
    tokens: float
    batches: int
    engine_seconds: float
    other_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--replicas", type=int, default=0, help="0: one process, without Ray")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    options = parser.parse_args()
    how = ["--ray", "--replicas", str(options.replicas)] if options.replicas else []
    engines = max(1, options.replicas)
    with server("--threads", "1", *how) as address:
        speed, mean_tokens, prefix_tokens = calibrate(address)
        print(
            f"calibrated: {1 / speed.token_seconds:.0f} tokens/s, {speed.batch_seconds * 1e3:.1f} ms a batch, "
            f"{speed.request_seconds * 1e3:.1f} ms a request outside the engine; {mean_tokens:.0f} tokens a request"
        )
        bodies = [body(1000 + number, DOCUMENTS, WORDS, SPREAD) for number in range(400)]
        capacity = engines / (mean_tokens * speed.token_seconds + speed.batch_seconds * mean_tokens / BUDGET)
        errors = []
        for share in options.shares:
            rate = share * capacity
            real = open_loop(address, bodies, rate, options.seconds)
            workload = Workload(
                requests_per_second=rate,
                num_documents=DOCUMENTS,
                document_tokens=(mean_tokens - prefix_tokens) / DOCUMENTS,
                document_spread=SPREAD,
                prefix_tokens=prefix_tokens,
            )
            simulated = simulate(workload, speed, num_replicas=engines, num_requests=20_000)
            errors.append(compare(share, rate, real, simulated))
    print(
        f"simulation against a server of {engines} engines: p50 off by at most {max(e[0] for e in errors):.0%}, "
        f"p95 {max(e[1] for e in errors):.0%}, p99 {max(e[2] for e in errors):.0%}"
    )


def calibrate(address: str) -> tuple[Speed, float, int]:
    """The simulation's numbers, mean tokens of a request of the load, and those of its prefix."""
    connection = http.client.HTTPConnection(address)
    timings, tokens_of_load = [], []
    prefix_tokens = 0
    for documents in CALIBRATION:
        for number in range(12):
            content = body(100 * documents + number, documents, WORDS, SPREAD)
            started = time.perf_counter()
            answer = post(connection, content)
            seconds = time.perf_counter() - started
            engine = (answer["total_ms"] - answer["queue_ms"] - answer["tokenize_ms"]) / 1e3
            if documents == 1:  # a document of the answer counts without its suffix, which is one token here
                prefix_tokens = int(answer["num_computed_tokens"] - answer["num_document_tokens"]) - 1
            if number >= 2:  # the first ones warm up
                timings.append(
                    Timing(answer["num_computed_tokens"], num_batches(answer, documents), engine, seconds - engine)
                )
                if documents == DOCUMENTS:
                    tokens_of_load.append(answer["num_computed_tokens"])
    matrix = np.array([[timing.tokens, timing.batches] for timing in timings])
    token_seconds, batch_seconds = np.linalg.lstsq(matrix, [t.engine_seconds for t in timings], rcond=None)[0]
    speed = Speed(
        token_seconds=float(token_seconds),
        batch_seconds=max(0.0, float(batch_seconds)),
        request_seconds=statistics.median(timing.other_seconds for timing in timings),
        max_batch_tokens=BUDGET,
    )
    return speed, statistics.mean(tokens_of_load), prefix_tokens


def num_batches(answer: dict[str, float], documents: int) -> int:
    """How many batches the scheduler makes of that request, its documents taken as equal."""
    length = int(answer["num_document_tokens"] / documents) + 1
    scheduler = Scheduler(BUDGET)
    scheduler.add(0, [Pair((0,) * 20, (0,) * length)] * documents)
    return sum(1 for _ in itertools.takewhile(bool, iter(scheduler.next_batch, None)))


def compare(share: float, rate: float, real: list[float], simulated: Outcome) -> tuple[float, float, float]:
    """Print both sides; returns the relative errors of p50, p95 and p99."""
    errors = []
    line = []
    for name, part, said in (
        ("p50", 0.5, simulated.p50_ms), ("p95", 0.95, simulated.p95_ms), ("p99", 0.99, simulated.p99_ms)
    ):  # fmt: skip
        measured = real[min(len(real) - 1, int(part * len(real)))] * 1e3
        errors.append(abs(said / measured - 1))
        line.append(f"{name} {measured:.0f} ms (simulated {said:.0f})")
    print(f"{share:.0%} of capacity, {rate:.1f} requests/s, {len(real)} requests: {', '.join(line)}", flush=True)
    return errors[0], errors[1], errors[2]


if __name__ == "__main__":
    main()
