"""Text Embeddings Inference: `texts` in the request, a list as the response; and `/info`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NotRequired

from starlette.requests import Request
from typing_extensions import TypedDict

import local_rerank
from local_rerank.async_reranker import TOKENIZER_THREADS
from local_rerank.config import Scores
from local_rerank.errors import (
    DocumentTooLong,
    EmptyDocument,
    EmptyQuery,
    EngineFailure,
    InvalidDocumentCount,
    LocalRerankError,
    NoDocuments,
    TextTooLong,
    TooManyCharacters,
    TooManyTokens,
)
from local_rerank.types import RankedDocument, RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import Texts, Unsupported
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import CommonRequest, make_request, score_of
from local_rerank_server.dialects._route import Dialect, add_get, add_post, rank_body, state_of
from local_rerank_server.errors import InvalidField, MissingField, UnsupportedInput

PATHS = ("/rerank", "/v1/rerank", "/reranking", "/v1/reranking")

_EMPTY = (EmptyQuery, EmptyDocument, NoDocuments)
_ERROR_TYPES = {429: "Overloaded", 503: "Unhealthy"}


class TeiRequest(CommonRequest):
    own_names: ClassVar = {"documents": "texts"}

    texts: Texts
    rank_fields: Unsupported = None


class TeiResult(TypedDict):
    index: int
    score: float
    text: NotRequired[str]


class TeiError(TypedDict):
    error: str
    error_type: str


class ClassifierModel(TypedDict):
    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(TypedDict):
    reranker: ClassifierModel


class Info(TypedDict):
    """The served model and the limits of a request."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: ModelType
    served_model_name: str
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None
    scores: NotRequired[Scores]  # only with --scores calibrated


def takes(body: Mapping[str, Any]) -> bool:
    """`texts` decides, as in llama.cpp, which serves this API too."""
    return body.get("texts") is not None


def parse(body: TeiRequest, config: ServerConfig) -> RerankRequest:
    return make_request(body.query, body.texts, body, config)


def render(result: RerankResult, body: TeiRequest) -> list[TeiResult]:
    return [_render_item(item, body) for item in result]


def _render_item(item: RankedDocument, body: TeiRequest) -> TeiResult:
    rendered: TeiResult = {"index": item.index, "score": score_of(item, body, is_raw=False)}
    if body.wants_documents():
        rendered["text"] = item.document
    return rendered


def render_error(error: LocalRerankError, status: int, request_id: str) -> TeiError:
    if isinstance(error, NoDocuments):
        return {"error": "`texts` cannot be empty", "error_type": "Empty"}
    return {"error": str(error), "error_type": "Empty" if isinstance(error, _EMPTY) else _error_type(status)}


def _error_type(status: int) -> str:
    return _ERROR_TYPES.get(status, "Backend" if status >= 500 or status == 424 else "Validation")


dialect = Dialect(
    name="Text Embeddings Inference",
    render_error=render_error,
    error_model=TeiError,
    prefixes=("/info",),
    status={
        InvalidDocumentCount: 413,
        DocumentTooLong: 413,
        TooManyCharacters: 413,
        TooManyTokens: 413,
        TextTooLong: 413,
        MissingField: 422,
        InvalidField: 422,
        UnsupportedInput: 422,
        EngineFailure: 424,
    },
)
router = dialect.router()

EXAMPLE = {"query": QUERY, "texts": DOCUMENTS, "truncate": True, "raw_scores": False, "return_text": True}


async def rank(http: Request, body: TeiRequest) -> JsonResponse:
    """Rank texts by relevance to a query. A body with `texts` is TEI's."""
    return JsonResponse(render(await rank_body(http, body, parse), body))


async def info(http: Request) -> JsonResponse:
    """The served model, as Text Embeddings Inference describes it."""
    state = state_of(http)
    model, config = state.default.known_info, state.config
    scores = state.default.options.engine.scores
    calibrated: dict[str, Scores] = {} if scores == "model" else {"scores": scores}
    return JsonResponse(
        Info(
            model_id=model.model_id,
            model_sha=model.revision,
            model_dtype=model.dtype,
            model_type={"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            served_model_name=model.model_id,
            # a lower bound, for requests of maximum length
            max_concurrent_requests=max(1, state.default.options.engine.max_queued_tokens // model.max_length),
            max_input_length=model.max_length,
            max_batch_tokens=model.max_batch_tokens,
            max_batch_requests=None,  # only tokens are limited
            max_client_batch_size=config.max_documents,
            auto_truncate=True,
            tokenization_workers=TOKENIZER_THREADS,
            version=local_rerank.__version__,
            sha=None,  # the program's build, of which Text Embeddings Inference tells commit and image
            docker_label=None,
        )
        | calibrated
    )


add_post(
    router,
    PATHS,
    rank,
    takes=takes,
    examples={"Text Embeddings Inference": EXAMPLE},
    summary="TEI rerank",
    response_model=list[TeiResult],
)
add_get(router, "/info", info, response_model=Info)
