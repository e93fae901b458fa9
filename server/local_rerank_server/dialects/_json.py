"""Reads a JSON body in UTF-8, where a missing Content-Type is accepted, and writes JSON responses."""

from __future__ import annotations

import asyncio
import json
from email.message import Message
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse

from local_rerank_server.dialects._structure import SLICE_BYTES, StructureCheck
from local_rerank_server.errors import MalformedBody, UnsupportedContent, quoted

if TYPE_CHECKING:
    from local_rerank_server.state import ServerState

MAX_FIELDS = 1000  # of the body and of an object in it; each one is compared with the names of options
MAX_INLINE_BYTES = 256 * 1024  # about 2 ms of JSON parsing; larger bodies are parsed in a thread, one at a time


class JsonResponse(JSONResponse):
    """The same JSON in a tenth of the time."""

    def render(self, content: Any) -> bytes:
        try:
            return msgspec.json.encode(content)
        except (TypeError, ValueError, OverflowError):  # such as an integer of a document that has over 64 bits
            return super().render(content)


class JsonRequest(Request):
    """A request whose `json` raises `MalformedBody` or `UnsupportedContent`, and parses the body once."""

    async def body(self) -> bytes:
        """The body, checked by `StructureCheck` while it arrives, so that no more of a refused one is kept."""
        if not hasattr(self, "_body"):
            _check_content(self)
            check, chunks = StructureCheck(self._server.config), []
            async for chunk in self.stream():
                for start in range(0, len(chunk), SLICE_BYTES):
                    if start:  # some servers pass a body on in one chunk
                        await asyncio.sleep(0)
                    check.feed(chunk[start : start + SLICE_BYTES])
                chunks.append(chunk)
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            inline = len(body) <= MAX_INLINE_BYTES
            self._json = parse_json(body) if inline else await self._server.parse(parse_json, body)
        return self._json

    @property
    def _server(self) -> ServerState:
        state: ServerState = self.app.state.server
        return state


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
    """Parse a body that `StructureCheck` has passed; raises `MalformedBody`."""
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        parsed = _parse_leniently(body)
    if isinstance(parsed, dict):
        for value in (parsed, *parsed.values()):
            if isinstance(value, dict) and len(value) > MAX_FIELDS:
                raise MalformedBody(f"an object of the body has {len(value)} fields; at most {MAX_FIELDS} are allowed")
    return parsed


def _parse_leniently(body: bytes) -> Any:
    """Parse what msgspec refuses: a byte order mark and lone surrogates are taken, and errors say where they are."""
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise MalformedBody("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise MalformedBody(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinities, which Python's parser accepts although they are not JSON."""
    raise MalformedBody(f"the body is not JSON: {name} is not a JSON number")
