"""Chunks and spans over HTTP: our own route has all options, vendors' bodies those of their APIs."""

from __future__ import annotations

from typing import Any

import pytest

from local_rerank import Reranker, RerankRequest
from tests.server.conftest import Serve

pytestmark = pytest.mark.anyio
TEXT = " ".join(f"Sentence number {i} has some words in it." for i in range(60))  # about 2,400 tokens of the tiny model
LONG = {"query": "which?", "documents": ["short", TEXT]}


async def test_our_own_route_says_which_chunk_won(serve: Serve, tiny_reranker: Reranker) -> None:
    options = {"long_documents": "chunk", "chunkTokens": 100, "spans": True}
    async with serve(tiny_reranker) as client:
        answer = (await client.post("/v1/local/rank", json=LONG | options)).json()
        plain = (await client.post("/v1/local/rank", json=LONG)).json()
    long = next(item for item in answer["results"] if item["index"] == 1)
    assert long["num_chunks"] > 20
    assert long["num_truncated_tokens"] == 0
    chunk = long["best_chunk"]
    assert chunk["score"] == long["relevance_score"]
    assert TEXT[chunk["start"] :].startswith("Sentence")
    assert all(chunk["start"] <= span["start"] < span["end"] <= chunk["end"] for span in long["spans"])
    assert not {"num_chunks", "best_chunk", "spans"} & plain["results"][0].keys(), "nobody asked for them"


async def test_spans_count_in_the_limit_of_tokens_and_in_usage(serve: Serve, tiny_reranker: Reranker) -> None:
    body: dict[str, Any] = {"query": "q", "documents": [TEXT[:500], TEXT[:200]]}
    result = tiny_reranker.rank("q", body["documents"])
    num_tokens, longest = result.num_document_tokens + 2, max(item.num_tokens for item in result)
    async with serve(tiny_reranker, max_request_tokens=num_tokens + longest) as client:
        plain = (await client.post("/v1/local/rank", json=body)).json()
        one = (await client.post("/v1/local/rank", json=body | {"spans": True, "top_n": 1})).json()
        both = await client.post("/v1/local/rank", json=body | {"spans": True})
    assert one["total_tokens"] > plain["total_tokens"] + len(one["results"][0]["spans"]) * 30
    assert both.status_code == 400
    assert f"has {num_tokens + result.num_document_tokens} tokens or more; at most {num_tokens + longest}" in both.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"long_docs": "chunk"}, "long_docs: this route has no such field; the nearest is long_documents"),
        ({"zzz": 1}, "zzz: this route has no such field"),
        ({"long_documents": "split"}, "long_documents"),
        ({"long_documents": "truncate", "chunk_tokens": 50}, "chunk_tokens: this has no effect with"),
        ({"long_documents": "truncate", "chunkOverlapTokens": 50}, "chunk_overlap_tokens: this has no effect with"),
        ({"long_documents": "truncate", "max_chunks_per_document": 5}, "max_chunks_per_document: this has no effect"),
        ({"long_documents": "truncate", "max_chunks_per_doc": 5}, "max_chunks_per_doc: this has no effect with"),
        ({"chunk_tokens": 3}, "chunk_tokens is 3; it must be at least 16"),
        ({"truncation": "error", "long_documents": "chunk", "max_document_tokens": 9}, "documents[1] has 2"),
    ],
)
async def test_our_own_route_refuses_wrong_fields_by_name(
    serve: Serve, tiny_reranker: Reranker, fields: dict[str, Any], words: str
) -> None:
    async with serve(tiny_reranker) as client:
        response = await client.post("/v1/local/rank", json=LONG | fields)
    assert response.status_code == 400
    assert words in response.text


@pytest.mark.parametrize(
    ("path", "fields", "advised"),
    [
        ("/v1/local/rank", {"long_documents": "chunk"}, "max_chunks_per_document"),
        ("/v1/rerank", {"overlap_tokens": 9}, "max_chunks_per_doc"),
    ],
)
async def test_too_many_chunks_are_advised_to_be_limited_by_the_routes_own_field(
    serve: Serve, tiny_reranker: Reranker, path: str, fields: dict[str, Any], advised: str
) -> None:
    async with serve(tiny_reranker, max_document_chunks=2) as client:
        refused = await client.post(path, json=LONG | fields)
        limited = await client.post(path, json=LONG | fields | {advised: 2})
    assert (refused.status_code, limited.status_code) == (400, 200)
    assert "documents[1] has " in refused.text
    assert f"or set {advised}, beyond which a document is cut off" in refused.text


@pytest.mark.parametrize(
    ("fields", "library"),
    [
        ({"max_chunks_per_doc": 2}, {"long_documents": "chunk", "max_chunks_per_document": 2}),
        ({"max_chunks_per_doc": 99, "overlap_tokens": 80}, {"long_documents": "chunk", "chunk_overlap_tokens": 80}),
        ({}, {}),
    ],
)
async def test_vendors_fields_ask_for_chunks(
    serve: Serve, tiny_reranker: Reranker, fields: dict[str, int], library: dict[str, Any]
) -> None:
    async with serve(tiny_reranker) as client:
        answer = await client.post("/v1/rerank", json=LONG | fields)
    request = RerankRequest(query="which?", documents=("short", TEXT), **library)
    result = tiny_reranker.submit(request).result()
    scores = {item["index"]: item["relevance_score"] for item in answer.json()["results"]}
    assert scores == pytest.approx({item.index: item.relevance_score for item in result}, rel=1e-4)
    assert answer.json()["usage"]["total_tokens"] == result.total_tokens, "each chunk counts"
    assert "chunk" not in answer.text, "bodies stay as the vendors have them"
