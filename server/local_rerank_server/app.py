"""The parts put together: state, keys and dialects -> one ASGI application. Starts nothing and reads nothing."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Lifespan

import local_rerank
from local_rerank.errors import LocalRerankError
from local_rerank_server.dialects import dialect_at, make_routes, route_path
from local_rerank_server.errors import MethodNotAllowed, UnknownRoute
from local_rerank_server.keys import ApiKeys
from local_rerank_server.middleware import Door, RequestId
from local_rerank_server.state import ServerState


def create_app(state: ServerState, keys: ApiKeys, *, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The application over `state`; `state.config` says what it allows. `lifespan` runs around its serving."""
    app = FastAPI(
        title="local-rerank",
        version=local_rerank.__version__,
        summary="A local reranker behind the APIs of hosted ones.",
        redirect_slashes=False,  # a redirected POST loses its body in some clients
        docs_url=None,  # FastAPI's page loads its script from elsewhere; ours does not
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        routes=list(make_routes()),
    )
    app.state.server = state
    app.root_path = state.config.root_path  # for servers that are not told; as a parameter it is deprecated
    app.add_middleware(Door, state=state, keys=keys)
    if state.config.cors_origins:  # a browser asks before it sends, and without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.config.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestId, state=state)
    app.add_exception_handler(404, _no_such_route)
    app.add_exception_handler(405, _no_such_route)
    return app


async def _no_such_route(http: Request, error: Exception) -> JSONResponse:
    path = route_path(http)
    return dialect_at(path).error_response(_as_ours(http, error, path), http)


def _as_ours(http: Request, error: Exception, path: str) -> LocalRerankError:
    if isinstance(error, HTTPException) and error.status_code == 405:
        return MethodNotAllowed(http.method, path, allowed=(error.headers or {}).get("Allow", ""))
    return UnknownRoute(path, endpoints=_endpoints(http.app))


def _endpoints(app: FastAPI) -> list[str]:
    """Method and path of each route, aliases too; not the forms with a final slash, nor what a page loads."""
    routes = [route for route in app.routes if isinstance(route, APIRoute) and not route.path.endswith("/")]
    return [
        f"{method} {route.path.replace(':path', '')}"
        for route in routes
        for method in sorted(route.methods or ())
        if route.include_in_schema or method == "POST"
    ]
