"""Measure how much a large request delays small ones: requests of 8 passages, alone and next to one of 500 documents.

    python -m benchmarks.fairness                                     # the built-in model
    python -m benchmarks.fairness --layers 4 --samples 100            # random weights, 0.6B shape, 4 layers of 28
    python -m benchmarks.fairness --model FOLDER -- --dtype int8      # options after -- go to the server

The goal is a p99 with the large request at most two batch times above the p99 without it. A batch time is that of a
full batch. A small request arrives when the one before is answered, just after a batch has started: it waits for that
batch and runs in the next one.
"""

from __future__ import annotations

import argparse
import http.client
import re
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving_load import body, post, server
from local_rerank.bench.shapes import make_checkpoint

SMALL_DOCUMENTS, LARGE_DOCUMENTS, WORDS = 8, 500, 50
WARM_UP = 10
GOAL = 2  # batch times
LARGE_NUMBERS = 1_000_000  # seeds of large requests start here, so that no text occurs twice


@dataclass(frozen=True, slots=True)
class SmallRequest:
    """The latency of one small request in seconds, and its parts."""

    total: float
    tokenizing: float
    waiting: float  # until its first batch
    scoring: float

    @property
    def rest(self) -> float:
        """HTTP on both sides, and the event loop."""
        return self.total - self.tokenizing - self.waiting - self.scoring


def samples(address: str, count: int, first: int) -> list[SmallRequest]:
    """Send small requests one after the other; returns them sorted by latency."""
    connection = http.client.HTTPConnection(address)
    return sorted((sample(connection, number) for number in range(first, first + count)), key=lambda each: each.total)


def sample(connection: http.client.HTTPConnection, number: int) -> SmallRequest:
    content = body(number, SMALL_DOCUMENTS, WORDS, spread=0.3)
    started = time.perf_counter()
    answer = post(connection, content)
    total = time.perf_counter() - started
    tokenizing, waiting = answer["tokenize_ms"] / 1e3, answer["queue_ms"] / 1e3
    return SmallRequest(total, tokenizing, waiting, answer["total_ms"] / 1e3 - tokenizing - waiting)


@contextmanager
def large_requests(address: str) -> Iterator[list[float]]:
    """Send large requests one after the other during the block; yields the list of their latencies."""
    over, answered = threading.Event(), list[float]()

    def forever() -> None:
        connection, number = http.client.HTTPConnection(address), LARGE_NUMBERS
        while not over.is_set():
            content, started = body(number, LARGE_DOCUMENTS, WORDS, spread=0.3), time.perf_counter()
            post(connection, content)
            answered.append(time.perf_counter() - started)
            number += 1

    thread = threading.Thread(target=forever)
    thread.start()
    try:
        wait_until_queued(address)
        yield answered
    finally:
        over.set()
        thread.join()


def wait_until_queued(address: str) -> None:
    while not metrics(address)["queued_tokens"]:
        time.sleep(0.01)


def metrics(address: str) -> dict[str, float]:
    """Read the metrics without labels."""
    text = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
    return {name: float(value) for name, value in re.findall(r"^local_rerank_(\w+) (\S+)$", text, re.MULTILINE)}


def percentile(values: list[SmallRequest], share: float) -> float:
    return values[round(share * (len(values) - 1))].total


def mean_parts(values: list[SmallRequest]) -> str:
    parts = ("tokenizing", "waiting", "scoring", "rest")
    return ", ".join(f"{part} {statistics.fmean(getattr(value, part) for value in values):.3f}" for part in parts)


def measure(address: str, count: int) -> None:
    samples(address, WARM_UP, first=0)
    alone = samples(address, count, first=1000)
    with large_requests(address) as answered:
        before = metrics(address)
        beside = samples(address, count, first=100_000)
        after = metrics(address)
    batches = after["batch_seconds_count"] - before["batch_seconds_count"]
    batch = (after["batch_seconds_sum"] - before["batch_seconds_sum"]) / batches
    tokens = (after["batch_tokens_sum"] - before["batch_tokens_sum"]) / batches
    budget = after["batch_budget_tokens"]
    apart = (percentile(beside, 0.99) - percentile(alone, 0.99)) / (batch / tokens * budget)
    for name, values in (("alone", alone), ("beside", beside)):
        print(
            f"{name}: {count} requests of {SMALL_DOCUMENTS} passages, p50 {percentile(values, 0.5):.3f} s, "
            f"p99 {percentile(values, 0.99):.3f} s, longest {values[-1].total:.3f} s (means: {mean_parts(values)})"
        )
    print(
        f"{batches:.0f} batches beside, {tokens:.0f} tokens and {batch:.3f} s in the mean; {len(answered)} requests "
        f"of {LARGE_DOCUMENTS} took {statistics.fmean(answered):.1f} s each; a batch of {budget:.0f} tokens takes "
        f"{batch / tokens * budget:.3f} s: p99 {apart:.2f} batch times apart "
        f"(goal {GOAL}): {'holds' if apart <= GOAL else 'missed'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--layers", type=int, help="random weights in the 0.6B shape with this many layers")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("options", nargs="*", help="options of local-rerank serve, after --")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--request-timeout-ms", "600000", *chosen.options]
        if chosen.layers:
            made = make_checkpoint(Path(folder) / "random", "qwen3-reranker-0.6b", num_layers=chosen.layers)
            options += ["--model", str(made), "--no-self-test"]
        elif chosen.model:
            options += ["--model", chosen.model, "--no-self-test"]
        with server(*options) as address:
            measure(address, chosen.samples)


if __name__ == "__main__":
    main()
