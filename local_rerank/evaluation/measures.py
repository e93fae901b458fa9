"""Score a collection, rerank it, compute ranking measures and compare systems.

The steps are `score`, `reorder`, `measure` and `compare`. `measure` and `compare` need the extra `local-rerank[eval]`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Blend, Bm25
from local_rerank.evaluation.collection import Collection
from local_rerank.requests.scores import best_first, blend
from local_rerank.types import BlendMethod, Limits, RerankRequest

if TYPE_CHECKING:
    from local_rerank.reranker import Reranker

Scores = dict[str, list[float]]  # query id -> one score per top candidate, in the first stage's order
Orders = dict[str, list[str]]  # query id -> document ids, best first
Values = dict[str, float]  # query id -> value of a measure

FIRST_STAGE = "first stage"  # name of the system that leaves the run as it is
MEASURE = "nDCG@10"  # the measure used to compare systems
NUM_RESAMPLES = 9999  # of the randomization test, which gives p to about 0.005
SEED = 0
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # that `tune_blend` tries
_BY_QUERY = ("queries", "qrels", "run")  # fields of a collection
TIE = 1e-9  # smaller differences are rounding error


@dataclass(frozen=True, kw_only=True)
class System:
    """The measured values of one way to rank the collection."""

    name: str
    values: dict[str, Values]  # by measure

    def mean(self, measure: str) -> float:
        values = self.values[measure].values()
        return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A system compared with a baseline by one measure."""

    baseline: str
    system: str
    measure: str
    differences: Values  # system minus baseline per query, in descending order
    p_value: float  # two-sided, paired randomization test

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
        """Return the queries with the largest gains, largest first."""
        return [item for item in self.differences.items() if item[1] > TIE][:count]

    def largest_losses(self, count: int) -> list[tuple[str, float]]:
        """Return the queries with the largest losses, largest first."""
        return [item for item in reversed(self.differences.items()) if item[1] < -TIE][:count]


def measures(top_k: int) -> tuple[str, ...]:
    """Return the default measures. Reranking cannot change recall at `top_k`, which bounds the others."""
    return tuple(dict.fromkeys((MEASURE, "RR", "AP", "R@10", f"R@{top_k}")))


def score(reranker: Reranker, collection: Collection, *, top_k: int) -> Iterator[tuple[str, list[float]]]:
    """Yield each query id with the log-odds of its `top_k` candidates; skips queries without candidates."""
    limits = Limits(max_request_chunks=None)
    found = {query_id: run[:top_k] for query_id, run in collection.run.items() if run}
    requests = (
        RerankRequest(
            query=collection.queries[query_id],
            documents=tuple(collection.documents[candidate.document_id] for candidate in candidates),
            max_chunks_per_document=limits.max_document_chunks,  # one document should not end the command
            limits=limits,
        )
        for query_id, candidates in found.items()
    )
    for query_id, result in zip(found, reranker.rank_batch(requests), strict=True):
        yield query_id, [item.log_odds for item in sorted(result, key=lambda item: item.index)]


def blend_scores(scores: Scores, collection: Collection, how: Blend) -> Scores:
    """Blend scores with those of the first stage, or with BM25 over the collection's documents."""
    bm25 = Bm25(collection.documents.values()) if how.source == "bm25" else None
    blended = {}
    for query_id, log_odds in scores.items():
        candidates = collection.run.get(query_id, ())[: len(log_odds)]
        if not candidates:  # of the other half
            continue
        if bm25 is None:
            others = [candidate.score for candidate in candidates]
        else:
            texts = [collection.documents[candidate.document_id] for candidate in candidates]
            others = bm25.scores(collection.queries[query_id], texts)
        blended[query_id] = blend(log_odds, others, how.weight, how.method)
    return blended


def tune_blend(scores: Scores, collection: Collection) -> Blend:
    """Return the weight of the run's scores, and the method, with the highest mean nDCG@10; the smallest of equals.

    Weight 0 is the model alone.
    """

    def mean(how: Blend) -> float:
        orders = reorder(collection, blend_scores(scores, collection, how))
        return System(name="", values=measure(collection.qrels, orders, [MEASURE])).mean(MEASURE)

    tried = [Blend("run", weight, method) for weight in WEIGHTS for method in get_args(BlendMethod)]
    return max(tried, key=mean)


