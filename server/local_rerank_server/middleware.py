"""What happens to every request before its route: it gets an id and a line in the log, and is let in or refused.

Plain ASGI. Refusals here come in the shape of the dialect whose path it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Self

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_rerank.errors import LocalRerankError, ModelUnavailable
from local_rerank_server.dialects import OPEN_PATHS, dialect_at, route_path
from local_rerank_server.errors import BodyTooLarge, BodyTooSlow
from local_rerank_server.keys import ApiKeys
from local_rerank_server.state import ServerState

logger = logging.getLogger(__name__)


class RequestId:
    """Gives each request an id, sends it as `x-request-id`, and counts and logs the request, but no text of it."""

    def __init__(self, app: ASGIApp, *, state: ServerState) -> None:
        self.app = app
        self.state = state

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
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if self.state.draining:  # else the client's next request would meet a closed connection
                    headers["connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        path, found = route_path(Request(scope)), scope["state"]
        reason = found.get("error")
        self.state.metrics.add_request(dialect=dialect_at(path).name, status=status, seconds=seconds, reason=reason)
        fields = {
            "method": scope["method"],
            "path": _printable(scope["path"]),
            "status": status,
            "ms": round(seconds * 1e3, 1),
            "key": found.get("key"),
            "error": reason,
            "request_id": found["request_id"],
        }
        level = logging.DEBUG if path in OPEN_PATHS else logging.INFO  # probes come every few seconds
        more = "".join(f" {name}={fields[name]}" for name in ("key", "error") if fields[name])
        line = "%(method)s %(path)s %(status)d %(ms).1f ms" + more.replace("%", "%%") + " id=%(request_id)s"
        logger.log(level, line, fields, extra=fields)


class Door:
    """Lets a request in, or refuses it: no key, too much of something, or the server is about to stop."""

    def __init__(self, app: ASGIApp, *, state: ServerState, keys: ApiKeys) -> None:
        self.app = app
        self.state = state
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        http = Request(scope)
        if route_path(http) in OPEN_PATHS:
            return await self.app(scope, receive, send)
        try:
            num_declared = self._check(http)
        except LocalRerankError as error:
            response = dialect_at(route_path(http)).error_response(error, http)
            return await response(scope, receive, send)
        with self.state.admitted(), _Body(receive, self.state, num_declared) as body:
            await self.app(scope, body.receive, send)

    def _check(self, http: Request) -> int:
        """Returns the bytes of the body that the request declares."""
        http.state.key = key = self.keys.check(http.headers.get("authorization", "").encode("latin-1"))
        if self.state.draining:
            raise ModelUnavailable("the server is stopping")
        declared = http.headers.get("content-length", "")
        num_bytes = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
        if num_bytes > self.state.config.max_body_bytes:
            raise BodyTooLarge(limit=self.state.config.max_body_bytes)
        if http.method == "POST":
            self.state.check_room(num_bytes)
            self.state.rates.take_request(key)
        return num_bytes


class _Body:
    """A request's body as it comes: timed, and counted against the limits of one and of all while it is held."""

    def __init__(self, receive: Receive, state: ServerState, num_declared: int) -> None:
        self._receive = receive
        self._state = state
        self._more = True
        self._num_held = num_declared  # bytes that this body takes, or will
        self._num_bytes = 0  # bytes that came
        self._end = time.monotonic() + state.config.body_timeout_seconds

    def __enter__(self) -> Self:
        self._state.num_body_bytes += self._num_held
        return self

    def __exit__(self, *_: object) -> None:
        self._state.num_body_bytes -= self._num_held

    async def receive(self) -> Message:
        if not self._more:  # now the wait is for the client to leave, as long as it takes
            return await self._receive()
        try:
            async with asyncio.timeout(self._end - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow(limit_seconds=self._state.config.body_timeout_seconds) from None
        self._more = message.get("more_body", False)
        self._count(len(message.get("body", b"")))
        return message

    def _count(self, num_bytes: int) -> None:
        """One sent in chunks shows only as it comes how large it is."""
        self._num_bytes += num_bytes
        if self._num_bytes > self._state.config.max_body_bytes:
            raise BodyTooLarge(limit=self._state.config.max_body_bytes)
        if (more := self._num_bytes - self._num_held) > 0:
            self._state.check_bytes(more)
            self._num_held += more
            self._state.num_body_bytes += more


def _printable(path: str) -> str:
    """A path as one line of a log, whatever its sender put in."""
    return path.encode("unicode_escape").decode("ascii")
