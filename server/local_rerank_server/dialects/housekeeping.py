"""Routes besides ranking: health, readiness, limits, metrics, models and version.

Errors on paths that belong to no dialect have the shape of this module's errors.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from typing_extensions import TypedDict

import local_rerank
from local_rerank.requests.tokenization import MAX_INSTRUCTION_TOKENS
from local_rerank.types import Limits
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._models import add_loading, add_models
from local_rerank_server.dialects._responses import GenericError, render_generic_error
from local_rerank_server.dialects._route import Dialect, add_get, state_of
from local_rerank_server.metrics import CONTENT_TYPE

dialect = Dialect(
    name="Housekeeping",
    render_error=render_generic_error,
    error_model=GenericError,
    open_paths=("/health", "/healthz", "/ping", "/ready"),
)
router = dialect.router()


class TokenLimits(TypedDict):
    """Queries and documents are truncated to their limit; a longer instruction is refused."""

    max_query_tokens: int
    max_document_tokens: int
    max_instruction_tokens: int
    max_prompt_tokens: int


class ConfiguredLimits(TypedDict):
    """The names are those of `ServerConfig`."""

    max_body_bytes: int
    max_total_body_bytes: int
    max_queued_requests: int
    request_timeout_ms: int
    client_timeout_seconds: int
    key_requests_per_minute: int | None
    key_tokens_per_minute: int | None


class ServerLimits(ConfiguredLimits):
    """Every limit that a client can exceed."""

    dashscope: Limits
    other_routes: Limits
    texts: TokenLimits
    max_queued_tokens: int


async def health() -> JsonResponse:
    """200 as soon as the server listens."""
    return JsonResponse({"status": "ok"})


async def ready(http: Request) -> JsonResponse:
    """200 while the server accepts requests; 503 while the model loads and while the server drains."""
    status = state_of(http).status
    return JsonResponse({"status": status}, status_code=200 if status == "ready" else 503)


async def version() -> JsonResponse:
    """The version of local-rerank."""
    return JsonResponse({"version": local_rerank.__version__})


async def limits(http: Request) -> JsonResponse:
    """The limits of this server; 503 while the model loads, because its maximum length is not known yet."""
    state = state_of(http)
    config, engine = state.config, state.default.options.engine
    tokens = TokenLimits(
        max_query_tokens=engine.max_query_tokens,
        max_document_tokens=engine.max_document_tokens,
        max_instruction_tokens=MAX_INSTRUCTION_TOKENS,
        max_prompt_tokens=state.default.known_info.max_length,
    )
    of_routes = {"dashscope": asdict(config.dashscope_route_limits), "other_routes": asdict(config.limits)}
    configured: dict[str, Any] = {name: getattr(config, name) for name in ConfiguredLimits.__annotations__}
    return JsonResponse(of_routes | {"texts": tokens, "max_queued_tokens": engine.max_queued_tokens} | configured)


async def metrics(http: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(state_of(http).render_metrics(), headers={"content-type": CONTENT_TYPE})


for path in ("/health", "/healthz", "/ping"):
    add_get(router, path, health)
add_get(router, "/ready", ready)
add_get(router, "/version", version)
add_get(router, "/limits", limits, response_model=ServerLimits)
add_get(router, "/metrics", metrics, response_class=PlainTextResponse)
add_models(router, "", "/v1")  # without a prefix as Infinity serves them
add_loading(router, "/v1")
