"""vLLM's score API: scores one query with many documents, or N queries with N documents, in the order of the request.

The two fields have four alternative pairs of names. N queries with N documents become one `RerankRequest` per distinct
query.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.errors import InvalidDocumentCount, LocalRerankError
from local_rerank.types import Limits, RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import OneOrMore, Unsupported
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import Options, make_request, named_as_sent, score_of
from local_rerank_server.dialects._responses import ErrorDetail, Usage, make_usage, param_of
from local_rerank_server.dialects._route import Dialect, add_post, state_of
from local_rerank_server.errors import InvalidField, MissingField
from local_rerank_server.state import all_or_none

PATHS = ("/score", "/v1/score")
FIELD_PAIRS = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))

_TYPES = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError", 503: "ServiceUnavailableError"}


class ScoreRequest(Options):
    """Needs both fields of one of `FIELD_PAIRS`."""

    queries: OneOrMore | None = None
    documents: OneOrMore | None = None
    items: OneOrMore | None = None
    text_1: OneOrMore | None = None
    text_2: OneOrMore | None = None
    data_1: OneOrMore | None = None
    data_2: OneOrMore | None = None
    top_n: Unsupported = None  # the scores have the order of the request, and there is one for each document
    top_k: Unsupported = None
    return_documents: Unsupported = None
    return_text: Unsupported = None
    return_input: Unsupported = None
    rank_fields: Unsupported = None

    def fields(self) -> tuple[str, str]:
        """The first of `FIELD_PAIRS` that is complete; raises MissingField."""
        for pair in FIELD_PAIRS:
            if all(getattr(self, name) is not None for name in pair):
                return pair
        raise MissingField(_missing(self))

    def names(self) -> dict[str, str]:
        return super().names() | dict(zip(("query", "documents"), self.fields(), strict=True))


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


class VllmError(TypedDict):
    error: ErrorDetail


def parse(body: ScoreRequest, config: ServerConfig) -> list[tuple[RerankRequest, list[int]]]:
    """One request per distinct query, with the positions of its documents in the body."""
    queries, documents = _aligned(body, config.limits)
    positions_of: dict[str, list[int]] = {}
    for position, query in enumerate(queries):
        positions_of.setdefault(query, []).append(position)
    requests = []
    for query, positions in positions_of.items():
        with named_as_sent(body.names(), positions):
            texts = [documents[position] for position in positions]
            requests.append((make_request(query, texts, body, config), positions))
    return requests


def _aligned(body: ScoreRequest, limits: Limits) -> tuple[Sequence[str], Sequence[str]]:
    """Queries and documents of equal number; a single query is repeated."""
    left, right = body.fields()
    queries, documents = getattr(body, left), getattr(body, right)
    limit = limits.max_documents
    if not documents or (limit is not None and len(documents) > limit):
        raise InvalidDocumentCount(limit=limit, value=len(documents))
    if len(queries) not in (1, len(documents)):
        expected = f"1 or {len(documents)} texts are" if len(documents) > 1 else "1 text is"
        raise InvalidField(left, f"{expected} expected, as {right} has, not {len(queries)}")
    return queries * (len(documents) // len(queries)), documents


def _missing(body: ScoreRequest) -> str:
    """The missing field of the first pair that is half present."""
    for left, right in FIELD_PAIRS:
        for present, missing in ((left, right), (right, left)):
            if getattr(body, present) is not None:
                return missing
    return "queries"


def render(results: Sequence[tuple[RerankResult, list[int]]], body: ScoreRequest, request_id: str) -> ScoreResponse:
    scores = {positions[item.index]: score_of(item, body) for result, positions in results for item in result}
    return {
        "id": f"score-{request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model or results[0][0].model,
        "data": [{"index": index, "object": "score", "score": scores[index]} for index in sorted(scores)],
        "usage": make_usage(*(result for result, _ in results)),
    }


def render_error(error: LocalRerankError, status: int, request_id: str) -> VllmError:
    kind = _TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return {"error": {"message": str(error), "type": kind, "param": param_of(error), "code": status}}


dialect = Dialect(name="vLLM score", render_error=render_error, error_model=VllmError, prefixes=PATHS)
router = dialect.router()

EXAMPLES = {
    "one query": {"model": "Qwen/Qwen3-Reranker-0.6B", "queries": QUERY, "documents": DOCUMENTS},
    "pairs": {"model": "Qwen/Qwen3-Reranker-0.6B", "text_1": [QUERY, "What is physics?"], "text_2": DOCUMENTS[:2]},
}


async def score(http: Request, body: ScoreRequest) -> JsonResponse:
    """Score one query with many documents, or many queries with one document each, in the order of the request."""
    state = state_of(http)
    state.check_model(body.model, strict=False)
    with named_as_sent(body.names()):
        requests = parse(body, state.config)

    async def rank(request: RerankRequest, positions: list[int]) -> tuple[RerankResult, list[int]]:
        with named_as_sent(body.names(), positions):
            return await state.rank(http, request, body.model), positions

    placed = await all_or_none([rank(request, positions) for request, positions in requests])
    return JsonResponse(render(placed, body, http.state.request_id))


add_post(router, PATHS, score, examples=EXAMPLES, summary="vLLM score", response_model=ScoreResponse)
