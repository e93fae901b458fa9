"""Routes beside ranking: alive, ready, which models, which version, and a page that lists every route.

Errors on paths that belong to no other dialect come in this file's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NotRequired

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from typing_extensions import TypedDict

import local_rerank
from local_rerank.checkpoints.find import EMBEDDED_MODEL
from local_rerank_server.dialects._responses import GenericError, render_generic_error
from local_rerank_server.dialects._route import Dialect, state_of
from local_rerank_server.docs_page import render_docs
from local_rerank_server.limits_page import AllLimits, all_limits
from local_rerank_server.metrics import CONTENT_TYPE
from local_rerank_server.state import ServerState

dialect = Dialect(
    name="Housekeeping",
    render_error=render_generic_error,
    error_model=GenericError,
    open_paths=("/health", "/healthz", "/ping", "/ready"),
)
router = dialect.router()


class Model(TypedDict):
    """A name that can be sent as `model`; the fields serve OpenAI and Xinference clients."""

    id: str
    object: str
    created: int
    owned_by: str
    model_type: str
    model_name: str
    description: NotRequired[str]  # only for the built-in model


class ModelList(TypedDict):
    object: str
    data: list[Model]


def _add_get(path: str, handler: Callable[..., Any], **documentation: Any) -> None:
    """GET, and HEAD beside it for probes that want no body."""
    router.add_api_route(path, handler, methods=["GET"], **documentation)
    router.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)


async def health() -> JSONResponse:
    """Whether the process answers at all."""
    return JSONResponse({"status": "ok"})


async def ready(http: Request) -> JSONResponse:
    """Whether requests are ranked: 200 once the model is loaded, 503 before that and while the server drains."""
    status = state_of(http).status
    return JSONResponse({"status": status}, status_code=200 if status == "ready" else 503)


async def version() -> JSONResponse:
    """The version of local-rerank."""
    return JSONResponse({"version": local_rerank.__version__})


async def limits(http: Request) -> JSONResponse:
    """What a request may hold and how long it may take, as this server is set."""
    return JSONResponse(all_limits(state_of(http)))


async def metrics(http: Request) -> Response:
    """Counters and gauges for Prometheus."""
    state = state_of(http)
    return Response(state.metrics.render(state), headers={"content-type": CONTENT_TYPE})


async def list_models(http: Request) -> JSONResponse:
    """The names that can be sent as `model`."""
    state = state_of(http)
    return JSONResponse(ModelList(object="list", data=[_describe(name, state) for name in state.model_names]))


async def get_model(http: Request, model_id: str) -> JSONResponse:
    """A name that can be sent as `model`: any, as the routes that rank take any, unless --strict-models is set."""
    state = state_of(http)
    state.check_model(model_id, strict=False)
    return JSONResponse(_describe(model_id, state))


def _describe(name: str, state: ServerState) -> Model:
    model = Model(
        id=name,
        object="model",
        created=state.started,
        owned_by="local-rerank",
        model_type="rerank",
        model_name=state.reranker.model_id,
    )
    if state.reranker.model_id == EMBEDDED_MODEL:
        model["description"] = "the small built-in model; serve a real one with --model Qwen/Qwen3-Reranker-0.6B"
    return model


async def docs(http: Request) -> HTMLResponse:
    """Every route with its example, as a page that loads nothing from elsewhere."""
    return HTMLResponse(render_docs(http.app.openapi(), base_url=str(http.base_url).rstrip("/")))


async def openapi(http: Request) -> JSONResponse:
    """The OpenAPI description of every route."""
    return JSONResponse(http.app.openapi())


for path in ("/health", "/healthz", "/ping"):
    _add_get(path, health)
_add_get("/ready", ready)
_add_get("/version", version)
_add_get("/limits", limits, response_model=AllLimits)
_add_get("/metrics", metrics, response_class=PlainTextResponse)
_add_get("/v1/models", list_models, response_model=ModelList)
_add_get("/compatible-mode/v1/models", list_models, response_model=ModelList)
_add_get("/v1/models/{model_id:path}", get_model, response_model=Model)
_add_get("/docs", docs, response_class=HTMLResponse)
_add_get("/openapi.json", openapi)
