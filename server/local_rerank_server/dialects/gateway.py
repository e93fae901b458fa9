"""The Vercel AI Gateway's rerank API: texts, or objects, which are ranked as JSON; the model is in a header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.errors import LocalRerankError
from local_rerank.types import RerankRequest
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import Documents, RequestBody
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import CommonRequest, make_request, score_of
from local_rerank_server.dialects._responses import ErrorDetail, param_of
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATHS = [f"/{version}/ai/reranking-model" for version in ("v4", "v3", "v1")]  # the first of @ai-sdk/gateway 4
_TYPES = {401: "authentication_error", 403: "forbidden", 404: "model_not_found", 429: "rate_limit_exceeded"}


class GatewayDocuments(RequestBody):
    values: Documents


class GatewayRequest(CommonRequest):
    own_names: ClassVar = {"documents": "documents.values"}
    documents: GatewayDocuments


class GatewayError(TypedDict):
    error: ErrorDetail


def takes(body: Mapping[str, Any]) -> bool:
    """On an unknown path: no other API has documents in an object."""
    return isinstance(body.get("documents"), dict)


def parse(body: GatewayRequest, config: ServerConfig) -> RerankRequest:
    texts = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in body.documents.values]
    return make_request(body.query, texts, body, config)


def render_error(error: LocalRerankError, status: int, request_id: str) -> GatewayError:
    kind = _TYPES.get(status, "internal_server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": param_of(error), "code": status}}


dialect = Dialect(name="Vercel AI Gateway", render_error=render_error, error_model=GatewayError, prefixes=PATHS)
router = dialect.router()


async def rank(http: Request, body: GatewayRequest) -> JsonResponse:
    """Rank documents by relevance to a query, like the Vercel AI Gateway."""
    named = {"model": body.model or http.headers.get("ai-model-id")}
    result = await rank_body(http, body.model_copy(update=named), parse)
    return JsonResponse({"ranking": [{"index": each.index, "relevanceScore": score_of(each, body)} for each in result]})


EXAMPLE = {"AI Gateway": {"documents": {"type": "text", "values": DOCUMENTS}, "query": QUERY, "topN": 2}}
Ranking = dict[str, list[dict[str, float]]]
add_post(router, PATHS, rank, takes=takes, examples=EXAMPLE, summary="AI Gateway", response_model=Ranking)
