"""ZeroEntropy's rerank API, whose path is under that of the list of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired

from pydantic import Field
from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.types import RankedDocument, RerankResult
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import String
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import DocumentsRequest, parse_documents, score_of, texts_of
from local_rerank_server.dialects._responses import DetailError, render_detail_error
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATHS = ("/v1/models/rerank",)


class ZeroEntropyRequest(DocumentsRequest):
    latency: String | None = Field(default=None, description="Without effect; the response repeats slow.")


class ZeroEntropyResult(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[str]


class ZeroEntropyResponse(TypedDict):
    """The documents, most relevant first. Bytes are counted as tokens are: the query once per document."""

    results: list[ZeroEntropyResult]
    total_tokens: int
    total_bytes: int
    actual_latency_mode: str  # the SDK takes fast and slow
    e2e_latency: float  # seconds, and so is the next
    inference_latency: float


def takes(body: Mapping[str, Any]) -> bool:
    """On an unknown path: no other API has a `latency`."""
    return body.get("latency") is not None


def render(result: RerankResult, body: ZeroEntropyRequest) -> ZeroEntropyResponse:
    documents = texts_of(body.documents, body.rank_fields)
    return {
        "results": [_render_item(item, body) for item in result],
        "total_tokens": result.total_tokens,
        "total_bytes": sum(len(text.encode()) for text in documents) + len(body.query.encode()) * len(documents),
        "actual_latency_mode": "slow" if body.latency == "slow" else "fast",
        "e2e_latency": result.total_ms / 1000,
        "inference_latency": (result.total_ms - result.tokenize_ms - result.queue_ms) / 1000,
    }


def _render_item(item: RankedDocument, body: ZeroEntropyRequest) -> ZeroEntropyResult:
    rendered: ZeroEntropyResult = {"index": item.index, "relevance_score": score_of(item, body)}
    if body.wants_documents():
        rendered["document"] = item.document
    return rendered


dialect = Dialect(name="ZeroEntropy", render_error=render_detail_error, error_model=DetailError, prefixes=PATHS)
router = dialect.router()

EXAMPLE = {"model": "zerank-1", "query": QUERY, "documents": DOCUMENTS, "top_n": 2, "latency": "fast"}


async def rank(http: Request, body: ZeroEntropyRequest) -> JsonResponse:
    """Rank documents by relevance to a query, like ZeroEntropy."""
    return JsonResponse(render(await rank_body(http, body, parse_documents), body))


add_post(
    router,
    PATHS,
    rank,
    takes=takes,
    examples={"ZeroEntropy": EXAMPLE},
    summary="ZeroEntropy rerank",
    response_model=ZeroEntropyResponse,
)
