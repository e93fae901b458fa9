"""Routes of a dialect: every response, also of an error, has the shape of the dialect's API.

A dialect's module creates one `Dialect`, gets its router from `Dialect.router()` and adds handlers. Errors in a
handler, and before it (malformed JSON, an invalid field), are rendered here. Errors outside of any route (404, 405, a
missing key) find their dialect by path in `dialects/__init__.py`. `_shared_paths` has the paths of several dialects.
"""

from __future__ import annotations

import html
import json
import logging
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response

from local_rerank.errors import EngineFailure, LocalRerankError
from local_rerank.types import RerankRequest, RerankResult
from local_rerank_server.dialects._field_types import NOT_TEXT_ERROR, snake_case
from local_rerank_server.dialects._json import JsonResponse, json_request
from local_rerank_server.dialects._options import named_as_sent
from local_rerank_server.errors import (
    STATUS,
    ClientDisconnected,
    InvalidField,
    MalformedBody,
    MissingApiKey,
    MissingField,
    UnknownRoute,
    UnsupportedInput,
    headers_of,
)

if TYPE_CHECKING:
    from local_rerank.requests.pending import OnScored
    from local_rerank_server.config import ServerConfig
    from local_rerank_server.state import ServerState

MAX_SHOWN = 40  # characters of a value that an error shows

FORM_TAG = "form:"
"""Prefix of the tags of tagged unions, which must not appear in the names of fields."""

_KEY_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>local-rerank: API key needed</title>
<h1>This address needs an API key</h1>
<p>Send it as <code>Authorization: Bearer KEY</code>, which a browser does not do by itself.
<a href="{home}">The page of this server</a> asks for the key.</p>
</html>
"""

logger = logging.getLogger(__name__)

RenderError = Callable[[LocalRerankError, int, str], Mapping[str, Any]]
"""Renders an error, its status and the request id as a JSON object."""

Takes = Callable[[Mapping[str, Any]], bool]
"""Whether a body on a shared path belongs to the dialect."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The row of a dialect: its name, the shape of its errors, and the path prefixes that belong to it."""

    name: str
    render_error: RenderError
    error_model: type  # the type of `render_error`'s result, for OpenAPI
    prefixes: Sequence[str] = ()
    lists_endpoints: bool = True  # whether a 404 lists the existing routes
    open_paths: Sequence[str] = ()  # need no API key, and answer while the server drains
    status: Mapping[type[LocalRerankError], int] = field(default_factory=dict)  # overrides of `errors.STATUS`
    error_headers: Callable[[int], Mapping[str, str]] = lambda status: {}  # of an error's response, by its status

    def router(self) -> APIRouter:
        """A router whose responses all have this dialect's shape."""
        return APIRouter(
            route_class=type("Route", (DialectRoute,), {"dialect": self}),
            tags=[self.name],
            responses=documented_errors(self.error_model),
            strict_content_type=False,  # a body without Content-Type is read as JSON
        )

    def error_response(self, error: LocalRerankError, http: Request) -> Response:
        http.state.dialect, http.state.error = self, type(error).__name__  # for the access log and the metrics
        status = self.status.get(type(error), STATUS[type(error)])
        if isinstance(error, MissingApiKey) and http.method == "GET" and "text/html" in http.headers.get("accept", ""):
            page = _KEY_PAGE.format(home=html.escape(f"{http.scope.get('root_path', '')}/"))
            return HTMLResponse(page, status_code=status, headers=headers_of(error))
        body = dict(self.render_error(error, status, http.state.request_id))
        if isinstance(error, UnknownRoute) and self.lists_endpoints:
            body["endpoints"] = list(error.endpoints)
        return JsonResponse(body, status_code=status, headers={**headers_of(error), **self.error_headers(status)})


class DialectRoute(APIRoute):
    """A route of one dialect, which also renders the errors."""

    dialect: Dialect
    takes: Takes | None = None  # None: every body that no other dialect on this path takes
    header: str | None = None  # sent by the dialect's clients alone, so any body beside it is the dialect's
    examples: Mapping[str, Any] = {}  # example requests by name

    def owns(self, body: Any, http: Request) -> bool:
        """Whether a body on a shared path belongs to this dialect, if it does to none before it."""
        if self.takes is None or (self.header is not None and self.header in http.headers):
            return True
        return isinstance(body, dict) and self.takes(body)

    def fits(self, body: Any, http: Request) -> bool:
        """Whether a body on an unknown path belongs to this dialect: it has all required fields, too."""
        assert self.body_field is not None
        if not (isinstance(body, dict) and self.owns(body, http)):
            return False
        model: Any = self.body_field.field_info.annotation
        return all(body.get(name) is not None for name, info in model.model_fields.items() if info.is_required())

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler() if self.body_field is None else self._rank

        async def respond(http: Request) -> Response:
            http.state.dialect = self.dialect  # for the middleware
            try:
                return await handle(json_request(http))
            except Exception as error:
                return self.dialect.error_response(to_known_error(error, http), http)

        return respond

    async def _rank(self, http: Request) -> Response:
        """What FastAPI's handler of a body does, without what our routes do not use."""
        body = (await http.json()) if await http.body() else None
        for dependency in self.dependencies:
            assert dependency.dependency is not None
            dependency.dependency(http)
        assert self.body_field is not None
        value, errors = self.body_field.validate(body, {}, loc=("body",))
        if errors:
            raise RequestValidationError(errors, body=body)
        named = {parameter.name: http.path_params[parameter.name] for parameter in self.dependant.path_params}
        response: Response = await self.endpoint(http, value, **named)
        return response


