"""A request from submission to result."""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from local_rerank.errors import LocalRerankError
from local_rerank.requests.calibration import Calibration, sigmoid
from local_rerank.requests.pair import Pair, TokenizedRequest
from local_rerank.types import RankedDocument, RerankRequest, RerankResult, ScoredSpan

logger = logging.getLogger(__name__)

SpanPairs = Callable[[str, tuple[int, int], Pair], list[tuple[tuple[int, int], Pair]]]
"""The sentences of a part of a document, each with the pair that scores it."""


class PendingRequest:
    """A tokenized request, the log-odds computed so far, and the caller's future."""

    def __init__(
        self,
        request: RerankRequest,
        tokenized: TokenizedRequest,
        *,
        model_id: str,
        activation: str = "sigmoid",
        started: float,
        name: str | None = None,
        span_pairs: SpanPairs = lambda document, bounds, pair: [],
        calibration: Calibration | None = None,
    ) -> None:
        """`started`: time.perf_counter() when tokenization started; `name`: the request's name in the log.

        `activation`: a row of ACTIVATIONS. `span_pairs` is used if the request asks for spans.
        """
        self.request = request
        self.tokenized = tokenized
        self.name = name
        self.future: Future[RerankResult] = Future()
        self.log_odds: dict[int, float] = {}  # by position of the pair
        self.num_computed_tokens = 0
        self.first_batch: float | None = None
        self._num_pairs = len(tokenized.pairs)  # with those of spans, as soon as they are known
        self._span_pairs = span_pairs if request.spans else None
        self._spans: dict[int, dict[int, tuple[int, int]]] = {}  # by document: bounds by position of the pair
        self._model_id = model_id
        self._relevance_score = ACTIVATIONS[activation]
        self._calibration = calibration if tokenized.has_default_instruction else None
        self._started = started
        self._queued = time.perf_counter()

    @property
    def is_complete(self) -> bool:
        return len(self.log_odds) == self._num_pairs

    def more_pairs(self) -> list[Pair]:
        """After all pairs were scored: those of the spans, numbered on. Empty when they were returned before."""
        if self._span_pairs is None:
            return []
        span_pairs, self._span_pairs = self._span_pairs, None
        pairs: list[Pair] = []
        for index in _order(self._document_log_odds())[: self.request.top_n]:
            best = self._best_pair(index)
            if (bounds := self.tokenized.bounds_as_sent(index, best)) is not None:
                spans = span_pairs(self.request.documents[index], bounds, self.tokenized.pairs[best])
                first = self._num_pairs + len(pairs)
                self._spans[index] = {first + i: span for i, (span, _) in enumerate(spans)}
                pairs += [pair for _, pair in spans]
        self._num_pairs += len(pairs)
        return pairs

    def answer(self) -> None:
        """Resolve the future with the result. Every pair must have its log-odds."""
        self._resolve(self._result())

    def fail(self, error: LocalRerankError) -> None:
        self._resolve(error)

    def _resolve(self, outcome: RerankResult | LocalRerankError) -> None:
        try:
            if isinstance(outcome, LocalRerankError):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        except InvalidStateError:  # the caller cancelled it at the same moment
            logger.debug("a request was cancelled while its result was delivered")

    def _result(self) -> RerankResult:
        """Sort by log-odds, which do not saturate as scores do, then by index, and keep `top_n` documents."""
        tokenized, now = self.tokenized, time.perf_counter()
        log_odds, curve = self._document_log_odds(), self._calibration
        num_tokens = [tokenized.num_document_tokens(index) for index in range(len(log_odds))]
        return RerankResult(
            results=tuple(
                RankedDocument(
                    index=index,
                    relevance_score=self._relevance_score(log_odds[index]),
                    log_odds=log_odds[index],
                    document=self.request.documents[index],
                    num_tokens=num_tokens[index],
                    num_truncated_tokens=tokenized.num_truncated_tokens[index],
                    **self._chunks(index),
                    probability=None if curve is None else curve.probability(log_odds[index]),
                )
                for index in _order(log_odds)[: self.request.top_n]
            ),
            model=self._model_id,
            num_query_tokens=tokenized.num_query_tokens,
            num_query_truncated_tokens=tokenized.num_query_truncated_tokens,
            unwrapped=tokenized.unwrapped,
            num_document_tokens=sum(num_tokens),
            num_truncated_documents=sum(cut > 0 for cut in tokenized.num_truncated_tokens),
            total_tokens=tokenized.total_tokens,
            num_computed_tokens=self.num_computed_tokens,
            tokenize_ms=(self._queued - self._started) * 1e3,
            queue_ms=((self.first_batch or now) - self._queued) * 1e3,
            total_ms=(now - self._started) * 1e3,
        )

    def _document_log_odds(self) -> list[float]:
        """By document: the mean of its best chunks."""
        num_best = self.tokenized.num_best_chunks
        best = (
            heapq.nlargest(num_best, map(self.log_odds.__getitem__, own)) for own in self.tokenized.pairs_of_document
        )
        return [sum(values) / len(values) for values in best]

    def _best_pair(self, index: int) -> int:
        return max(self.tokenized.pairs_of_document[index], key=self.log_odds.__getitem__)

    def _chunks(self, index: int) -> dict[str, Any]:
        """The fields of a result about chunks and spans."""
        best = self._best_pair(index)
        if (bounds := self.tokenized.bounds_as_sent(index, best)) is None:
            return {}
        spans = [self._scored(pair, span) for pair, span in self._spans.get(index, {}).items()]
        return {
            "num_chunks": len(self.tokenized.pairs_of_document[index]),
            "best_chunk": self._scored(best, bounds),
            "spans": tuple(sorted(spans, key=lambda span: -span.score)) if self.request.spans else None,
        }

    def _scored(self, pair: int, bounds: tuple[int, int]) -> ScoredSpan:
        return ScoredSpan(start=bounds[0], end=bounds[1], score=self._relevance_score(self.log_odds[pair]))


def _order(log_odds: list[float]) -> list[int]:
    return sorted(range(len(log_odds)), key=lambda index: (-log_odds[index], index))


ACTIVATIONS: dict[str, Callable[[float], float]] = {"sigmoid": sigmoid, "identity": float}
"""What makes a relevance score of log-odds; some classifiers are used with their bare logit."""
