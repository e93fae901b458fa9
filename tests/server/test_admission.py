"""Admission: limits for requests and body bytes, rate limits per key, CORS, and slow bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from httpx2 import AsyncClient, Response

from local_rerank import Reranker
from local_rerank_server import config
from tests.server.conftest import HeldRanker, Serve, until

pytestmark = pytest.mark.anyio
NATIVE = "/api/v1/services/rerank/text-rerank/text-rerank"
LOCAL = "/v1/local/rank"
BODY = {"model": "qwen3-rerank", "query": "q", "documents": ["a", "b"]}
JSON = {"Content-Type": "application/json"}


async def test_requests_over_the_limit_get_429_with_the_estimated_retry_time(serve: Serve) -> None:
    ranker = HeldRanker()
    async with serve(ranker, max_queued_requests=3) as client:
        held = [asyncio.create_task(client.post(LOCAL, json=BODY)) for _ in range(3)]
        await until(lambda: len(ranker.futures) == 3)
        refused = await client.post(LOCAL, json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
        assert "3 requests are in flight; at most 3 are allowed" in refused.json()["message"]
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/version")).status_code == 200, "only rankings count"
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await until(lambda: client.state.admission.num_requests == 0)  # type: ignore[attr-defined]
        again = asyncio.create_task(client.post(LOCAL, json=BODY))
        await until(lambda: len(ranker.futures) == 4)
        again.cancel()


async def test_a_body_over_the_total_limit_is_refused_before_it_is_read(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = HeldRanker()
    monkeypatch.setattr(config, "BODIES_HELD", 1)
    async with serve(ranker, max_body_bytes=1000) as client:
        padded = b" " * 600 + json.dumps(BODY).encode()
        held = asyncio.create_task(client.post(LOCAL, content=padded, headers=JSON))
        await until(lambda: ranker.futures)

        async def body() -> AsyncIterator[bytes]:
            raise AssertionError("the body was read")
            yield b""

        declared = await client.post(LOCAL, content=body(), headers=JSON | {"Content-Length": "900"})
        assert declared.status_code == 429
        assert "and 900 more would exceed the limit of 1000" in declared.json()["message"]

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(9):
                yield b"[" * 100

        in_chunks = await client.post(LOCAL, content=chunks(), headers=JSON)
        assert in_chunks.status_code == 429
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        await until(lambda: client.state.admission.num_body_bytes == 0)  # type: ignore[attr-defined]
        assert (await client.post(LOCAL, content=padded[:-1], headers=JSON)).status_code == 400
        assert client.state.admission.num_body_bytes == 0  # type: ignore[attr-defined]


async def test_each_key_has_its_own_request_rate(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker, api_key=("a", "b"), key_requests_per_minute=2) as client:
        statuses = [await ask(client, key, NATIVE) for key in ("a", "b", "a", "a", "b")]
        assert [answer.status_code for answer in statuses] == [200, 200, 200, 429, 200]
        refused = statuses[3]
        assert refused.json()["code"] == "Throttling.RateQuota"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        listed = await client.get("/v1/models", headers={"Authorization": "Bearer a"})
        assert listed.status_code == 200, "only rankings count"
        assert (await ask(client, "wrong", NATIVE)).status_code == 401


async def test_a_key_over_its_tokens_is_refused_until_the_minute_is_over(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker, api_key=("a", "b"), key_tokens_per_minute=100) as client:
        first = await ask(client, "a", NATIVE)
        assert first.json()["usage"]["total_tokens"] > 100, (
            "tokens are known only afterwards, so the limit can be exceeded once"
        )
        second, other = await ask(client, "a", NATIVE), await ask(client, "b", NATIVE)
    assert (second.status_code, second.json()["code"]) == (429, "Throttling.AllocationQuota")
    assert other.status_code == 200


async def test_without_keys_all_clients_share_one_rate(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker, key_requests_per_minute=1) as client:
        assert [(await client.post(LOCAL, json=BODY)).status_code for _ in range(2)] == [200, 429]


async def test_pages_of_other_origins_are_refused_unless_their_origin_is_set(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    asks = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    sends = {"Origin": "http://a.example", "Authorization": "Bearer k"}
    async with serve(tiny_reranker, api_key=("k",)) as client:
        assert (await client.options(LOCAL, headers=asks)).status_code == 403
        answer = await client.post(LOCAL, json=BODY, headers=sends)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
    async with serve(tiny_reranker, api_key=("k",), cors_origins=("http://a.example",)) as client:
        preflight = await client.options(LOCAL, headers=asks)
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "http://a.example")
        for headers in (sends, {"Origin": "http://a.example"}):  # errors are readable for the page as well
            answer = await client.post(LOCAL, json=BODY, headers=headers)
            assert answer.headers["access-control-allow-origin"] == "http://a.example"
        other = await client.post(LOCAL, json=BODY, headers=sends | {"Origin": "http://b.example"})
        assert (other.status_code, "access-control-allow-origin" in other.headers) == (403, False)


@pytest.mark.parametrize("path", ["/v1/rerank", "/api/v1/rerank", "/v1/reranking"])
async def test_a_returned_document_object_is_valid_json(path: str, serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        head = b'{"query": "q", "return_documents": true, "documents": [{"text": "d", "more": '
        answer = await client.post(path, content=head + rb'["\ud800"]}]}')
        assert answer.status_code == 200
        assert answer.json()["results"][0]["document"] == {"text": "d", "more": ["\ufffd"]}
        for more in (b"NaN", b"-Infinity", b"[" * 900 + b"]" * 900):
            answer = await client.post(path, content=head + more + b"}]}")
            assert answer.status_code in (200, 400), answer.text


async def ask(client: AsyncClient, key: str, path: str) -> Response:
    return await client.post(path, json=BODY, headers={"Authorization": f"Bearer {key}"})
