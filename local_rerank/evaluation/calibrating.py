"""Fit a calibration to labelled log-odds, and measure by cross-validation what it is worth.

The folds are queries, because documents of one query resemble each other. Intervals are 95 % bootstrap intervals over
queries. Fitting needs scipy, which the extra `local-rerank[eval]` installs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from local_rerank.errors import InvalidRequest
from local_rerank.requests.calibration import sigmoid

Floats = NDArray[np.float64]
Interval = tuple[float, float]
Curve = Callable[[Floats], Floats]

NUM_FOLDS = 5
NUM_BINS = 10  # of equal width, for the calibration error and the plot
NUM_RESAMPLES = 1000
SEED = 0
MIN_OF_EACH = 10  # pairs with either label
MIN_KEPT = 10  # documents at or above a threshold: of fewer, a precision says little
ISOTONIC_PAIRS, ISOTONIC_OF_EACH = 1000, 100  # with fewer it overfits (Niculescu-Mizil and Caruana, ICML 2005)
NO_SEPARATION = "no clean separation"


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The log-odds from which documents have the wanted precision or recall; None if none reaches it."""

    wanted: Literal["precision", "recall"]
    value: float
    log_odds: float | None
    probability: float | None = None
    held_out: dict[str, dict[str, Any]] = field(default_factory=dict)  # precision and recall: value and interval


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measured on queries that the curve was not fitted to; `before`: the relevance score as a probability."""

    auc: float
    auc_interval: Interval
    brier_before: float
    brier_after: float
    error_before: float  # expected calibration error
    error_after: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    method: Literal["platt", "isotonic"]
    curve: dict[str, Any]  # fields of Calibration
    quality: Quality
    thresholds: tuple[Threshold, ...]
    bins: dict[str, list[tuple[float, float, int]]]  # before, after: mean probability, share relevant, pairs

    @property
    def is_usable(self) -> bool:
        """Whether relevant documents score higher than others, by more than chance."""
        return self.quality.auc_interval[0] > 0.5 and self.curve.get("slope", 1.0) > 0

    @property
    def why_no_separation(self) -> str:
        """Empty if the curve is usable and each wanted precision has a threshold."""
        low, high = self.quality.auc_interval
        if not self.is_usable:
            return f"the AUC is {self.quality.auc:.3f} ({low:.3f} to {high:.3f}), which may be chance (0.5)"
        missed = [f"{one.value:g}" for one in self.thresholds if one.log_odds is None]
        return f"no threshold has precision {' or '.join(missed)} over {MIN_KEPT} documents or more" if missed else ""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Labelled pairs with their log-odds, as arrays of shape (num_pairs,)."""

    log_odds: Floats
    relevant: NDArray[np.bool_]
    query: NDArray[np.int64]  # 0 ... num_queries - 1

    @property
    def num_queries(self) -> int:
        return int(self.query.max()) + 1

    def __getitem__(self, chosen: NDArray[np.bool_]) -> Scored:
        return Scored(log_odds=self.log_odds[chosen], relevant=self.relevant[chosen], query=self.query[chosen])

    def folds(self) -> Iterator[NDArray[np.bool_]]:
        """Which pairs each fold holds out: all of some queries."""
        fold = np.random.default_rng(SEED).permutation(self.num_queries) % NUM_FOLDS
        return (fold[self.query] == number for number in range(NUM_FOLDS))


def check_size(num_queries: int, num_relevant: int, num_other: int) -> None:
    """Raise InvalidRequest for too few labels, which may be called before anything is scored."""
    if num_queries < NUM_FOLDS or min(num_relevant, num_other) < MIN_OF_EACH:
        raise InvalidRequest(
            f"there are {num_queries} queries with {num_relevant} relevant and {num_other} other documents; label at "
            f"least {NUM_FOLDS} queries and {MIN_OF_EACH} documents of each kind, better some hundreds",
            field="labelled",
        )


