"""Isaacus' rerank API: `texts` in the request, `score` in the response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.types import RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import Texts, Unsupported
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import CommonRequest, make_request, score_of
from local_rerank_server.dialects._responses import GenericError, render_generic_error
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATHS = ("/v1/rerankings",)


class IsaacusRequest(CommonRequest):
    """`scoring_method` and `chunking_options` are met by any value, because texts stay whole."""

    own_names: ClassVar = {"documents": "texts"}

    texts: Texts
    is_iql: Unsupported = None  # a query in Isaacus' language, which only its models can answer
    rank_fields: Unsupported = None


class IsaacusResponse(TypedDict):
    """The texts, most relevant first: `index` and `score` of each."""

    results: list[dict[str, Any]]
    usage: dict[str, int]


def takes(body: Mapping[str, Any]) -> bool:
    """On an unknown path: Text Embeddings Inference, which has `texts` too, has no `model`."""
    return body.get("texts") is not None and body.get("model") is not None


def parse(body: IsaacusRequest, config: ServerConfig) -> RerankRequest:
    return make_request(body.query, body.texts, body, config)


def render(result: RerankResult, body: IsaacusRequest) -> IsaacusResponse:
    results = [{"index": item.index, "score": score_of(item, body)} for item in result]
    return {"results": results, "usage": {"input_tokens": result.total_tokens}}


# every client of a Stainless SDK shows the whole body of an error
dialect = Dialect(name="Isaacus", render_error=render_generic_error, error_model=GenericError, prefixes=PATHS)
router = dialect.router()

EXAMPLE = {"Isaacus": {"model": "kanon-2-reranker", "query": QUERY, "texts": DOCUMENTS, "top_n": 2}}


async def rank(http: Request, body: IsaacusRequest) -> JsonResponse:
    """Rank texts by relevance to a query, like Isaacus."""
    return JsonResponse(render(await rank_body(http, body, parse), body))


add_post(router, PATHS, rank, takes=takes, examples=EXAMPLE, summary="Isaacus", response_model=IsaacusResponse)
