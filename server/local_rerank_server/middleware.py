"""What happens to every request before its route: it gets an id and a line in the log, and is let in or refused.

Plain ASGI. Refusals here come in the shape of the dialect whose path it is.
"""

from __future__ import annotations

import logging
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_rerank.errors import LocalRerankError, ModelUnavailable
from local_rerank_server.dialects import OPEN_PATHS, dialect_at, route_path
from local_rerank_server.errors import BodyTooLarge
from local_rerank_server.keys import ApiKeys
from local_rerank_server.state import ServerState

logger = logging.getLogger(__name__)


class RequestId:
    """Gives each request an id, sends it as `x-request-id`, and logs the request's line. No text of it is logged."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = scope.setdefault("state", {}).setdefault("request_id", str(uuid.uuid4()))  # Ray's proxy brings one
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            took = (time.perf_counter() - started) * 1e3
            is_probe = route_path(Request(scope)) in OPEN_PATHS  # these come every few seconds
            level = logging.DEBUG if is_probe else logging.INFO
            logger.log(
                level, "%s %s %d %.1f ms id=%s", scope["method"], _printable(scope["path"]), status, took, request_id
            )


class Door:
    """Lets a request in, or refuses it: no key, too large a body, or the server is about to stop."""

    def __init__(self, app: ASGIApp, *, state: ServerState, keys: ApiKeys) -> None:
        self.app = app
        self.state = state
        self.keys = keys
        self.max_body_bytes = state.config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        http = Request(scope)
        try:
            self._check(http)
        except LocalRerankError as error:
            response = dialect_at(route_path(http)).error_response(error, http)
            return await response(scope, receive, send)
        with self.state.admitted():
            await self.app(scope, self._counted(receive), send)

    def _check(self, http: Request) -> None:
        if route_path(http) in OPEN_PATHS:
            return
        self.keys.check(http.headers.get("authorization", "").encode("latin-1"))
        if self.state.draining:
            raise ModelUnavailable("the server is stopping")
        declared = http.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_body_bytes:
            raise BodyTooLarge(limit=self.max_body_bytes)

    def _counted(self, receive: Receive) -> Receive:
        """`receive`, until the body is larger than it may be, which one sent in chunks shows only as it comes."""
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                raise BodyTooLarge(limit=self.max_body_bytes)
            return message

        return receive_counted


def _printable(path: str) -> str:
    """A path as one line of a log, whatever its sender put in."""
    return path.encode("unicode_escape").decode("ascii")
