"""Engines and HTTP ingress as one Ray Serve application: `serve deploy`, KubeRay's RayService, several machines.

    import_path: local_rerank_server.ray_serve.application:build
    args: {model: Qwen/Qwen3-Reranker-0.6B, device: cuda, replicas: 1-8, api_key_file: /etc/local-rerank/keys}

Here HTTP comes through Ray Serve's own proxies, so options of the socket (host, port, TLS) are Serve's `http_options`.
A change of `args` rolls through the replicas while the others go on answering.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError
from local_rerank_server.app import create_app
from local_rerank_server.config import ServerConfig
from local_rerank_server.keys import ApiKeys
from local_rerank_server.ray_serve.replica import MAX_ONGOING_REQUESTS, engine_application
from local_rerank_server.ray_serve.reranker import RemoteReranker
from local_rerank_server.state import ServerState

REQUEST_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
ENGINE_START_SECONDS = 600  # when the only engine is replaced, requests in flight wait until the new one is loaded


def build(args: dict[str, Any]) -> serve.Application:
    """The application. `args` are options of engine and server by their names, and `ingresses`, how many answer HTTP.

    Raises ConfigError for an unknown or malformed one, and where neither a key nor `insecure` is given: whom Serve's
    proxies listen to is not seen here.
    """
    args = dict(args)
    ingresses = args.pop("ingresses", 1)
    if not isinstance(ingresses, int) or ingresses < 1:
        raise ConfigError(f"ingresses is {ingresses!r}; it must be a number from 1")
    config = EngineConfig(**_taken(args, EngineConfig))
    server_config = ServerConfig(**_taken(args, ServerConfig) | {"ray": True})
    if args:
        raise ConfigError(f"unknown option {min(args)!r}")
    if not (server_config.has_keys or server_config.insecure):
        raise ConfigError("no api_key and no api_key_file is set; set one, or allow that with insecure: true")
    make = serve.deployment(
        name="Ingress",
        num_replicas=ingresses,
        ray_actor_options={"num_cpus": 0},  # it waits most of the time, and must not take an engine's place
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=ENGINE_START_SECONDS + server_config.drain_seconds,
    )
    application: serve.Application = make(serve.ingress()(Ingress)).bind(
        engine_application(config, server_config, may_grow=True), server_config, config
    )
    return application


def _taken(args: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Take the options of that kind out of `args`; lists become tuples, which the configurations hold."""
    names = [field.name for field in dataclasses.fields(kind) if field.name in args]
    values = {name: args.pop(name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


class Ingress:
    """The server's application in front of a deployment's handle."""

    async def __init__(  # type: ignore[misc]  # awaited
        self, engines: DeploymentHandle[Any], config: ServerConfig, engine_config: EngineConfig
    ) -> None:
        """Waits for an engine: Serve sends requests as soon as this ends, to a new ingress of a rolling update too."""
        state = ServerState(config)
        state.serve(RemoteReranker(engines, await engines.info.remote(), engine_config))
        self._app = create_app(state, ApiKeys.from_config(config))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _RequestIdOfProxy(self._app)


class _RequestIdOfProxy:
    """Serve's proxy gives each request an id and sends it as `x-request-id`; ours is to be the same, and sent once."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        if scope["type"] == "http" and REQUEST_ID.fullmatch(given := Headers(scope=scope).get("x-request-id", "")):
            scope.setdefault("state", {})["request_id"] = given
            return await self.app(scope, receive, send_without_id)
        await self.app(scope, receive, send)
