"""Fit a calibration on each collection and measure it on the others, as in the table of docs/quality.md.

    python -m benchmarks.calibration --data DIR [--model MODEL]

DIR has a folder for each collection, as for benchmarks.quality. The pairs are the top 20 of the run for each query; a
document without a judgement is not relevant. Needs `local-rerank[eval]`. Keeps no fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.quality import NAMES, TOP_K, read
from local_rerank import Reranker
from local_rerank.evaluation.calibrating import Scored, area_under_roc, brier_score, calibration_error, fit, reliability
from local_rerank.evaluation.collection import Collection
from local_rerank.evaluation.measures import Scores, score
from local_rerank.requests.scores import Curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    collections = {name: read(arguments.data / name, max_queries=None) for name in NAMES}
    with Reranker(arguments.model) as reranker:
        scores = {name: dict(score(reranker, each, top_k=TOP_K)) for name, each in collections.items()}
    print_table({name: labelled(each, scores[name]) for name, each in collections.items()})


def labelled(collection: Collection, scores: Scores) -> Scored:
    """The scored candidates with their labels."""
    rows = [
        (log_odds, collection.qrels[query_id].get(candidate.document_id, 0) >= 1, number)
        for number, (query_id, values) in enumerate(scores.items())
        for candidate, log_odds in zip(collection.run[query_id], values, strict=False)
    ]
    log_odds, relevant, query = zip(*rows, strict=True)
    return Scored(log_odds=np.array(log_odds), relevant=np.array(relevant), query=np.array(query))


def print_table(pairs: Mapping[str, Scored]) -> None:
    """Print a row for each collection that is measured, and a column for each that the curve was fitted to."""
    fits = {name: fit(each, precisions=[], recalls=[], num_resamples=1) for name, each in pairs.items()}
    print(f"| Brier score / calibration error of | AUC | relevant | uncalibrated | {' | '.join(fits)} |")
    print(f"| --- | --- | --- |{' --- |' * (len(fits) + 1)}")
    for name, each in pairs.items():
        auc = area_under_roc(each, np.ones((1, each.num_queries)))[0]
        own = f"{fits[name].quality['brier_after']:.3f} / {fits[name].quality['error_after']:.3f}"  # cross-validated
        cells = [own if name == other else errors(each, found.curve) for other, found in fits.items()]
        shown = f"{auc:.3f} | {each.relevant.mean():.1%} | {errors(each, Curve())}"
        print(f"| {name} ({fits[name].method}) | {shown} | {' | '.join(cells)} |")


def errors(pairs: Scored, curve: Curve) -> str:
    probabilities = pairs.probabilities(curve)
    return f"{brier_score(probabilities, pairs):.3f} / {calibration_error(reliability(probabilities, pairs)):.3f}"


if __name__ == "__main__":
    main()
