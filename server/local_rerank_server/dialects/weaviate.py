"""The API of Weaviate's container reranker-transformers: `/rerank`, and what Weaviate asks for when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.errors import LocalRerankError
from local_rerank.types import RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import String, Texts, Unsupported
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import CommonRequest, make_request, score_of
from local_rerank_server.dialects._route import Dialect, add_get, add_post, rank_body, state_of

PATHS = ("/rerank",)
LIVE, READY, META = "/.well-known/live", "/.well-known/ready", "/meta"


class WeaviateRequest(CommonRequest):
    documents: Texts
    property: String | None = Field(default=None, description="Where Weaviate has the documents from; repeated.")
    rank_fields: Unsupported = None


class WeaviateScore(TypedDict):
    document: str
    score: float


class WeaviateResponse(TypedDict):
    """The documents, most relevant first; Weaviate itself sorts them."""

    query: str
    property: str
    scores: list[WeaviateScore]


class WeaviateError(TypedDict):
    error: str


def takes(body: Mapping[str, Any]) -> bool:
    """`property`, which may be empty, decides, because no other API on this path has it."""
    return "property" in body and "documents" in body


def parse(body: WeaviateRequest, config: ServerConfig) -> RerankRequest:
    return make_request(body.query, body.documents, body, config)


def render(result: RerankResult, body: WeaviateRequest) -> WeaviateResponse:
    scores = [WeaviateScore(document=item.document, score=score_of(item, body)) for item in result]
    return {"query": body.query, "property": body.property or "", "scores": scores}


def render_error(error: LocalRerankError, status: int, request_id: str) -> WeaviateError:
    return {"error": str(error)}


dialect = Dialect(
    name="Weaviate",
    render_error=render_error,
    error_model=WeaviateError,
    open_paths=(LIVE, READY, META),  # Weaviate has no key to send
)
router = dialect.router()

EXAMPLE = {"query": QUERY, "documents": DOCUMENTS, "property": "content"}


async def rank(http: Request, body: WeaviateRequest) -> JsonResponse:
    """Rank documents by relevance to a query. A body with `property` is Weaviate's."""
    return JsonResponse(render(await rank_body(http, body, parse), body))


async def live() -> JsonResponse:
    """200 as soon as the server listens."""
    return JsonResponse({"status": "ok"})


async def ready(http: Request) -> JsonResponse:
    """200 while the server accepts requests, else 503. Weaviate does not start before it gets 200."""
    status = state_of(http).status
    return JsonResponse({"status": status}, status_code=200 if status == "ready" else 503)


async def meta() -> JsonResponse:
    """An object, which Weaviate shows among its modules. It says no more, because it needs no key."""
    return JsonResponse({"server": "local-rerank"})


add_post(
    router,
    PATHS,
    rank,
    takes=takes,
    examples={"Weaviate": EXAMPLE},
    summary="Weaviate rerank",
    response_model=WeaviateResponse,
)
add_get(router, LIVE, live)
add_get(router, READY, ready)
add_get(router, META, meta)
