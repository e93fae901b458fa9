"""The OpenAPI document, and serving the page at /docs; tests/playground opens it in a browser."""

from __future__ import annotations

import pytest

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
    assert (keyed["servers"], keyed["security"]) == ([{"url": "/rerank"}], [{"ApiKey": []}])
    assert keyed["components"]["securitySchemes"] == {"ApiKey": {"type": "http", "scheme": "bearer"}}
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


async def test_the_docs_page_needs_no_key_and_has_a_policy(serve: Serve) -> None:
    async with serve(HeldRanker(), api_key=("k",)) as client:
        for path, file in docs.FILES.items():
            answer = await client.get(path)
            assert answer.content == file.read_bytes()
            assert answer.headers["content-type"].split(";")[0] == MEDIA_TYPES[file.suffix]
            policy = answer.headers["content-security-policy"]
            assert "script-src 'self';" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
