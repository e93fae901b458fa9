"""Compare `local_rerank.planning.simulation` with a real server, after calibrating it on other runs.

    python -m benchmarks.simulation_vs_server --seconds 45

A server with one engine of one thread, or replicas of it (--replicas 2), gets Poisson arrivals at three shares of its
capacity. Requests have 4 documents of 100 tokens on average, few enough for many requests and a meaningful p99. The
simulation gets three numbers from other runs: seconds per token, per batch, and per request outside the engine.
"""

from __future__ import annotations

import argparse
import http.client
import statistics
import time

from benchmarks.serving_load import body, closed_loop, open_loop, post, server
from local_rerank.engine.plan import PLATFORMS
from local_rerank.planning.simulation import SimulationResult, Speed, Traffic, simulate

DOCUMENTS, WORDS, SPREAD = 4, 100, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45.0, help="per share")
    parser.add_argument("--replicas", type=int, default=0, help="0 runs one process without Ray")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    options = parser.parse_args()
    how = ["--ray", "--replicas", str(options.replicas)] if options.replicas else []
    engines = max(1, options.replicas)
    with server("--threads", "1", *how) as address:
        bodies = [body(number, DOCUMENTS, WORDS, SPREAD) for number in range(2000)]
        speed, mean_tokens, prefix_tokens = calibrate(address, bodies, engines, options.seconds / 3)
        print(
            f"calibrated: {1 / speed.token_seconds:.0f} tokens/s, {speed.batch_seconds * 1e3:.1f} ms a batch, "
            f"{speed.request_seconds * 1e3:.1f} ms a request outside the engine; {mean_tokens:.0f} tokens a request"
        )
        capacity = engines / (
            mean_tokens * (speed.token_seconds + speed.batch_seconds / PLATFORMS["cpu"].max_batch_tokens)
        )
        errors = []
        for share in options.shares:
            rate = share * capacity
            real = open_loop(address, bodies, rate, options.seconds)
            traffic = Traffic(
                requests_per_second=rate,
                num_documents=DOCUMENTS,
                document_tokens=(mean_tokens - prefix_tokens) / DOCUMENTS,
                document_spread=SPREAD,
                prefix_tokens=prefix_tokens,
            )
            simulated = simulate(traffic, speed, num_replicas=engines, num_requests=20_000)
            errors.append(compare(share, rate, real, simulated))
    print(
        f"simulation against a server of {engines} engines: p50 off by at most {max(e[0] for e in errors):.0%}, "
        f"p95 {max(e[1] for e in errors):.0%}, p99 {max(e[2] for e in errors):.0%}"
    )


def calibrate(address: str, bodies: list[bytes], engines: int, seconds: float) -> tuple[Speed, float, int]:
    """Return the simulation's speed, and the mean tokens of a request and of its prefix.

    Sequential requests, each in a batch by itself, and a busy server with full batches give two equations for seconds
    per token and per batch.
    """
    connection = http.client.HTTPConnection(address)
    tokens, engine, other = [], [], []
    for content in bodies[:60]:
        started = time.perf_counter()
        answer = post(connection, content)
        engine.append((answer["total_ms"] - answer["queue_ms"] - answer["tokenize_ms"]) / 1e3)
        other.append(time.perf_counter() - started - engine[-1])
        tokens.append(answer["num_computed_tokens"])
    # num_document_tokens does not count the suffix, which is one token here
    prefix_tokens = int(answer["num_computed_tokens"] - answer["num_document_tokens"]) - DOCUMENTS
    mean_tokens = statistics.mean(tokens)
    alone = statistics.mean(engine[5:])  # the first ones warm up
    busy = engines / closed_loop(address, bodies[60:], 12 * engines, seconds)  # engine seconds per request
    requests_of_batch = PLATFORMS["cpu"].max_batch_tokens / mean_tokens
    batch_seconds = max(0.0, (alone - busy) / (1 - 1 / requests_of_batch))
    speed = Speed(
        token_seconds=(busy - batch_seconds / requests_of_batch) / mean_tokens,
        batch_seconds=batch_seconds,
        request_seconds=statistics.median(other[5:]),
        max_batch_tokens=PLATFORMS["cpu"].max_batch_tokens,
    )
    return speed, mean_tokens, prefix_tokens


def compare(share: float, rate: float, real: list[float], simulated: SimulationResult) -> tuple[float, float, float]:
    """Print both; returns the relative errors of p50, p95 and p99."""
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
