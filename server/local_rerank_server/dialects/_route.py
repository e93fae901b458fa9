"""What makes a set of routes a dialect: its own error shape on everything that can go wrong, and its row.

A dialect file makes one `Dialect`, takes its router from `Dialect.router()` and adds handlers. Every error inside a
handler, and before it (the body is no JSON, a field is wrong), is answered here in the dialect's words; errors outside
any route (404, 405, a missing key) find their dialect by path in `dialects/__init__.py`. Where dialects share a path,
`_shared_paths.SharedRoute` gives each body to the dialect that it belongs to.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from local_rerank.errors import EngineFailure, LocalRerankError
from local_rerank_server.dialects._field_types import NOT_TEXT_ERROR
from local_rerank_server.dialects._json import json_request
from local_rerank_server.errors import (
    STATUS,
    ClientDisconnected,
    InvalidField,
    MalformedBody,
    MissingField,
    UnknownRoute,
    UnsupportedInput,
    headers_of,
)

if TYPE_CHECKING:
    from local_rerank_server.state import ServerState

FORM_TAG = "form:"
"""Begins the tags of tagged unions, so that a tag is not taken for a part of the field's name."""

logger = logging.getLogger(__name__)

ErrorBody = Callable[[LocalRerankError, int, str], Mapping[str, Any]]
"""An error, its status and the request id, as the JSON object that a dialect answers with."""

Takes = Callable[[Mapping[str, Any]], bool]
"""Whether a body, on a path that several dialects share, is one of this dialect's."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One row: a name, an error shape, and the paths that are this dialect's even where nothing is served."""

    name: str
    render_error: ErrorBody
    error_model: type  # the shape of `render_error`'s answer, for the OpenAPI page
    prefixes: Sequence[str] = ()
    lists_endpoints: bool = True  # whether an unknown path is answered with those that exist
    open_paths: Sequence[str] = ()  # answered without a key, and while draining
    status: Mapping[type[LocalRerankError], int] = field(default_factory=dict)  # where the contract departs from STATUS

    def router(self) -> APIRouter:
        """A router whose every answer is in this dialect's shape."""
        return APIRouter(
            route_class=_route_class(self),
            tags=[self.name],
            responses=documented_errors(self.error_model),
            strict_content_type=False,  # a body that declares no type is read as JSON
        )

    def error_response(self, error: LocalRerankError, http: Request) -> JSONResponse:
        http.state.error = type(error).__name__  # for the log and the metrics
        status = self.status.get(type(error), STATUS[type(error)])
        body = dict(self.render_error(error, status, http.state.request_id))
        if isinstance(error, UnknownRoute) and self.lists_endpoints:
            body["endpoints"] = list(error.endpoints)
        return JSONResponse(body, status_code=status, headers=headers_of(error))


class DialectRoute(APIRoute):
    """A route whose every answer, errors too, is in the shape of its dialect."""

    dialect: Dialect
    takes: Takes | None = None  # None: whatever no other dialect on this path takes
    examples: Mapping[str, Any] = {}  # requests to copy, by name

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(http: Request) -> Response:
            try:
                return await handle(json_request(http))
            except Exception as error:
                return self.dialect.error_response(as_ours(error, http), http)

        return answer


def state_of(http: Request) -> ServerState:
    """The process's `ServerState`, from inside a handler."""
    state: ServerState = http.app.state.server
    return state


def add_post(
    router: APIRouter,
    paths: Sequence[str],
    handler: Callable[..., Any],
    *,
    examples: Mapping[str, Any],
    takes: Takes | None = None,
    **documentation: Any,
) -> None:
    """Serve `handler` on each path, with and without a final slash; the first path stands in the OpenAPI page.

    `takes` tells this dialect's bodies from others' where a path is shared.
    """
    for path in paths:
        for form in (path, path + "/"):
            router.add_api_route(
                form,
                handler,
                methods=["POST"],
                include_in_schema=form == paths[0],
                openapi_extra=documented_examples(examples),
                **documentation,
            )
            route = router.routes[-1]
            assert isinstance(route, DialectRoute)
            route.takes, route.examples = takes, examples


def _route_class(dialect: Dialect) -> type[DialectRoute]:
    return type("Route", (DialectRoute,), {"dialect": dialect})


def documented_errors(shape: Any) -> dict[int | str, dict[str, Any]]:
    """Every error's shape, for the OpenAPI page."""
    documented = {"model": shape, "description": "Any error, in the shape of this API"}
    return {"4XX": documented, "5XX": documented}


def documented_examples(examples: Mapping[str, Any]) -> dict[str, Any]:
    """Requests to copy, for the OpenAPI page."""
    by_name = {name: {"value": example} for name, example in examples.items()}
    return {"requestBody": {"content": {"application/json": {"examples": by_name}}}}


def as_ours(error: Exception, http: Request) -> LocalRerankError:
    """Any exception of a route as a leaf of the error tree."""
    match error:
        case LocalRerankError():
            return error
        case RecursionError():  # what the parser's shallower stack could still hold
            return MalformedBody("the body is nested too deeply")
        case RequestValidationError():
            return _first_wrong_field(error)
        case HTTPException(__cause__=LocalRerankError() as cause):  # FastAPI wraps so what reading the body raises
            return cause
        case ClientDisconnect() | HTTPException(__cause__=ClientDisconnect()):
            return ClientDisconnected("the client left while it sent its request")
        case _:
            # without the exception's own words, which may quote the request
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("id=%s failed with %s\n%s", http.state.request_id, type(error).__name__, frames)
            return EngineFailure("internal error")


def _first_wrong_field(error: RequestValidationError) -> LocalRerankError:
    wrong = error.errors()[0]
    place = ".".join(str(part) for part in wrong["loc"][1:] if not str(part).startswith(FORM_TAG))
    if not place:
        return MalformedBody("the body must be a JSON object")
    if wrong["type"] == "missing" or wrong["input"] is None:
        return MissingField(place)
    if wrong["type"] == NOT_TEXT_ERROR:
        return UnsupportedInput(place, wrong["ctx"]["kind"])
    return InvalidField(place, wrong["msg"])