def fit(pairs: Scored, *, precisions: Sequence[float], recalls: Sequence[float]) -> Fit:
    """Fit Platt's curve, or isotonic regression where pairs suffice and it is better on held-out queries."""
    methods: list[Literal["platt", "isotonic"]] = ["platt"]
    num_relevant = int(pairs.relevant.sum())
    of_each = min(num_relevant, len(pairs.relevant) - num_relevant)
    if len(pairs.relevant) >= ISOTONIC_PAIRS and of_each >= ISOTONIC_OF_EACH:
        methods.append("isotonic")
    held_out = {method: _held_out(pairs, method) for method in methods}
    method = min(methods, key=lambda name: _brier(held_out[name], pairs))
    before, after = np.array([sigmoid(x) for x in pairs.log_odds]), held_out[method]
    bins = {"before": _bins(before, pairs), "after": _bins(after, pairs)}
    auc = _auc_of(pairs)
    quality = Quality(
        auc=auc(np.ones(pairs.num_queries)),
        auc_interval=_interval(auc, pairs.num_queries),
        brier_before=_brier(before, pairs),
        brier_after=_brier(after, pairs),
        error_before=_error(bins["before"]),
        error_after=_error(bins["after"]),
    )
    curve, fields = _FITS[method](pairs)
    wanted: list[tuple[Literal["precision", "recall"], float]] = [("precision", value) for value in precisions]
    wanted += [("recall", value) for value in recalls]
    thresholds = tuple(_threshold(pairs, kind, value, curve) for kind, value in wanted)
    return Fit(method=method, curve=fields, quality=quality, thresholds=thresholds, bins=bins)


def _held_out(pairs: Scored, method: str) -> Floats:
    """The probability of each pair from a curve fitted without its query."""
    probabilities = np.empty(len(pairs.log_odds))
    for held_out in pairs.folds():
        probabilities[held_out] = _FITS[method](pairs[~held_out])[0](pairs.log_odds[held_out])
    return probabilities


def _targets(pairs: Scored) -> tuple[float, float]:
    """Platt's probabilities for irrelevant and relevant pairs instead of 0 and 1, which no finite sample proves."""
    num_relevant = int(pairs.relevant.sum())
    return 1 / (len(pairs.relevant) - num_relevant + 2), (num_relevant + 1) / (num_relevant + 2)


def _fit_platt(pairs: Scored) -> tuple[Curve, dict[str, Any]]:
    """Logistic regression of the label on the log-odds (Platt 1999)."""
    from scipy.optimize import minimize

    low, high = _targets(pairs)
    target = np.where(pairs.relevant, high, low)
    center, spread = float(pairs.log_odds.mean()), float(pairs.log_odds.std()) or 1.0
    x = (pairs.log_odds - center) / spread

    def loss(weights: Floats) -> tuple[float, Floats]:
        z = weights[0] * x + weights[1]
        difference = _sigmoid(z) - target
        gradient = np.array([(difference * x).mean(), difference.mean()])
        return float((np.logaddexp(0, z) - target * z).mean()), gradient

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS").x
    slope = float(found[0]) / spread
    intercept = float(found[1]) - slope * center
    return lambda log_odds: _sigmoid(slope * log_odds + intercept), {"slope": slope, "intercept": intercept}


def _fit_isotonic(pairs: Scored) -> tuple[Curve, dict[str, Any]]:
    from scipy.optimize import isotonic_regression

    x, place, counts = np.unique(pairs.log_odds, return_inverse=True, return_counts=True)
    shares = np.bincount(place, weights=pairs.relevant) / counts
    y = np.clip(isotonic_regression(shares, weights=counts).x, *_targets(pairs))
    changes = np.flatnonzero(np.diff(y))  # the curve is flat between them
    kept = np.unique(np.concatenate(([0], changes, changes + 1, [len(x) - 1])))
    points = tuple(zip(x[kept].tolist(), y[kept].tolist(), strict=True))
    return lambda log_odds: np.interp(log_odds, x[kept], y[kept]), {"points": points}


_FITS: dict[str, Callable[[Scored], tuple[Curve, dict[str, Any]]]] = {"platt": _fit_platt, "isotonic": _fit_isotonic}


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(x / 2))


def _brier(probabilities: Floats, pairs: Scored) -> float:
    return float(np.mean((probabilities - pairs.relevant) ** 2))


