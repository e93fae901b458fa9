"""NVIDIA NIM's ranking API: `passages` in the request, log-odds as `logit` in the response; and its health checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.errors import LocalRerankError, TextTooLong
from local_rerank.types import RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import Texts, Unsupported
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import CommonRequest, LongTexts, make_request
from local_rerank_server.dialects._responses import PromptUsage, make_prompt_usage
from local_rerank_server.dialects._route import Dialect, add_get, add_post, rank_body, state_of

PATHS = (
    "/v1/ranking",
    "/ranking",
    "/v1/retrieval/{name:path}/reranking",  # a hosted model has a path of its own; the body names it, too
    "/v1/reranking",
    "/reranking",
)
READY, LIVE = "/v1/health/ready", "/v1/health/live"


class NvidiaRequest(CommonRequest):
    own_names: ClassVar = {"documents": "passages"}

    passages: Texts
    truncate: LongTexts = "error"  # without END, NIM refuses long texts
    rank_fields: Unsupported = None
    return_documents: Unsupported = None  # the response has no place for them
    return_text: Unsupported = None
    return_input: Unsupported = None


class NvidiaResult(TypedDict):
    index: int
    logit: float


class NvidiaResponse(TypedDict):
    """The passages, most relevant first. A `logit` is the log-odds of relevance."""

    rankings: list[NvidiaResult]
    usage: PromptUsage


class NvidiaError(TypedDict):
    """`message` and `detail` are the same: each is read by some client."""

    object: str
    message: str
    detail: str
    type: str


class Health(TypedDict):
    object: str
    message: str


def takes(body: Mapping[str, Any]) -> bool:
    """`passages` decides, because no other API on these paths has it."""
    return body.get("passages") is not None


def parse(body: NvidiaRequest, config: ServerConfig) -> RerankRequest:
    return make_request(body.query, body.passages, body, config)


def render(result: RerankResult) -> NvidiaResponse:
    rankings: list[NvidiaResult] = [{"index": item.index, "logit": item.log_odds} for item in result]
    return {"rankings": rankings, "usage": make_prompt_usage(result)}


def render_error(error: LocalRerankError, status: int, request_id: str) -> NvidiaError:
    message = f'{error}; "truncate": "END" cuts it' if isinstance(error, TextTooLong) else str(error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"object": "error", "message": message, "detail": message, "type": kind}


dialect = Dialect(
    name="NVIDIA NIM",
    render_error=render_error,
    error_model=NvidiaError,
    prefixes=("/v1/ranking", "/ranking", "/v1/retrieval"),
    open_paths=(READY, LIVE),
)
router = dialect.router()

EXAMPLE = {
    "model": "nvidia/llama-3.2-nv-rerankqa-1b-v2",
    "query": {"text": QUERY},
    "passages": [{"text": text} for text in DOCUMENTS],
    "truncate": "END",
}


async def rank(http: Request, body: NvidiaRequest) -> JsonResponse:
    """Rank passages by relevance to a query, with log-odds. A body with `passages` is NVIDIA NIM's."""
    return JsonResponse(render(await rank_body(http, body, parse)))


async def ready(http: Request) -> JsonResponse:
    """The same as /ready, for NIM's clients."""
    status = state_of(http).status
    health = Health(object="health.response", message=f"Service is {status}.")
    return JsonResponse(health, status_code=200 if status == "ready" else 503)


async def live() -> JsonResponse:
    """The same as /health, for NIM's clients."""
    return JsonResponse(Health(object="health.response", message="Service is live."))


add_post(
    router,
    PATHS,
    rank,
    takes=takes,
    examples={"NVIDIA NIM": EXAMPLE},
    summary="NVIDIA NIM ranking",
    response_model=NvidiaResponse,
)
add_get(router, READY, ready, response_model=Health)
add_get(router, LIVE, live, response_model=Health)
