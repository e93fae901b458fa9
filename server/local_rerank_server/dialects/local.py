"""Our own API: every field of the library's result, under the library's names."""

from __future__ import annotations

from typing import NotRequired, cast

from pydantic import Field
from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.types import RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import Count, Texts, Unsupported
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import CommonRequest, make_request
from local_rerank_server.dialects._responses import GenericError, render_generic_error
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATH = "/v1/local/rank"


class LocalRequest(CommonRequest):
    """Refuses `top_n` 0, unlike the other dialects. Log-odds are always in the response."""

    documents: Texts
    rank_fields: Unsupported = None
    top_n: Count | None = Field(default=None, description="How many documents to return; all by default.")

    def count(self) -> int | None:
        return self.top_k if self.top_n is None else self.top_n


class LocalResult(TypedDict):
    """One ranked document: `local_rerank.RankedDocument`."""

    index: int
    relevance_score: float
    log_odds: float
    document: NotRequired[str]  # unless the request declines them
    num_tokens: int
    num_truncated_tokens: int
    probability: NotRequired[float]  # with --calibration, unless the request has another instruction


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
    return make_request(body.query, body.documents, body, config)


def render(result: RerankResult, body: LocalRequest, request_id: str) -> LocalResponse:
    omitted = {"document"} if body.wants_documents() is False else set()
    if any(item.probability is None for item in result):
        omitted.add("probability")
    items = [{name: value for name, value in vars(item).items() if name not in omitted} for item in result]
    return cast(LocalResponse, {"id": request_id, "model": result.model} | vars(result) | {"results": items})


dialect = Dialect(
    name="local-rerank", render_error=render_generic_error, error_model=GenericError, prefixes=("/v1/local",)
)
router = dialect.router()

EXAMPLE = {"query": QUERY, "documents": DOCUMENTS}


async def rank(http: Request, body: LocalRequest) -> JsonResponse:
    """Rank documents. The response has log-odds, token counts and times as well."""
    return JsonResponse(render(await rank_body(http, body, parse), body, http.state.request_id))


add_post(
    router,
    [PATH],
    rank,
    examples={"local-rerank": EXAMPLE},
    summary="Rank, with all details of the result",
    response_model=LocalResponse,
)
