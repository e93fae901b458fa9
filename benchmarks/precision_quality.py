"""Measure the loss of quality of a precision: nDCG@10 and Kendall's tau per query compared with fp32.

    python -m benchmarks.precision_quality --data DIR [--model MODEL] [--dtype int8]

DIR and the number of queries as in quality.py. Needs `local-rerank[eval]`.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.quality import NAMES, TOP_K, read, short
from local_rerank import Reranker
from local_rerank.bench.measure import kendall_tau
from local_rerank.evaluation.collection import Collection
from local_rerank.evaluation.measures import MEASURE, Scores, measure, reorder, score


def main() -> None:
    """Print a row for each collection."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="int8")
    arguments = parser.parse_args()
    with Reranker(arguments.model, dtype="fp32") as exact, Reranker(arguments.model, dtype=arguments.dtype) as other:
        print(f"| {exact.model_id} | nDCG@10 fp32 | {other.info.dtype} | Kendall's tau, mean | largest difference |")
        print("| --- | --- | --- | --- | --- |")
        for name in NAMES:
            collection = read(arguments.data / name)
            rows = [dict(score(reranker, collection, top_k=TOP_K)) for reranker in (exact, other)]
            print(f"| {name} | {' | '.join(cells(collection, *rows))} |", flush=True)


def cells(collection: Collection, exact: Scores, other: Scores) -> list[str]:
    """Return nDCG of both, mean tau over the queries, and the largest difference of log-odds."""
    means = [
        statistics.fmean(measure(collection.qrels, reorder(collection, scores), [MEASURE])[MEASURE].values())
        for scores in (exact, other)
    ]
    taus = [kendall_tau(row, other[query]) for query, row in exact.items()]
    gaps = [abs(a - b) for query, row in exact.items() for a, b in zip(row, other[query], strict=True)]
    return [*map(short, means), f"{statistics.fmean(taus):.3f}", f"{max(gaps):.3f}"]


if __name__ == "__main__":
    main()
