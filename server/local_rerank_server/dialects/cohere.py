"""Cohere's rerank API v2, which vLLM serves too; the response has the documents, as vLLM's always has."""

from __future__ import annotations

from typing import Any, NotRequired

from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.errors import LocalRerankError
from local_rerank.types import RankedDocument, RerankResult
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._models import add_models
from local_rerank_server.dialects._options import DocumentsRequest, as_object, parse_documents, score_of
from local_rerank_server.dialects._responses import Meta, Usage, make_meta, make_usage
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATHS = (
    "/v2/rerank",
    "/v1/v2/rerank",  # Cohere's SDKs append /v2/rerank to a base URL that ends in /v1
)


class CohereResult(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[dict[str, Any]]  # unless return_documents is false


class CohereResponse(TypedDict):
    """The documents, most relevant first. `document`, `model` and `usage` are vLLM's."""

    id: str
    results: list[CohereResult]
    meta: Meta
    model: str
    usage: Usage


class CohereError(TypedDict):
    id: str
    message: str


def render(result: RerankResult, body: DocumentsRequest, request_id: str) -> CohereResponse:
    return {
        "id": request_id,
        "results": [_render_item(item, body) for item in result],
        "meta": make_meta(result, len(body.documents), version="2"),
        "model": body.model or result.model,
        "usage": make_usage(result),
    }


def _render_item(item: RankedDocument, body: DocumentsRequest) -> CohereResult:
    rendered: CohereResult = {"index": item.index, "relevance_score": score_of(item, body)}
    if body.wants_documents() is not False:
        rendered["document"] = as_object(body.documents[item.index])
    return rendered


def render_error(error: LocalRerankError, status: int, request_id: str) -> CohereError:
    return {"id": request_id, "message": str(error)}


dialect = Dialect(name="Cohere v2", render_error=render_error, error_model=CohereError, prefixes=("/v2", "/v1/v2"))
router = dialect.router()

EXAMPLE = {"model": "rerank-v3.5", "query": QUERY, "documents": DOCUMENTS, "top_n": 2, "max_tokens_per_doc": 4096}


async def rank(http: Request, body: DocumentsRequest) -> JsonResponse:
    """Rank documents by relevance to a query, like Cohere's API v2."""
    return JsonResponse(render(await rank_body(http, body, parse_documents), body, http.state.request_id))


add_post(router, PATHS, rank, examples={"Cohere v2": EXAMPLE}, summary="Cohere rerank", response_model=CohereResponse)
add_models(router, "/v2")
