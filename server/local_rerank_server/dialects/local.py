"""Our own route: everything that the library's result holds, under the library's own names."""

from __future__ import annotations

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from local_rerank.types import RankedDocument, RerankRequest, RerankResult, Truncation
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import Count, RequestBody, String, Text, Texts
from local_rerank_server.dialects._responses import GenericError, render_generic_error
from local_rerank_server.dialects._route import Dialect, add_post, state_of

PATH = "/v1/local/rank"


class LocalRequest(RequestBody):
    query: Text
    documents: Texts
    instruction: String | None = Field(default=None, description="What makes a document relevant, in one sentence.")
    top_n: Count | None = Field(default=None, description="How many documents to answer; without it, all.")
    max_query_tokens: Count | None = Field(default=None, description="Cut the query to this many tokens.")
    max_document_tokens: Count | None = Field(default=None, description="Cut each document to this many tokens.")
    truncation: Truncation | None = Field(default=None, description="Which end is cut; error refuses a long text.")
    model: String | None = None


class LocalResult(TypedDict):
    """One ranked document: `local_rerank.RankedDocument`."""

    index: int
    relevance_score: float
    log_odds: float
    document: str
    num_tokens: int
    num_truncated_tokens: int


class LocalResponse(TypedDict):
    """The documents, most relevant first, and what they cost: `local_rerank.RerankResult`."""

    id: str
    model: str
    results: list[LocalResult]
    num_query_tokens: int
    num_query_truncated_tokens: int
    num_document_tokens: int
    num_truncated_documents: int
    total_tokens: int
    num_computed_tokens: int
    tokenize_ms: float
    queue_ms: float
    total_ms: float


def parse(body: LocalRequest, config: ServerConfig) -> RerankRequest:
    return RerankRequest(
        query=body.query,
        documents=tuple(body.documents),
        instruction=body.instruction,
        top_n=body.top_n,
        max_query_tokens=body.max_query_tokens,
        max_document_tokens=body.max_document_tokens,
        truncation=body.truncation or "end",
        limits=config.limits,
    )


def render(result: RerankResult, request_id: str) -> LocalResponse:
    return {
        "id": request_id,
        "model": result.model,
        "results": [_render_item(item) for item in result],
        "num_query_tokens": result.num_query_tokens,
        "num_query_truncated_tokens": result.num_query_truncated_tokens,
        "num_document_tokens": result.num_document_tokens,
        "num_truncated_documents": result.num_truncated_documents,
        "total_tokens": result.total_tokens,
        "num_computed_tokens": result.num_computed_tokens,
        "tokenize_ms": result.tokenize_ms,
        "queue_ms": result.queue_ms,
        "total_ms": result.total_ms,
    }


def _render_item(item: RankedDocument) -> LocalResult:
    return {
        "index": item.index,
        "relevance_score": item.relevance_score,
        "log_odds": item.log_odds,
        "document": item.document,
        "num_tokens": item.num_tokens,
        "num_truncated_tokens": item.num_truncated_tokens,
    }


dialect = Dialect(
    name="local-rerank", render_error=render_generic_error, error_model=GenericError, prefixes=("/v1/local",)
)
router = dialect.router()

EXAMPLE = {"query": QUERY, "documents": DOCUMENTS}


async def rank(http: Request, body: LocalRequest) -> JSONResponse:
    """Rank documents, and tell log-odds, tokens, cuts and timings too."""
    state = state_of(http)
    state.check_model(body.model, strict=False)
    return JSONResponse(render(await state.rank(http, parse(body, state.config)), http.state.request_id))


add_post(
    router,
    [PATH],
    rank,
    examples={"local-rerank": EXAMPLE},
    summary="Rank, with everything the library tells",
    response_model=LocalResponse,
)
