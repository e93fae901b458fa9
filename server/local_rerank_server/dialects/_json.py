"""Reading a body: JSON in UTF-8, declared as such or not declared at all, parsed once."""

from __future__ import annotations

import json
from email.message import Message
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from local_rerank_server.errors import MalformedBody, UnsupportedContent

PARSED_IN_THE_LOOP_BYTES = 256 * 1024  # about 2 ms of JSON parsing; longer bodies are parsed in a thread
MOST_OF = {b"[": 1_000_000, b"{": 1_000_000, b",": 5_000_000}
"""Characters of a body, in its texts or between them. The parser lets no other thread run until it is done: a body of
nothing but empty lists would stop the server for seconds and fill gigabytes."""


class JsonRequest(Request):
    """A request that raises `MalformedBody` or `UnsupportedContent` for a body that is no JSON in UTF-8."""

    async def body(self) -> bytes:
        _check_content(self)
        return await super().body()

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            in_the_loop = len(body) <= PARSED_IN_THE_LOOP_BYTES
            self._json = parse_json(body) if in_the_loop else await run_in_threadpool(parse_json, body)
        return self._json


def json_request(http: Request) -> JsonRequest:
    """`http` as such a request; what was read of it before stays read."""
    return http if isinstance(http, JsonRequest) else JsonRequest(http.scope, http.receive)


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
    for character, most in MOST_OF.items():
        if (count := body.count(character)) > most:
            raise MalformedBody(f"the body holds {count} times {character.decode()!r}; at most {most} are read")
    try:
        return json.loads(
            body.decode("utf-8-sig"), parse_constant=_no_number
        )  # a byte order mark is not JSON, but some editors leave one
    except UnicodeDecodeError:
        raise MalformedBody("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise MalformedBody(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise MalformedBody(f"the body is not JSON that can be read: {error}") from None


def _no_number(name: str) -> None:
    """NaN and the infinities, which Python's parser takes and no answer could hold."""
    raise MalformedBody(f"the body is not JSON: {name} is no number")
