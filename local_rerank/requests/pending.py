"""A request from submission to result."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, InvalidStateError

from local_rerank.errors import LocalRerankError
from local_rerank.requests.calibration import Calibration, sigmoid
from local_rerank.requests.tokenization import TokenizedRequest
from local_rerank.types import RankedDocument, RerankRequest, RerankResult

logger = logging.getLogger(__name__)


class PendingRequest:
    """A tokenized request, the log-odds computed so far, and the caller's future."""

    def __init__(
        self,
        request: RerankRequest,
        tokenized: TokenizedRequest,
        *,
        model_id: str,
        started: float,
        name: str | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """`started`: time.perf_counter() when tokenization started; `name`: the request's name in the log."""
        self.request = request
        self.tokenized = tokenized
        self.name = name
        self.future: Future[RerankResult] = Future()
        self.log_odds: dict[int, float] = {}  # by position of the pair
        self.num_computed_tokens = 0
        self.first_batch: float | None = None
        self._model_id = model_id
        self._calibration = calibration if tokenized.has_default_instruction else None
        self._started = started
        self._queued = time.perf_counter()

    @property
    def is_complete(self) -> bool:
        return len(self.log_odds) == len(self.tokenized.pairs)

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
        log_odds = [self.log_odds[pair] for pair in tokenized.pair_of_document]
        order = sorted(range(len(log_odds)), key=lambda index: (-log_odds[index], index))
        curve = self._calibration
        num_tokens = [tokenized.num_document_tokens(index) for index in range(len(log_odds))]
        return RerankResult(
            results=tuple(
                RankedDocument(
                    index=index,
                    relevance_score=sigmoid(log_odds[index]),
                    log_odds=log_odds[index],
                    document=self.request.documents[index],
                    num_tokens=num_tokens[index],
                    num_truncated_tokens=tokenized.num_truncated_tokens[index],
                    probability=None if curve is None else curve.probability(log_odds[index]),
                )
                for index in order[: self.request.top_n]
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
