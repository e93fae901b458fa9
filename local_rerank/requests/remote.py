"""Rank through a running server (`rank --server`), without importing torch.

The route is our server's own, because its answer has every field of a `RerankResult`. Errors quote no key, and of what
a server says only the start.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import socket
import ssl
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPMessage
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import msgspec

from local_rerank import __version__
from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError, InvalidRequest, LocalRerankError, ModelUnavailable, Overloaded
from local_rerank.types import RerankRequest, RerankResult

ROUTE = "/v1/local/rank"
KEY_VARIABLE = "LOCAL_RERANK_API_KEY"
CONNECT_SECONDS = 10
ANSWER_SECONDS = 600  # the server's own timeout is 55 s by default, after which it answers 504
SENT = {  # engine options that a request can have, and their names in it
    "instruction": "instruct",
    "max_query_tokens": "max_query_tokens",
    "max_document_tokens": "max_document_tokens",
    "max_length": "truncate_prompt_tokens",
    "long_documents": "long_documents",
    "chunk_tokens": "chunk_tokens",
    "chunk_overlap_tokens": "chunk_overlap_tokens",
    "num_best_chunks": "num_best_chunks",
}
FIRST_STAGE = ("first_stage_scores", "first_stage_weight", "first_stage_method")
FORMS = "http://HOST:PORT, https://HOST or http+unix:///PATH, as `local-rerank serve` prints it"
MAX_SHOWN_CHARS = 300  # of a server's message


@dataclass(frozen=True)
class Server:
    """Where a server listens. `shown` names it in errors."""

    shown: str
    scheme: str
    host: str  # path of the socket, for http+unix
    port: int | None
    prefix: str  # the path under which a proxy publishes the server

    @classmethod
    def parse(cls, url: str) -> Server:
        """Raises ConfigError, which does not quote a URL that may hold a secret."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"server is no URL ({error}); give {FORMS}") from None
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError(f"server has more than an address; give {FORMS}, and the key in {KEY_VARIABLE}")
        path = quote(parts.path.rstrip("/"), safe="/%")
        if parts.scheme == "http+unix" and path and not parts.netloc:
            return cls(url, parts.scheme, unquote(path), None, "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"server is {url!r}; give {FORMS}")
        return cls(url, parts.scheme, parts.hostname, port, path.removesuffix(ROUTE))

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is not open yet. Variables for proxies have no effect."""
        if self.scheme == "http+unix":
            return _UnixConnection(self.host)
        if self.scheme == "https":
            return http.client.HTTPSConnection(
                self.host, self.port, timeout=CONNECT_SECONDS, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=CONNECT_SECONDS)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_SECONDS)
        self.sock.connect(self._path)


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: HTTPMessage
    body: bytes


def options_to_send(config: EngineConfig | None) -> dict[str, Any]:
    """The options of a request. Raises ConfigError for an engine option that only the server's own engine has."""
    if config is None:
        return {}
    given = [field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]
    if refused := [name for name in given if name not in SENT]:
        raise ConfigError(f"{refused[0]} cannot be combined with --server, which has a model and options of its own")
    return {SENT[name]: getattr(config, name) for name in given}


def rank_at(server: Server, request: RerankRequest, options: Mapping[str, Any]) -> RerankResult:
    """Rank at a server with the first key of LOCAL_RERANK_API_KEY, if it is set.

    Raises ConfigError if it cannot be reached or does not answer as our server does, InvalidRequest, Overloaded or
    ModelUnavailable for what it refuses.
    """
    names = [
        "query",
        "documents",
        "top_n",
        *["spans"] * request.spans,
        *["min_score"] * (request.min_score is not None),
    ]
    names += FIRST_STAGE if request.first_stage_scores is not None else ()
    body = {name: getattr(request, name) for name in names} | {"return_documents": False}
    key = next(iter(os.environ.get(KEY_VARIABLE, "").split()), None)
    answer = _post(server, json.dumps(body | dict(options)).encode(), key)
    if answer.status != 200:
        raise _refusal(server, answer, key)
    try:
        value = msgspec.json.decode(answer.body)
        for item in value["results"]:
            item["document"] = request.documents[item["index"]]
        return msgspec.convert(value, RerankResult)
    except (msgspec.MsgspecError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ConfigError(
            f"{server.shown} is no local-rerank server of this version ({__version__}): its answer to POST {ROUTE} "
            f"has another form ({error})"
        ) from error


def _post(server: Server, body: bytes, key: str | None) -> _Answer:
    headers: dict[str, str | bytes] = {"Content-Type": "application/json", "User-Agent": f"local-rerank/{__version__}"}
    if key is not None:
        headers["Authorization"] = b"Bearer " + os.fsencode(key)
    try:
        with closing(server.connect()) as connection:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(ANSWER_SECONDS)
            with suppress(BrokenPipeError, ConnectionResetError):  # it may refuse a request before it has read all
                connection.request("POST", server.prefix + ROUTE, body, headers)
            response = connection.getresponse()
            return _Answer(response.status, response.headers, response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ConfigError(f"server is {server.shown}, {_why_not(server, error)}") from error


def _why_not(server: Server, error: Exception) -> str:
    """What went wrong on the way to a server, and what to do."""
    match error:
        case ConnectionRefusedError() | FileNotFoundError():
            return "where no server listens; start one with `local-rerank serve`, or correct the address"
        case socket.gaierror():
            return f"whose name cannot be resolved ({error.strerror}); correct the address"
        case ssl.SSLCertVerificationError():
            return f"whose certificate is not trusted ({error.verify_message}); name its CA's file in SSL_CERT_FILE"
        case ssl.SSLError():
            return (
                f"which does not speak TLS as it should ({error.reason}); a server without TLS has an http:// address"
            )
        case TimeoutError():
            return f"which did not answer within {CONNECT_SECONDS} s (connecting) or {ANSWER_SECONDS} s"
        case http.client.RemoteDisconnected() | ConnectionError():
            return "which closed the connection without an answer; a server with TLS has an https:// address"
        case http.client.InvalidURL():
            return f"which is no URL; give {FORMS}"
        case http.client.HTTPException():
            return f"which does not speak HTTP; give {FORMS}"
        case _:
            return f"which cannot be reached: {error}"


def _refusal(server: Server, answer: _Answer, key: str | None) -> LocalRerankError:
    """The error for an answer that is no result."""
    said, shown, status = _message_of(answer), server.shown, answer.status
    after = answer.headers.get("retry-after", "")
    again = f"; try again in {after} s" if after.isdecimal() else "; try again later"
    match status:
        case 401 | 403 if key is None:
            return ConfigError(f"{shown} wants an API key ({status}{said}); set {KEY_VARIABLE}")
        case 401:
            return ConfigError(f"{shown} refuses the key in {KEY_VARIABLE} ({status}{said})")
        case 404 | 405:
            return ConfigError(
                f"{shown} has no route {ROUTE} ({status}{said}); give the address of a local-rerank server, with its "
                "--root-path if it has one"
            )
        case 429:
            seconds = float(after) if after.isdecimal() else 1.0
            return Overloaded(f"{shown} is busy ({status}{said}){again}", retry_after=seconds)
        case 504:
            return ModelUnavailable(f"{shown} did not rank in time ({status}{said})")
        case 502 | 503:
            return ModelUnavailable(f"{shown} cannot rank now ({status}{said}){again}")
        case _ if 300 <= status < 400:
            return ConfigError(f"{shown} points to {answer.headers.get('location', 'another address')}; give that one")
        case _ if status >= 500:
            return ModelUnavailable(f"{shown} failed ({status}{said}); its log says more")
        case _:
            return InvalidRequest(f"{shown} refuses the request ({status}{said})", field="server")


def _message_of(answer: _Answer) -> str:
    """A colon and the message of an error in our form or in a similar one; nothing for any other body, such as HTML."""
    try:
        value = json.loads(answer.body)
        inner = value.get("error")
        said = value.get("message") or value.get("detail") or (inner["message"] if isinstance(inner, dict) else inner)
    except (ValueError, LookupError, AttributeError, RecursionError):
        return ""
    return f": {said[:MAX_SHOWN_CHARS]}" if isinstance(said, str) else ""
