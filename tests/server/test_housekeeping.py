"""Health, limits, models and version."""

from __future__ import annotations

from typing import Any

import pytest

import local_rerank
from local_rerank import Reranker
from tests.server.conftest import HeldRanker, Serve

pytestmark = pytest.mark.anyio


async def test_any_model_name_exists_unless_strict_models_is_set(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker, model_aliases=("Qwen/Qwen3-Reranker-0.6B", tiny_reranker.model_id)) as client:
        listed: list[dict[str, Any]] = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == [tiny_reranker.model_id, "Qwen/Qwen3-Reranker-0.6B"]
        assert (await client.get("/compatible-mode/v1/models")).json()["data"] == listed
        for model in listed:
            assert (await client.get(f"/v1/models/{model['id']}")).json() == model
        assert (await client.get("/v1/models/Qwen/other")).json()["id"] == "Qwen/other"  # ranking accepts it too
    async with serve(tiny_reranker, strict_models=True) as client:
        missing = await client.get("/v1/models/Qwen/other")
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "UnknownModel")


async def test_version_is_the_version_of_the_library(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        assert (await client.get("/version")).json() == {"version": local_rerank.__version__}


async def test_the_built_in_model_has_a_description(serve: Serve) -> None:
    built_in, other = HeldRanker(), HeldRanker()
    built_in.model_id = "local-rerank-nano"
    for ranker, has_description in ((built_in, True), (other, False)):
        async with serve(ranker) as client:
            described = (await client.get("/v1/models")).json()["data"][0]
        assert ("built-in" in described.get("description", "")) is has_description


async def test_get_routes_answer_head_requests(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for path in ("/health", "/ready", "/.well-known/ready", "/v1/models", "/docs"):
            assert (await client.head(path)).status_code == 200
    async with serve(None) as client:
        probes = {"/ready": 503, "/v1/health/ready": 503, "/v1/health/live": 200, "/.well-known/ready": 503}
        for path, status in probes.items():
            assert (await client.head(path)).status_code == status


async def test_limits_shows_the_configured_values(serve: Serve) -> None:
    options = {"max_documents": 7, "client_timeout_seconds": 9, "key_tokens_per_minute": 9, "strict": True}
    async with serve(HeldRanker(), **options) as client:
        published = (await client.get("/limits")).json()
    assert published["dashscope"] == {
        "max_documents": 500,
        "max_query_chars": 300_000,
        "max_instruction_chars": 50_000,
        "max_document_chars": 300_000,
        "max_request_tokens": 120_000,
        "max_document_chunks": 256,
        "max_request_chunks": 10_000,
        "allow_empty_documents": False,
    }
    assert published["other_routes"]["max_documents"] == 7
    assert published["client_timeout_seconds"] == 9
    assert published["texts"]["max_document_tokens"] == 4000
    assert published["max_queued_tokens"] == 500_000
    assert (published["key_tokens_per_minute"], published["key_requests_per_minute"]) == (9, None)