def state_of(http: Request) -> ServerState:
    """The `ServerState` of this process."""
    state: ServerState = http.app.state.server
    return state


class _Body(Protocol):
    @property
    def model(self) -> str | None: ...

    def names(self) -> dict[str, str]: ...


Body = TypeVar("Body", bound=_Body)


async def rank_body(
    http: Request,
    body: Body,
    parse: Callable[[Body, ServerConfig], RerankRequest],
    *,
    strict: bool = False,
    on_scored: OnScored | None = None,
) -> RerankResult:
    """Check the body's model name, parse the body, and rank. `strict` refuses unknown models on this route.

    `on_scored` is that of `Reranker.submit`.
    """
    state = state_of(http)
    state.check_model(body.model, strict=strict)
    with named_as_sent(body.names()):
        return await state.rank(http, parse(body, state.config), body.model, on_scored=on_scored)


def add_get(router: APIRouter, path: str, handler: Callable[..., Any], **documentation: Any) -> None:
    """Serve `handler` with GET and HEAD."""
    router.add_api_route(path, handler, methods=["GET"], **documentation)
    router.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)


def add_post(
    router: APIRouter,
    paths: Sequence[str],
    handler: Callable[..., Any],
    *,
    examples: Mapping[str, Any],
    takes: Takes | None = None,
    header: str | None = None,
    **documentation: Any,
) -> None:
    """Serve `handler` on each path. OpenAPI lists the first one.

    `takes`, or a header that only this dialect's clients send, recognizes its bodies on a shared path.
    """
    for path in paths:
        router.add_api_route(
            path,
            handler,
            methods=["POST"],
            include_in_schema=path == paths[0],
            openapi_extra=documented_examples(examples),
            **documentation,
        )
        route = router.routes[-1]
        assert isinstance(route, DialectRoute)
        route.takes, route.header, route.examples = takes, header, examples


def documented_errors(model: Any) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for all errors."""
    documented = {"model": model, "description": "Any error, in the shape of this API"}
    return {"4XX": documented, "5XX": documented}


def documented_examples(examples: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAPI examples of the request body."""
    by_name = {name: {"value": example} for name, example in examples.items()}
    return {"requestBody": {"content": {"application/json": {"examples": by_name}}}}


def to_known_error(error: Exception, http: Request) -> LocalRerankError:
    """Convert any exception of a route into an error of the tree."""
    match error:
        case LocalRerankError():
            return error
        case RecursionError():  # validation recurses deeper than the JSON parser did
            return MalformedBody("the body is nested too deeply")
        case RequestValidationError():
            return _first_invalid_field(error)
        case HTTPException(__cause__=LocalRerankError() as cause):  # FastAPI wraps errors of reading the body
            return cause
        case ClientDisconnect() | HTTPException(__cause__=ClientDisconnect()):
            return ClientDisconnected("the client disconnected while sending its request")
        case _:
            # without the exception's message, which may quote the request
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("id=%s failed with %s\n%s", http.state.request_id, type(error).__name__, frames)
            return EngineFailure("internal error")


def _first_invalid_field(error: RequestValidationError) -> LocalRerankError:
    invalid = error.errors()[0]
    body = error.body if isinstance(error.body, dict) else {}
    parts = [str(part) for part in invalid["loc"][1:] if not str(part).startswith(FORM_TAG)]
    if not parts:
        return MalformedBody("the body must be a JSON object")
    if body.get(parts[0]) is None:
        parts[0] = _name_sent(parts[0], body)
    name = ".".join(parts)
    is_null = invalid["input"] is None and invalid["type"] != "float_type"  # among numbers null is a wrong number
    if invalid["type"] == "missing" or is_null:
        return MissingField(name, hint=_hint(name, body))
    if invalid["type"] == NOT_TEXT_ERROR:
        at = invalid["ctx"]["at"]
        return UnsupportedInput(f"{name}.{at}" if at else name, invalid["ctx"]["kind"])
    return InvalidField(name, invalid["msg"], sent=_shown(invalid["input"]))


def _name_sent(name: str, body: Mapping[str, Any]) -> str:
    """The name in the body of an option that was sent in another case or in DashScope's `parameters`."""
    nested = body.get("parameters")
    for prefix, fields in (("", body), ("parameters.", nested if isinstance(nested, dict) else {})):
        for key, value in fields.items():
            if snake_case(key) == name and value is not None:
                return prefix + key
    return name


def _hint(missing: str, body: Mapping[str, Any]) -> str:
    """What to do if a body of one of DashScope's two APIs was sent to the other one."""
    if missing == "input" and {"query", "documents"} & body.keys():
        return "; without `input`, both `query` and `documents` are needed at the top level"
    if missing in ("query", "documents") and isinstance(body.get("input"), dict):
        return (
            "; the body has an `input`, as DashScope's native API takes it: send it to "
            "/api/v1/services/rerank/text-rerank/text-rerank, or its fields at the top level"
        )
    return ""


def _shown(value: Any) -> str | None:
    """A short value as JSON, else None: longer ones are texts."""
    if (
        not isinstance(value, str | int | float | None)
        or len(shown := json.dumps(value, ensure_ascii=False)) > MAX_SHOWN
    ):
        return None
    return shown
