"""A calibration: the function from log-odds to the probability that a document is relevant.

`local-rerank calibrate` fits it and writes it as JSON. Reading and applying it needs no package for statistics.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.text_files import open_utf8

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A curve that never falls, and what produced the log-odds that it was fitted to."""

    model: str
    instruction: str | None  # None for an encoder, which reads none
    recipe: Mapping[str, Any]  # what else a log-odds depends on: weights, template, dtype and token limits
    slope: float = 1.0  # with no points: probability = sigmoid(slope * log-odds + intercept)
    intercept: float = 0.0
    points: tuple[tuple[float, float], ...] = ()  # log-odds and probability, both ascending; linear between them

    def __post_init__(self) -> None:
        numbers = [self.slope, self.intercept, *(number for point in self.points for number in point)]
        if not all(map(math.isfinite, numbers)) or self.slope <= 0:
            raise ValueError("slope and intercept must be finite numbers, and the slope above 0")
        if not all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(self.points)):
            raise ValueError("points must rise in log-odds and must not fall in probability")
        if not all(0 <= probability <= 1 for _, probability in self.points):
            raise ValueError("probabilities must be from 0 to 1")

    def probability(self, log_odds: float) -> float:
        """The probability, 0...1, that a document with these log-odds is relevant."""
        if not self.points:
            return sigmoid(self.slope * log_odds + self.intercept)
        after = bisect_right(self.points, log_odds, key=lambda point: point[0])
        if after in (0, len(self.points)):  # before the first point or after the last
            return self.points[min(after, len(self.points) - 1)][1]
        (left, low), (right, high) = self.points[after - 1 : after + 1]
        return low + (high - low) * (log_odds - left) / (right - left)

    def require(self, *, model: str, instruction: str | None, recipe: Mapping[str, Any], where: str) -> None:
        """Raise ConfigError unless the log-odds of this model mean what those mean that the curve was fitted to."""
        fitted = {"model": self.model, "instruction": self.instruction, **self.recipe}
        for name, found in {"model": model, "instruction": instruction, **recipe}.items():
            if fitted.get(name) != found:
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
        return Calibration(
            model=value["model"],
            instruction=value["instruction"],
            recipe=dict(value["recipe"]),
            **_curve(value),
        )
    except InvalidRequest as error:
        raise ConfigError(f"calibration {error}") from error
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        why = f"without {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"calibration {file} is not a file of `local-rerank calibrate` ({why}); fit one with it"
        ) from error


def _curve(value: Mapping[str, Any]) -> dict[str, Any]:
    if value["method"] == "platt":
        return {name: float(value[name]) for name in ("slope", "intercept")}
    points = tuple((float(log_odds), float(probability)) for log_odds, probability in value["points"])
    if not points:
        raise ValueError("there are no points")
    return {"points": points}


def sigmoid(x: float) -> float:
    """The relevance score of log-odds `x`."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
