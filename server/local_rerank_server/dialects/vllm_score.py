"""vLLM's score: one text with many, or texts in pairs; scores in the order of the request, not sorted.

The texts go by four pairs of names. One query with N documents is one request of the library; N queries with N
documents are one for each different query.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from local_rerank.errors import InvalidDocumentCount, InvalidRequest, LocalRerankError
from local_rerank.types import Limits, RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import OneOrMore
from local_rerank_server.dialects._options import Options, make_request, score_of
from local_rerank_server.dialects._responses import Usage, make_usage
from local_rerank_server.dialects._route import Dialect, add_post, state_of
from local_rerank_server.errors import InvalidField, MissingField

PATHS = ("/score", "/v1/score")
PAIRS = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))

_TYPES = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError", 503: "ServiceUnavailableError"}


class ScoreRequest(Options):
    """One of the pairs of fields `PAIRS`."""

    queries: OneOrMore | None = None
    documents: OneOrMore | None = None
    items: OneOrMore | None = None
    text_1: OneOrMore | None = None
    text_2: OneOrMore | None = None
    data_1: OneOrMore | None = None
    data_2: OneOrMore | None = None


class Score(TypedDict):
    index: int
    object: str
    score: float


class ScoreResponse(TypedDict):
    """A score for each document, in the order of the request."""

    id: str
    object: str
    created: int
    model: str
    data: list[Score]
    usage: Usage


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: int


class VllmError(TypedDict):
    error: ErrorDetail


def parse(body: ScoreRequest, config: ServerConfig) -> list[tuple[RerankRequest, list[int]]]:
    """A request for each different query, with the places of its documents in the whole."""
    queries, documents = _aligned(body, config.limits)
    places: dict[str, list[int]] = {}
    for place, query in enumerate(queries):
        places.setdefault(query, []).append(place)
    return [
        (make_request(query, [documents[place] for place in of_query], body, config), of_query)
        for query, of_query in places.items()
    ]


def _aligned(body: ScoreRequest, limits: Limits) -> tuple[Sequence[str], Sequence[str]]:
    """As many queries as documents."""
    left, right = next((pair for pair in PAIRS if all(getattr(body, name) is not None for name in pair)), ("", ""))
    if not left:
        raise MissingField(_missing(body))
    queries, documents = getattr(body, left), getattr(body, right)
    limit = limits.max_documents
    if not documents or (limit is not None and len(documents) > limit):
        raise InvalidDocumentCount(limit=limit, value=len(documents))
    if len(queries) not in (1, len(documents)):
        raise InvalidField(left, f"1 or {len(documents)} texts are expected, as {right} has, not {len(queries)}")
    return queries * (len(documents) // len(queries)), documents


def _missing(body: ScoreRequest) -> str:
    """The other half of the first pair of which one is there."""
    for left, right in PAIRS:
        for given, other in ((left, right), (right, left)):
            if getattr(body, given) is not None:
                return other
    return "queries"


def render(results: Sequence[tuple[RerankResult, list[int]]], body: ScoreRequest, request_id: str) -> ScoreResponse:
    scores = {places[item.index]: score_of(item, body) for result, places in results for item in result}
    return {
        "id": f"score-{request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model or results[0][0].model,
        "data": [{"index": place, "object": "score", "score": scores[place]} for place in sorted(scores)],
        "usage": make_usage(*(result for result, _ in results)),
    }


def render_error(error: LocalRerankError, status: int, request_id: str) -> VllmError:
    kind = _TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    param = error.field if isinstance(error, InvalidRequest) else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": status}}


dialect = Dialect(name="vLLM score", render_error=render_error, error_model=VllmError, prefixes=PATHS)
router = dialect.router()

EXAMPLES = {
    "one query": {"model": "Qwen/Qwen3-Reranker-0.6B", "queries": QUERY, "documents": DOCUMENTS},
    "pairs": {"model": "Qwen/Qwen3-Reranker-0.6B", "text_1": [QUERY, "What is physics?"], "text_2": DOCUMENTS[:2]},
}


async def score(http: Request, body: ScoreRequest) -> JSONResponse:
    """Score one query with many documents, or many with one each, in the order of the request."""
    state = state_of(http)
    state.check_model(body.model, strict=False)
    requests = parse(body, state.config)
    results = await state.rank_all(http, [request for request, _ in requests])
    placed = [(result, places) for result, (_, places) in zip(results, requests, strict=True)]
    return JSONResponse(render(placed, body, http.state.request_id))


add_post(router, PATHS, score, examples=EXAMPLES, summary="vLLM score", response_model=ScoreResponse)
