"""The ASGI application for gunicorn and uvicorn, configured by `LOCAL_RERANK_*` variables.

    gunicorn -k uvicorn_worker.UvicornWorker -w 2 --preload local_rerank_server.asgi:app
    uvicorn --factory local_rerank_server.asgi:create

Creating the application starts loading the model. With gunicorn's --preload that happens before the fork, which waits
for the model, and the workers share its weights; without it each worker loads its own. Importing this module does
nothing.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from local_rerank.async_reranker import AsyncReranker
from local_rerank.commands.app import kubernetes_variables, serve_options
from local_rerank.engine.cpu.process_setup import configure_process
from local_rerank.errors import ConfigError
from local_rerank_server.app import create_app
from local_rerank_server.keys import ApiKeys
from local_rerank_server.logs import set_up_logging
from local_rerank_server.state import ServerState
from local_rerank_server.tracing import Tracing


@functools.cache
def create() -> ASGIApp:
    """Create this process's application; also configures logging and OpenMP. Takes the variables of `serve`.

    Raises ConfigError for an unknown or malformed variable, and if neither a key nor `insecure` is set, because the
    address that the server listens on is unknown here.
    """
    engine_config, config = serve_options()
    if len(config.model) > 1 or config.keep_alive or config.max_model_bytes:
        what = "the ASGI application serves one model, which stays loaded"
        raise ConfigError(f"{what}; leave out others, keep_alive, max_model_bytes")
    config.check_scores(engine_config)
    if config.ray:
        raise ConfigError("ray is not supported here; use `local-rerank serve --ray` or Ray Serve")
    if not (config.has_keys or config.insecure):
        raise ConfigError(
            "no LOCAL_RERANK_API_KEY and no LOCAL_RERANK_API_KEY_FILE is set; set one, or allow this with "
            "LOCAL_RERANK_INSECURE=true"
        )
    configure_process()
    set_up_logging(config, passed_over=kubernetes_variables())
    tracing = Tracing(config.otlp_endpoint) if config.otlp_endpoint else None
    _import_transformers()
    # the server of this application listens, on an address that is unknown here
    state, reranker = ServerState(replace(config, host="")), AsyncReranker(config=engine_config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        """Fails the server's start if the model cannot be loaded or fails its self-test."""
        await _open(reranker, state)
        yield
        state.drain()
        await asyncio.to_thread(state.close)
        await reranker.close()
        if tracing is not None:
            tracing.close()

    # the server whose process this is stops and, if it has a supervisor, is started anew
    state.on_failure = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    app = create_app(state, ApiKeys.from_config(config), lifespan=lifespan)
    return app if tracing is None else tracing.wrap(app)


def _import_transformers() -> None:
    """Import what loading needs, because a module imported while a fork waits misses half of its fork hooks."""
    import transformers  # noqa: F401


async def _open(reranker: AsyncReranker, state: ServerState) -> None:
    loaded = await reranker.load()
    if not state.config.no_self_test:
        from local_rerank.selftest.self_test import require_self_test

        await asyncio.to_thread(require_self_test, loaded)
    state.serve(loaded)


def __getattr__(name: str) -> Any:
    """Create `app` when a server first asks for it."""
    if name == "app":
        return create()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
