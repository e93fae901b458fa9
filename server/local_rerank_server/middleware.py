"""ASGI middleware around every route: request ids, the access log, and admission.

A refusal has the error shape of the dialect that owns the path.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_rerank.errors import LocalRerankError, ModelUnavailable
from local_rerank_server.admission import BodyReader
from local_rerank_server.dialects import OPEN_PATHS, dialect_at, route_path
from local_rerank_server.keys import ApiKeys
from local_rerank_server.state import ServerState

logger = logging.getLogger(__name__)


class RequestLog:
    """Gives each request an id, sends it as `x-request-id`, and logs and counts the request without its texts.

    Adds the headers of the result, too, whose counts `ServerState.rank` fills in.
    """

    def __init__(self, app: ASGIApp, *, state: ServerState) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = scope.setdefault("state", {}).setdefault("request_id", str(uuid.uuid4()))  # Ray's proxy sets one
        counts = scope["state"]["result_counts"] = Counter[str]()
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update({name: str(number) for name, number in counts.items() if number})
                if self.state.draining:  # otherwise the client's next request would meet a closed connection
                    headers["connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        path, state = route_path(Request(scope)), scope["state"]
        reason = state.get("error")
        self.state.metrics.add_request(dialect=dialect_at(path).name, status=status, seconds=seconds, reason=reason)
        fields = {
            "method": scope["method"],
            "path": _printable(scope["path"]),
            "status": status,
            "ms": round(seconds * 1e3, 1),
            "key": state.get("key"),
            "error": reason,
            "request_id": state["request_id"],
        }
        level = logging.DEBUG if path in OPEN_PATHS else logging.INFO  # probes come every few seconds
        optional = "".join(f" {name}=%({name})s" for name in ("key", "error") if fields[name])
        logger.log(
            level, f"%(method)s %(path)s %(status)d %(ms).1f ms{optional} id=%(request_id)s", fields, extra=fields
        )


class AdmissionMiddleware:
    """Passes admitted requests on; answers the others with the reason for the refusal."""

    def __init__(self, app: ASGIApp, *, state: ServerState, keys: ApiKeys) -> None:
        self.app = app
        self.state = state
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        http, admission = Request(scope), self.state.admission
        if route_path(http) in OPEN_PATHS:
            return await self.app(scope, receive, send)
        num_bytes = _declared_bytes(http)
        try:
            self._check(http, num_bytes)
        except LocalRerankError as error:
            response = dialect_at(route_path(http)).error_response(error, http)
            return await response(scope, receive, send)
        with admission.admitted(), BodyReader(receive, admission, num_declared_bytes=num_bytes) as body:
            await self.app(scope, body.receive, send)

    def _check(self, http: Request, num_bytes: int) -> None:
        http.state.key = key = self.keys.check(http.headers.get("authorization", "").encode("latin-1"))
        if self.state.draining:
            raise ModelUnavailable("the server is stopping")
        if http.method == "POST":
            self.state.admission.check(num_bytes, key)
        else:
            self.state.admission.check_size(num_bytes)


def _declared_bytes(http: Request) -> int:
    """The Content-Length; 0 if there is none or it is malformed."""
    declared = http.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() and len(declared) < 20 else 0


def _printable(path: str) -> str:
    """Escape control characters, so that a path cannot forge log lines."""
    return path.encode("unicode_escape").decode("ascii")
