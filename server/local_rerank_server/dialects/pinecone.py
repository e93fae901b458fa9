"""Pinecone's rerank API on `/rerank`: documents are objects, `data` with `score` in the response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired

from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.errors import LocalRerankError
from local_rerank.types import RankedDocument, RerankResult
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import DocumentsRequest, as_object, parse_documents, score_of
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATHS = ("/rerank",)

_CODES = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class PineconeResult(TypedDict):
    index: int
    score: float
    document: NotRequired[dict[str, Any]]  # unless return_documents is false


class PineconeUsage(TypedDict):
    rerank_units: int


class PineconeResponse(TypedDict):
    """The documents, most relevant first."""

    model: str
    data: list[PineconeResult]
    usage: PineconeUsage


class PineconeErrorDetail(TypedDict):
    code: str
    message: str


class PineconeError(TypedDict):
    error: PineconeErrorDetail
    status: int


def takes(body: Mapping[str, Any]) -> bool:
    """For clients without the header: no other API with `rank_fields` has `parameters`."""
    return body.get("rank_fields") is not None and body.get("parameters") is not None


def render(result: RerankResult, body: DocumentsRequest) -> PineconeResponse:
    return {
        "model": body.model or result.model,
        "data": [_render_item(item, body) for item in result],
        "usage": {"rerank_units": 1},  # what Pinecone bills for a request
    }


def _render_item(item: RankedDocument, body: DocumentsRequest) -> PineconeResult:
    rendered: PineconeResult = {"index": item.index, "score": score_of(item, body)}
    if body.wants_documents() is not False:
        rendered["document"] = as_object(body.documents[item.index])
    return rendered


def render_error(error: LocalRerankError, status: int, request_id: str) -> PineconeError:
    code = _CODES.get(status, "INTERNAL" if status >= 500 else "INVALID_ARGUMENT")
    return {"error": {"code": code, "message": str(error)}, "status": status}


dialect = Dialect(name="Pinecone", render_error=render_error, error_model=PineconeError)
router = dialect.router()

EXAMPLE = {
    "model": "bge-reranker-v2-m3",
    "query": QUERY,
    "documents": [{"id": str(number), "text": text} for number, text in enumerate(DOCUMENTS)],
    "rank_fields": ["text"],
    "top_n": 2,
    "return_documents": True,
    "parameters": {"truncate": "END"},
}


async def rank(http: Request, body: DocumentsRequest) -> JsonResponse:
    """Rank documents by relevance to a query. Pinecone's clients send the header X-Pinecone-Api-Version."""
    return JsonResponse(render(await rank_body(http, body, parse_documents), body))


add_post(
    router,
    PATHS,
    rank,
    takes=takes,
    header="x-pinecone-api-version",
    examples={"Pinecone": EXAMPLE},
    summary="Pinecone rerank",
    response_model=PineconeResponse,
)
