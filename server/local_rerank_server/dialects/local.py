"""Our own API: every field of the library's result, under the library's names."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from typing import Any, ClassVar, NotRequired, cast

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from local_rerank.types import BlendMethod, LongDocuments, OnDeadline, RankedDocument, RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import (
    Count,
    CountOrAll,
    Flag,
    Many,
    Number,
    Texts,
    Unsupported,
    snake_case,
)
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import CommonRequest, make_request
from local_rerank_server.dialects._responses import GenericError, render_generic_error
from local_rerank_server.dialects._route import Dialect, add_post, rank_body
from local_rerank_server.dialects._stream import LineStream, stream
from local_rerank_server.errors import InvalidField

PATH = "/v1/local/rank"


class LocalRequest(CommonRequest):
    """Refuses `top_n` 0 and unknown fields, unlike the other dialects. Log-odds are always in the response."""

    own_names: ClassVar = {name: name for name in ("max_chunks_per_document", "chunk_overlap_tokens")}

    documents: Texts
    long_documents: LongDocuments | None = Field(
        default=None, description="chunk: score a long document by the best of its chunks."
    )
    chunk_tokens: Count | None = Field(default=None, description="Maximum tokens of a chunk.")
    chunk_overlap_tokens: CountOrAll | None = Field(default=None, description="Tokens that two chunks share.")
    num_best_chunks: Count | None = Field(default=None, description="How many chunks' mean a document's log-odds are.")
    max_chunks_per_document: Count | None = Field(default=None, description="Cut off what is beyond so many chunks.")
    on_deadline: OnDeadline | None = Field(
        default=None, description="partial: at the timeout, rank what is scored by then; the default is an error."
    )
    stream: Flag | None = Field(
        default=None, description="Send each document as a line of JSON as soon as it is scored, then the ranking."
    )
    spans: Flag | None = Field(default=None, description="Whether to score the sentences of the best chunks, too.")
    min_score: Number | None = Field(default=None, description="Leave out documents whose relevance_score is lower.")
    first_stage_scores: Many[Number] | None = Field(
        default=None, description="Scores of another ranking, one for each document, that change the order."
    )
    first_stage_weight: Number | None = Field(default=None, description="Their weight; that of the log-odds is 1.")
    first_stage_method: BlendMethod | None = Field(default=None, description="What both are converted to.")
    rank_fields: Unsupported = None
    top_n: Count | None = Field(default=None, description="How many documents to return; all by default.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, body: Any) -> Any:
        is_ours = isinstance(body, dict) and {"query", "documents"} <= body.keys()  # else that is what is wrong
        for key in body if is_ours else ():
            if key != "parameters" and snake_case(key) not in cls.model_fields:
                near = get_close_matches(snake_case(key), cls.model_fields, n=1)
                what = f"the nearest is {near[0]}" if near else "GET /openapi.json lists those it has"
                raise InvalidField(key, f"this route has no such field; {what}")
        return body

    def count(self) -> int | None:
        return self.top_k if self.top_n is None else self.top_n


class LocalSpan(TypedDict):
    """A part of a document: `local_rerank.ScoredSpan`."""

    start: int
    end: int
    score: float


class LocalResult(TypedDict):
    """One ranked document: `local_rerank.RankedDocument`."""

    index: int
    relevance_score: float
    log_odds: float
    document: NotRequired[str]  # unless the request declines them
    num_tokens: int
    num_truncated_tokens: int
    num_chunks: NotRequired[int]  # if the request or the server asks for chunks or spans
    best_chunk: NotRequired[LocalSpan]
    spans: NotRequired[list[LocalSpan]]
    probability: NotRequired[float]  # with --calibration, unless the request has another instruction
    blended_score: NotRequired[float]  # with first_stage_scores


class LocalResponse(TypedDict):
    """The documents, most relevant first, with token counts and times: `local_rerank.RerankResult`."""

    id: str
    model: str
    status: str  # as in the header x-rerank-status
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
    is_constant: bool
    not_scored: list[int]
    num_without_spans: int
    num_below_min_score: NotRequired[int]  # with min_score


_OWN = (
    "long_documents", "chunk_tokens", "chunk_overlap_tokens", "num_best_chunks", "max_chunks_per_document", "spans",
    "on_deadline",
    "min_score", "first_stage_scores", "first_stage_weight", "first_stage_method",
)  # fmt: skip
_OF_BLENDING = ("first_stage_weight", "first_stage_method")
_OF_CHUNKS = (
    "chunk_tokens", "chunk_overlap_tokens", "num_best_chunks", "max_chunks_per_document", "max_chunks_per_doc",
    "overlap_tokens",
)  # fmt: skip


def _refuse_fields_without_effect(body: LocalRequest) -> None:
    """Without `long_documents` the model decides whether documents are read in chunks, so nothing is refused then."""
    for name in _OF_BLENDING if body.first_stage_scores is None else ():
        if getattr(body, name) is not None:
            raise InvalidField(name, "this has no effect without first_stage_scores; send those too, or leave it out")
    for name in _OF_CHUNKS if body.long_documents == "truncate" else ():
        if getattr(body, name):
            what = 'this has no effect with "long_documents": "truncate"; send "chunk", or leave it out'
            raise InvalidField(name, what)


def parse(body: LocalRequest, config: ServerConfig) -> RerankRequest:
    _refuse_fields_without_effect(body)
    request = make_request(body.query, body.documents, body, config)
    given = {name: getattr(body, name) for name in _OWN if getattr(body, name) is not None}
    return replace(request, **given) if given else request


def render(result: RerankResult, body: LocalRequest, request_id: str) -> LocalResponse:
    items = [render_item(item, body) for item in result]
    head = {"id": request_id, "model": result.model, "status": result.status}
    return cast(LocalResponse, head | _given(result) | {"results": items})


def render_item(item: RankedDocument, body: LocalRequest) -> dict[str, Any]:
    omitted = {"document"} if body.wants_documents() is False else set()
    return {name: value for name, value in _given(item).items() if name not in omitted}


def _given(value: RankedDocument | RerankResult) -> dict[str, Any]:
    """The fields of a result but those that the request did not ask for."""
    return {name: each for name, each in vars(value).items() if each is not None}


dialect = Dialect(
    name="local-rerank", render_error=render_generic_error, error_model=GenericError, prefixes=("/v1/local",)
)
router = dialect.router()

EXAMPLE = {"query": QUERY, "documents": DOCUMENTS}


async def rank(http: Request, body: LocalRequest) -> Response:
    """Rank documents. The response has log-odds, token counts and times as well."""
    if not body.stream:
        return JsonResponse(render(await rank_body(http, body, parse), body, http.state.request_id))
    return await stream(
        http,
        lambda on_scored: rank_body(http, body, parse, on_scored=on_scored),
        dialect=dialect,
        render_item=lambda item: render_item(item, body),
        render=lambda result: render(result, body, http.state.request_id),
    )


add_post(
    router,
    [PATH],
    rank,
    examples={"local-rerank": EXAMPLE},
    summary="Rank, with all details of the result",
    response_model=LocalResponse,
    responses={200: {"content": {LineStream.media_type: {"schema": {"type": "string"}}}}},
)
