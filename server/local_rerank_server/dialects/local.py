"""Our own API: every field of the library's result, under the library's names."""

from __future__ import annotations

from typing import cast

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from local_rerank.types import RerankRequest, RerankResult, Truncation
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import Count, RequestBody, String, Text, Texts
from local_rerank_server.dialects._responses import GenericError, render_generic_error
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATH = "/v1/local/rank"


class LocalRequest(RequestBody):
    query: Text
    documents: Texts
    instruction: String | None = Field(default=None, description="What makes a document relevant, in one sentence.")
    top_n: Count | None = Field(default=None, description="How many documents to return; all by default.")
    max_query_tokens: Count | None = Field(default=None, description="Truncate the query to this many tokens.")
    max_document_tokens: Count | None = Field(default=None, description="Truncate each document to this many tokens.")
    truncation: Truncation | None = Field(default=None, description="Which end to cut off; error refuses long texts.")
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
    """The documents, most relevant first, with token counts and times: `local_rerank.RerankResult`."""

    id: str
    model: str
    results: list[LocalResult]
    num_query_tokens: int
    num_query_truncated_tokens: int
    num_document_tokens: int
    num_truncated_documents: int
    unwrapped: bool
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
    rendered = {"id": request_id, "model": result.model} | vars(result) | {"results": [vars(item) for item in result]}
    return cast(LocalResponse, rendered)


dialect = Dialect(
    name="local-rerank", render_error=render_generic_error, error_model=GenericError, prefixes=("/v1/local",)
)
router = dialect.router()

EXAMPLE = {"query": QUERY, "documents": DOCUMENTS}


async def rank(http: Request, body: LocalRequest) -> JSONResponse:
    """Rank documents. The response has log-odds, token counts and times as well."""
    return JSONResponse(render(await rank_body(http, body, parse), http.state.request_id))


add_post(
    router,
    [PATH],
    rank,
    examples={"local-rerank": EXAMPLE},
    summary="Rank, with all details of the result",
    response_model=LocalResponse,
)
