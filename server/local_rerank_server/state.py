"""What the handlers share: whether the model is there, who is served, and the one way to have a request ranked.

`ServerState.rank` takes a `RerankRequest` off the event loop: tokenization runs in a small pool of threads, the model
in the engine's own; the loop only awaits. Knows nothing of any dialect.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Protocol

from starlette.requests import Request

from local_rerank.errors import DeadlineExceeded, ModelUnavailable
from local_rerank.types import RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import ClientDisconnected, InvalidField, UnknownModel

TIMEOUT_HEADER = "x-request-timeout-ms"
TOKENIZER_THREADS = 4  # tokenization lets go of the interpreter lock, so a few long requests do not hold up short ones

logger = logging.getLogger(__name__)


class Ranker(Protocol):
    """What the server needs of a `Reranker`: an engine in this process, or replicas of it elsewhere."""

    @property
    def model_id(self) -> str: ...

    def submit(self, request: RerankRequest) -> Future[RerankResult]: ...

    def close(self) -> None: ...


class ServerState:
    """One per process. Loading until `serve` is called, ready until `drain` is."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.started = int(time.time())
        self.draining = False
        self.num_admitted = 0  # requests that were let in and are not answered yet
        self._reranker: Ranker | None = None
        self._tokenizers = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")

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
        self._reranker = reranker

    def drain(self) -> None:
        """From now on new requests are refused; those let in before are finished."""
        self.draining = True

    def close(self) -> None:
        """Let go of the model and the threads; whoever still waits is answered with `ModelUnavailable`."""
        if self._reranker is not None:
            self._reranker.close()
        self._tokenizers.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request as let in while the block runs."""
        self.num_admitted += 1
        try:
            yield
        finally:
            self.num_admitted -= 1

    def check_model(self, name: str | None, *, strict: bool) -> None:
        """Raise `UnknownModel` if `name` is not served; without `strict`, only where --strict-models asks for it."""
        if (strict or self.config.strict_models) and name is not None and name not in self.model_names:
            raise UnknownModel(name, known=self.model_names)

    async def rank(self, http: Request, request: RerankRequest) -> RerankResult:
        """The answer to `request`, unless its deadline passes or its client leaves first; then its work is dropped."""
        timeout_ms = _timeout_ms(http, self.config.request_timeout_ms)
        if self.config.log_texts:
            logger.info("id=%s query=%r documents=%r", http.state.request_id, request.query, request.documents)
        answer = asyncio.ensure_future(self._submit(request))
        client_left = asyncio.ensure_future(_until_disconnected(http))
        try:
            await asyncio.wait({answer, client_left}, timeout=timeout_ms / 1000, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if client_left.done():
                raise ClientDisconnected("the client left before its answer was ready")
            raise DeadlineExceeded(timeout_ms=timeout_ms)
        finally:
            answer.cancel()
            client_left.cancel()

    async def _submit(self, request: RerankRequest) -> RerankResult:
        """Cancelled, it takes the request out of the engine's queue, whichever step it was at."""
        submission = self._tokenizers.submit(self.reranker.submit, request)
        try:
            pending = await asyncio.wrap_future(submission)
        except asyncio.CancelledError:
            submission.add_done_callback(_cancel_outcome)
            raise
        return await asyncio.wrap_future(pending)


def _cancel_outcome(submission: Future[Future[RerankResult]]) -> None:
    if not submission.cancelled() and submission.exception() is None:
        submission.result().cancel()


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
