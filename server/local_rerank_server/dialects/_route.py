"""What makes a set of routes a dialect: its own error shape on everything that can go wrong, and its row.

A dialect file makes one `Dialect`, takes its router from `Dialect.router()` and adds handlers. Every error inside a
handler, and before it (the body is no JSON, a field is wrong), is answered here in the dialect's words; errors outside
any route (404, 405, a missing key) find their dialect by path in `dialects/__init__.py`.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from local_rerank.errors import EngineFailure, LocalRerankError
from local_rerank_server.dialects._fields import NOT_TEXT_ERROR
from local_rerank_server.errors import (
    STATUS,
    ClientDisconnected,
    InvalidField,
    MalformedBody,
    MissingField,
    UnsupportedContent,
    UnsupportedInput,
    headers_of,
)

if TYPE_CHECKING:
    from local_rerank_server.state import ServerState

FORM_TAG = "form:"
"""Begins the tags of tagged unions, so that a tag is not taken for a part of the field's name."""

PARSED_IN_THE_LOOP_BYTES = 256 * 1024  # about 2 ms of JSON parsing; longer bodies are parsed in a thread

logger = logging.getLogger(__name__)

ErrorBody = Callable[[LocalRerankError, int, str], Mapping[str, Any]]
"""An error, its status and the request id, as the JSON object that a dialect answers with."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One row: a name, an error shape, and the paths that are this dialect's even where nothing is served."""

    name: str
    render_error: ErrorBody
    error_model: type  # the shape of `render_error`'s answer, for the OpenAPI page
    prefixes: Sequence[str] = ()
    open_paths: Sequence[str] = ()  # answered without a key, and while draining
    status: Mapping[type[LocalRerankError], int] = field(default_factory=dict)  # where the contract departs from STATUS

    def router(self) -> APIRouter:
        """A router whose every answer is in this dialect's shape."""
        return APIRouter(route_class=_route_class(self), tags=[self.name], responses=self._documented_errors())

    def error_response(self, error: LocalRerankError, http: Request) -> JSONResponse:
        http.state.error = type(error).__name__  # for the log and the metrics
        status = self.status.get(type(error), STATUS[type(error)])
        body = self.render_error(error, status, http.state.request_id)
        return JSONResponse(body, status_code=status, headers=headers_of(error))

    def _documented_errors(self) -> dict[int | str, dict[str, Any]]:
        shape = {"model": self.error_model, "description": "Any error, in the shape of this API"}
        return {"4XX": shape, "5XX": shape}


def state_of(http: Request) -> ServerState:
    """The process's `ServerState`, from inside a handler."""
    state: ServerState = http.app.state.server
    return state


def add_post(router: APIRouter, paths: Sequence[str], handler: Callable[..., Any], **documentation: Any) -> None:
    """Serve `handler` on each path, with and without a final slash; the first path stands in the OpenAPI page."""
    for path in paths:
        for form in (path, path + "/"):
            documented = form == paths[0]
            router.add_api_route(form, handler, methods=["POST"], include_in_schema=documented, **documentation)


def _route_class(dialect: Dialect) -> type[APIRoute]:
    class DialectRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def answer(http: Request) -> Response:
                try:
                    return await handle(_JsonRequest(http.scope, http.receive))
                except Exception as error:
                    return dialect.error_response(_as_ours(error, http), http)

            return answer

    return DialectRoute


def _as_ours(error: Exception, http: Request) -> LocalRerankError:
    """Any exception of a route as a leaf of the error tree."""
    match error:
        case LocalRerankError():
            return error
        case RequestValidationError():
            return _first_wrong_field(error)
        case HTTPException(__cause__=LocalRerankError() as cause):  # FastAPI wraps so what reading the body raises
            return cause
        case HTTPException(__cause__=ClientDisconnect()):
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


class _JsonRequest(Request):
    """A request whose body is JSON in UTF-8, declared as such or not declared at all."""

    async def body(self) -> bytes:
        _check_content(self)
        return await super().body()

    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= PARSED_IN_THE_LOOP_BYTES:
            return parse_json(body)
        return await run_in_threadpool(parse_json, body)


def _check_content(http: Request) -> None:
    encoding = http.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedContent(f"Content-Encoding {encoding} is not supported; send the body uncompressed")
    declared = http.headers.get("content-type")
    if not declared:
        return
    header = Message()
    header["content-type"] = declared
    kind = header.get_content_type()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedContent(f"Content-Type {kind} is not supported; send application/json")


def parse_json(body: bytes) -> Any:
    """The JSON value of a body; raises `MalformedBody` for whatever stops it from being read."""
    try:
        return json.loads(body.decode("utf-8-sig"))  # a byte order mark is not JSON, but some editors leave one
    except UnicodeDecodeError:
        raise MalformedBody("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise MalformedBody(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise MalformedBody(f"the body is not JSON that can be read: {error}") from None
