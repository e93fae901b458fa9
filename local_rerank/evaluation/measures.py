"""`Collection` and a reranker -> log-odds -> orders -> measures -> comparisons.

`score` asks the model once; `reorder` makes an order of its scores, blended with others or not; `measure` compares an
order with the judgements (ir-measures); `compare` compares two systems query by query. Needs the extra
`local-rerank[eval]` from `measure` on. Nothing here reads files, prints or draws.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from local_rerank.errors import ConfigError
from local_rerank.evaluation.blending import Blend, Bm25, best_first, blend
from local_rerank.evaluation.collection import Collection
from local_rerank.types import RerankRequest

if TYPE_CHECKING:
    from local_rerank.reranker import Reranker

Scores = dict[str, list[float]]  # by query: one for each of the top candidates, in the first stage's order
Orders = dict[str, list[str]]  # by query: document ids, best first
Values = dict[str, float]  # by query: a measure's value

MEASURE = "nDCG@10"  # the one that systems are compared by
NUM_RESAMPLES = 9999  # of the randomisation test; with its own, 10,000: p is known to about 0.005
SEED = 0
TIE = 1e-9  # differences below it are rounding


@dataclass(frozen=True, kw_only=True)
class System:
    """A ranking of the whole collection and what it is worth."""

    name: str
    values: dict[str, Values]  # by measure

    def mean(self, measure: str) -> float:
        values = self.values[measure].values()
        return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One system against another by one measure."""

    baseline: str
    system: str
    measure: str
    differences: Values  # system less baseline by query, greatest first
    p_value: float  # two-sided, of a paired randomisation test

    @property
    def wins(self) -> int:
        return sum(difference > TIE for difference in self.differences.values())

    @property
    def losses(self) -> int:
        return sum(difference < -TIE for difference in self.differences.values())

    @property
    def ties(self) -> int:
        return len(self.differences) - self.wins - self.losses

    @property
    def mean_difference(self) -> float:
        return sum(self.differences.values()) / len(self.differences)

    def largest_wins(self, count: int) -> list[tuple[str, float]]:
        """Queries that gained most, the greatest gain first."""
        return [item for item in self.differences.items() if item[1] > TIE][:count]

    def largest_losses(self, count: int) -> list[tuple[str, float]]:
        """Queries that lost most, the greatest loss first."""
        return [item for item in reversed(self.differences.items()) if item[1] < -TIE][:count]


def measures(top_k: int) -> tuple[str, ...]:
    """Names as ir-measures has them; reranking cannot change recall at `top_k`, which bounds what it can reach."""
    return tuple(dict.fromkeys((MEASURE, "RR", "AP", "R@10", f"R@{top_k}")))


def score(reranker: Reranker, collection: Collection, *, top_k: int) -> Iterator[tuple[str, list[float]]]:
    """Query ids with the log-odds of their `top_k` candidates; queries without candidates are left out."""
    found = {query_id: run[:top_k] for query_id, run in collection.run.items() if run}
    requests = (
        RerankRequest(
            query=collection.queries[query_id],
            documents=tuple(collection.documents[candidate.document_id] for candidate in candidates),
        )
        for query_id, candidates in found.items()
    )
    for query_id, result in zip(found, reranker.rank_batch(requests), strict=True):
        yield query_id, [item.log_odds for item in sorted(result, key=lambda item: item.index)]


def blend_scores(scores: Scores, collection: Collection, how: Blend) -> Scores:
    """Scores with the first stage's own, or with BM25 over the collection's documents, added to them."""
    bm25 = Bm25(collection.documents.values()) if how.source == "bm25" else None
    blended = {}
    for query_id, log_odds in scores.items():
        candidates = collection.run[query_id][: len(log_odds)]
        if bm25 is None:
            others = [candidate.score for candidate in candidates]
        else:
            texts = [collection.documents[candidate.document_id] for candidate in candidates]
            others = bm25.scores(collection.queries[query_id], texts)
        blended[query_id] = blend(log_odds, others, how.weight)
    return blended


def reorder(collection: Collection, scores: Scores) -> Orders:
    """Candidates that have a score come in its order, ties as the first stage had them; the rest stays below."""
    orders = {}
    for query_id, candidates in collection.run.items():
        ids = [candidate.document_id for candidate in candidates]
        top = best_first(scores.get(query_id, []))
        orders[query_id] = [ids[position] for position in top] + ids[len(top) :]
    return orders


def measure(qrels: Mapping[str, Mapping[str, int]], orders: Orders, names: Sequence[str]) -> dict[str, Values]:
    """Values by measure and query, for every query of `qrels`: 0 where nothing was found. Raises ConfigError."""
    ir_measures = load_ir_measures()
    # falling whole numbers: trec_eval sorts by score, and would break ties by document id
    run = {query_id: {name: float(-rank) for rank, name in enumerate(order)} for query_id, order in orders.items()}
    values: dict[str, Values] = {name: {} for name in names}
    for metric in ir_measures.iter_calc([ir_measures.parse_measure(name) for name in names], qrels, run):
        values[str(metric.measure)][metric.query_id] = float(metric.value)
    return values


def parse_measure(name: str) -> str:
    """A measure's name as ir-measures writes it; raises ConfigError."""
    ir_measures = load_ir_measures()
    try:
        return str(ir_measures.parse_measure(name))
    except Exception as error:  # a parser's and the package's own, by version
        raise ConfigError(f"measure is {name!r}, which ir-measures does not know") from error


def load_ir_measures() -> ModuleType:
    """The package ir-measures; raises ConfigError, which says how to install it."""
    try:
        return importlib.import_module("ir_measures")
    except ModuleNotFoundError as error:
        raise ConfigError(f'measuring needs {error.name}: pip install "local-rerank[eval]"') from error


def compare(baseline: System, system: System, measure: str = MEASURE) -> Comparison:
    """Differences query by query, and how likely they are by chance alone."""
    ours, theirs = system.values[measure], baseline.values[measure]
    differences = {query_id: ours[query_id] - theirs[query_id] for query_id in theirs}
    return Comparison(
        baseline=baseline.name,
        system=system.name,
        measure=measure,
        differences=dict(sorted(differences.items(), key=lambda item: -item[1])),
        p_value=p_value(list(differences.values())),
    )


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of a paired randomisation test: how often random signs give a mean as far from 0.

    Exact where all signs can be tried (13 queries or fewer), else 9,999 random draws from a fixed seed. For search
    results it is to be preferred to tests on ranks or signs, and agrees with the t-test, without its assumptions
    (Smucker, Allan and Carterette, CIKM 2007).
    """
    import numpy
    from scipy.stats import permutation_test

    if len(differences) < 2 or all(abs(difference) <= TIE for difference in differences):
        return 1.0  # of one query, too: either sign is as far from 0
    result = permutation_test(
        (numpy.array(differences),),
        lambda x, axis: numpy.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=1000,  # draws held in memory at once
        rng=SEED,
    )
    return float(result.pvalue)
