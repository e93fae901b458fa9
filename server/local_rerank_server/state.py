"""The state of one server process: the models, admission, metrics, and the way to have a request ranked.

`ServerState.rank` submits a `RerankRequest` off the event loop: a small pool of threads tokenizes it, the engine's
thread scores it, and the loop awaits the result. A model that is not loaded is loaded first. This module knows no
dialect.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from starlette.requests import Request

from local_rerank import forks
from local_rerank.async_reranker import TOKENIZER_THREADS, queued
from local_rerank.errors import DeadlineExceeded, DeviceFailure, ModelUnavailable, Overloaded
from local_rerank.models.model_set import ModelSet
from local_rerank.models.served import Ranker, ServedModel
from local_rerank.types import OnDeadline, RerankRequest, RerankResult
from local_rerank_server.admission import Admission
from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import ClientDisconnected, InvalidField, ModelNotLoaded, UnknownModel
from local_rerank_server.metrics import Metrics

if TYPE_CHECKING:
    from local_rerank.requests.pending import OnScored

TIMEOUT_HEADER, ON_DEADLINE_HEADER = "x-request-timeout-ms", "x-on-deadline"
PARTIAL_SECONDS = 1.0  # for a partial result to arrive after the deadline, until which alone it was scored
COLD_START_HEADER = "x-cold-start"  # reject: do not wait until the model is loaded
LONG_CHARS = 1_000_000  # up to half a second of tokenization; longer requests share a pool of their own
LONG_THREADS = 1  # fastokens needs some 50 ms; tokenizers splits the documents of one request between threads

Ranking = TypeVar("Ranking")

logger = logging.getLogger(__name__)


class ServerState:
    """The state is loading until `serve` is called, then ready until `drain` is called. A forked child has its own."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.started = int(time.time())
        self.draining = False
        self.on_failure: Callable[[DeviceFailure], None] | None = None  # ends the process
        self._models: ModelSet | None = None
        self._set_up()
        forks.renew_in_child(self)

    def _set_up(self) -> None:
        self.metrics = Metrics()
        self.admission = Admission(self.config, retry_after=self._retry_after)
        self._tokenizers = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._long_tokenizers = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="tokenize-long")
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="parse")  # one, because the JSON parser holds the GIL

    def renew(self) -> None:
        """Start counting from zero in a forked child, with threads of its own."""
        self._set_up()
        if self._models is not None:
            for model in self._models.models:
                if model.ranker is not None:
                    self.observe(model, model.ranker)

    @property
    def status(self) -> str:
        """loading, ready or draining."""
        if self.draining:
            return "draining"
        return "loading" if self._models is None else "ready"

    @property
    def is_loading(self) -> bool:
        """Whether a model is being loaded after the start."""
        return self._models is not None and self._models.is_loading

    @property
    def models(self) -> ModelSet:
        """The models; raises `ModelUnavailable` while the default one loads for the first time."""
        if self._models is None:
            raise ModelUnavailable("the model is still loading")
        return self._models

    @property
    def default(self) -> ServedModel:
        """The model of requests that name no other."""
        return self.models.default

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that can be sent as `model`: for each model its own, then its aliases."""
        return tuple(self.models.by_name)

    def serve(self, models: ModelSet | Ranker) -> None:
        """Rank requests with these models from now on. `observe` must be the `on_load` of a ModelSet."""
        if not isinstance(models, ModelSet):
            models = ModelSet.of(models, aliases=self.config.model_aliases, on_load=self.observe)
        for model in models.models:
            if model.options.engine.scores == "calibrated":
                calibration = model.options.engine.calibration
                logger.info("relevance_score is the probability of calibration %s, model %s", calibration, model.name)
        self.admission.num_models = len(models.models)
        self._models = models

    def observe(self, model: ServedModel, ranker: Ranker) -> None:
        """Count the batches of a model that was loaded, and stop if its GPU fails."""
        ranker.observe_batches(self.metrics.of(model.name).add_batch)
        ranker.observe_failure(self.fail)
        self.metrics.set_model(model.name, ranker.info)

    def drain(self) -> None:
        """Refuse new requests; those already admitted are finished."""
        self.draining = True

    def fail(self, error: DeviceFailure) -> None:
        """Refuse new requests because the GPU failed; the engine answers those already admitted with the error."""
        self.drain()
        if self.on_failure is not None:
            self.on_failure(error)

    def close(self) -> None:
        """Close the models and the thread pools; requests still waiting get `ModelUnavailable`."""
        if self._models is not None:
            self._models.close()
        for threads in (self._tokenizers, self._long_tokenizers, self._parser):
            threads.shutdown(wait=False, cancel_futures=True)

    def render_metrics(self) -> bytes:
        """The page that Prometheus reads."""
        models = self._models.models if self._models else ()
        return self.metrics.render(ready=self.status == "ready", admission=self.admission, models=models)

    def check_model(self, name: str | None, *, strict: bool) -> None:
        """Raise `UnknownModel` if `name` is not served and either `strict` or --strict-models asks for the check."""
        if (strict or self.config.strict_models) and name is not None and name not in self.models.by_name:
            raise UnknownModel(name, known=self.model_names)

    async def parse(self, parse: Callable[[bytes], Any], body: bytes) -> Any:
        """Parse a large body in a thread, after those that wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._parser, parse, body)

    async def rank(
        self, http: Request, request: RerankRequest, name: str | None = None, *, on_scored: OnScored | None = None
    ) -> RerankResult:
        """Rank `request` with a model; its work is cancelled if the deadline passes or the client disconnects first.

        `on_scored` is that of `Reranker.submit`.
        """
        model = self._model_for(http, name)
        timeout_ms = _timeout_ms(http, self.config.request_timeout_ms)
        deadline = None
        if "partial" in (request.on_deadline, wanted_on_deadline(http)):
            deadline = time.monotonic() + timeout_ms / 1e3
        http.state.model = model.name
        http.state.num_documents += len(request.documents)
        if self.config.log_texts:
            logger.info("id=%s query=%r documents=%r", http.state.request_id, request.query, request.documents)
        acquired = asyncio.Event()
        name_in_log = http.state.request_id
        ranking = asyncio.ensure_future(self._submit(model, request, name_in_log, on_scored, deadline, acquired))
        disconnect = asyncio.ensure_future(_until_disconnected(http))
        try:
            patience = timeout_ms / 1e3 + (0 if deadline is None else PARTIAL_SECONDS)
            await asyncio.wait({ranking, disconnect}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if ranking.done() and (deadline is None or not isinstance(ranking.exception(), DeadlineExceeded)):
                result = ranking.result()
                http.state.results.append(result)
                self.metrics.of(model.name).add_result(result, num_documents=len(request.documents))
                self.admission.rates.count_tokens(getattr(http.state, "key", None), result.total_tokens)
                return result
            if disconnect.done() and not ranking.done():
                raise ClientDisconnected("the client disconnected before the response was ready")
            remedy = self._remedy(model, request, timeout_ms, is_loaded=acquired.is_set())
            if deadline is not None:  # else the engine was not asked what is scored
                remedy = f"no document was scored by then; {remedy}"
            raise DeadlineExceeded(timeout_ms=timeout_ms, remedy=remedy)
        finally:
            ranking.cancel()
            disconnect.cancel()

    def _model_for(self, http: Request, name: str | None) -> ServedModel:
        """Raises `ModelNotLoaded` if it has to be loaded and the client does not wait, and `Overloaded`."""
        model, limit = self.models.find(name), self.config.max_queued_requests
        if (num_waiting := model.num_users + len(model.loads)) >= limit:
            what = f"{num_waiting} requests for {model.name} are in flight; at most {limit} are allowed"
            raise Overloaded(what, retry_after=self._retry_after())
        if (sent := http.headers.get(COLD_START_HEADER)) not in (None, "reject"):
            raise InvalidField(COLD_START_HEADER, "only reject is allowed", sent=sent)
        if sent and model.ranker is None:
            self.models.load(model).add_done_callback(lambda loading: self.models.release_unused(model, loading))
            raise ModelNotLoaded(model.name, retry_after=model.seconds_to_load)
        return model

    async def loaded(self, model: ServedModel, *, again: bool = False) -> Ranker:
        """The model, loaded if it is not, to be used until `release`. Raises `ModelUnavailable`."""
        loading = self.models.load(model, again=again)
        try:
            return await asyncio.wrap_future(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(lambda done: self.models.release_unused(model, done))
            raise

    async def _submit(
        self,
        model: ServedModel,
        request: RerankRequest,
        request_id: str,
        on_scored: OnScored | None,
        deadline: float | None,
        acquired: asyncio.Event,
    ) -> RerankResult:
        """Tokenize and score; cancelling it removes the request from the tokenizers' or the engine's queue.

        `deadline`, of time.monotonic(), is when the engine answers with what is scored. `acquired` is set if the model
        is loaded by then.
        """

        def submit() -> Future[RerankResult]:
            ours = request
            if deadline is not None:
                left = max(deadline - time.monotonic(), 1e-6)  # after the waits for the model and this thread
                ours = replace(request, timeout=left, on_deadline="partial")
            return ranker.submit(ours, name=request_id, on_scored=on_scored)

        num_chars = len(request.query) + sum(map(len, request.documents))
        threads = self._long_tokenizers if num_chars > LONG_CHARS else self._tokenizers
        ranker = self.models.acquire(model) or await self.loaded(model)
        if deadline is None or time.monotonic() < deadline:
            acquired.set()
        try:
            result = await asyncio.wrap_future(await queued(threads, submit))
            return result if result.model == model.name else replace(result, model=model.name)
        finally:
            self.models.release(model)

    def _remedy(self, model: ServedModel, request: RerankRequest, timeout_ms: float, *, is_loaded: bool) -> str:
        """What this process was measured to do, and what to change so that such a request is answered in time."""
        longer = "raise --request-timeout-ms"
        if timeout_ms < self.config.request_timeout_ms:
            most = self.config.request_timeout_ms
            longer = f"raise the header {TIMEOUT_HEADER} (the server's --request-timeout-ms is {most})"
        if not is_loaded or (ranker := model.ranker) is None:
            return f"model {model.name} was still loading. Send the request again when it is loaded, or {longer}"
        rate, on_cpu = ranker.tokens_per_second, ranker.info.device == "cpu"
        speed = f", measured rate: {rate:,.0f} tokens per second" if rate else ""
        faster = "--dtype int8 or a smaller model"
        if not on_cpu or ranker.config.dtype == "int8":
            faster = "a smaller model"
        return (
            f"documents: {len(request.documents)}{speed}. Send fewer or shorter documents, {longer}, "
            f"or serve with {faster}"
        )

    def _retry_after(self) -> float:
        ranker = self._models and self._models.default.ranker
        return ranker.retry_after() if ranker else 1.0


async def all_or_none(rankings: Iterable[Coroutine[Any, Any, Ranking]]) -> list[Ranking]:
    """Run the rankings of one client concurrently; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(ranking) for ranking in rankings]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _until_disconnected(http: Request) -> None:
    """Wait until the client closes its connection; the body has been read before."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def wanted_on_deadline(http: Request) -> str:
    """The header's value; raises InvalidField for an unknown one."""
    sent = http.headers.get(ON_DEADLINE_HEADER, "error").strip().lower()
    if sent not in get_args(OnDeadline):
        raise InvalidField(ON_DEADLINE_HEADER, f"one of {', '.join(get_args(OnDeadline))} is expected", sent=sent)
    return sent


def _timeout_ms(http: Request, limit_ms: int) -> float:
    sent = http.headers.get(TIMEOUT_HEADER)
    if sent is None:
        return limit_ms
    with suppress(ValueError):
        timeout_ms = float(sent)
        if timeout_ms > 0:  # false for NaN as well
            return min(timeout_ms, limit_ms)
    raise InvalidField(TIMEOUT_HEADER, "a positive number of milliseconds is expected")
