"""Builds the ASGI application from its parts: routes of all dialects, middleware, and the server's state."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

import local_rerank
from local_rerank.errors import LocalRerankError
from local_rerank_server.dialects import api_of, dialect_at, housekeeping, make_routes, route_path
from local_rerank_server.dialects._json import MAX_INLINE_BYTES, json_request
from local_rerank_server.dialects._route import Dialect
from local_rerank_server.errors import MethodNotAllowed, UnknownRoute
from local_rerank_server.keys import ApiKeys
from local_rerank_server.middleware import EXPOSED_HEADERS, AdmissionMiddleware, RequestLog, declared_bytes
from local_rerank_server.state import ServerState

JUDGE_SECONDS = 1.0  # for the rest of a body that only decides what an error says
MAX_COMPARED_CHARS = 200  # of an unknown path; comparing takes time in proportion to its length


def create_app(state: ServerState, keys: ApiKeys, *, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The application that serves `state`, with the options of `state.config`."""
    app = FastAPI(
        title="local-rerank",
        version=local_rerank.__version__,
        summary="A local reranker with the APIs of hosted ones.",
        redirect_slashes=False,  # some clients drop the body of a redirected POST
        docs_url=None,  # FastAPI's page loads Swagger UI from a CDN; dialects/docs.py serves it from here
        redoc_url=None,
        openapi_url=None,
        # FastAPI looks for a provider of its own spans in every request; ours come from tracing.py
        telemetry={"tracing": False, "metrics": False, "logs": False},
        lifespan=lifespan,
        routes=list(make_routes()),
    )
    app.state.server = state
    app.root_path = state.config.prefix  # the parameter is deprecated
    app.add_middleware(PostsByPath)
    app.add_middleware(AdmissionMiddleware, state=state, keys=keys)
    if state.config.cors_origins:  # outside of admission, because a browser's preflight request has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.config.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(RequestLog, state=state)
    app.add_exception_handler(404, _no_such_route)
    app.add_exception_handler(405, _no_such_route)
    return app


class PostsByPath:
    """Hands a POST to the route of its path. The router would try forty routes, in contexts that ours do not use."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        routes = [route for route in make_routes() if isinstance(route, APIRoute) and route.methods == {"POST"}]
        self._routes = {
            route.path: (route, route.get_route_handler()) for route in routes if not route.param_convertors
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            http = Request(scope, receive, send)
            if found := self._routes.get(route_path(http)):
                scope["route"], respond = found
                return await (await respond(http))(scope, receive, send)
        await self.app(scope, receive, send)


async def _no_such_route(http: Request, error: Exception) -> Response:
    """404 or 405. Path and body say what was meant; if the body has an API's marker, the error has that API's shape."""
    path, routes = route_path(http), [route for route in http.app.routes if isinstance(route, APIRoute)]
    owner = dialect_at(path)
    if isinstance(error, HTTPException) and error.status_code == 405:
        here = [route for route in routes if route.matches(http.scope)[0] != Match.NONE]
        allowed = ", ".join(sorted({method for route in here for method in route.methods or ()}))
        if http.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": f"{allowed}, OPTIONS"})
        dialect, hint = await _judge_body(http, owner, or_common=True)
        wrong = MethodNotAllowed(http.method, path, allowed=allowed, body_hint=hint)
        return dialect.error_response(wrong, http)
    endpoints = _endpoints(routes)
    nearest = _nearest(f"{http.method} {path.lower()}", endpoints)
    dialect, hint = await _judge_body(http, owner, or_common=nearest is None)
    address = str(http.base_url).rstrip("/")
    unknown = UnknownRoute(path, endpoints=endpoints, nearest=nearest, address=address, body_hint=hint)
    return dialect.error_response(unknown, http)


async def _judge_body(http: Request, owner: Dialect, *, or_common: bool) -> tuple[Dialect, str]:
    """The dialect for the error, and whose body it is if that is known: `api_of` a POST's body, if that is small.

    `owner` has the path. If that is a vendor's, a body without a marker is not told of the most common dialect.
    """
    if http.method != "POST" or not 0 < declared_bytes(http) <= MAX_INLINE_BYTES:
        return owner, ""
    or_common = or_common and owner is housekeeping.dialect
    try:
        async with asyncio.timeout(JUDGE_SECONDS):
            return api_of(await json_request(http).json(), http, or_common=or_common) or (owner, "")
    except (TimeoutError, LocalRerankError, ClientDisconnect):
        return owner, ""


def _nearest(wanted: str, endpoints: Sequence[str]) -> str | None:
    """The endpoint whose method and path are most like the wanted ones, if any is like them."""
    found = difflib.get_close_matches(wanted[:MAX_COMPARED_CHARS], endpoints, n=1)
    return found[0] if found else None


def _endpoints(routes: Sequence[APIRoute]) -> list[str]:
    """Method and path of each route, without the files of pages."""
    return [
        f"{method} {route.path.replace(':path', '')}"
        for route in routes
        for method in sorted(route.methods or ())
        if route.include_in_schema or method == "POST"
    ]
