"""Fit a calibration to labelled log-odds, and measure by cross-validation what it is worth.

The folds are queries, because documents of one query resemble each other. Intervals are 95 % bootstrap intervals over
queries. Fitting needs scipy, which the extra `local-rerank[eval]` installs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from local_rerank.errors import InvalidRequest
from local_rerank.requests.scores import Curve

Floats = NDArray[np.float64]

NUM_FOLDS = 5
NUM_BINS = 10  # of equal width, for the calibration error and the plot
SEED = 0
MIN_OF_EACH = 10  # pairs with either label
MIN_KEPT = 10  # documents at or above a threshold: of fewer, a precision says little
ISOTONIC_PAIRS, ISOTONIC_OF_EACH = 1000, 100  # with fewer it overfits (Niculescu-Mizil and Caruana, ICML 2005)
NO_SEPARATION = "no clean separation"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A curve and its worth on queries that it was not fitted to; `before` is the relevance score as a probability."""

    method: str
    curve: Curve
    quality: dict[str, Any]  # auc, and Brier score and expected calibration error before and after
    thresholds: list[dict[str, Any]]  # with log_odds None where none reaches the wanted precision
    bins: dict[str, list[tuple[float, float, int]]]  # before, after: mean probability, share relevant, pairs

    @property
    def is_usable(self) -> bool:
        """Whether relevant documents score higher than others, by more than chance."""
        return self.quality["auc_interval"][0] > 0.5 and self.curve.slope > 0

    @property
    def why_no_separation(self) -> str:
        """Empty if the curve is usable and each wanted precision has a threshold."""
        low, high = self.quality["auc_interval"]
        if not self.is_usable:
            return f"the AUC is {self.quality['auc']:.3f} ({low:.3f} to {high:.3f}), which may be chance (0.5)"
        missed = [f"{one['value']:g}" for one in self.thresholds if one["log_odds"] is None]
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

    def probabilities(self, curve: Curve) -> Floats:
        return np.array([curve.probability(x) for x in self.log_odds.tolist()])


def check_size(num_queries: int, num_relevant: int, num_other: int) -> None:
    """Raise InvalidRequest for too few labels, which may be called before anything is scored."""
    if num_queries < NUM_FOLDS or min(num_relevant, num_other) < MIN_OF_EACH:
        raise InvalidRequest(
            f"there are {num_queries} queries with {num_relevant} relevant and {num_other} other documents; label at "
            f"least {NUM_FOLDS} queries and {MIN_OF_EACH} documents of each kind, better some hundreds",
            field="labelled",
        )


def fit(pairs: Scored, *, precisions: Sequence[float], recalls: Sequence[float], num_resamples: int) -> Fit:
    """Fit Platt's curve, or isotonic regression where pairs suffice and it is better on held-out queries."""
    num_pairs, num_relevant = len(pairs.relevant), int(pairs.relevant.sum())
    is_enough = num_pairs >= ISOTONIC_PAIRS and min(num_relevant, num_pairs - num_relevant) >= ISOTONIC_OF_EACH
    probabilities: dict[str, Floats] = {}
    for method in ("platt", "isotonic") if is_enough else ("platt",):
        probabilities[method] = np.empty(num_pairs)
        for fold in pairs.folds():
            probabilities[method][fold] = pairs[fold].probabilities(_FITS[method](pairs[~fold]))
    method = min(probabilities, key=lambda name: brier_score(probabilities[name], pairs))
    shown = {"before": pairs.probabilities(Curve()), "after": probabilities[method]}
    bins = {name: reliability(values, pairs) for name, values in shown.items()}
    weights = _resamples(pairs.num_queries, num_resamples)
    auc = _with_interval(area_under_roc(pairs, weights))
    quality = {"auc": auc["value"], "auc_interval": auc["interval"]}
    quality |= {f"brier_{name}": brier_score(values, pairs) for name, values in shown.items()}
    quality |= {f"error_{name}": calibration_error(values) for name, values in bins.items()}
    curve = _FITS[method](pairs)
    wanted = [*(("precision", value) for value in precisions), *(("recall", value) for value in recalls)]
    thresholds = [_threshold(pairs, kind, value, curve, weights) for kind, value in wanted]
    return Fit(method=method, curve=curve, quality=quality, thresholds=thresholds, bins=bins)


def _targets(pairs: Scored) -> tuple[float, float]:
    """Platt's probabilities for irrelevant and relevant pairs instead of 0 and 1, which no finite sample proves."""
    num_relevant = int(pairs.relevant.sum())
    return 1 / (len(pairs.relevant) - num_relevant + 2), (num_relevant + 1) / (num_relevant + 2)


