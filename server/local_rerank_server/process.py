"""The server process: binds the port, loads the model in the background, and drains on shutdown.

`/health` answers as soon as the port is bound, `/ready` returns 200 once the model is loaded. A failure to bind or to
load is raised; the command line prints it as one line and exits with a non-zero status.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from local_rerank.batch.ray_cluster import require_ray
from local_rerank.commands.app import kubernetes_variables
from local_rerank.commands.console import missing_package
from local_rerank.config import EngineConfig
from local_rerank.errors import CheckpointError, ConfigError, DeviceFailure, LocalRerankError
from local_rerank.models.model_set import ModelSet
from local_rerank.models.options import ModelOptions, models_of, seconds_of
from local_rerank_server.app import create_app
from local_rerank_server.config import DASHSCOPE_MODELS, ServerConfig
from local_rerank_server.connections import (
    address_of,
    allow_many_connections,
    file_id,
    listen,
    make_protocol,
    make_tls_context,
)
from local_rerank_server.keys import ApiKeys
from local_rerank_server.logs import announce, set_up_logging
from local_rerank_server.state import ServerState
from local_rerank_server.tracing import Tracing

if TYPE_CHECKING:
    from local_rerank.types import ModelInfo

KEEP_ALIVE_SECONDS = 75  # longer than SDKs' pools keep idle connections, so that the client closes them first
CUT_OFF_SECONDS = 1  # for writing the 503 of requests that are cut off, or that the GPU can compute no more
IDLE_CLOSE_SECONDS = 0.5  # for the closing handshake of TLS
LOOPBACK = "127.0.0.1,::1,::ffff:127.0.0.1"  # the last is IPv4 on a socket for both
SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger(__name__)


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve until a signal arrives or the GPU fails; returns the exit status, 1 if requests were left unanswered.

    Ends the process itself while the model still loads or computes, and with status 1 if the GPU failed. Raises
    ConfigError or CheckpointError if the server cannot start.
    """
    models = models_of(server_config.model, engine_config)
    set_up_logging(server_config, passed_over=kubernetes_variables())
    for model in models:
        server_config.check_scores(model.engine)
    keys = ApiKeys.from_config(server_config)
    allow_many_connections()
    with listen(server_config) as listener:
        path = server_config.uds
        ours = path and file_id(path)
        try:
            status, model_is_busy = _serve_on(listener, models, server_config, keys)
        finally:
            if path is not None and file_id(path) == ours:  # not what another process has put there since
                path.unlink(missing_ok=True)
    if model_is_busy and not server_config.ray:  # Ray ends its processes at Python's exit
        _end_process(status)
    return status


