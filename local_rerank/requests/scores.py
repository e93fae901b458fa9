"""What log-odds become in a result: relevance scores, probabilities, and blends with a first stage's scores.

`local-rerank calibrate` fits a calibration, the function from log-odds to the probability that a document is relevant,
and writes it as JSON. Reading and applying it needs no package for statistics.
"""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.text_files import open_utf8
from local_rerank.types import BlendMethod

FORMAT_VERSION = 1
RANK_OFFSET = 60  # of reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009)
_ROUNDING = 1e-5  # of log-odds, relative to the largest above 1: what the rest of a batch changes in fp32
_MIN_SPREAD = 1e-9  # relative to the largest score; a smaller deviation is rounding error


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A function from log-odds to probabilities; by default the relevance score."""

    slope: float = 1.0  # with no points: probability = sigmoid(slope * log-odds + intercept)
    intercept: float = 0.0
    points: tuple[tuple[float, float], ...] = ()  # log-odds and probability, both ascending; linear between them

    def probability(self, log_odds: float) -> float:
        """The probability, 0...1, that a document with these log-odds is relevant."""
        if not self.points:
            return sigmoid(self.slope * log_odds + self.intercept)
        after = bisect_right(self.points, log_odds, key=lambda point: point[0])
        if after in (0, len(self.points)):  # before the first point or after the last
            return self.points[min(after, len(self.points) - 1)][1]
        (left, low), (right, high) = self.points[after - 1 : after + 1]
        return low + (high - low) * (log_odds - left) / (right - left)


@dataclass(frozen=True, kw_only=True)
class Calibration(Curve):
    """A curve that never falls, and what produced the log-odds that it was fitted to."""

    model: str
    instruction: str | None  # None for an encoder, which reads none
    recipe: Mapping[str, Any]  # what else a log-odds depends on: weights, template, dtype and token limits

    def __post_init__(self) -> None:
        numbers = [self.slope, self.intercept, *(number for point in self.points for number in point)]
        if not all(map(math.isfinite, numbers)) or self.slope <= 0:
            raise ValueError("slope and intercept must be finite numbers, and the slope above 0")
        if not all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(self.points)):
            raise ValueError("points must rise in log-odds and must not fall in probability")
        if not all(0 <= probability <= 1 for _, probability in self.points):
            raise ValueError("probabilities must be from 0 to 1")

    def require(self, *, model: str, instruction: str | None, recipe: Mapping[str, Any], where: str) -> None:
        """Raise ConfigError unless the log-odds of this model mean what those mean that the curve was fitted to."""
        fitted = {"model": self.model, "instruction": self.instruction, **self.recipe}
        ours = {"model": model, "instruction": instruction, **recipe}
        for name in ours | fitted:
            if fitted.get(name) != (found := ours.get(name)):
                raise ConfigError(
                    f"calibration {where} was fitted with {name} {fitted.get(name)!r}, but this engine has {found!r}; "
                    "use the same model and options, or fit another with `local-rerank calibrate`"
                )


def read_calibration(file: Path) -> Calibration:
    """Read a file that `local-rerank calibrate` wrote; raises ConfigError."""
    try:
        with open_utf8(file, "calibration") as stream:
            value = json.load(stream)
        if value["version"] != FORMAT_VERSION:
            raise ConfigError(
                f"calibration {file} has version {value['version']!r}; this program reads version {FORMAT_VERSION}"
            )
        names = ("slope", "intercept") if value["method"] == "platt" else ("points",)
        if not value[names[0]]:
            raise ValueError(f"{names[0]} is {value[names[0]]!r}")
        curve = {name: _numbers(value[name]) for name in names}
        own = {name: value[name] for name in ("model", "instruction", "recipe")}
        return Calibration(**own, **curve)
    except InvalidRequest as error:
        raise ConfigError(f"calibration {error}") from error
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        why = f"without {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"calibration {file} is not a file of `local-rerank calibrate` ({why}); fit one with it"
        ) from error


def _numbers(value: Any) -> Any:
    """A number, or lists of them as tuples; raises TypeError for all else."""
    return tuple(map(_numbers, value)) if isinstance(value, list) else float(value)


def sigmoid(x: float) -> float:
    """The relevance score of log-odds `x`."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


ACTIVATIONS: dict[str, Callable[[float], float]] = {"sigmoid": sigmoid, "identity": float}
"""What makes a relevance score of log-odds; some classifiers are used with their bare logit."""


@dataclass(frozen=True, kw_only=True)
class ScoreScale:
    """How a loaded model's log-odds are reported."""

    activation: str = "sigmoid"
    calibration: Calibration | None = None
    is_calibrated: bool = False  # whether the relevance score is the probability

    def of(self, log_odds: float, *, has_default_instruction: bool) -> tuple[float, float | None]:
        """The relevance score, and the probability, which a calibration gives for its own instruction only."""
        score = ACTIVATIONS[self.activation](log_odds)
        if self.calibration is None or not has_default_instruction:
            return score, None
        probability = self.calibration.probability(log_odds)
        return (probability if self.is_calibrated else score), probability

    def check_instruction(self, *, has_default_instruction: bool) -> None:
        """Raise InvalidRequest if relevance scores are to be probabilities, and this instruction has none."""
        if self.is_calibrated and not has_default_instruction:
            raise InvalidRequest(
                "instruction is not the one that scores are calibrated for; leave it out", field="instruction"
            )


def blend(
    log_odds: Sequence[float], others: Sequence[float], weight: float, method: BlendMethod = "z-scores"
) -> list[float]:
    """Return z(log_odds) + weight * z(others), document by document; or the same of reciprocal ranks.

    >>> blend([2.0, 0.0], [5.0, 7.0], 0.5)
    [0.5, -0.5]
    """
    of = _METHODS[method]
    return [a + weight * b for a, b in zip(of(log_odds), of(others), strict=True)]


def z_scores(values: Sequence[float]) -> list[float]:
    """Return (value - mean) / population standard deviation; zeros if all values are equal."""
    if not values:
        return []
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    if deviation <= _MIN_SPREAD * max(map(abs, values)):
        return [0.0] * len(values)
    return [(value - mean) / deviation for value in values]


def reciprocal_ranks(values: Sequence[float]) -> list[float]:
    """Return 1 / (60 + rank); equal values share the best of their ranks."""
    ranks: dict[float, int] = {}
    for rank, value in enumerate(sorted(values, reverse=True), 1):
        ranks.setdefault(value, rank)
    return [1 / (RANK_OFFSET + ranks[value]) for value in values]


_METHODS: dict[BlendMethod, Callable[[Sequence[float]], list[float]]] = {
    "z-scores": z_scores,
    "reciprocal-ranks": reciprocal_ranks,
}


def are_equal(log_odds: Collection[float]) -> bool:
    """Whether log-odds, at least one, differ by no more than rounding, which orders nothing."""
    least, most = min(log_odds), max(log_odds)
    return most - least <= _ROUNDING * max(1.0, abs(least), abs(most))


def best_first(scores: Sequence[float]) -> list[int]:
    """Return positions sorted by descending score; ties keep their order."""
    return sorted(range(len(scores)), key=lambda position: -scores[position])
