"""What the handlers share: whether the model is there, who is served, and the one way to have a request ranked.

`ServerState.rank` takes a `RerankRequest` off the event loop: tokenization runs in a small pool of threads, the model
in the engine's own; the loop only awaits. Knows nothing of any dialect.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from starlette.requests import Request

from local_rerank import forks
from local_rerank.async_reranker import TOKENIZER_THREADS, queued
from local_rerank.errors import DeadlineExceeded, ModelUnavailable, Overloaded
from local_rerank.types import RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import ClientDisconnected, InvalidField, UnknownModel
from local_rerank_server.metrics import Metrics
from local_rerank_server.rate_limits import KeyRates

if TYPE_CHECKING:
    from local_rerank.config import EngineConfig
    from local_rerank.requests.worker import BatchReport
    from local_rerank.types import ModelInfo

TIMEOUT_HEADER = "x-request-timeout-ms"
LONG_CHARS = 1_000_000  # about half a second of tokenization; a request of more waits for those of its kind alone
LONG_THREADS = 1  # the tokenizers' own threads share one request's documents

logger = logging.getLogger(__name__)


class Ranker(Protocol):
    """What the server needs of a `Reranker`: an engine in this process, or replicas of it elsewhere."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def info(self) -> ModelInfo: ...

    @property
    def model_id(self) -> str: ...

    @property
    def num_queued_tokens(self) -> int: ...

    @property
    def num_queued_requests(self) -> int: ...

    @property
    def max_batch_tokens(self) -> int: ...

    @property
    def tokens_per_second(self) -> float | None: ...

    def retry_after(self) -> float: ...

    def observe_batches(self, observer: Callable[[BatchReport], None]) -> None: ...

    def submit(self, request: RerankRequest, *, name: str | None = None) -> Future[RerankResult]: ...

    def close(self) -> None: ...


class ServerState:
    """One per process; a forked child has its own. Loading until `serve` is called, ready until `drain` is."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.started = int(time.time())
        self.draining = False
        self._reranker: Ranker | None = None
        self._set_up()
        forks.renew_in_child(self)

    def _set_up(self) -> None:
        self.num_admitted = 0  # requests that were let in and are not answered yet
        self.num_body_bytes = 0  # of the bodies of those
        self.metrics = Metrics()
        self.rates = KeyRates(self.config)
        self._tokenizers = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._long_tokenizers = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="tokenize-long")

    def renew(self) -> None:
        """In a forked child: it counts its own requests."""
        self._set_up()
        if self._reranker is not None:
            self.serve(self._reranker)

    @property
    def status(self) -> str:
        """loading, ready or draining."""
        if self.draining:
            return "draining"
        return "loading" if self._reranker is None else "ready"

    @property
    def reranker(self) -> Ranker:
        """The loaded model; raises `ModelUnavailable` before there is one."""
        if self._reranker is None:
            raise ModelUnavailable("the model is still loading")
        return self._reranker

    @property
    def model_names(self) -> tuple[str, ...]:
        """The served model's own id, then its aliases, each once."""
        return tuple(dict.fromkeys((self.reranker.model_id, *self.config.model_aliases)))

    def serve(self, reranker: Ranker) -> None:
        """From now on requests are ranked by `reranker`."""
        reranker.observe_batches(self.metrics.add_batch)
        self.metrics.set_model(reranker.info)
        self._reranker = reranker

    def drain(self) -> None:
        """From now on new requests are refused; those let in before are finished."""
        self.draining = True

    def close(self) -> None:
        """Let go of the model and the threads; whoever still waits is answered with `ModelUnavailable`."""
        if self._reranker is not None:
            self._reranker.close()
        for threads in (self._tokenizers, self._long_tokenizers):
            threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request as let in while the block runs."""
        self.num_admitted += 1
        try:
            yield
        finally:
            self.num_admitted -= 1

    def check_room(self, num_body_bytes: int) -> None:
        """Raise `Overloaded` where one request more, with a body of that size, is more than may be held."""
        limit = self.config.max_queued_requests
        if self.num_admitted >= limit:
            raise Overloaded(f"{self.num_admitted} requests are held, and at most {limit} may be", **self._when_again())
        self.check_bytes(num_body_bytes)

    def check_bytes(self, num_more: int) -> None:
        """Raise `Overloaded` where the bodies held and `num_more` bytes are more than may be held."""
        limit, held = self.config.max_total_body_bytes, self.num_body_bytes
        if held and held + num_more > limit:
            what = (
                f"{held} bytes of request bodies are held and {num_more} more are to come; at most {limit} may be held"
            )
            raise Overloaded(what, **self._when_again())

    def _when_again(self) -> dict[str, float]:
        return {"retry_after": 1.0 if self._reranker is None else self._reranker.retry_after()}

    def check_model(self, name: str | None, *, strict: bool) -> None:
        """Raise `UnknownModel` if `name` is not served; without `strict`, only where --strict-models asks for it."""
        if (strict or self.config.strict_models) and name is not None and name not in self.model_names:
            raise UnknownModel(name, known=self.model_names)

    async def rank(self, http: Request, request: RerankRequest) -> RerankResult:
        """The answer to `request`, unless its deadline passes or its client leaves first; then its work is dropped."""
        timeout_ms = _timeout_ms(http, self.config.request_timeout_ms)
        if self.config.log_texts:
            logger.info("id=%s query=%r documents=%r", http.state.request_id, request.query, request.documents)
        answer = asyncio.ensure_future(self._submit(request, http.state.request_id))
        client_left = asyncio.ensure_future(_until_disconnected(http))
        try:
            await asyncio.wait({answer, client_left}, timeout=timeout_ms / 1000, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                result = answer.result()
                self.metrics.add_result(result, num_documents=len(request.documents))
                self.rates.add_tokens(getattr(http.state, "key", None), result.total_tokens)
                return result
            if client_left.done():
                raise ClientDisconnected("the client left before its answer was ready")
            raise DeadlineExceeded(timeout_ms=timeout_ms)
        finally:
            answer.cancel()
            client_left.cancel()

    async def rank_all(self, http: Request, requests: Sequence[RerankRequest]) -> list[RerankResult]:
        """The answers to several requests of one client, all at once; the first failure drops the others' work."""
        tasks = [asyncio.ensure_future(self.rank(http, request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _submit(self, request: RerankRequest, request_id: str) -> RerankResult:
        """Cancelled, it takes the request out of the engine's queue, whichever step it was at."""
        threads = self._long_tokenizers if num_chars(request) > LONG_CHARS else self._tokenizers
        return await asyncio.wrap_future(await queued(threads, self.reranker.submit, request, name=request_id))


def num_chars(request: RerankRequest) -> int:
    """Of its query and its documents."""
    return len(request.query) + sum(map(len, request.documents))


async def _until_disconnected(http: Request) -> None:
    """Returns when the client has closed its connection; the body has been read before."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _timeout_ms(http: Request, limit_ms: int) -> float:
    sent = http.headers.get(TIMEOUT_HEADER)
    if sent is None:
        return limit_ms
    with suppress(ValueError):
        asked = float(sent)
        if asked > 0:  # false for NaN too
            return min(asked, limit_ms)
    raise InvalidField(TIMEOUT_HEADER, "a positive number of milliseconds is expected")
