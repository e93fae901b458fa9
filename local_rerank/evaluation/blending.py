"""Blend a model's log-odds with the first stage's scores or with BM25.

Both sides are converted to z-scores within each query, so a weight means the same for every model and every query.
Blending only changes the order: the relevance scores and log-odds stay the model's.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from local_rerank.errors import ConfigError

BlendSource = Literal["bm25", "run"]
"""Which scores are added: BM25 over the documents, or those of the first stage's run."""

K1, B = 1.2, 0.75  # BM25's usual constants: term-frequency saturation and length normalization
_MIN_SPREAD = 1e-9  # relative to the largest score; a smaller deviation is rounding error
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han
_WORD = re.compile(rf"(?P<cjk>[{_CJK}]+)|[^\W_{_CJK}]+")


@dataclass(frozen=True, slots=True)
class Blend:
    """Which scores are added to the log-odds, and their weight."""

    source: BlendSource
    weight: float

    def __str__(self) -> str:
        return f"{self.source}={self.weight:g}"


def parse_blend(text: str) -> Blend:
    """Parse the value of `--blend`; raises ConfigError.

    >>> parse_blend("bm25=0.5")
    Blend(source='bm25', weight=0.5)
    """
    source, _, number = text.partition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if source not in get_args(BlendSource) or not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(f"blend is {text!r}; it must be bm25=W or run=W, where the weight W is at least 0")
    return Blend(cast("BlendSource", source), weight)


def blend(log_odds: Sequence[float], others: Sequence[float], weight: float) -> list[float]:
    """Return z(log_odds) + weight * z(others), document by document.

    >>> blend([2.0, 0.0], [5.0, 7.0], 0.5)
    [0.5, -0.5]
    """
    return [a + weight * b for a, b in zip(z_scores(log_odds), z_scores(others), strict=True)]


def z_scores(values: Sequence[float]) -> list[float]:
    """Return (value - mean) / population standard deviation; zeros if all values are equal."""
    if not values:
        return []
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    if deviation <= _MIN_SPREAD * max(map(abs, values)):
        return [0.0] * len(values)
    return [(value - mean) / deviation for value in values]


def best_first(scores: Sequence[float]) -> list[int]:
    """Return positions sorted by descending score; ties keep their order."""
    return sorted(range(len(scores)), key=lambda position: -scores[position])


def words(text: str) -> list[str]:
    """Split into lower-case runs of letters and digits, without stemming, and Han and kana runs into bigrams.

    >>> words("The 2nd TEST: 人工智能")
    ['the', '2nd', 'test', '人工', '工智', '智能']
    """
    found = []
    for match in _WORD.finditer(text.lower()):
        run = match[0]
        if match["cjk"] and len(run) > 1:
            found += [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            found.append(run)
    return found


class Bm25:
    """BM25 with the document frequencies and mean length of the documents it is built from."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._num_documents = 0
        self._num_with: Counter[str] = Counter()  # document frequency of each word
        num_words = 0
        for document in documents:
            found = words(document)
            self._num_documents += 1
            self._num_with.update(set(found))
            num_words += len(found)
        self._mean_length = num_words / self._num_documents if num_words else 1.0

    def scores(self, query: str, documents: Iterable[str]) -> list[float]:
        """Score each document (0 or more); a word repeated in the query counts each time."""
        weights = {word: count * self._idf(word) for word, count in Counter(words(query)).items()}
        return [self._score(weights, words(document)) for document in documents]

    def _idf(self, word: str) -> float:
        num_with = self._num_with[word]
        return math.log(1 + (self._num_documents - num_with + 0.5) / (num_with + 0.5))

    def _score(self, weights: dict[str, float], document: list[str]) -> float:
        counts = Counter(document)
        length = K1 * (1 - B + B * len(document) / self._mean_length)
        return sum(
            idf * counts[word] * (K1 + 1) / (counts[word] + length) for word, idf in weights.items() if counts[word]
        )