def _end_process(status: int) -> None:
    """End without Python's teardown: it waits 3 s for a model that loads, and torch can abort in it, because of its
    threads or because it frees what was on a GPU that failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _serve_on(
    listener: socket.socket, models: Sequence[ModelOptions], config: ServerConfig, keys: ApiKeys
) -> tuple[int, bool]:
    """Returns the exit status, and whether a thread still loads or runs the model, or the GPU failed."""
    state = ServerState(config)
    tracing = Tracing(config.otlp_endpoint) if config.otlp_endpoint else None
    server = _Server(_uvicorn_config(state, keys, tracing), state)
    state.on_failure = server.fail
    address = address_of(listener, config)
    announce(config, f"listening on {address}, loading the model ...")
    loading = _load_in_background(state, server, models, ready=lambda served: _announce_ready(served, address, config))
    server.run(sockets=[listener])
    if tracing is not None:
        tracing.close()
    if isinstance(server.failure, DeviceFailure):  # the engine has logged it
        return 1, True
    if server.failure is not None:
        raise server.failure
    return int(server.cut_off), server.cut_off or loading.is_alive() or state.is_loading


def _load_in_background(
    state: ServerState, server: _Server, models: Sequence[ModelOptions], *, ready: Callable[[ModelSet], None]
) -> threading.Thread:
    """Load the models in a thread and pass them to `state`; stop the server if the first one fails."""

    def load() -> None:
        try:
            served = _load(models, state)
        except LocalRerankError as error:
            server.fail(error)
        except Exception as error:
            logger.debug("loading failed", exc_info=error)
            why = missing_package(error) or f"{type(error).__name__}: {error}"
            server.fail(CheckpointError(f"the model cannot be loaded: {why}"))
        else:
            server.restore_signal_handlers()
            state.serve(served)
            ready(served)

    loading = threading.Thread(target=load, name="load", daemon=True)  # a signal does not wait for a long load
    loading.start()
    return loading


def _load(models: Sequence[ModelOptions], state: ServerState) -> ModelSet:
    """Load the first model, and those that are pinned, into this process or, with --ray, into replicas, which run the
    self-test themselves.

    Imports torch, which takes two seconds; the port is already open.
    """
    config = state.config
    if config.model_aliases != DASHSCOPE_MODELS:  # the user chose them, so that no other model may have such a name
        models = [replace(models[0], aliases=(*models[0].aliases, *config.model_aliases)), *models[1:]]
    if config.ray:
        require_ray()
        from local_rerank_server.ray_serve.reranker import start_replicas

        rankers = start_replicas([model.engine for model in models], config)
        return ModelSet.of(*rankers, options=models, aliases=config.model_aliases, on_load=state.observe)
    from local_rerank.bench.kept_speeds import before_download
    from local_rerank.models.loader import EngineLoader

    for model in models:
        if expected := before_download(model.engine):
            logger.info(expected)
    served = ModelSet(
        models,
        EngineLoader(self_test=not config.no_self_test),
        aliases=config.model_aliases,
        keep_alive_seconds=seconds_of(config.keep_alive, several=len(models) > 1),
        max_bytes=config.max_model_bytes,
        on_load=state.observe,
    )
    gc.freeze()  # of what was imported: unloading a model collects garbage, which would walk all of it for 0.1 s
    served.start()
    return served


class _Server(uvicorn.Server):
    """uvicorn's server; the first signal drains admitted requests and refuses new ones, the second stops at once."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self.state = state
        self.failure: LocalRerankError | None = None
        self.cut_off = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def fail(self, error: LocalRerankError) -> None:
        """Stop because the model cannot be loaded or the GPU failed; may be called from any thread."""
        self.failure = error
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def restore_signal_handlers(self) -> None:
        """Set the handlers again from any thread, because starting Ray replaces them with ones that abort after 3 s."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: [signal.signal(number, self.handle_exit) for number in SIGNALS])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but does not raise the signal again, so that a clean stop exits with status 0."""
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.state.drain()
        if self.failure is None:
            announce(self.state.config, self._stopping())
        end = time.monotonic() + (CUT_OFF_SECONDS if self.failure else self.state.config.drain_seconds)
        while self.state.admission.num_requests and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(0.05)
        if self.state.admission.num_requests:
            logger.warning("stopped with %d requests unanswered", self.state.admission.num_requests)
            self.cut_off = True
            await self._cut_off_requests()
        # the remaining time is for responses that clients are still reading
        self.config.timeout_graceful_shutdown = max(1, math.ceil(end - time.monotonic()))
        aborting = asyncio.create_task(self._abort_idle_connections())
        await super().shutdown(sockets)
        aborting.cancel()
        if not self.cut_off:  # otherwise the model is still computing and ends with the process
            await asyncio.to_thread(self.state.close)

    def _stopping(self) -> str:
        num_requests = self.state.admission.num_requests
        if not num_requests:
            return "stopping: no requests in flight"
        seconds = self.state.config.drain_seconds
        return f"stopping: {num_requests} in flight, up to {seconds} s to finish; Ctrl-C or SIGTERM again stops at once"

    async def _cut_off_requests(self) -> None:
        """Have every request answered with 503; a response that has begun cannot be, so its connection is closed."""
        for connection in self._connections():
            if connection.cycle and connection.cycle.response_started and not connection.cycle.response_complete:
                connection.transport.abort()
        await asyncio.sleep(0)  # the requests of these connections see that before they are cancelled
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CUT_OFF_SECONDS)

    async def _abort_idle_connections(self) -> None:
        """Close what is left over with nothing to send: TLS connections whose peers do not confirm their end."""
        await asyncio.sleep(IDLE_CLOSE_SECONDS)
        while True:
            for connection in self._connections():
                idle = not connection.cycle or connection.cycle.response_complete
                if idle and not connection.transport.get_write_buffer_size():
                    connection.transport.abort()
            await asyncio.sleep(0.1)

    def _connections(self) -> list[H11Protocol]:
        return [each for each in self.server_state.connections if isinstance(each, H11Protocol)]


def _uvicorn_config(state: ServerState, keys: ApiKeys, tracing: Tracing | None) -> uvicorn.Config:
    config, app = state.config, create_app(state, keys)  # which has the root path
    uvicorn_config = uvicorn.Config(
        app if tracing is None else tracing.wrap(app),
        log_config=None,
        # h11, because httptools loses the body of requests with `Upgrade: h2c`, which some Java clients send
        http=make_protocol(config),
        ws="none",
        lifespan="off",  # _Server starts and stops what there is, also after a second signal
        access_log=False,  # middleware.RequestLog writes the access log
        server_header=False,
        ssl_context_factory=None if config.ssl_certfile is None else lambda *_: make_tls_context(config),
        # peers whose X-Forwarded-For tells the client: uvicorn's default has no IPv6, and none on a Unix socket
        forwarded_allow_ips="*" if config.uds else os.environ.get("FORWARDED_ALLOW_IPS") or LOOPBACK,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    try:
        uvicorn_config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"ssl_certfile {config.ssl_certfile} or ssl_keyfile cannot be used: {error}") from None
    return uvicorn_config


def _announce_ready(served: ModelSet, address: str, config: ServerConfig) -> None:
    say = partial(announce, config)
    for model in served.models:
        say(f"model: {_loaded(model.info) if model.info else f'{model.name}, {model.error or model.state}'}")
    if served.default.known_info.source == "embedded":
        say("This is the small built-in model. For better results: local-rerank serve --model Qwen/Qwen3-Reranker-0.6B")
    say(f"ready: {address} (API documentation: {address}/docs). Try:")
    say(_curl(address, config))


def _loaded(info: ModelInfo) -> str:
    return f"{info.model_id} ({info.source}), {info.device}, {info.dtype}, loaded in {info.load_seconds:.1f} s"


def _curl(address: str, config: ServerConfig) -> str:
    reach = f"--unix-socket {config.uds} http://localhost{config.prefix}" if config.uds else address
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.has_keys else ""
    body = (
        '{"model":"qwen3-rerank","input":{"query":"What is a text reranking model?","documents":'
        '["Quantum computing is a frontier field of computer science.",'
        '"Text reranking models sort candidates by relevance."]}}'
    )
    path = "/api/v1/services/rerank/text-rerank/text-rerank"
    return f"curl {reach}{path}{key} -H 'Content-Type: application/json' -d '{body}'"
