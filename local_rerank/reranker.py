"""The main path: RerankRequest -> tokenize -> queue -> batch -> log-odds -> RerankResult.

`submit` tokenizes in the caller's thread and queues the pairs. The worker's thread takes batches from the queue, which
may mix pairs of several requests, and resolves each request's future with a result or an error.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from local_rerank import forks
from local_rerank.arguments import documents_of, first_stage_of, requests_of, scores_of
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.checkpoints.known_scores import known_pairs
from local_rerank.config import OF_CHUNKS, EngineConfig, EngineOptions, merged
from local_rerank.engine.cpu.compute_thread import compute
from local_rerank.engine.engine import Engine
from local_rerank.engine.load import load
from local_rerank.engine.plan import make_plan
from local_rerank.errors import DeviceFailure, InvalidRequest, Overloaded
from local_rerank.requests.parts import PromptLimits
from local_rerank.requests.pending import OnScored, PendingRequest
from local_rerank.requests.scores import Calibration, ScoreScale, read_calibration
from local_rerank.requests.worker import BatchReport, Worker
from local_rerank.types import (
    LongDocuments,
    ModelInfo,
    OnDeadline,
    RerankRequest,
    RerankResult,
    check_request,
)

AHEAD_BATCHES = 4
"""Batches that `rank_batch` queues ahead. The shortest requests are scored first, so a longer queue delays results."""


class Reranker:
    """Ranks documents by relevance to a query, with a Qwen3-Reranker model or an encoder on this machine.

    `model` is a hub id, a local folder, a bundle, or None for the built-in local-rerank-nano; `options` are fields of
    `EngineConfig`, which `config` gives all at once; an option wins over its field. The constructor returns when the
    model is loaded. Any number of threads may call the methods at the same time. Raises CheckpointError or ConfigError.

    `config` is the EngineConfig, with what the checkpoint states about long documents; `info` is the ModelInfo: device,
    dtypes, kernels and why each was chosen.

    >>> reranker = Reranker()
    >>> result = reranker.rank("capital of France", ["Rome is in Italy", "Paris is the capital of France"], top_n=1)
    >>> [(item.index, item.document) for item in result]
    [(1, 'Paris is the capital of France')]
    """

    def __init__(
        self,
        model: str | PathLike[str] | None = None,
        *,
        config: EngineConfig | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.config = merged(config, model, options)
        self.checkpoint = checkpoint = open_checkpoint(self.config.model, self.config.revision, self.config.recipe)
        given = {name: value for name in OF_CHUNKS if (value := getattr(self.config, name)) is not None}
        limits = PromptLimits(
            max_length=min(self.config.max_length, checkpoint.max_length),
            max_query_tokens=self.config.max_query_tokens,
            max_document_tokens=self.config.max_document_tokens,
            **checkpoint.config["local_rerank"] | given,
        )
        self.config = replace(self.config, **{name: getattr(limits, name) for name in OF_CHUNKS})
        self.tokenizer = checkpoint.tokenizer(limits=limits, default_instruction=self.config.instruction)
        with ThreadPoolExecutor(1) as thread:  # beside the weights
            faster = thread.submit(self.tokenizer.use_fastest)
            self.engine, self.info = compute(self._load)
        faster.result()
        self.scale = ScoreScale(
            activation=checkpoint.activation,
            calibration=self._read_calibration(),
            is_calibrated=self.config.scores == "calibrated",
        )
        device = self.info.device
        self._worker = Worker(
            lambda pairs: self.engine.score(pairs),
            max_batch_tokens=self.info.max_batch_tokens,
            max_queued_tokens=self.config.max_queued_tokens,
            one_pair_at_a_time=self.config.deterministic,
            launch=(lambda pairs: self.engine.launch(pairs)) if device.startswith("cuda") else None,
            device=device if self.config.device_map is None else f"device_map {self.config.device_map!r}",
            is_alive=lambda: self.engine.is_alive(),
        )

    def _read_calibration(self) -> Calibration | None:
        if (where := self.config.calibration) is None:
            return None
        calibration = read_calibration(Path(where))
        calibration.require(model=self.model_id, instruction=self.instruction, recipe=self.recipe, where=where)
        return calibration

    def _load(self) -> tuple[Engine, ModelInfo]:
        plan = make_plan(self.config, self.checkpoint)
        return load(plan, self.tokenizer.answer_ids, known=lambda: known_pairs(self.checkpoint))

    @property
    def instruction(self) -> str | None:
        """The instruction of requests that have none; None for an encoder, which reads none."""
        return None if self.checkpoint.recipe.is_encoder else self.config.instruction

    @property
    def recipe(self) -> dict[str, Any]:
        """What log-odds depend on beside the model's name, the instruction and the texts. A calibration names it."""
        template = json.dumps(self.checkpoint.recipe.stored, sort_keys=True)
        return {
            "weights": self.checkpoint.digest,
            "template": hashlib.sha256(template.encode()).hexdigest()[:32],
            "dtype": self.info.dtype,
            "max_length": min(self.config.max_length, self.checkpoint.max_length),
            "max_query_tokens": self.config.max_query_tokens,
            "max_document_tokens": self.config.max_document_tokens,
            **{name: getattr(self.config, name) for name in OF_CHUNKS if self.config.in_chunks},
        }

    @property
    def model_id(self) -> str:
        """The name of the loaded model: a hub id, the name of a folder or bundle, or local-rerank-nano."""
        return self.info.model_id

    @property
    def num_queued_tokens(self) -> int:
        """Tokens in the queue, without those of the running batch."""
        return self._worker.num_queued_tokens

    @property
    def num_queued_requests(self) -> int:
        """Requests in the queue, without those of which all pairs are in the running batch."""
        return self._worker.num_queued_requests

    @property
    def max_batch_tokens(self) -> int:
        """The token budget of a batch; below the configured one while memory is short."""
        return self._worker.max_batch_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Queued tokens processed per second, measured over the last batches; None before the first one."""
        return self._worker.tokens_per_second

    def retry_after(self) -> float:
        """Estimated seconds until one of the queued requests is done."""
        return self._worker.retry_after()

    def observe_batches(self, observer: Callable[[BatchReport], None]) -> None:
        """Call `observer` after every batch, in the worker's thread; it must be quick and must not raise."""
        self._worker.on_batch = observer

    def observe_failure(self, observer: Callable[[DeviceFailure], None]) -> None:
        """Call `observer` if the GPU fails, in the worker's thread, before requests fail; it must not raise."""
        self._worker.on_failure = observer

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        instruction: str | None = None,
        top_n: int | None = None,
        long_documents: LongDocuments | None = None,
        spans: bool = False,
        timeout: float | None = None,
        on_deadline: OnDeadline = "error",
        min_score: float | None = None,
        first_stage_scores: Iterable[float] | None = None,
        first_stage_weight: float = 1.0,
    ) -> RerankResult:
        """The documents ranked by relevance, most relevant first, at most `top_n`.

        `documents` is a list, tuple, NumPy array, pandas column or generator of strings; one string is one document.
        `instruction` replaces the default one, `long_documents` the engine's setting: with "chunk" a document longer
        than `chunk_tokens` is scored by its best chunk. `spans=True` scores the sentences of the best chunk of each
        returned document, too. Documents whose relevance score is below `min_score` are left out and counted.
        `first_stage_scores`, one for each document, change the order: documents are sorted by the z-scores of the
        log-odds plus `first_stage_weight` times those of these scores. After `timeout` seconds DeadlineExceeded is
        raised; with `on_deadline="partial"` the documents that are scored by then are ranked, and `not_scored` lists
        the others. A RerankRequest for `rank_batch` has more options.

        Raises a leaf of InvalidRequest, Overloaded, DeadlineExceeded, EngineFailure, ModelUnavailable, DeviceFailure
        or UnusableAfterFork.
        """
        return self.submit(
            RerankRequest(
                query=query,
                documents=documents_of(documents),
                instruction=instruction,
                top_n=top_n,
                long_documents=long_documents,
                spans=spans,
                timeout=timeout,
                on_deadline=on_deadline,
                min_score=min_score,
                first_stage_scores=first_stage_of(first_stage_scores),
                first_stage_weight=first_stage_weight,
            )
        ).result()

    def score(
        self, pairs: Iterable[tuple[str, str]], *, instruction: str | None = None, logits: bool = False
    ) -> list[float]:
        """Relevance scores of (query, document) pairs in order, 0...1 (`RankedDocument`); with `logits=True` log-odds.

        One pair also goes in a list: `score([("query", "document")])`. Neighbouring pairs with the same query share its
        tokens. Raises as `rank`.
        """
        results = self.rank_batch(requests_of(pairs, instruction))
        return [score for result in results for score in scores_of(result, logits=logits)]

    @overload
    def rank_batch(
        self, requests: Iterable[RerankRequest], *, return_errors: Literal[False] = False
    ) -> Iterator[RerankResult]: ...

    @overload
    def rank_batch(
        self, requests: Iterable[RerankRequest], *, return_errors: bool
    ) -> Iterator[RerankResult | InvalidRequest]: ...

    def rank_batch(
        self, requests: Iterable[RerankRequest], *, return_errors: bool = False
    ) -> Iterator[RerankResult | InvalidRequest]:
        """Rank many requests in shared batches. Yields results in the order of the requests, reading a bounded number
        ahead.

        An invalid request raises InvalidRequest and ends the iteration; with `return_errors=True` the error is yielded
        in its place. Other errors are always raised, but not Overloaded while requests of this call are queued: then it
        waits.
        """
        in_flight: deque[Future[RerankResult] | Future[RerankResult | InvalidRequest]] = deque()
        try:
            for request in requests:
                while (future := self.submit_if_room(request, not in_flight, return_errors)) is None:
                    yield in_flight.popleft().result()
                in_flight.append(future)
                if len(in_flight) > 1 and self.num_queued_tokens > AHEAD_BATCHES * self.max_batch_tokens:
                    yield in_flight.popleft().result()
                while in_flight and in_flight[0].done():
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:  # after an error, or when the caller stops early, nothing stays queued
            for future in in_flight:
                future.cancel()

    def submit_if_room(
        self, request: RerankRequest, must: bool, return_errors: bool
    ) -> Future[RerankResult] | Future[RerankResult | InvalidRequest] | None:
        """Like `submit`, but None if the queue is full, unless `must`; `return_errors`: the error as a result."""
        try:
            return self.submit(request)
        except Overloaded:
            if must:
                raise
            return None
        except InvalidRequest as error:
            if not return_errors:
                raise
            refused: Future[RerankResult | InvalidRequest] = Future()
            refused.set_result(error)  # keeps its place in the order
            return refused

    def submit(
        self,
        request: RerankRequest,
        *,
        name: str | None = None,
        on_scored: OnScored | None = None,
        scale: ScoreScale | None = None,
    ) -> Future[RerankResult]:
        """Tokenize in this thread and queue the request. Cancelling the future removes it from the queue.

        `name` is the request's name in the log; `scale` is the self-test's. `on_scored` is called with lists of
        RankedDocument as soon as their scores are known, in the worker's thread, without documents below `min_score`;
        it must be quick and must not raise. Raises a leaf of InvalidRequest, Overloaded, ModelUnavailable,
        DeviceFailure or UnusableAfterFork; the future may fail with DeadlineExceeded, EngineFailure, ModelUnavailable
        or DeviceFailure.
        """
        check_request(request)
        started = time.perf_counter()
        self._worker.check_room()  # before the work of tokenizing
        pending = PendingRequest(
            request,
            self.tokenizer.pairs(request),
            model_id=self.model_id,
            scale=scale or self.scale,
            started=started,
            name=name,
            span_pairs=self.tokenizer.span_pairs,
            on_scored=on_scored,
        )
        self._worker.submit(pending)
        pending.start_timer()
        return pending.future

    def explain(self, query: str, document: str, *, instruction: str | None = None) -> tuple[str, list[int]]:
        """The exact prompt of one pair as the model reads it, after truncation, and its token ids. Raises a leaf of
        InvalidRequest.
        """
        request = RerankRequest(query=query, documents=(document,), instruction=instruction)
        pair = self.tokenizer.pairs(request).pairs[0]
        ids = [*pair.prefix_ids, *pair.document_ids]
        return self.tokenizer.decode(ids), ids

    def close(self) -> None:
        """Finish the running batch, fail queued requests with ModelUnavailable, and stop the thread.

        Later calls raise ModelUnavailable. Dropping the object frees the weights only after this, because until then
        the thread refers to it. Closing twice does nothing.
        """
        self._worker.close()

    __reduce__ = forks.refuse_copies

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
