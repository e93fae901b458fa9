"""Log-odds of one query's documents and some other scores of the same documents -> one blended score for each.

The other scores are a first stage's own, or BM25 (`Bm25`) over the documents. Both sides become z-scores within the
query, so that a weight means the same for every model and every query. Blending is asked for and never happens by
itself: relevance scores and log-odds stay what the model said. Nothing here knows of models or files.
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

Source = Literal["bm25", "run"]
"""Whose scores are added: BM25 over the documents, or the scores that a first stage's run carries."""

K1, B = 1.2, 0.75  # BM25's usual constants: saturation of term frequency, share of length normalisation
_SPREAD = 1e-9  # a deviation below this share of the scores' size is rounding: the scores are constant
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han
_WORD = re.compile(rf"(?P<cjk>[{_CJK}]+)|[^\W_{_CJK}]+")


@dataclass(frozen=True, slots=True)
class Blend:
    """What is added to the log-odds, and how much of it."""

    source: Source
    weight: float

    def __str__(self) -> str:
        return f"{self.source}={self.weight:g}"


def parse_blend(text: str) -> Blend:
    """The value of `--blend`; raises ConfigError.

    >>> parse_blend("bm25=0.5")
    Blend(source='bm25', weight=0.5)
    """
    source, _, number = text.partition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if source not in get_args(Source) or not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(f"blend is {text!r}; it must be bm25=W or run=W with a weight W of 0 or more")
    return Blend(cast("Source", source), weight)


def blend(log_odds: Sequence[float], others: Sequence[float], weight: float) -> list[float]:
    """z-scores of the log-odds plus `weight` times z-scores of the others, in the order of the documents.

    >>> blend([2.0, 0.0], [5.0, 7.0], 0.5)
    [0.5, -0.5]
    """
    return [a + weight * b for a, b in zip(z_scores(log_odds), z_scores(others), strict=True)]


def z_scores(values: Sequence[float]) -> list[float]:
    """Values less their mean over their standard deviation (population); 0 for each where they are all the same."""
    if not values:
        return []
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    if deviation <= _SPREAD * max(map(abs, values)):
        return [0.0] * len(values)
    return [(value - mean) / deviation for value in values]


def best_first(scores: Sequence[float]) -> list[int]:
    """Positions in the order of their scores, highest first; ties keep their order."""
    return sorted(range(len(scores)), key=lambda position: -scores[position])


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, not stemmed; of Chinese and Japanese runs the pairs of characters.

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
    """BM25 with the statistics of the documents it is made from: how many hold a word, and their mean length."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._num_documents = 0
        self._num_with: Counter[str] = Counter()  # documents by word
        num_words = 0
        for document in documents:
            found = words(document)
            self._num_documents += 1
            self._num_with.update(set(found))
            num_words += len(found)
        self._mean_length = num_words / self._num_documents if num_words else 1.0

    def scores(self, query: str, documents: Iterable[str]) -> list[float]:
        """One score of 0 or more for each document; a word that the query holds twice counts twice."""
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
