"""Discovery: the OpenAPI document, the page at /docs, models and version."""

from __future__ import annotations

from typing import Any

import pytest

import local_rerank
from local_rerank import Reranker
from local_rerank_server.dialects import ROWS, docs
from local_rerank_server.dialects._files import MEDIA_TYPES
from local_rerank_server.dialects._route import DialectRoute
from tests.server.conftest import HeldRanker, Serve

pytestmark = pytest.mark.anyio


async def test_every_example_in_the_openapi_document_is_ranked(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
        posts = {path: methods["post"] for path, methods in paths.items() if "post" in methods}
        assert len(posts) >= 3
        for path, operation in posts.items():
            examples = operation["requestBody"]["content"]["application/json"]["examples"]
            for example in examples.values():
                answer = await client.post(path, json=example["value"])
                assert answer.status_code == 200, answer.text


async def test_the_openapi_document_omits_fastapis_own_error_shape(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        document = (await client.get("/openapi.json")).text
    assert "HTTPValidationError" not in document
    assert '"422"' not in document


async def test_the_openapi_document_names_server_and_key_as_configured(serve: Serve) -> None:
    async with serve(HeldRanker(), root_path="/rerank", api_key=("k",)) as client:
        keyed = (await client.get("/openapi.json", headers={"Authorization": "Bearer k"})).json()
    async with serve(HeldRanker()) as client:
        document = (await client.get("/openapi.json")).json()
    assert (keyed["servers"], keyed["security"]) == ([{"url": "/rerank"}], [{"API key": []}])
    assert keyed["components"]["securitySchemes"] == {"API key": {"type": "http", "scheme": "bearer"}}
    assert document["servers"] == [{"url": "/"}]
    assert "security" not in document


async def test_the_openapi_document_has_each_example_of_each_dialect(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    documented = {
        name
        for operation in (methods["post"] for methods in paths.values() if "post" in methods)
        for name in operation["requestBody"]["content"]["application/json"]["examples"]
    }
    for _, router in ROWS:
        for route in router.routes:
            assert isinstance(route, DialectRoute)
            assert route.examples.keys() <= documented, route.path


async def test_the_docs_page_and_its_files_need_the_key_and_have_a_policy(serve: Serve) -> None:
    async with serve(HeldRanker(), api_key=("k",)) as client:
        for path, file in docs.FILES.items():
            assert (await client.get(path)).status_code == 401
            answer = await client.get(path, headers={"Authorization": "Bearer k"})
            assert answer.content == file.read_bytes()
            assert answer.headers["content-type"].split(";")[0] == MEDIA_TYPES[file.suffix]
            policy = answer.headers["content-security-policy"]
            assert "script-src 'self';" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy


async def test_any_model_name_exists_unless_strict_models_is_set(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker, model_aliases=("Qwen/Qwen3-Reranker-0.6B",)) as client:
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
        for path in ("/health", "/ready", "/v1/models", "/docs"):
            assert (await client.head(path)).status_code == 200
    async with serve(None) as client:
        assert (await client.head("/ready")).status_code == 503
