"""Voyage's rerank API: `top_k` and `truncation` in the request, `data` in the response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NotRequired

from annotated_types import Ge
from pydantic import Field
from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.types import RankedDocument, RerankResult
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import Count
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import DocumentsRequest, parse_documents, score_of
from local_rerank_server.dialects._responses import DetailError, TotalTokens, render_detail_error
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATHS = ("/v1/rerank", "/rerank")


class VoyageRequest(DocumentsRequest):
    own_names: ClassVar = {"top_n": "top_k"}

    top_k: Annotated[Count, Ge(1)] | None = Field(default=None, description="How many documents to return.")


class VoyageResult(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[str]


class VoyageResponse(TypedDict):
    """The documents, most relevant first."""

    object: str
    data: list[VoyageResult]
    model: str
    usage: TotalTokens


def takes(body: Mapping[str, Any]) -> bool:
    """Voyage's SDK always sends both fields, possibly null; LiteLLM sends only `top_k`."""
    return body.get("top_n") is None and ("top_k" in body or "truncation" in body)


def render(result: RerankResult, body: VoyageRequest, request_id: str) -> VoyageResponse:
    return {
        "object": "list",
        "data": [_render_item(item, body) for item in result],
        "model": body.model or result.model,
        "usage": {"total_tokens": result.total_tokens},
    }


def _render_item(item: RankedDocument, body: VoyageRequest) -> VoyageResult:
    rendered: VoyageResult = {"index": item.index, "relevance_score": score_of(item, body)}
    if body.wants_documents():
        rendered["document"] = item.document
    return rendered


dialect = Dialect(name="Voyage", render_error=render_detail_error, error_model=DetailError)
router = dialect.router()

EXAMPLE = {"model": "rerank-2.5", "query": QUERY, "documents": DOCUMENTS, "top_k": 2, "truncation": True}


async def rank(http: Request, body: VoyageRequest) -> JsonResponse:
    """Rank documents by relevance to a query. A body with `top_k` or `truncation` and without `top_n` is Voyage's."""
    return JsonResponse(render(await rank_body(http, body, parse_documents), body, http.state.request_id))


add_post(
    router,
    PATHS,
    rank,
    takes=takes,
    examples={"Voyage": EXAMPLE},
    summary="Voyage rerank",
    response_model=VoyageResponse,
)
