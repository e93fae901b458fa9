"""What a body costs to parse is bounded before it is parsed; the text of documents does not count."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_rerank.errors import ModelUnavailable
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects import _structure
from local_rerank_server.dialects._structure import StructureCheck
from local_rerank_server.errors import MalformedBody
from tests.server.conftest import HeldRanker, Serve, message_of

pytestmark = pytest.mark.anyio
LOCAL, SHARED = "/v1/local/rank", "/v1/rerank"  # bodies are parsed in one place for each
HEAD = b'{"query": "q", "documents": ["a"], "more": '
COSTLY = {
    "objects": b"[" + b",".join([b'{"a":1}'] * 60_000) + b"]",
    "lists": b"[" + b",".join([b"[]"] * 80_000) + b"]",
    "strings": b"[" + b",".join([b'""'] * 80_000) + b"]",
    "numbers": b"[" + b",".join([b"1"] * 151_000) + b"]",
    "keys": b"{" + b",".join([b'"a":1'] * 60_000) + b"}",
    "many different keys": json.dumps({f"key{number}": 1 for number in range(1001)}).encode(),
    "depth": b"[" * 160_000 + b"]" * 160_000,
    "depth without an end": b'{"a":' * 80_000,
    "quotes": b'"' * 400_000,
    "white space": b" " * 17_000_000 + b"1",
    "an integer": b"[%d]" % 10**20,
    "a negative integer": b"[-%d ]" % 10**20,
    "an integer of 4299 digits": b"1" * 4299,
    "a float of many digits": b"1." + b"1" * 200_000,
    "an exponent of many digits": b"1e" + b"1" * 200_000,
}
WITHIN = {
    "embeddings": [[0.1234567890123456789] * 1024] * 100,
    "integers of 20 digits": [10**19, -(10**19)],
    "long floats": [1e300, -1.2345678901234567e-308],
    "a thousand fields": {str(number): number for number in range(1000)},
}
CODE = 'if (a["b"] == \'\\\\\') { return [{"c": [1, 2, 3], "d": "\\"" }, {}]; } // 中文 12345678901234567890123\n'


async def status_of(serve: Serve, path: str, body: bytes) -> tuple[int, str]:
    async with serve(HeldRanker(ModelUnavailable("it was read"))) as client:
        answer = await client.post(path, content=body)
        return answer.status_code, message_of(answer.json())


@pytest.mark.parametrize("name", COSTLY)
async def test_a_body_that_costs_more_than_documents_need_is_refused(name: str, serve: Serve) -> None:
    for path in (LOCAL, SHARED) if len(COSTLY[name]) < 1_000_000 else (LOCAL,):
        status, message = await status_of(serve, path, HEAD + COSTLY[name] + b"}")
        assert (status, "at most" in message) == (400, True), message


async def test_the_rest_of_such_a_body_is_not_read(serve: Serve) -> None:
    num_sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_sent
        yield HEAD
        for _ in range(1000):
            num_sent += 1
            yield b'{"a":1},' * 8000

    async with serve(HeldRanker()) as client:
        assert (await client.post(LOCAL, content=body())).status_code == 400
    assert num_sent < 10


@pytest.mark.parametrize("name", WITHIN)
async def test_other_fields_of_usual_size_are_read(name: str, serve: Serve) -> None:
    body = HEAD + json.dumps(WITHIN[name]).encode() + b"}"
    assert await status_of(serve, SHARED, body) == (503, "it was read")


@pytest.mark.parametrize("escaped", [True, False])
async def test_a_thousand_documents_of_code_and_json_are_read(escaped: bool, serve: Serve) -> None:
    documents: list[Any] = [CODE * 60, json.dumps({"a": [CODE, {"b": "\\"}]}), {"text": CODE, "meta": [1, {"a": "b"}]}]
    body = json.dumps({"query": CODE, "documents": documents * 333}, ensure_ascii=escaped, indent=2).encode()
    assert sum(map(body.count, b",:[{")) > _structure.MIN_PARTS
    assert await status_of(serve, SHARED, body) == (503, "it was read")


async def test_the_limit_grows_with_the_documents_of_a_request(serve: Serve) -> None:
    body = json.dumps({"query": "q", "documents": [{"text": "a"}] * 50_000}).encode()
    assert (await status_of(serve, LOCAL, body))[0] == 400
    async with serve(HeldRanker(ModelUnavailable("it was read")), max_documents=50_000) as client:
        assert (await client.post(LOCAL, content=body)).status_code == 503


texts = st.text(alphabet='a"\\{}[]:,0.e- \n中', max_size=8)
values = st.recursive(
    st.none() | st.integers(-(10**19), 10**19) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def parts_of(value: Any) -> int:
    """How many brackets, colons, commas and strings a value has as JSON."""
    if isinstance(value, str):
        return 1
    if isinstance(value, list):
        return 1 + max(0, len(value) - 1) + sum(map(parts_of, value))
    if isinstance(value, dict):
        return 1 + max(0, len(value) - 1) + sum(2 + parts_of(each) for each in value.values())
    return 0


@given(value=st.lists(values, max_size=3), size=st.integers(1, 9), escaped=st.booleans())
def test_parts_are_counted_exactly_however_the_body_is_cut(value: Any, size: int, escaped: bool) -> None:
    body = json.dumps(value, ensure_ascii=escaped).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_structure, "PARTS_PER_DOCUMENT", 0)
        for limit in (parts_of(value), parts_of(value) - 1):
            patch.setattr(_structure, "MIN_PARTS", limit)
            check = StructureCheck(ServerConfig())
            refused = False
            try:
                for start in range(0, len(body), size):
                    check.feed(body[start : start + size])
            except MalformedBody:
                refused = True
            assert refused is (limit < parts_of(value))
