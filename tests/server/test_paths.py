"""Paths as clients write them: with slashes too many, without a prefix, at another base URL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from local_rerank import Reranker
from local_rerank_server.dialects._json import MAX_INLINE_BYTES
from tests.server.conftest import HeldRanker, Serve, message_of
from tests.serving import NATIVE

pytestmark = pytest.mark.anyio
FLAT = {"model": "qwen3-rerank", "query": "q", "documents": ["a", "b"]}
BASES = ("", "/v1", "/v2", "/v3", "/api/v1", "/api/paas/v4", "/compatible-api/v1", "/compatible-mode/v1", "/openai/v1")


@pytest.mark.parametrize("path", ["//v1/rerank", "/v1//rerank", "/v1/rerank/", "/v1/rerank//", "/api/v1/reranks"])
async def test_c12_a_post_is_served_whatever_slashes_its_path_has(
    path: str, serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker, api_key=("k",), root_path="/prefix") as client:
        for prefix in ("http://localhost", "http://localhost/prefix", "http://localhost//prefix"):
            answer = await client.post(prefix + path, json=FLAT, headers={"Authorization": "Bearer k"})
            assert len(answer.json()["results"]) == 2, answer.text


async def test_c12_every_get_route_takes_a_final_slash_and_doubled_ones(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for path in ("/health", "/ready", "/v1/models", "/models", "/info", "/metrics", "/v1/cluster/auth", "/limits"):
            for written in (path, f"{path}/", f"/{path}", f"{path}//"):
                for answer in (
                    await client.get(f"http://localhost{written}"),
                    await client.head(f"http://localhost{written}"),
                ):
                    assert answer.status_code == 200, (written, answer.text)


async def test_c12_the_page_of_the_documentation_keeps_its_relative_links(serve: Serve) -> None:
    async with serve(HeldRanker(), root_path="/prefix") as client:
        for path in ("/docs/", "/prefix/docs/", "/docs//"):
            answer = await client.get(path, follow_redirects=True)
            assert (answer.status_code, answer.url.path) == (200, path.rstrip("/"))
            assert all("x-request-id" in each.headers for each in (answer, *answer.history))


@pytest.mark.parametrize(
    ("method", "path", "nearest"),
    [
        ("POST", "/v1/rerankk", "POST /v1/rerank"),
        ("POST", "/rerank/v1", "POST /rerank"),
        ("GET", "/v1/model", "GET /v1/models"),
        ("POST", "/compatible-mode/reranks", "POST /compatible-mode/v1/reranks"),
        ("GET", "/helth", "GET /health"),
        ("POST", "/V1/Rerank", "POST /v1/rerank"),
    ],
)
async def test_c12_an_unknown_path_names_the_nearest(method: str, path: str, nearest: str, serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        answer = await client.request(method, path)
        assert (await client.get("/" + "x" * 60_000)).status_code == 404
    assert answer.status_code == 404
    assert nearest in message_of(answer.json())


async def test_c12_a_wrong_method_lists_the_right_ones(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for path, methods in (("/v1/models", "GET, HEAD"), ("/v1/rerank", "POST"), ("/models/a/b", "GET, HEAD")):
            refused, asked = await client.put(path), await client.options(f"{path}/")
            assert (refused.status_code, refused.headers["allow"]) == (405, methods)
            assert f"it takes {methods}" in message_of(refused.json())
            assert (asked.status_code, asked.headers["allow"]) == (204, f"{methods}, OPTIONS")


@pytest.mark.parametrize("base", BASES)
async def test_e7_every_base_url_has_the_list_of_models_and_each_model(base: str, serve: Serve) -> None:
    async with serve(HeldRanker(), model_aliases=("Qwen/Qwen3-Reranker-0.6B", "qwen3-rerank")) as client:
        listed = (await client.get(f"{base}/models")).json()["data"]
        assert [model["id"] for model in listed] == ["held", "Qwen/Qwen3-Reranker-0.6B", "qwen3-rerank"]
        for model in listed:
            for name in (model["id"], model["id"].replace("/", "%2F")):
                assert (await client.get(f"{base}/models/{name}")).json() == model


async def test_e7_an_unknown_model_is_refused_in_the_shape_of_its_base_url(serve: Serve) -> None:
    async with serve(HeldRanker(), strict_models=True) as client:
        for base, keys in (("/api/v1", {"code"}), ("/compatible-mode/v1", {"error", "code"}), ("/v2", {"id"})):
            answer = await client.get(f"{base}/models/other")
            assert answer.status_code == 404
            assert keys <= answer.json().keys()


@pytest.mark.parametrize("base", ["", "/v1", "/api", "/compatible-mode/v1", "/api/v1/api/v1", "/rerank"])
async def test_e7_a_wrong_base_url_of_dashscopes_sdk_is_told_the_right_one(base: str, serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        answer = await client.post(base + NATIVE.removeprefix("/api/v1"), json={})
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (404, "NotFound")
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "http://localhost/api/v1." in body["message"]


TEI = {"query": "q", "texts": ["a", "b"]}
COMMON = {"query": "q", "documents": ["a", "b"]}


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/api/v2/search", TEI, "this body is Text Embeddings Inference's: POST /rerank"),
        ("/", TEI, "/ does not take POST; it takes GET, HEAD; this body is Text Embeddings Inference's: POST /rerank"),
        ("/v1/models", COMMON | {"top_k": 2}, "this body is Voyage's: POST /v1/rerank"),
        ("/rerankings", {"query": "q", "input": ["a"], "top_k": 2}, "this body is Mixedbread's: POST /v1/reranking"),
        ("/compatible-api/v1/x", {"model": "m", "input": COMMON}, f"this body is DashScope native's: POST {NATIVE}."),
        ("/", COMMON, "this body is one of Jina, Cohere v1, vLLM, Xinference, SiliconFlow: POST /v1/rerank"),
        ("/rerank/rerankings", TEI | {"model": "m"}, "this body is Isaacus's: POST /v1/rerankings"),
        ("/v1/models", {"queries": ["q"], "documents": ["a"]}, "/v1/models does not take POST; it takes GET, HEAD"),
        ("/v1/models", {}, "/v1/models does not take POST; it takes GET, HEAD"),
        ("/cohere/v2/rerank", COMMON, "the nearest path is POST /v2/rerank"),
        ("/compatible-mode/v1/models", COMMON, "Request method 'POST' is not supported."),
    ],
)
async def test_a_body_on_a_wrong_path_is_told_whose_it_is(
    path: str, body: dict[str, Any], told: str, serve: Serve
) -> None:
    async with serve(HeldRanker()) as client:
        answer = await client.post(path, json=body)
        assert answer.status_code in (400, 404, 405)
        assert message_of(answer.json()).endswith(told)
        assert ("error_type" in answer.json()) is (body is TEI), "in the shape that its client reads"


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b'{"query": "q", "texts": ["a"]', {}),
        (b"[1]", {}),
        (b"\xff", {}),
        (b'{"query": "q", "texts": null}', {}),
        (b'{"query": "q", "texts": ["%s"]}' % (b"x" * MAX_INLINE_BYTES), {}),
        (json.dumps(TEI).encode(), {"Content-Type": "text/plain"}),
        (json.dumps(TEI).encode(), {"Content-Encoding": "gzip"}),
    ],
    ids=["cut", "array", "not UTF-8", "null", "large", "text", "compressed"],
)
async def test_a_body_that_cannot_be_judged_gets_the_nearest_path(
    content: bytes, headers: dict[str, str], serve: Serve
) -> None:
    async with serve(HeldRanker()) as client:
        answer = await client.post(
            "/v1/rerankk", content=content, headers={"Content-Type": "application/json"} | headers
        )
    assert message_of(answer.json()) == "unknown path /v1/rerankk; the nearest path is POST /v1/rerank"


async def test_an_unknown_path_does_not_wait_for_a_slow_body(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("local_rerank_server.app.JUDGE_SECONDS", 0.01)

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async with serve(HeldRanker()) as client, asyncio.timeout(10):
        answer = await client.post("/v1/rerankk", content=body(), headers={"Content-Length": "2"})
    assert answer.status_code == 404
