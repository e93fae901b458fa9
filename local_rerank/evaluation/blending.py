"""Which scores to blend a model's log-odds with: the first stage's or BM25 (`local_rerank.requests.scores` blends).

Both sides are converted to z-scores or to reciprocal ranks within each query, so a weight means the same for every
model and every query. Blending only changes the order: the relevance scores and log-odds stay the model's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from local_rerank.errors import ConfigError
from local_rerank.types import BlendMethod

BlendSource = Literal["bm25", "run"]
"""Which scores are added: BM25 over the documents, or those of the first stage's run."""

BY_RANK = "-ranks"  # suffix of a source in `--blend`
K1, B = 1.2, 0.75  # BM25's usual constants: term-frequency saturation and length normalization
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han
_WORD = re.compile(rf"(?P<cjk>[{_CJK}]+)|[^\W_{_CJK}]+")


@dataclass(frozen=True, slots=True)
class Blend:
    """Which scores are added to the log-odds, and their weight."""

    source: BlendSource
    weight: float
    method: BlendMethod = "z-scores"

    def __str__(self) -> str:
        return f"{self.source}{'' if self.method == 'z-scores' else BY_RANK}={self.weight:g}"


def parse_blend(text: str) -> Blend:
    """Parse the value of `--blend`; raises ConfigError.

    >>> parse_blend("bm25=0.5")
    Blend(source='bm25', weight=0.5)
    """
    name, _, number = text.partition("=")
    source = name.removesuffix(BY_RANK)
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if source not in get_args(BlendSource) or not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(
            f"blend is {text!r}; it must be bm25=W or run=W, or bm25-ranks=W or run-ranks=W, where the weight W is at "
            "least 0"
        )
    return Blend(cast("BlendSource", source), weight, "z-scores" if source == name else "reciprocal-ranks")


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

    def matched(self, query: str, scores: Sequence[float]) -> float:
        """The best score divided by the highest that BM25 could give for this query (0...1).

        It is low where no document has the rare words of the query, for instance if they are in two languages.
        """
        most = sum(count * self._idf(word) * (K1 + 1) for word, count in Counter(words(query)).items())
        return max(scores, default=0.0) / most if most else 0.0

    def _idf(self, word: str) -> float:
        num_with = self._num_with[word]
        return math.log(1 + (self._num_documents - num_with + 0.5) / (num_with + 0.5))

    def _score(self, weights: dict[str, float], document: list[str]) -> float:
        counts = Counter(document)
        length = K1 * (1 - B + B * len(document) / self._mean_length)
        return sum(
            idf * counts[word] * (K1 + 1) / (counts[word] + length) for word, idf in weights.items() if counts[word]
        )
