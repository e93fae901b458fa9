"""The main path: RerankRequest -> pairs -> scheduler -> packed batch -> engine -> RerankResult.

`submit` tokenizes in the caller's thread and queues; one thread owns the model and works off batches, in which pairs of
several requests may share a forward pass. Every request that was taken gets an answer, an error included.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import Any, Literal, Self, overload

from local_rerank.config import EngineConfig
from local_rerank.engine import Engine, ModelInfo, load_engine
from local_rerank.errors import (
    ConfigError,
    EngineFailure,
    InvalidRequest,
    LocalRerankError,
    ModelUnavailable,
    Overloaded,
)
from local_rerank.models import open_checkpoint
from local_rerank.packing import pack
from local_rerank.scheduler import Entry, Scheduler
from local_rerank.tokenization import PairTokenizer, TokenizedRequest, num_batch_tokens
from local_rerank.types import RankedDocument, RerankRequest, RerankResult

logger = logging.getLogger(__name__)


class _Job:
    """One request on its way: what came in, the log-odds that are there, who waits."""

    def __init__(self, request: RerankRequest, tokenized: TokenizedRequest, started: float) -> None:
        self.request = request
        self.tokenized = tokenized
        self.future: Future[RerankResult] = Future()
        self.log_odds: dict[int, float] = {}  # by pair
        self.num_computed_tokens = 0
        self.started = started
        self.queued = time.perf_counter()
        self.first_batch: float | None = None


class Reranker:
    """Ranks documents by their relevance to a query, with a Qwen3-Reranker model on this machine.

    `model` is a hub id, a local folder, a bundle or None for the embedded local-rerank-nano; options are those of
    `EngineConfig`. Raises CheckpointError where the model cannot be loaded, ConfigError where an option cannot hold.

    >>> reranker = Reranker()
    >>> result = reranker.rank("capital of France", ["Rome is in Italy", "Paris is the capital of France"], top_n=1)
    >>> [(item.index, item.document) for item in result]
    [(1, 'Paris is the capital of France')]
    """

    def __init__(self, model: str | None = None, *, config: EngineConfig | None = None, **options: Any) -> None:
        self.config = _merge(config or EngineConfig(), model, options)
        self.checkpoint = checkpoint = open_checkpoint(self.config.model, self.config.revision)
        self.tokenizer = PairTokenizer.from_folder(
            checkpoint.folder,
            checkpoint.template,
            max_length=min(self.config.max_length, checkpoint.max_length),
            max_query_tokens=self.config.max_query_tokens,
            max_document_tokens=self.config.max_document_tokens,
            default_instruction=self.config.instruction,
        )
        engine, self.info = load_engine(
            self.config, checkpoint, yes_id=self.tokenizer.yes_id, no_id=self.tokenizer.no_id
        )
        self._start(engine, self.info)

    def _start(self, engine: Engine, info: ModelInfo) -> None:
        self._engine = engine
        self._scheduler = Scheduler(info.max_batch_tokens)
        self._jobs: dict[int, _Job] = {}
        self._ids = itertools.count()
        self._changed = threading.Condition()  # guards scheduler, jobs and closing
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="local-rerank-engine", daemon=True)
        self._thread.start()

    @property
    def model_id(self) -> str:
        return self.info.model_id

    @property
    def num_queued_tokens(self) -> int:
        with self._changed:
            return self._scheduler.num_queued_tokens

    def rank(
        self, query: str, documents: Sequence[str], *, instruction: str | None = None, top_n: int | None = None
    ) -> RerankResult:
        """Rank documents, most relevant first; raises a leaf of InvalidRequest, Overloaded or EngineFailure."""
        documents = (documents,) if isinstance(documents, str) else tuple(documents)
        return self.submit(
            RerankRequest(query=query, documents=documents, instruction=instruction, top_n=top_n)
        ).result()

    def score(
        self, pairs: Iterable[tuple[str, str]], *, instruction: str | None = None, logits: bool = False
    ) -> list[float]:
        """Relevance scores of (query, document) pairs in their order; log-odds with `logits=True`.

        Neighbouring pairs with the same query share its tokens.
        """
        requests = (
            RerankRequest(query=query, documents=tuple(document for _, document in group), instruction=instruction)
            for query, group in itertools.groupby(pairs, key=lambda pair: pair[0])
        )
        scores: list[float] = []
        for result in self.rank_batch(requests):
            in_order = sorted(result, key=lambda item: item.index)
            scores += [item.log_odds if logits else item.relevance_score for item in in_order]
        return scores

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
        """Rank many requests, sharing batches; yields results in the order of the requests, a bounded number ahead.

        A request that cannot be ranked ends the iteration with its InvalidRequest or, with `return_errors=True`, is
        answered with it; whatever else goes wrong is raised.
        """
        in_flight: deque[Future[RerankResult] | Future[RerankResult | InvalidRequest]] = deque()
        try:
            for request in requests:
                while (future := self._submit_if_room(request, not in_flight, return_errors)) is None:
                    yield in_flight.popleft().result()
                in_flight.append(future)
                while in_flight and in_flight[0].done():
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:  # a request that cannot be ranked, or a caller who stops, leaves nothing running
            for future in in_flight:
                future.cancel()

    def _submit_if_room(
        self, request: RerankRequest, must: bool, return_errors: bool
    ) -> Future[RerankResult] | Future[RerankResult | InvalidRequest] | None:
        """As `submit`, but None where the queue is full, unless it `must` go in now; perhaps an error as the result."""
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
            refused.set_result(error)  # keeps its place behind the requests before it
            return refused

    def submit(self, request: RerankRequest) -> Future[RerankResult]:
        """Tokenize in this thread and queue; cancelling the future frees its place before the next forward pass.

        Raises a leaf of InvalidRequest, Overloaded or ModelUnavailable; the future may fail with EngineFailure.
        """
        started = time.perf_counter()
        self._check_queue(self.num_queued_tokens, 1)  # before the work of tokenizing
        job = _Job(request, self.tokenizer.pairs(request), started)
        num_tokens = num_batch_tokens(job.tokenized.pairs)
        with self._changed:
            if self._closing:
                raise ModelUnavailable("the engine is closing")
            self._check_queue(self._scheduler.num_queued_tokens, num_tokens)
            request_id = next(self._ids)
            self._jobs[request_id] = job
            self._scheduler.add(request_id, job.tokenized.pairs)
            self._changed.notify_all()
        return job.future

    def _check_queue(self, queued: int, num_tokens: int) -> None:
        """An empty queue takes any request; else what waits and what comes must fit. Raises Overloaded."""
        limit = self.config.max_queued_tokens
        if queued and queued + num_tokens > limit:
            what = f"{queued} tokens wait and this request has {num_tokens} or more; at most {limit} may wait"
            raise Overloaded(what, retry_after=1.0)

    def explain(self, query: str, document: str, *, instruction: str | None = None) -> tuple[str, list[int]]:
        """The exact prompt of one pair and its token ids."""
        request = RerankRequest(query=query, documents=(document,), instruction=instruction)
        pair = self.tokenizer.pairs(request).pairs[0]
        ids = [*pair.prefix_ids, *pair.document_ids]
        return self.tokenizer.decode(ids), ids

    def close(self) -> None:
        """Finish the batch that runs, fail what waits with ModelUnavailable, and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        """The model's thread: take a batch, score it, deliver; until closed. Whatever happens, it goes on."""
        while (batch := self._next_batch()) is not None:
            try:
                self._score(batch)
            except Exception as error:  # a fault of ours: each waiter must hear of it
                logger.exception("a batch of %d pairs could not be delivered", len(batch))
                for request_id in {entry.request_id for entry in batch}:
                    self._fail(request_id, EngineFailure(f"scoring failed: {type(error).__name__}: {error}"))
        with self._changed:
            jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            _answer(job, ModelUnavailable("the engine is closing"))

    def _next_batch(self) -> list[Entry] | None:
        """Wait for work; requests whose caller has gone are dropped first. None when closing."""
        with self._changed:
            while not self._closing:
                for request_id in [i for i, job in self._jobs.items() if job.future.cancelled()]:
                    self._drop(request_id)
                if batch := self._scheduler.next_batch():
                    now = time.perf_counter()
                    for job in {self._jobs[entry.request_id] for entry in batch}:
                        job.first_batch = job.first_batch or now
                    return batch
                self._changed.wait()
            return None

    def _score(self, batch: list[Entry]) -> None:
        """Score a batch; where it fails, its halves by request, so that only the guilty request fails."""
        request_ids = list(dict.fromkeys(entry.request_id for entry in batch))
        try:
            log_odds: list[float] = self._engine.forward(pack([entry.pair for entry in batch])).tolist()
        except Exception as error:
            if len(request_ids) > 1:
                first = set(request_ids[: len(request_ids) // 2])
                self._score([entry for entry in batch if entry.request_id in first])
                self._score([entry for entry in batch if entry.request_id not in first])
                return
            logger.exception("a batch of %d pairs failed", len(batch))
            self._fail(request_ids[0], EngineFailure(f"the model failed: {type(error).__name__}: {error}"))
            return
        self._deliver(batch, log_odds)

    def _deliver(self, batch: list[Entry], log_odds: list[float]) -> None:
        """Hand scores to their requests and answer those that are complete."""
        by_request: dict[int, list[Entry]] = {}
        for entry, value in zip(batch, log_odds, strict=True):
            if (job := self._jobs.get(entry.request_id)) is not None:
                job.log_odds[entry.position] = value
                by_request.setdefault(entry.request_id, []).append(entry)
        for request_id, entries in by_request.items():
            job = self._jobs[request_id]
            job.num_computed_tokens += num_batch_tokens([entry.pair for entry in entries])
            if bad := [
                job.log_odds[entry.position] for entry in entries if not math.isfinite(job.log_odds[entry.position])
            ]:
                self._fail(request_id, EngineFailure(f"the model gave {bad[0]} as log-odds"))
            elif len(job.log_odds) == len(job.tokenized.pairs):
                self._drop(request_id)
                _answer(job, _result(job, self.model_id))

    def _fail(self, request_id: int, error: LocalRerankError) -> None:
        if (job := self._drop(request_id)) is not None:
            _answer(job, error)

    def _drop(self, request_id: int) -> _Job | None:
        with self._changed:
            self._scheduler.discard(request_id)
            return self._jobs.pop(request_id, None)


def _merge(config: EngineConfig, model: str | None, options: dict[str, Any]) -> EngineConfig:
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    if unknown := sorted(set(options) - names):
        raise ConfigError(f"unknown option {unknown[0]!r}; there are {', '.join(sorted(names))}")
    if model is not None:
        options["model"] = model
    return dataclasses.replace(config, **options)


def _answer(job: _Job, outcome: RerankResult | LocalRerankError) -> None:
    """Settle the job's future, unless its caller cancelled it at the same moment."""
    try:
        if isinstance(outcome, LocalRerankError):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
    except InvalidStateError:
        logger.debug("a request was cancelled as it was answered")


def _result(job: _Job, model_id: str) -> RerankResult:
    """Sort by log-odds (scores saturate, log-odds do not), ties by index, and keep `top_n`."""
    tokenized, now = job.tokenized, time.perf_counter()
    log_odds = [job.log_odds[pair] for pair in tokenized.pair_of_document]
    order = sorted(range(len(log_odds)), key=lambda index: (-log_odds[index], index))
    num_tokens = [tokenized.num_document_tokens(index) for index in range(len(log_odds))]
    return RerankResult(
        results=tuple(
            RankedDocument(
                index=index,
                relevance_score=sigmoid(log_odds[index]),
                log_odds=log_odds[index],
                document=job.request.documents[index],
                num_tokens=num_tokens[index],
                num_truncated_tokens=tokenized.num_truncated_tokens[index],
            )
            for index in order[: job.request.top_n]
        ),
        model=model_id,
        num_query_tokens=tokenized.num_query_tokens,
        num_query_truncated_tokens=tokenized.num_query_truncated_tokens,
        num_document_tokens=sum(num_tokens),
        num_truncated_documents=sum(cut > 0 for cut in tokenized.num_truncated_tokens),
        total_tokens=tokenized.total_tokens,
        num_computed_tokens=job.num_computed_tokens,
        tokenize_ms=(job.queued - job.started) * 1e3,
        queue_ms=((job.first_batch or now) - job.queued) * 1e3,
        total_ms=(now - job.started) * 1e3,
    )


def sigmoid(x: float) -> float:
    """The relevance score that log-odds stand for."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