def halves(collection: Collection) -> tuple[Collection, Collection]:
    """Split the queries in two by a hash of their ids, which no order and no other query changes.

    Raises InvalidRequest if either half has no query with candidates.
    """
    sides: tuple[list[str], list[str]] = [], []
    for query_id in collection.queries:
        sides[hashlib.sha256(query_id.encode()).digest()[0] % 2].append(query_id)
    if not all(any(collection.run[query_id] for query_id in side) for side in sides):
        what = f"{len(collection.queries)} queries cannot be split in two halves that both have candidates"
        raise InvalidRequest(f"{what}; give some dozens of queries", field="queries")

    def part(side: list[str]) -> Collection:
        fields: dict[str, Any] = {name: {each: getattr(collection, name)[each] for each in side} for name in _BY_QUERY}
        return replace(collection, **fields)

    return part(sides[0]), part(sides[1])


def reorder(collection: Collection, scores: Scores) -> Orders:
    """Sort the scored candidates by score; ties and unscored candidates keep the first stage's order."""
    orders = {}
    for query_id, candidates in collection.run.items():
        ids = [candidate.document_id for candidate in candidates]
        top = best_first(scores.get(query_id, []))
        orders[query_id] = [ids[position] for position in top] + ids[len(top) :]
    return orders


def measure(qrels: Mapping[str, Mapping[str, int]], orders: Orders, names: Sequence[str]) -> dict[str, Values]:
    """Compute values by measure and query; a query of `qrels` without results gets 0. Raises ConfigError."""
    ir_measures = load_ir_measures()
    # distinct scores by rank, because trec_eval breaks ties by document id
    run = {query_id: {name: float(-rank) for rank, name in enumerate(order)} for query_id, order in orders.items()}
    values: dict[str, Values] = {name: {} for name in names}
    for metric in ir_measures.iter_calc([ir_measures.parse_measure(name) for name in names], qrels, run):
        values[str(metric.measure)][metric.query_id] = float(metric.value)
    return values


def parse_measure(name: str) -> str:
    """Return a measure's canonical name; raises ConfigError for one that is unknown or cannot be computed here."""
    ir_measures = load_ir_measures()
    try:
        found = ir_measures.parse_measure(name)
        ir_measures.calc_aggregate([found], {"1": {"a": 1, "b": 0}}, {"1": {"a": 2.0, "b": 1.0}})
    except Exception as error:  # which type depends on the version of ir-measures
        raise ConfigError(f"measure is {name!r}, which ir-measures cannot compute; try nDCG@10 or RR") from error
    return str(found)


def require_extras() -> None:
    """Fail before the work if a package for measuring or for tests of significance is missing; raises ConfigError."""
    load_ir_measures()
    import_extra("scipy", "a test of significance")


def load_ir_measures() -> ModuleType:
    return import_extra("ir_measures", "measuring")


def import_extra(name: str, purpose: str) -> ModuleType:
    """Import a package of the `eval` extra; raises ConfigError if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f'{purpose} needs {error.name}: pip install "local-rerank[eval]"') from error


def compare(baseline: System, system: System, measure: str = MEASURE) -> Comparison:
    """Compare two systems query by query, with a significance test."""
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
    """Return the two-sided p of a paired randomization test: how often random signs give a mean as far from 0.

    The test is exact for up to 13 queries and otherwise uses 9,999 draws with a fixed seed. Smucker, Allan and
    Carterette (CIKM 2007) recommend it for search results over sign and rank tests.
    """
    import numpy
    from scipy.stats import permutation_test

    if len(differences) < 2 or all(abs(difference) <= TIE for difference in differences):
        return 1.0  # also for one query, because either sign is as far from 0
    result = permutation_test(
        (numpy.array(differences),),
        lambda x, axis: numpy.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=1000,  # bounds memory
        rng=SEED,
    )
    return float(result.pvalue)