def _bins(probabilities: Floats, pairs: Scored) -> list[tuple[float, float, int]]:
    number = np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
    chosen = [number == each for each in np.unique(number)]
    return [(float(probabilities[c].mean()), float(pairs.relevant[c].mean()), int(c.sum())) for c in chosen]


def _error(bins: list[tuple[float, float, int]]) -> float:
    total = sum(count for *_, count in bins)
    return sum(abs(mean - share) * count for mean, share, count in bins) / total


def _auc_of(pairs: Scored) -> Callable[[Floats], float]:
    """The area under the ROC curve over all pairs, as a function of the queries' weights; NaN without both labels."""
    group = np.unique(pairs.log_odds, return_inverse=True)[1]

    def auc(weights: Floats) -> float:
        weight = weights[pairs.query]
        relevant = np.bincount(group, weights=weight * pairs.relevant)
        other = np.bincount(group, weights=weight * ~pairs.relevant)
        won = float(relevant @ (other.cumsum() - other / 2))  # a tie is half a win
        total = float(relevant.sum() * other.sum())
        return won / total if total else math.nan

    return auc


def _interval(statistic: Callable[[Floats], float], num_queries: int) -> Interval:
    """The 95 % percentile bootstrap interval over queries."""
    random = np.random.default_rng(SEED)
    draws = (random.integers(num_queries, size=num_queries) for _ in range(NUM_RESAMPLES))
    values = [statistic(np.bincount(draw, minlength=num_queries).astype(float)) for draw in draws]
    if all(map(math.isnan, values)):
        return math.nan, math.nan
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _threshold(pairs: Scored, kind: Literal["precision", "recall"], value: float, curve: Curve) -> Threshold:
    """Choose from all pairs; measure with thresholds that were chosen without the queries they are applied to."""
    chosen = _CHOOSE[kind](pairs, value)
    if chosen is None:
        return Threshold(wanted=kind, value=value, log_odds=None)
    kept = np.zeros(len(pairs.relevant), dtype=bool)
    for held_out in pairs.folds():
        if (limit := _CHOOSE[kind](pairs[~held_out], value)) is not None:
            kept[held_out] = pairs.log_odds[held_out] >= limit
    found, num_kept, num_relevant = (
        np.bincount(pairs.query, weights=each, minlength=pairs.num_queries)
        for each in (kept & pairs.relevant, kept, pairs.relevant)
    )

    def share(of: NDArray[Any]) -> dict[str, Any]:
        def statistic(weights: Floats) -> float:
            return float(weights @ found / (weights @ of)) if weights @ of else math.nan

        value, interval = statistic(np.ones(pairs.num_queries)), _interval(statistic, pairs.num_queries)
        return {"value": None if math.isnan(value) else value, "interval": None if math.isnan(value) else interval}

    return Threshold(
        wanted=kind,
        value=value,
        log_odds=chosen,
        probability=float(curve(np.array([chosen]))[0]),
        held_out={"precision": share(num_kept), "recall": share(num_relevant)},
    )


def _steps(pairs: Scored) -> tuple[Floats, Floats, Floats]:
    """Distinct log-odds in descending order, with how many pairs and how many relevant ones are at or above each."""
    x, place, counts = np.unique(-pairs.log_odds, return_inverse=True, return_counts=True)
    return -x, counts.cumsum(), np.bincount(place, weights=pairs.relevant).cumsum()


def _for_precision(pairs: Scored, precision: float) -> float | None:
    """The lowest log-odds with this precision, so that the most documents are kept."""
    x, num_kept, num_relevant = _steps(pairs)
    reached = np.flatnonzero((num_kept >= MIN_KEPT) & (num_relevant >= precision * num_kept))
    return float(x[reached[-1]]) if len(reached) else None


def _for_recall(pairs: Scored, recall: float) -> float | None:
    """The highest log-odds with this recall."""
    x, _, num_relevant = _steps(pairs)
    return float(x[np.flatnonzero(num_relevant >= recall * num_relevant[-1])[0]])


_CHOOSE: dict[str, Callable[[Scored, float], float | None]] = {"precision": _for_precision, "recall": _for_recall}
