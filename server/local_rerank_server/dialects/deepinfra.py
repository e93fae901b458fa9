"""DeepInfra's rerank API: the model in the path, one query, and scores in the order of the documents."""

from __future__ import annotations

from typing import ClassVar

from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.types import RerankRequest
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import OneOrMore, Texts, Unsupported
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import Options, make_request, score_of
from local_rerank_server.dialects._responses import DetailError, render_detail_error
from local_rerank_server.dialects._route import Dialect, add_post, rank_body
from local_rerank_server.errors import InvalidField
from local_rerank_server.state import ON_DEADLINE_HEADER, wanted_on_deadline

BASE, PATH = "/v1/inference", "/v1/inference/{model:path}"


class DeepInfraRequest(Options):
    own_names: ClassVar = {"query": "queries[0]"}

    queries: OneOrMore
    documents: Texts
    top_n: Unsupported = None  # there is a score for each document
    top_k: Unsupported = None
    return_documents: Unsupported = None
    rank_fields: Unsupported = None


class DeepInfraScores(TypedDict):
    scores: list[float]  # in the order of the request
    input_tokens: int
    request_id: str
    inference_status: dict[str, str | int]  # LiteLLM keeps it beside the results


def parse(body: DeepInfraRequest, config: ServerConfig) -> RerankRequest:
    if len(set(body.queries)) != 1:
        raise InvalidField("queries", "one query is expected, alone or once for each document; /score takes several")
    return make_request(body.queries[0], body.documents, body, config)


dialect = Dialect(name="DeepInfra", render_error=render_detail_error, error_model=DetailError, prefixes=[BASE])
router = dialect.router()


async def rank(http: Request, body: DeepInfraRequest, model: str) -> JsonResponse:
    """Score documents for one query, like DeepInfra."""
    if wanted_on_deadline(http) == "partial":
        raise InvalidField(
            ON_DEADLINE_HEADER, "partial has no place here, where each document has a score; leave it out"
        )
    ranked = await rank_body(http, body.model_copy(update={"model": body.model or model}), parse)
    scores = [score_of(item, body) for item in sorted(ranked, key=lambda item: item.index)]
    total, request_id = ranked.total_tokens, http.state.request_id
    status: dict[str, str | int] = {"status": "succeeded", "tokens_input": total}
    return JsonResponse(
        DeepInfraScores(scores=scores, input_tokens=total, request_id=request_id, inference_status=status)
    )


EXAMPLE = {"DeepInfra": {"queries": [QUERY], "documents": DOCUMENTS}}
add_post(router, [PATH], rank, examples=EXAMPLE, summary="DeepInfra rerank", response_model=DeepInfraScores)