def _fit_platt(pairs: Scored) -> Curve:
    """Logistic regression of the label on the log-odds (Platt 1999)."""
    from scipy.optimize import minimize

    low, high = _targets(pairs)
    target = np.where(pairs.relevant, high, low)
    center, spread = float(pairs.log_odds.mean()), float(pairs.log_odds.std()) or 1.0
    x = (pairs.log_odds - center) / spread

    def loss(weights: Floats) -> float:
        z = weights[0] * x + weights[1]
        return float((np.logaddexp(0, z) - target * z).mean())

    slope, intercept = minimize(loss, np.array([1.0, 0.0])).x
    return Curve(slope=float(slope) / spread, intercept=float(intercept - slope * center / spread))


def _fit_isotonic(pairs: Scored) -> Curve:
    from scipy.optimize import isotonic_regression

    x, place, counts = np.unique(pairs.log_odds, return_inverse=True, return_counts=True)
    shares = np.bincount(place, weights=pairs.relevant) / counts
    y = np.clip(isotonic_regression(shares, weights=counts).x, *_targets(pairs))
    changes = np.flatnonzero(np.diff(y))  # the curve is flat between them
    kept = np.unique(np.concatenate(([0], changes, changes + 1, [len(x) - 1])))
    return Curve(points=tuple(zip(x[kept].tolist(), y[kept].tolist(), strict=True)))


_FITS: dict[str, Callable[[Scored], Curve]] = {"platt": _fit_platt, "isotonic": _fit_isotonic}


def brier_score(probabilities: Floats, pairs: Scored) -> float:
    return float(np.mean((probabilities - pairs.relevant) ** 2))


def reliability(probabilities: Floats, pairs: Scored) -> list[tuple[float, float, int]]:
    """Mean probability, share of relevant pairs and number of pairs of each bin."""
    number = np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
    chosen = [number == each for each in np.unique(number)]
    return [(float(probabilities[c].mean()), float(pairs.relevant[c].mean()), int(c.sum())) for c in chosen]


def calibration_error(bins: Sequence[tuple[float, float, int]]) -> float:
    return sum(abs(mean - share) * count for mean, share, count in bins) / sum(count for *_, count in bins)


def area_under_roc(pairs: Scored, weights: Floats) -> Floats:
    """Over all pairs, for each row of `weights`, (num_rows, num_queries); NaN for a row without both labels."""
    place = np.unique(pairs.log_odds, return_inverse=True)[1]

    def area(weight: Floats) -> float:
        relevant, other = (np.bincount(place, weight[pairs.query] * kind) for kind in (pairs.relevant, ~pairs.relevant))
        total = relevant.sum() * other.sum()
        return float(relevant @ (other.cumsum() - other / 2) / total) if total else np.nan  # a tie is half a win

    return np.array([area(weight) for weight in weights])


def _resamples(num_queries: int, num_resamples: int) -> Floats:
    """Weights of the queries in the sample itself, then in each bootstrap sample."""
    drawn = np.random.default_rng(SEED).multinomial(num_queries, np.full(num_queries, 1 / num_queries), num_resamples)
    return np.vstack([np.ones(num_queries), drawn])


def _with_interval(values: Floats) -> dict[str, Any]:
    """The statistic of the sample, and its 95 % percentile interval over the others; None where it is not defined."""
    if np.isnan(values[1:]).all():
        return {"value": None, "interval": None}
    return {"value": float(values[0]), "interval": np.nanpercentile(values[1:], [2.5, 97.5]).tolist()}


def _threshold(pairs: Scored, kind: str, value: float, curve: Curve, weights: Floats) -> dict[str, Any]:
    """Choose from all pairs; measure with thresholds that were chosen without the queries they are applied to."""
    wanted = {"wanted": kind, "value": value}
    if (chosen := _CHOOSE[kind](pairs, value)) is None:
        return wanted | {"log_odds": None}
    kept = np.zeros(len(pairs.relevant), dtype=bool)
    for fold in pairs.folds():
        if (limit := _CHOOSE[kind](pairs[~fold], value)) is not None:
            kept[fold] = pairs.log_odds[fold] >= limit

    def count(which: NDArray[np.bool_]) -> Floats:
        by_sample: Floats = weights @ np.bincount(pairs.query, which, minlength=pairs.num_queries)
        return by_sample

    found = count(kept & pairs.relevant)
    with np.errstate(invalid="ignore"):  # a resample may keep nothing: 0 / 0
        shares = {"precision": found / count(kept), "recall": found / count(pairs.relevant)}
    held_out = {name: _with_interval(values) for name, values in shares.items()}
    return wanted | {"log_odds": chosen, "probability": curve.probability(chosen), "held_out": held_out}


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
