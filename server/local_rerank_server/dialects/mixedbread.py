"""Mixedbread's rerank API: `input` and `top_k` in the request, `data` with `score` in the response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NotRequired

from annotated_types import Ge
from pydantic import Field
from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.types import RankedDocument, RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import Count, Documents
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import CommonRequest, make_request, score_of, texts_of
from local_rerank_server.dialects._responses import GenericError, PromptUsage, make_prompt_usage, render_generic_error
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATHS = ("/v1/reranking", "/reranking")


class MixedbreadRequest(CommonRequest):
    own_names: ClassVar = {"documents": "input", "top_n": "top_k"}

    input: Documents
    top_k: Annotated[Count, Ge(1)] | None = Field(default=None, description="How many documents to return.")


class MixedbreadResult(TypedDict):
    index: int
    score: float
    input: NotRequired[str | dict[str, Any]]


class MixedbreadResponse(TypedDict):
    """The documents, most relevant first. Items have no `object`: the SDK 2 does not know the hosted "rank_result"."""

    usage: PromptUsage
    model: str
    data: list[MixedbreadResult]
    object: str
    top_k: int
    return_input: bool


def takes(body: Mapping[str, Any]) -> bool:
    """`input` decides, because no other API on these paths has it."""
    return body.get("input") is not None


def parse(body: MixedbreadRequest, config: ServerConfig) -> RerankRequest:
    texts = texts_of(body.input, body.rank_fields, field="input")
    return make_request(body.query, texts, body, config)


def render(result: RerankResult, body: MixedbreadRequest) -> MixedbreadResponse:
    return {
        "usage": make_prompt_usage(result),
        "model": body.model or result.model,
        "data": [_render_item(item, body) for item in result],
        "object": "list",
        "top_k": len(result),
        "return_input": body.wants_documents() is True,
    }


def _render_item(item: RankedDocument, body: MixedbreadRequest) -> MixedbreadResult:
    rendered: MixedbreadResult = {"index": item.index, "score": score_of(item, body)}
    if body.wants_documents():
        rendered["input"] = body.input[item.index]
    return rendered


# the hosted service's error format is unknown, so this one has the fields of all clients
dialect = Dialect(name="Mixedbread", render_error=render_generic_error, error_model=GenericError)
router = dialect.router()

EXAMPLE = {
    "model": "mixedbread-ai/mxbai-rerank-large-v2",
    "query": QUERY,
    "input": DOCUMENTS,
    "top_k": 2,
    "return_input": True,
}


async def rank(http: Request, body: MixedbreadRequest) -> JsonResponse:
    """Rank documents by relevance to a query. A body with `input` is Mixedbread's."""
    return JsonResponse(render(await rank_body(http, body, parse), body))


add_post(
    router,
    PATHS,
    rank,
    takes=takes,
    examples={"Mixedbread": EXAMPLE},
    summary="Mixedbread rerank",
    response_model=MixedbreadResponse,
)
