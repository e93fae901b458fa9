"""Measure how much a pair's score depends on its batch, and the cost of `--deterministic`, which prevents that.

    python -m benchmarks.tolerance                                             # the built-in model, fp32
    python -m benchmarks.tolerance --model FOLDER --mode fp32 --mode bf16      # any checkpoint
    python -m benchmarks.tolerance --model FOLDER --mode fp32 --cost           # pairs per second with and without

Each pair is scored alone, in a request with others, in reverse order, and with all requests queued at once, several
times. The result is the largest difference of log-odds from the pair alone.
"""

from __future__ import annotations

import argparse
import random
import time

from local_rerank import Reranker, RerankRequest, RerankResult
from local_rerank.bench.workloads import WORKLOADS, make_requests

DOCUMENT_WORDS = (3, 150)
LOADS = 2  # times that all requests are queued at once, shuffled
WORDS = "river mountain engine protein market treaty violin harbour glacier senate 模型 排序 检索".split()

LogOdds = dict[tuple[str, str], float]


def make_groups(num_queries: int, num_documents: int) -> list[RerankRequest]:
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    return [
        RerankRequest(query=text(2, 12), documents=tuple(text(*DOCUMENT_WORDS) for _ in range(num_documents)))
        for _ in range(num_queries)
    ]


def log_odds(request: RerankRequest, result: RerankResult) -> LogOdds:
    return {(request.query, item.document): item.log_odds for item in result}


def one_by_one(reranker: Reranker, requests: list[RerankRequest]) -> LogOdds:
    found: LogOdds = {}
    for request in requests:
        found |= log_odds(request, reranker.submit(request).result())
    return found


def at_once(reranker: Reranker, requests: list[RerankRequest]) -> LogOdds:
    found: LogOdds = {}
    for request, future in [(request, reranker.submit(request)) for request in requests]:
        found |= log_odds(request, future.result())
    return found


def largest_difference(expected: LogOdds, found: LogOdds) -> float:
    return max(abs(found[pair] - expected[pair]) for pair in expected)


def compare(name: str, reranker: Reranker, groups: list[RerankRequest], reference: LogOdds | None) -> LogOdds:
    """Print the differences; returns the log-odds of the pairs alone."""
    alone = one_by_one(
        reranker, [RerankRequest(query=group.query, documents=(one,)) for group in groups for one in group.documents]
    )
    reverse = [RerankRequest(query=group.query, documents=group.documents[::-1]) for group in groups]
    company = {
        "in one request": one_by_one(reranker, groups),
        "in reverse": one_by_one(reranker, reverse),
    }
    draw = random.Random(1)
    for number in range(LOADS):
        company[f"at once, {number + 1}"] = at_once(reranker, draw.sample(groups, len(groups)))
    differences = {what: largest_difference(alone, found) for what, found in company.items()}
    values = alone.values()
    print(
        f"{name}: {len(alone)} pairs, log-odds {min(values):.2f} to {max(values):.2f}; "
        f"furthest from the pair alone {max(differences.values()):.2e} ("
        + ", ".join(f"{what} {difference:.2e}" for what, difference in differences.items())
        + ")"
        + (f"; from fp32 {largest_difference(reference, alone):.2e}" if reference else ""),
        flush=True,
    )
    return alone


def pairs_per_second(reranker: Reranker, rounds: int) -> float:
    """Of the passages workload: 32 documents of 40 to 100 tokens behind one query; the best round."""
    requests = make_requests(WORKLOADS["passages"], reranker.tokenizer.count_tokens)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        at_once(reranker, requests)
        seconds.append(time.perf_counter() - started)
    return sum(len(request.documents) for request in requests) / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--mode", action="append", help="a dtype; may be repeated; default fp32")
    parser.add_argument("--cost", action="store_true", help="measure what --deterministic costs instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--documents", type=int, default=8, help="of each query")
    chosen = parser.parse_args()
    reference: LogOdds | None = None
    groups = make_groups(chosen.queries, chosen.documents)
    for mode in chosen.mode or ["fp32"]:
        if chosen.cost:
            speeds = []
            for deterministic in (False, True):
                with Reranker(chosen.model, dtype=mode, deterministic=deterministic) as reranker:
                    speeds.append(pairs_per_second(reranker, chosen.rounds))
            usual, exact = speeds
            print(f"{mode}: {usual:.1f} pairs/s, --deterministic {exact:.1f} pairs/s, {usual / exact:.2f} times slower")
            continue
        for deterministic in (False, True):
            with Reranker(chosen.model, dtype=mode, deterministic=deterministic) as reranker:
                name = f"{reranker.model_id}, {reranker.info.dtype}" + ", deterministic" * deterministic
                found = compare(name, reranker, groups, None if deterministic else reference)
            reference = reference or found


if __name__ == "__main__":
    main()
