"""Zhipu's rerank API, and `/api/rerank` of servers like Ollama's: the response has documents as strings."""

from __future__ import annotations

import time
from typing import NotRequired

from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.types import RankedDocument, RerankResult
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._models import add_models
from local_rerank_server.dialects._options import DocumentsRequest, parse_documents, score_of
from local_rerank_server.dialects._responses import GenericError, PromptUsage, make_prompt_usage, render_generic_error
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

BASE = "/api/paas/v4"
OLLAMA = "/api/rerank"


class ZhipuResult(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[str]  # unless return_documents is false: Ollama's clients do not ask for it


class ZhipuResponse(TypedDict):
    """The documents, most relevant first."""

    id: str
    request_id: str
    created: int
    model: str
    results: list[ZhipuResult]
    usage: PromptUsage


def render(result: RerankResult, body: DocumentsRequest, request_id: str) -> ZhipuResponse:
    return {
        "id": request_id,
        "request_id": request_id,
        "created": int(time.time()),
        "model": body.model or result.model,
        "results": [_render_item(item, body) for item in result],
        "usage": make_prompt_usage(result),
    }


def _render_item(item: RankedDocument, body: DocumentsRequest) -> ZhipuResult:
    rendered: ZhipuResult = {"index": item.index, "relevance_score": score_of(item, body)}
    if body.wants_documents() is not False:
        rendered["document"] = item.document
    return rendered


dialect = Dialect(name="Zhipu", render_error=render_generic_error, error_model=GenericError, prefixes=(BASE, OLLAMA))
router = dialect.router()

EXAMPLE = {"model": "rerank", "query": QUERY, "documents": DOCUMENTS, "top_n": 2, "return_documents": True}


async def rank(http: Request, body: DocumentsRequest) -> JsonResponse:
    """Rank documents by relevance to a query, like Zhipu. The response has the documents as strings."""
    return JsonResponse(render(await rank_body(http, body, parse_documents), body, http.state.request_id))


add_post(
    router,
    (f"{BASE}/rerank", OLLAMA),
    rank,
    examples={"Zhipu": EXAMPLE},
    summary="Zhipu rerank",
    response_model=ZhipuResponse,
)
add_models(router, BASE)
