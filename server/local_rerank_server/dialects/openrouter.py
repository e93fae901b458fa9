"""OpenRouter's rerank API, whose path is under the prefix of DashScope's native API."""

from __future__ import annotations

from typing import Any, NotRequired

from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.errors import LocalRerankError
from local_rerank.types import RankedDocument, RerankResult
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import DocumentsRequest, as_object, parse_documents, score_of
from local_rerank_server.dialects._responses import search_units
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATHS = ("/api/v1/rerank",)


class OpenRouterResult(TypedDict):
    document: NotRequired[dict[str, Any]]  # unless the request declines them
    index: int
    relevance_score: float


class OpenRouterUsage(TypedDict):
    search_units: int
    total_tokens: int


class OpenRouterResponse(TypedDict):
    """The documents, most relevant first."""

    id: str
    model: str
    provider: str
    results: list[OpenRouterResult]
    usage: OpenRouterUsage


class OpenRouterErrorDetail(TypedDict):
    code: int
    message: str


class OpenRouterError(TypedDict):
    error: OpenRouterErrorDetail


def render(result: RerankResult, body: DocumentsRequest, request_id: str) -> OpenRouterResponse:
    return {
        "id": f"gen-rerank-{request_id}",
        "model": body.model or result.model,
        "provider": "local-rerank",
        "results": [_render_item(item, body) for item in result],
        "usage": {"search_units": search_units(len(body.documents)), "total_tokens": result.total_tokens},
    }


def _render_item(item: RankedDocument, body: DocumentsRequest) -> OpenRouterResult:
    rendered: OpenRouterResult = {"index": item.index, "relevance_score": score_of(item, body)}
    if body.wants_documents() is False:
        return rendered
    return {"document": as_object(body.documents[item.index]), **rendered}


def render_error(error: LocalRerankError, status: int, request_id: str) -> OpenRouterError:
    return {"error": {"code": status, "message": str(error)}}


dialect = Dialect(name="OpenRouter", render_error=render_error, error_model=OpenRouterError, prefixes=PATHS)
router = dialect.router()

EXAMPLE = {"model": "cohere/rerank-v3.5", "query": QUERY, "documents": DOCUMENTS, "top_n": 2}


async def rank(http: Request, body: DocumentsRequest) -> JsonResponse:
    """Rank documents by relevance to a query, like OpenRouter."""
    return JsonResponse(render(await rank_body(http, body, parse_documents), body, http.state.request_id))


add_post(
    router,
    PATHS,
    rank,
    examples={"OpenRouter": EXAMPLE},
    summary="OpenRouter rerank",
    response_model=OpenRouterResponse,
)
