"""ASGI middleware around every route: paths, request ids, the access log, and admission.

A refusal has the error shape of the dialect that owns the path.
"""

from __future__ import annotations

import asyncio
import logging
import re
import string
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_rerank.errors import LocalRerankError, ModelUnavailable
from local_rerank.types import RerankResult, status_of
from local_rerank_server.admission import BodyReader
from local_rerank_server.browsers import SECURITY_HEADERS, check_sender
from local_rerank_server.dialects import OPEN_PATHS, dialect_at, make_routes, route_path
from local_rerank_server.dialects._route import Dialect
from local_rerank_server.errors import AmbiguousBody, MethodNotAllowed, quoted
from local_rerank_server.keys import ApiKeys
from local_rerank_server.state import ServerState

METHODS = "GET, HEAD, OPTIONS, POST"
ABSOLUTE_FORM = re.compile(r"https?://(?:[^/]*@)?([^/]*)", re.IGNORECASE)
SENT_ID = re.compile(r"[!-~]([ -~]{0,126}[!-~])?")  # printable ASCII, at most 128 characters
RESULT_HEADERS: dict[str, Callable[[RerankResult], int]] = {
    "x-truncated-documents": lambda result: result.num_truncated_documents,
    "x-truncated-query-tokens": lambda result: result.num_query_truncated_tokens,
    "x-unwrapped-queries": lambda result: int(result.unwrapped),
}
"""Counts in the headers of a response unless they are 0, because most dialects have no field for them."""
MODEL_HEADER, STATUS_HEADER = "x-rerank-model", "x-rerank-status"
EXPOSED_HEADERS = ("x-request-id", "retry-after", MODEL_HEADER, STATUS_HEADER, *RESULT_HEADERS)

logger = logging.getLogger(__name__)


