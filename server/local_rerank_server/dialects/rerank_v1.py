"""`/v1/rerank` and `/rerank`: the APIs of Jina, Cohere v1, vLLM, Xinference, SiliconFlow, Infinity and Together AI.

Their requests look alike, so a request may use the fields of all of them, and the response has every field that one of
their clients reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NotRequired

from pydantic import Field
from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.types import RankedDocument, RerankResult
from local_rerank_server.config import DocumentEcho
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._models import add_models
from local_rerank_server.dialects._options import DocumentsRequest, as_object, parse_documents, score_of
from local_rerank_server.dialects._responses import (
    GenericError,
    Meta,
    Usage,
    amazon_error_type,
    make_meta,
    make_usage,
    render_generic_error,
)
from local_rerank_server.dialects._route import Dialect, add_post, rank_body, state_of

PATHS = ("/v1/rerank", "/rerank")
ALIASES = ("/v3/rerank", "/openai/v1/rerank")  # of OpenVINO Model Server and KServe
DOUBLED = "/v1/v1/rerank"  # Cohere's and Together AI's SDKs append /v1/rerank to a base URL that ends in /v1


class GenericRequest(DocumentsRequest):
    kwargs: Any = Field(default=None, description="Xinference's extra arguments, a JSON object in a string.")

    def instructions(self) -> Iterator[tuple[str, str | None]]:
        yield from super().instructions()
        with suppress(TypeError, ValueError, RecursionError):
            arguments = json.loads(self.kwargs)
            given = arguments.get("instruction") if isinstance(arguments, dict) else None
            yield "kwargs", given if isinstance(given, str) else None


class GenericResult(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[dict[str, Any] | str]  # unless return_documents is false


class GenericScore(TypedDict):
    index: int
    relevance_score: float


class GenericResponse(TypedDict):
    """The documents, most relevant first. `data` is for Voyage's clients, whose body without `top_k` is like Jina's."""

    id: str
    object: str
    model: str
    results: list[GenericResult]
    data: list[GenericScore]
    usage: Usage
    meta: Meta


def render(result: RerankResult, body: GenericRequest, request_id: str, echo: DocumentEcho) -> GenericResponse:
    results = [_render_item(item, body, echo) for item in result]
    return {
        "id": request_id,
        "object": "rerank",  # Infinity's client takes nothing else; the others do not look
        "model": body.model or result.model,
        "results": results,
        "data": [{"index": item["index"], "relevance_score": item["relevance_score"]} for item in results],
        "usage": make_usage(result),
        "meta": make_meta(result, len(body.documents), version="1"),
    }


def _render_item(item: RankedDocument, body: GenericRequest, echo: DocumentEcho) -> GenericResult:
    rendered: GenericResult = {"index": item.index, "relevance_score": score_of(item, body)}
    if body.wants_documents() is not False:
        as_string = echo == "string" or body.raw_scores is not None  # which Infinity's client alone sends, always
        rendered["document"] = item.document if as_string else as_object(body.documents[item.index])
    return rendered


dialect = Dialect(
    name="Jina, Cohere v1, vLLM, Xinference, SiliconFlow",
    render_error=render_generic_error,
    error_model=GenericError,
    prefixes=(*PATHS, DOUBLED, "/v3", "/openai/v1"),
    error_headers=amazon_error_type,  # AWS Bedrock's path is one of these, and some errors come before the body
)
router = dialect.router()

EXAMPLES = {
    "Jina": {"model": "jina-reranker-v2-base-multilingual", "query": QUERY, "documents": DOCUMENTS, "top_n": 2},
    "Cohere v1": {
        "model": "rerank-v3.5",
        "query": QUERY,
        "documents": [{"title": "Reranking", "text": DOCUMENTS[0]}, {"title": "Physics", "text": DOCUMENTS[1]}],
        "rank_fields": ["title", "text"],
        "return_documents": False,
    },
    "vLLM": {
        "model": "Qwen/Qwen3-Reranker-0.6B",
        "query": QUERY,
        "documents": DOCUMENTS,
        "instruction": "Retrieve semantically similar text.",
        "max_tokens_per_doc": 512,
    },
    "Xinference": {
        "model": "Qwen3-Reranker-0.6B",
        "query": QUERY,
        "documents": DOCUMENTS,
        "top_n": None,
        "return_documents": True,
        "return_len": None,
        "kwargs": "{}",
    },
    "SiliconFlow": {
        "model": "Qwen/Qwen3-Reranker-0.6B",
        "query": QUERY,
        "documents": DOCUMENTS,
        "return_documents": False,
        "max_chunks_per_doc": 1024,
        "overlap_tokens": 80,
    },
    "Infinity": {"model": "default/not-specified", "query": QUERY, "documents": DOCUMENTS, "raw_scores": True},
}


async def rank(http: Request, body: GenericRequest) -> JsonResponse:
    """Rank documents by relevance to a query. The response has the documents unless return_documents is false."""
    result = await rank_body(http, body, parse_documents)
    echo = state_of(http).config.document_echo
    return JsonResponse(render(result, body, http.state.request_id, echo))


add_post(router, (*PATHS, *ALIASES, DOUBLED), rank, examples=EXAMPLES, summary="Rerank", response_model=GenericResponse)
add_models(router, "/v3", "/openai/v1")
