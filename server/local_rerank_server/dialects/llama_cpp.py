"""The rerank API of llama.cpp's server, on `/v1/reranking` and `/reranking`."""

from __future__ import annotations

from typing import Any, NotRequired

from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.errors import LocalRerankError, NoDocuments
from local_rerank.types import RankedDocument, RerankResult
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import DocumentsRequest, as_object, parse_documents, score_of
from local_rerank_server.dialects._responses import PromptUsage, make_prompt_usage
from local_rerank_server.dialects._route import Dialect, add_post, rank_body
from local_rerank_server.errors import MissingField

PATHS = ("/v1/reranking", "/reranking")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
_MESSAGES = {
    "query": '"query" must be provided',
    "documents": '"documents" must be a non-empty string array',
}


class LlamaCppResult(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[dict[str, Any]]


class LlamaCppResponse(TypedDict):
    """The documents, most relevant first."""

    model: str
    object: str
    usage: PromptUsage
    results: list[LlamaCppResult]


class LlamaCppErrorDetail(TypedDict):
    code: int
    message: str
    type: str


class LlamaCppError(TypedDict):
    error: LlamaCppErrorDetail


def render(result: RerankResult, body: DocumentsRequest) -> LlamaCppResponse:
    return {
        "model": body.model or result.model,
        "object": "list",
        "usage": make_prompt_usage(result),
        "results": [_render_item(item, body) for item in result],
    }


def _render_item(item: RankedDocument, body: DocumentsRequest) -> LlamaCppResult:
    rendered: LlamaCppResult = {"index": item.index, "relevance_score": score_of(item, body)}
    if body.wants_documents():
        rendered["document"] = as_object(body.documents[item.index])
    return rendered


def render_error(error: LocalRerankError, status: int, request_id: str) -> LlamaCppError:
    message = str(error)
    if isinstance(error, MissingField | NoDocuments):
        message = _MESSAGES.get(error.field, message)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"code": status, "message": message, "type": kind}}


dialect = Dialect(name="llama.cpp", render_error=render_error, error_model=LlamaCppError, prefixes=PATHS)
router = dialect.router()

EXAMPLE = {"model": "qwen3-reranker", "query": QUERY, "documents": DOCUMENTS, "top_n": 2}


async def rank(http: Request, body: DocumentsRequest) -> JsonResponse:
    """Rank documents by relevance to a query, like llama.cpp's server."""
    return JsonResponse(render(await rank_body(http, body, parse_documents), body))


add_post(
    router,
    PATHS,
    rank,
    examples={"llama.cpp": EXAMPLE},
    summary="llama.cpp rerank",
    response_model=LlamaCppResponse,
)
