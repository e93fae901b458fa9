"""`AsyncReranker`, for asyncio. Loading and tokenization run in threads, so the event loop never blocks.

Concurrent calls queue at the same worker and share batches. Cancelling a call removes its pairs from the queue. torch
is imported in the loading thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from local_rerank import forks
from local_rerank.arguments import documents_of, first_stage_of, requests_of, scores_of
from local_rerank.config import EngineConfig, EngineOptions, merged
from local_rerank.errors import InvalidRequest, LocalRerankError, ModelUnavailable, UnusableAfterFork
from local_rerank.types import (
    LongDocuments,
    OnDeadline,
    RerankRequest,
    RerankResult,
)

if TYPE_CHECKING:
    from local_rerank.reranker import Reranker

TOKENIZER_THREADS = 4  # tokenization releases the GIL, so long requests do not block short ones

T = TypeVar("T")


class AsyncReranker:
    """`Reranker` for asyncio, with the same arguments. The constructor returns at once and the model loads in a thread.

    `async with` waits until the model is loaded, and closes it in the end. Raises ConfigError for an unknown option or
    a value of the wrong type. If the model cannot be loaded, every call raises CheckpointError or ConfigError.

    >>> import asyncio
    >>> async def main() -> None:
    ...     async with AsyncReranker() as reranker:
    ...         result = await reranker.rank("capital of France", ["Rome is in Italy", "Paris is in France"])
    ...         print([item.index for item in result])
    >>> asyncio.run(main())
    [1, 0]
    """

    def __init__(
        self,
        model: str | PathLike[str] | None = None,
        *,
        config: EngineConfig | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.config = merged(config, model, options)
        self._is_closed = False
        self._outcome: Reranker | BaseException = UnusableAfterFork("no model was loaded before the process was forked")
        self._threads = _make_threads()
        self._loading = forks.load_in_thread(self._threads, self._load)
        forks.renew_in_child(self)

    def _load(self) -> Reranker:
        from local_rerank.reranker import Reranker

        try:
            self._outcome = reranker = Reranker(config=self.config)
        except BaseException as error:
            self._outcome = error
            raise
        return reranker

    def renew(self) -> None:
        """After a fork: keep the parent's model or its error, and start new threads."""
        self._threads = _make_threads()
        self._loading = Future()
        if isinstance(self._outcome, BaseException):
            self._loading.set_exception(self._outcome)
        else:
            self._loading.set_result(self._outcome)

    __reduce__ = forks.refuse_copies

    async def load(self) -> Reranker:
        """Wait until the model is loaded; returns the underlying Reranker. Raises CheckpointError or ConfigError."""
        return await asyncio.shield(asyncio.wrap_future(self._loading))  # cancelling one caller must not stop loading

    async def rank(
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
        """As `Reranker.rank`. Cancelling the call removes the request from the queue."""
        return await self.submit(
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
        )

    async def score(
        self, pairs: Iterable[tuple[str, str]], *, instruction: str | None = None, logits: bool = False
    ) -> list[float]:
        """As `Reranker.score`."""
        results = self.rank_batch(requests_of(pairs, instruction))
        return [score async for result in results for score in scores_of(result, logits=logits)]

    @overload
    def rank_batch(
        self,
        requests: Iterable[RerankRequest] | AsyncIterable[RerankRequest],
        *,
        return_errors: Literal[False] = False,
    ) -> AsyncIterator[RerankResult]: ...

    @overload
    def rank_batch(
        self, requests: Iterable[RerankRequest] | AsyncIterable[RerankRequest], *, return_errors: bool
    ) -> AsyncIterator[RerankResult | InvalidRequest]: ...

    async def rank_batch(
        self, requests: Iterable[RerankRequest] | AsyncIterable[RerankRequest], *, return_errors: bool = False
    ) -> AsyncIterator[RerankResult | InvalidRequest]:
        """As `Reranker.rank_batch`; `requests` may be an async iterable too."""
        reranker = await self.load()
        in_flight: deque[Future[Any]] = deque()
        try:
            async for request in _each(requests):
                while (
                    future := await self._queued(reranker.submit_if_room, request, not in_flight, return_errors)
                ) is None:
                    yield await asyncio.wrap_future(in_flight.popleft())
                in_flight.append(future)
                while in_flight and in_flight[0].done():
                    yield in_flight.popleft().result()
            while in_flight:
                yield await asyncio.wrap_future(in_flight.popleft())
        finally:  # after an error, or when the caller stops early, nothing stays queued
            for future in in_flight:
                future.cancel()

    async def submit(self, request: RerankRequest, *, name: str | None = None) -> RerankResult:
        """The result of a request; `name` is its name in the log. Raises as `rank`."""
        reranker = await self.load()
        return await asyncio.wrap_future(await self._queued(reranker.submit, request, name=name))

    async def _queued(self, submit: Callable[..., T], *arguments: Any, **options: Any) -> T:
        if self._is_closed:
            raise ModelUnavailable("the reranker is closed")
        return await queued(self._threads, submit, *arguments, **options)

    async def close(self) -> None:
        """As `Reranker.close`; waits until the model is loaded, if it is loading."""
        self._is_closed = True
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with suppress(LocalRerankError):  # loading failed, which `load` reports
            self._loading.result().close()
        self._threads.shutdown()

    async def __aenter__(self) -> Self:
        """Wait until the model is loaded."""
        try:
            await self.load()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def queued(threads: Executor, submit: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Run `submit`, which tokenizes and queues a request, in `threads`; returns the future that `submit` returns.

    If the caller is cancelled while `submit` runs, that future is cancelled too, so the request leaves the queue.
    """
    submission = threads.submit(submit, *arguments, **options)
    try:
        return await asyncio.wrap_future(submission)
    except asyncio.CancelledError:
        submission.add_done_callback(_cancel_outcome)
        raise


def _cancel_outcome(submission: Future[Any]) -> None:
    if not submission.cancelled() and submission.exception() is None and submission.result() is not None:
        submission.result().cancel()


def _make_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")


async def _each(requests: Iterable[RerankRequest] | AsyncIterable[RerankRequest]) -> AsyncIterator[RerankRequest]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
