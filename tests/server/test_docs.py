"""The OpenAPI document, and serving the page at /docs; tests/playground opens it in a browser."""

from __future__ import annotations

import pytest

from local_rerank import Reranker
from local_rerank_server.dialects import ROWS, docs
from local_rerank_server.dialects._files import MEDIA_TYPES
from local_rerank_server.dialects._route import DialectRoute
from tests.server.conftest import HeldRanker, Serve

pytestmark = pytest.mark.anyio


async def test_the_openapi_document_has_every_example_and_each_is_ranked(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
        posts = {path: methods["post"] for path, methods in paths.items() if "post" in methods}
        documented: set[str] = set()
        for path, operation in posts.items():
            examples = operation["requestBody"]["content"]["application/json"].get("examples", {})  # of ranking
            documented |= examples.keys()
            for example in examples.values():
                answer = await client.post(path, json=example["value"])
                assert answer.status_code == 200, answer.text
    routes = [route for _, router in ROWS for route in router.routes if isinstance(route, DialectRoute)]
    assert documented == {name for route in routes for name in route.examples}


async def test_the_openapi_document_names_server_and_key_as_configured(serve: Serve) -> None:
    async with serve(HeldRanker(), root_path="/rerank", api_key=("k",)) as client:
        keyed = (await client.get("/openapi.json", headers={"Authorization": "Bearer k"})).json()
    async with serve(HeldRanker()) as client:
        document = (await client.get("/openapi.json")).json()
    assert (keyed["servers"], keyed["security"]) == ([{"url": "/rerank"}], [{"ApiKey": []}])
    assert keyed["components"]["securitySchemes"] == {"ApiKey": {"type": "http", "scheme": "bearer"}}
    assert document["servers"] == [{"url": "/"}]
    assert "security" not in document
    assert "HTTPValidationError" not in str(document), "FastAPI's own error shape"


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
