"""A request from submission to result."""

from __future__ import annotations

import heapq
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, InvalidStateError
from typing import Any

from local_rerank.errors import DeadlineExceeded, LocalRerankError
from local_rerank.requests.pair import Pair, TokenizedRequest
from local_rerank.requests.scores import ACTIVATIONS, ScoreScale, are_equal, blend
from local_rerank.types import RankedDocument, RerankRequest, RerankResult, ScoredSpan

logger = logging.getLogger(__name__)

SpanPairs = Callable[[str, tuple[int, int], Pair], list[tuple[tuple[int, int], Pair]]]
"""The sentences of a part of a document, each with the pair that scores it."""

OnScored = Callable[[list[RankedDocument]], None]
"""Takes documents as soon as their scores are known, in the worker's thread; it must be quick and must not raise."""


class PendingRequest:
    """A tokenized request, the log-odds computed so far, and the caller's future."""

    def __init__(
        self,
        request: RerankRequest,
        tokenized: TokenizedRequest,
        *,
        model_id: str,
        scale: ScoreScale = ScoreScale(),  # noqa: B008  # frozen
        started: float,
        name: str | None = None,
        span_pairs: SpanPairs = lambda document, bounds, pair: [],
        on_scored: OnScored | None = None,
    ) -> None:
        """`started`: time.perf_counter() when tokenization started; `name`: the request's name in the log.

        `span_pairs` is used if the request asks for spans. `on_scored` gets each document once, without spans and
        blended score. Raises InvalidRequest for an instruction without scores.
        """
        scale.check_instruction(has_default_instruction=tokenized.has_default_instruction)
        self.request = request
        self.tokenized = tokenized
        self.name = name
        self.future: Future[RerankResult] = Future()
        self.log_odds: dict[int, float] = {}  # by position of the pair
        self.num_computed_tokens = 0
        self.first_batch: float | None = None
        self._num_pairs = len(tokenized.pairs)  # with those of spans, as soon as they are known
        self._num_span_tokens = 0  # as total_tokens counts them
        self._span_pairs = span_pairs if request.spans else None
        self._spans: dict[int, dict[int, tuple[int, int]]] = {}  # by document: bounds by position of the pair
        self._model_id = model_id
        self._scale = scale
        self._on_scored = on_scored
        self._reported: set[int] = set()  # documents that `on_scored` has, or that `min_score` leaves out
        self._started = started
        self._queued = time.perf_counter()

    @property
    def is_complete(self) -> bool:
        return len(self.log_odds) == self._num_pairs

    def start_timer(self) -> None:
        """Resolve the future when the request's timeout has passed, whatever the worker does then."""
        if (seconds := self.request.timeout) is not None:
            left = seconds - (time.perf_counter() - self._started)
            timer = threading.Timer(left, self.expire, [seconds])
            timer.daemon = True
            self.future.add_done_callback(lambda _: timer.cancel())
            timer.start()

    def expire(self, seconds: float) -> None:
        """Resolve the future with what is scored, if the request takes that and there is any, else with an error."""
        is_any_scored = bool(self._document_log_odds())
        if self.request.on_deadline == "partial" and is_any_scored:
            return self.answer()
        remedy = "no document was scored by then; raise the timeout, or send fewer or shorter documents"
        if is_any_scored:
            remedy = 'raise the timeout, send fewer or shorter documents, or take what is scored: on_deadline="partial"'
        self.fail(DeadlineExceeded(timeout_ms=seconds * 1e3, remedy=remedy))

    def report(self) -> None:
        """Tell `on_scored` which documents have got their scores, but for those that `min_score` leaves out."""
        if self._on_scored is not None:
            scored = self._document_log_odds(but=self._reported)
            self._reported |= scored.keys()
            if kept := [self._document(index, scored[index]) for index in scored if self._is_kept(scored[index])]:
                self._on_scored(kept)

    def more_pairs(self) -> list[Pair]:
        """After all pairs were scored: those of the spans, numbered on. Empty when they were returned before."""
        if self._span_pairs is None:
            return []
        span_pairs, self._span_pairs = self._span_pairs, None
        pairs: list[Pair] = []
        for index, _ in self._ranked(self._document_log_odds())[: self.request.top_n]:
            best = self._best_pair(index)
            if (bounds := self.tokenized.bounds_as_sent(index, best)) is not None:
                spans = span_pairs(self.request.documents[index], bounds, self.tokenized.pairs[best])
                first = self._num_pairs + len(pairs)
                self._spans[index] = {first + i: span for i, (span, _) in enumerate(spans)}
                pairs += [pair for _, pair in spans]
        self._num_pairs += len(pairs)
        self._num_span_tokens = sum(pair.num_tokens - self.tokenized.num_unbilled_tokens for pair in pairs)
        return pairs

    def answer(self) -> None:
        """Resolve the future with the result; documents without a score are listed as such."""
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
        tokenized, now = self.tokenized, time.perf_counter()
        documents, log_odds = self.request.documents, self._document_log_odds()
        ranked = self._ranked(log_odds)
        results = [self._document(index, log_odds[index], blended) for index, blended in ranked[: self.request.top_n]]
        return RerankResult(
            results=tuple(results),
            model=self._model_id,
            num_query_tokens=tokenized.num_query_tokens,
            num_query_truncated_tokens=tokenized.num_query_truncated_tokens,
            unwrapped=tokenized.unwrapped,
            num_document_tokens=sum(map(tokenized.num_document_tokens, range(len(documents)))),
            num_truncated_documents=sum(cut > 0 for cut in tokenized.num_truncated_tokens),
            total_tokens=tokenized.total_tokens + self._num_span_tokens,
            num_computed_tokens=self.num_computed_tokens,
            tokenize_ms=(self._queued - self._started) * 1e3,
            queue_ms=((self.first_batch or now) - self._queued) * 1e3,
            total_ms=(now - self._started) * 1e3,
            is_constant=len({documents[index] for index in log_odds}) > 1 and are_equal(log_odds.values()),
            not_scored=tuple(index for index in range(len(documents)) if index not in log_odds),
            num_without_spans=sum(item.spans is None for item in results) if self.request.spans else 0,
            num_below_min_score=None if self.request.min_score is None else len(log_odds) - len(ranked),
        )

    def _document(self, index: int, log_odds: float, blended_score: float | None = None) -> RankedDocument:
        score, probability = self._score_of(log_odds)
        return RankedDocument(
            index=index,
            relevance_score=score,
            log_odds=log_odds,
            document=self.request.documents[index],
            num_tokens=self.tokenized.num_document_tokens(index),
            num_truncated_tokens=self.tokenized.num_truncated_tokens[index],
            **self._chunks(index),
            probability=probability,
            blended_score=blended_score,
        )

    def _score_of(self, log_odds: float) -> tuple[float, float | None]:
        return self._scale.of(log_odds, has_default_instruction=self.tokenized.has_default_instruction)

    def _is_kept(self, log_odds: float) -> bool:
        least = self.request.min_score
        return least is None or self._score_of(log_odds)[0] >= least

    def _ranked(self, log_odds: Mapping[int, float]) -> list[tuple[int, float | None]]:
        """The documents that `min_score` leaves, by index, with the blended scores that they are sorted by, if any.

        Else they are sorted by log-odds, which do not saturate as scores do; in both cases then by index. At the
        deadline, those are blended that are scored.
        """
        request = self.request
        blended: Mapping[int, float] = {}
        if request.first_stage_scores is not None:
            others = [float(request.first_stage_scores[index]) for index in log_odds]  # from ints and NumPy's types
            values = blend(list(log_odds.values()), others, request.first_stage_weight, request.first_stage_method)
            blended = dict(zip(log_odds, values, strict=True))
        keys = blended or log_odds
        order = sorted(log_odds, key=lambda index: (-keys[index], index))
        return [(index, blended.get(index)) for index in order if self._is_kept(log_odds[index])]

    def _document_log_odds(self, but: Collection[int] = ()) -> dict[int, float]:
        """By document: the mean of its best chunks. Without those of which a pair has no score that is a number: at the
        deadline the worker may not have looked at it yet.
        """
        found: dict[int, float] = {}
        for index, own in enumerate(self.tokenized.pairs_of_document):
            if index not in but:
                values = [self.log_odds.get(pair, math.nan) for pair in own]
                if all(map(math.isfinite, values)):
                    best = heapq.nlargest(self.tokenized.num_best_chunks, values) if len(values) > 1 else values
                    found[index] = sum(best) / len(best)
        return found

    def _best_pair(self, index: int) -> int:
        return max(self.tokenized.pairs_of_document[index], key=self.log_odds.__getitem__)

    def _chunks(self, index: int) -> dict[str, Any]:
        """The fields of a result about chunks and spans."""
        best = self._best_pair(index)
        if (bounds := self.tokenized.bounds_as_sent(index, best)) is None:
            return {}
        found = {"num_chunks": len(self.tokenized.pairs_of_document[index]), "best_chunk": self._scored(best, bounds)}
        asked = self._spans.get(index)
        if asked is None or not all(math.isfinite(self.log_odds.get(pair, math.nan)) for pair in asked):
            return found
        spans = [self._scored(pair, span) for pair, span in asked.items()]
        return found | {"spans": tuple(sorted(spans, key=lambda span: -span.score))}

    def _scored(self, pair: int, bounds: tuple[int, int]) -> ScoredSpan:
        return ScoredSpan(
            start=bounds[0], end=bounds[1], score=ACTIVATIONS[self._scale.activation](self.log_odds[pair])
        )