class RequestLog:
    """Takes over or makes the request's id, sends it as `x-request-id`, and logs and counts the request.

    Refuses web pages of other origins, and adds the headers of every response and those of the results.
    """

    def __init__(self, app: ASGIApp, *, state: ServerState) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        target = _set_path(scope)
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if SENT_ID.fullmatch(sent_id) else str(uuid.uuid4())
        scope.setdefault("state", {}).update(request_id=request_id, status=0, num_documents=0, results=[])
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["state"]["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers["x-request-id"] = request_id
                if message["status"] < 400 and (model := scope["state"].get("model")):  # a ranking, no error
                    headers[MODEL_HEADER] = quote(model, safe=string.punctuation + " ")  # a header is ASCII
                    headers.update(_result_headers(scope["state"]["results"]))
                if self.state.draining:  # otherwise the client's next request would meet a closed connection
                    headers["connection"] = "close"
            await send(message)

        try:
            await (self._early_answer(Request(scope), target) or self.app)(scope, receive, send_with_id)
        finally:
            self._record(Request(scope), time.perf_counter() - started)

    def _early_answer(self, http: Request, target: _Target) -> Response | None:
        """The answer to a request that no route may see or that asks for no route."""
        try:
            check_sender(http.scope, target.authority, self.state.config)
            _check_framing(http)
        except LocalRerankError as error:
            return _dialect_of(http).error_response(error, http)
        return _answer_without_route(http, target)

    def _record(self, http: Request, seconds: float) -> None:
        path, state = route_path(http), http.scope["state"]
        dialect, reason = _dialect_of(http).name, state.get("error")
        agent = http.headers.get("user-agent", "")
        self.state.metrics.add_request(
            dialect=dialect, status=state["status"], seconds=seconds, reason=reason, user_agent=agent
        )
        if self.state.config.no_access_log:
            return
        fields = {
            "client": _client(http),
            "method": quoted(http.method),
            "path": quoted(quote(quoted(path), safe="/:@!$&'()*+,;=~")),  # so that no path forges a line
            "status": state["status"],
            "ms": round(seconds * 1e3, 1),
            "dialect": dialect,
            "documents": state["num_documents"] or None,
            **_cost(state["results"]),
            "rerank_status": status_of(state["results"]) if state["results"] else None,
            "key": state.get("key"),
            "error": reason,
            "request_id": state["request_id"],
        }
        level = logging.DEBUG if path in OPEN_PATHS else logging.INFO  # probes come every few seconds
        named = ("documents", "tokens", "waiting_ms", "computing_ms", "key", "error")
        optional = "".join(f" {name}=%({name})s" for name in named if fields[name] is not None)
        if fields["rerank_status"] not in (None, "ok"):
            optional += " rerank_status=%(rerank_status)r"
        line = f"%(client)s %(method)s %(path)s %(status)d %(ms).1f ms dialect=%(dialect)r{optional} id=%(request_id)s"
        if logger.isEnabledFor(level):  # a record of ours: finding the caller's line takes as long as all the rest
            logger.handle(logger.makeRecord(logger.name, level, __file__, 0, line, (fields,), None, extra=fields))


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
        num_bytes = declared_bytes(http)
        try:
            self._check(http, num_bytes)
            with admission.admitted(), BodyReader(receive, admission, num_declared_bytes=num_bytes) as body:
                await self.app(scope, body.receive, send)
        except LocalRerankError as error:
            await _dialect_of(http).error_response(error, http)(scope, receive, send)
        except asyncio.CancelledError:  # the server stops; a response that has begun cannot be completed
            if not http.state.status:
                stopped = ModelUnavailable("the server was stopped before this request was answered")
                await _dialect_of(http).error_response(stopped, http)(scope, receive, send)

    def _check(self, http: Request, num_bytes: int) -> None:
        http.state.key = key = self.keys.check(http.headers)
        if self.state.draining:
            raise ModelUnavailable("the server is stopping")
        if http.method == "POST":
            self.state.admission.check(num_bytes, key)
        else:
            self.state.admission.check_size(num_bytes)


def _check_framing(http: Request) -> None:
    """Raise `AmbiguousBody` if a proxy in front may see another end of the body than we do (RFC 9112, section 6.1)."""
    if "transfer-encoding" in http.headers:
        if "content-length" in http.headers:
            raise AmbiguousBody("Content-Length and Transfer-Encoding are both set; send one of them")
        if http.scope.get("http_version") == "1.0":
            raise AmbiguousBody("HTTP/1.0 has no Transfer-Encoding; send a Content-Length")


class _Target(NamedTuple):
    """What a request's target says beside the path of a route."""

    authority: str | None  # host and port of a whole URL
    num_final_slashes: int


def _set_path(scope: Scope) -> _Target:
    """Set `path` to the root path plus the path of a route, in whatever form a client and a proxy send it.

    The target may be a whole URL, slashes may be doubled, and a reverse proxy may leave the root path in it or strip
    it. An ASGI server with a root path of its own has put that in front. Slashes at the end are cut off and not
    redirected, because a redirect would lose the body of a POST.
    """
    root, path = scope.get("root_path", ""), scope["path"]
    if found := ABSOLUTE_FORM.match(path.removeprefix(root)):
        path = path.removeprefix(root)[found.end() :] or "/"
    if not path.startswith("/"):  # OPTIONS * and CONNECT
        return _Target(None, 0)
    plain = re.sub("/{2,}", "/", path).rstrip("/") or "/"
    paths = [plain]
    while root and len(paths) < 3 and f"{paths[-1]}/".startswith(f"{root}/"):
        paths.append(paths[-1].removeprefix(root) or "/")
    if len(paths) > 1:  # the root path may be the start of a route, such as /api: take a path that has a route
        plain = max(*paths[1:], plain, key=lambda each: _match(scope, each))
    scope["path"] = root + plain
    return _Target(found and found[1], len(path) - len(path.rstrip("/")))


def _match(scope: Scope, path: str) -> int:
    alone = {**scope, "path": path, "root_path": ""}
    return max(route.matches(alone)[0].value for route in make_routes())


def _answer_without_route(http: Request, target: _Target) -> Response | None:
    """The answer to a target that is not a path (`OPTIONS *`, and CONNECT, which asks for a proxy), and to `/docs/`."""
    path = http.scope["path"].removeprefix(http.scope.get("root_path", ""))
    if http.method == "OPTIONS" and path == "*":
        return Response(status_code=204, headers={"allow": METHODS})
    if http.method == "CONNECT":
        return dialect_at(path).error_response(MethodNotAllowed("CONNECT", path, allowed=METHODS), http)
    if path == "/docs" and target.num_final_slashes:  # the page's links are relative to /docs
        return RedirectResponse("../" * target.num_final_slashes + "docs")
    return None


def _dialect_of(http: Request) -> Dialect:
    """The dialect of the route that took the request; before that, of its path."""
    found: Dialect = getattr(http.state, "dialect", None) or dialect_at(route_path(http))
    return found


def declared_bytes(http: Request) -> int:
    """The Content-Length; 0 if there is none or it is malformed."""
    declared = http.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() and len(declared) < 20 else 0


def _client(http: Request) -> str:
    """The client's address, which may come from a proxy's header; - on a Unix socket."""
    return quote(http.client.host, safe=":.[]")[:64] if http.client else "-"


def _result_headers(results: list[RerankResult]) -> dict[str, str]:
    """Those of finished rankings: a stream has none when its head is sent."""
    counts = {name: sum(map(count, results)) for name, count in RESULT_HEADERS.items()}
    status = {STATUS_HEADER: status_of(results)} if results else {}
    return status | {name: str(count) for name, count in counts.items() if count}


def _cost(results: list[RerankResult]) -> dict[str, Any]:
    """Tokens and times of what was ranked; a request's rankings run side by side, so the longest time counts."""
    if not results:
        return dict.fromkeys(("tokens", "waiting_ms", "computing_ms"))
    return {
        "tokens": sum(result.total_tokens for result in results),
        "waiting_ms": round(max(result.queue_ms for result in results), 1),
        "computing_ms": round(max(result.total_ms - result.tokenize_ms - result.queue_ms for result in results), 1),
    }
