"""Engines and HTTP ingress as one Ray Serve application, for `serve deploy` and KubeRay's RayService.

    import_path: local_rerank_server.ray_serve.application:build
    args: {model: Qwen/Qwen3-Reranker-0.6B, device: cuda, replicas: 1-8, api_key_file: /etc/local-rerank/keys}

HTTP goes through Ray Serve's proxies, so host, port and TLS are set in Serve's `http_options`. Changing `args` updates
the replicas one by one while the others keep answering.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError
from local_rerank_server.app import create_app
from local_rerank_server.config import ServerConfig
from local_rerank_server.keys import ApiKeys
from local_rerank_server.ray_serve.replica import MAX_ONGOING_REQUESTS, engine_application
from local_rerank_server.ray_serve.reranker import RemoteReranker
from local_rerank_server.state import ServerState

ENGINE_START_SECONDS = 600  # requests in flight wait that long while the only engine is replaced


def build(args: dict[str, Any]) -> serve.Application:
    """Build the application. `args` has options of engine and server by name, and `ingresses`, the number of ingresses.

    Raises ConfigError for an unknown or malformed option, and if neither a key nor `insecure` is set, because the
    address of Serve's proxies is unknown here.
    """
    args = dict(args)
    ingresses = args.pop("ingresses", 1)
    if not isinstance(ingresses, int) or ingresses < 1:
        raise ConfigError(f"ingresses is {ingresses!r}; it must be an integer of at least 1")
    config = EngineConfig(**_pop_options(args, EngineConfig))
    server_config = ServerConfig(**_pop_options(args, ServerConfig) | {"ray": True})
    if args:
        raise ConfigError(f"unknown option {min(args)!r}")
    if not (server_config.has_keys or server_config.insecure):
        raise ConfigError("no api_key and no api_key_file is set; set one, or allow this with insecure: true")
    server_config.check_scores(config)
    server_config = dataclasses.replace(server_config, host="")  # Serve's proxies listen
    make = serve.deployment(
        name="Ingress",
        num_replicas=ingresses,
        ray_actor_options={"num_cpus": 0},  # it mostly waits, and must not take an engine's CPU
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=ENGINE_START_SECONDS + server_config.drain_seconds,
    )
    application: serve.Application = make(serve.ingress()(Ingress)).bind(
        engine_application(config, server_config, may_grow=True), server_config, config
    )
    return application


def _pop_options(args: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Remove the options of `kind` from `args` and return them, as the types that YAML does not have."""
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name in args]
    return {name: _typed(args.pop(name), hints[name]) for name in names}


def _typed(value: Any, hint: Any) -> Any:
    if isinstance(value, str) and hint == Path | None:
        return Path(value)
    if hint == tuple[str, ...]:  # one text is a list of one
        return (value,) if isinstance(value, str) else tuple(value)
    return value


class Ingress:
    """The server's ASGI application in front of the engine deployment."""

    async def __init__(  # type: ignore[misc]  # awaited
        self, engines: DeploymentHandle[Any], config: ServerConfig, engine_config: EngineConfig
    ) -> None:
        """Waits for an engine, because Serve sends requests to an ingress as soon as its constructor returns."""
        state = ServerState(config)
        state.serve(RemoteReranker(engines, await engines.info.remote(), engine_config))
        self._app = create_app(state, ApiKeys.from_config(config))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _WithoutRequestId(self._app)


class _WithoutRequestId:
    """Sends no `x-request-id`: Serve's proxy adds the one that the request has, from the client or from the proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self.app(scope, receive, send_without_id)
