"""Reads a JSON body in UTF-8; a missing Content-Type is accepted."""

from __future__ import annotations

import json
from email.message import Message
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from local_rerank_server.errors import MalformedBody, UnsupportedContent, quoted

MAX_INLINE_BYTES = 256 * 1024  # about 2 ms of JSON parsing; larger bodies are parsed in a thread
MAX_COUNTS = {b"[": 1_000_000, b"{": 1_000_000, b",": 5_000_000}
"""Maximum occurrences of a byte in a body. The JSON parser holds the GIL, so a 64 MiB body of empty lists would block
the server for seconds and allocate gigabytes."""


class JsonRequest(Request):
    """A request whose `json` raises `MalformedBody` or `UnsupportedContent`, and parses the body once."""

    async def body(self) -> bytes:
        _check_content(self)
        return await super().body()

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            inline = len(body) <= MAX_INLINE_BYTES
            self._json = parse_json(body) if inline else await run_in_threadpool(parse_json, body)
        return self._json


def json_request(http: Request) -> JsonRequest:
    """`http` as a JsonRequest, which keeps a body that was already read."""
    return http if isinstance(http, JsonRequest) else JsonRequest(http.scope, http.receive)


def _check_content(http: Request) -> None:
    encoding = http.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedContent(f"Content-Encoding {quoted(encoding)} is not supported; send the body uncompressed")
    declared = http.headers.get("content-type")
    if not declared:
        return
    header = Message()
    header["content-type"] = declared
    kind = header.get_content_type()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedContent(f"Content-Type {quoted(kind)} is not supported; send application/json")


def parse_json(body: bytes) -> Any:
    """Parse a body; raises `MalformedBody`."""
    for byte, limit in MAX_COUNTS.items():
        if (count := body.count(byte)) > limit:
            raise MalformedBody(f"the body has {count} {byte.decode()!r}; at most {limit} are allowed")
    try:
        # utf-8-sig, because some editors write a byte order mark
        return json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise MalformedBody("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise MalformedBody(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
    except ValueError as error:  # an integer with more digits than Python parses
        raise MalformedBody(f"the body is JSON that cannot be read: {error}") from None


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinities, which Python's parser accepts although they are not JSON."""
    raise MalformedBody(f"the body is not JSON: {name} is not a JSON number")
