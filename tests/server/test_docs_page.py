"""Discovery: the OpenAPI document, the page made from it, models and versions."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest

import local_rerank
from local_rerank import Reranker
from local_rerank_server.docs_page import render_docs
from tests.server.conftest import HeldRanker, Serve

pytestmark = pytest.mark.anyio


async def test_every_example_of_the_openapi_document_is_ranked(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
        posts = {path: methods["post"] for path, methods in paths.items() if "post" in methods}
        assert len(posts) >= 3
        for path, operation in posts.items():
            examples = operation["requestBody"]["content"]["application/json"]["examples"]
            for example in examples.values():
                answer = await client.post(path, json=example["value"])
                assert answer.status_code == 200, answer.text


async def test_fastapis_own_error_shape_is_documented_nowhere(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        document = (await client.get("/openapi.json")).text
    assert "HTTPValidationError" not in document
    assert '"422"' not in document


async def test_the_docs_page_shows_every_route_and_loads_nothing(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        page = await client.get("/docs")
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    text = unescape(page.text)
    assert all(path in text for path in paths)
    assert "curl http://test/compatible-api/v1/reranks" in text
    assert not re.search(r"<script|<link|<img|src=|@import|url\(", page.text)


def test_the_docs_page_shows_markup_in_an_example_as_text() -> None:
    operation = {
        "tags": ["<b>"],
        "description": "<i>",
        "requestBody": {"content": {"application/json": {"examples": {"x": {"value": "it's <script>"}}}}},
    }
    openapi = {"info": {"title": "<u>", "version": "1"}, "paths": {"/<s>": {"post": operation}}}
    page = render_docs(openapi, base_url="http://x")
    assert not re.search(r"<(b|i|u|s|script)>", page)
    assert "it'\\''s <script>" in unescape(page)


async def test_models_are_found_by_every_name_and_with_strict_models_by_no_other(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker, model_aliases=("Qwen/Qwen3-Reranker-0.6B",)) as client:
        listed: list[dict[str, Any]] = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == [tiny_reranker.model_id, "Qwen/Qwen3-Reranker-0.6B"]
        assert (await client.get("/compatible-mode/v1/models")).json()["data"] == listed
        for model in listed:
            assert (await client.get(f"/v1/models/{model['id']}")).json() == model
        assert (await client.get("/v1/models/Qwen/other")).json()["id"] == "Qwen/other"  # it would be ranked, too
    async with serve(tiny_reranker, strict_models=True) as client:
        missing = await client.get("/v1/models/Qwen/other")
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "UnknownModel")


async def test_version_is_the_librarys(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        assert (await client.get("/version")).json() == {"version": local_rerank.__version__}


async def test_the_list_of_models_says_which_is_the_small_built_in_one(serve: Serve) -> None:
    built_in, other = HeldRanker(), HeldRanker()
    built_in.model_id = "local-rerank-nano"
    for ranker, says in ((built_in, True), (other, False)):
        async with serve(ranker) as client:
            described = (await client.get("/v1/models")).json()["data"][0]
        assert ("built-in" in described.get("description", "")) is says


async def test_probes_may_ask_for_the_head_alone(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for path in ("/health", "/ready", "/v1/models", "/docs"):
            assert (await client.head(path)).status_code == 200
    async with serve(None) as client:
        assert (await client.head("/ready")).status_code == 503
