"""Measure nDCG@10 of BM25, a model alone and the model blended, as in the table of docs/quality.md.

    python -m benchmarks.quality --data DIR [--model MODEL] [--weight 1]

DIR has a folder for each collection, with corpus.jsonl, queries.jsonl, qrels.trec and bm25.run. The top 20 of the run
are reranked for the first 200 queries. Needs `local-rerank[eval]`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from local_rerank import Reranker, RerankRequest
from local_rerank.evaluation.blending import Blend
from local_rerank.evaluation.collection import Collection, read_collection
from local_rerank.evaluation.measures import MEASURE, Scores, System, blend_scores, compare, measure, reorder, score

NAMES = ("xquad_sent_en", "xquad_sent_zh", "med", "cran")
TOP_K, MAX_QUERIES = 20, 200
SANITY = Path(__file__).parents[1] / "tests" / "data" / "sanity40.jsonl"


def main() -> None:
    """Print the table, then the result on the hand-written cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--weight", type=float, default=1.0, help="weight of the blended rows")
    arguments = parser.parse_args()
    blends = [Blend("run", arguments.weight), Blend("bm25", arguments.weight)]
    with Reranker(arguments.model) as reranker:
        columns = {name: systems(reranker, read(arguments.data / name), blends) for name in NAMES}
        print_table(columns, reranker)
        print_sanity(reranker)


def read(folder: Path, *, max_queries: int | None = MAX_QUERIES) -> Collection:
    files = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels.trec", "run": "bm25.run"}
    return read_collection(**{kind: folder / name for kind, name in files.items()}, max_queries=max_queries)


def systems(reranker: Reranker, collection: Collection, blends: list[Blend]) -> list[System]:
    """Measure the first stage, the model alone, and each blend."""
    start = time.perf_counter()
    scores = dict(score(reranker, collection, top_k=TOP_K))
    print(f"{sum(map(len, scores.values()))} pairs in {time.perf_counter() - start:.0f} s", flush=True)
    ways: dict[str, Scores] = {"BM25, the first stage": {}, f"{reranker.model_id} alone": scores}
    ways |= {f"{reranker.model_id}, `--blend {how}`": blend_scores(scores, collection, how) for how in blends}
    return [
        System(name=name, values=measure(collection.qrels, reorder(collection, each), [MEASURE]))
        for name, each in ways.items()
    ]


def print_table(columns: dict[str, list[System]], reranker: Reranker) -> None:
    """Print a row for each system; * marks a difference from the first stage with p < 0.05."""
    info = reranker.info
    print(f"\n{datetime.date.today()}, {info.model_id} on {info.device} in {info.dtype}, {MEASURE}:\n")
    print(f"| | {' | '.join(NAMES)} | mean |\n| --- |{' --- |' * (len(NAMES) + 1)}")
    for row in zip(*columns.values(), strict=True):
        means = [system.mean(MEASURE) for system in row]
        marks = [
            "*" if compare(first, system).p_value < 0.05 else ""
            for (first, *_), system in zip(columns.values(), row, strict=True)
        ]
        cells = [f"{short(mean)}{mark}" for mean, mark in zip(means, marks, strict=True)]
        print(f"| {row[0].name} | {' | '.join(cells)} | {short(statistics.fmean(means))} |")


def print_sanity(reranker: Reranker) -> None:
    """Print how many hand-written cases are correct, and how decided the scores are."""
    cases = [json.loads(line) for line in SANITY.read_text(encoding="utf-8").splitlines()]
    requests = [RerankRequest(query=case["query"], documents=tuple(case["documents"])) for case in cases]
    results = list(reranker.rank_batch(requests))
    hits = sum(result[0].index == case["right"] for case, result in zip(cases, results, strict=True))
    right, wrong = [], []
    for case, result in zip(cases, results, strict=True):
        for item in result:
            (right if item.index == case["right"] else wrong).append(item.relevance_score)
    print(
        f"\n{hits} of {len(cases)} hand-written cases correct; {share(x > 0.5 for x in right)} of the right documents "
        f"above 0.5, {share(x < 0.2 for x in wrong)} of the wrong ones below 0.2"
    )


def short(value: float) -> str:
    """Format with three digits and without the leading zero."""
    return f"{value:.3f}".removeprefix("0")


def share(flags: Iterable[bool]) -> str:
    return f"{statistics.fmean(flags):.0%}"


if __name__ == "__main__":
    main()
