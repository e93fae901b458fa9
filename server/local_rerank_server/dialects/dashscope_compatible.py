"""DashScope's OpenAI-compatible rerank: a flat body in, top-level `results` out."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from local_rerank.errors import LocalRerankError
from local_rerank.types import RerankRequest, RerankResult
from local_rerank_server.config import HOSTED_INSTRUCTION, ServerConfig
from local_rerank_server.dialects._dashscope import (
    STATUS,
    Parameters,
    Result,
    Usage,
    code_and_message,
    make_request,
    refuse_async,
    render_results,
)
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import IgnoredUnlessObject, RequestBody, String, Text, Texts
from local_rerank_server.dialects._route import Dialect, add_post, state_of

PATHS = (
    "/compatible-api/v1/reranks",
    "/compatible-api/v1/rerank",
    "/compatible-mode/v1/reranks",  # clients that know only the chat base URL post here
    "/compatible-mode/v1/rerank",
    "/v1/reranks",
)


class _Required(RequestBody):
    model: String
    query: Text
    documents: Texts


class FlatRequest(Parameters, _Required):  # in this order the fields of _Required come first, and so do their errors
    """Everything at one level; an extra `parameters` object, which some clients send, fills what is missing."""

    parameters: Annotated[Parameters | None, IgnoredUnlessObject] = None


class FlatResponse(TypedDict):
    """The documents, most relevant first."""

    object: str
    results: list[Result]
    model: str
    id: str
    usage: Usage


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


class FlatError(TypedDict):
    """An error for every client of this surface: OpenAI's form, and DashScope's beside it."""

    error: ErrorDetail
    code: str
    message: str
    id: str
    request_id: str


def parse(body: FlatRequest, config: ServerConfig) -> RerankRequest:
    return make_request(body.query, body.documents, _parameters(body), config)


def _parameters(body: FlatRequest) -> Parameters:
    extra = body.parameters or Parameters()
    names = Parameters.model_fields
    return Parameters.model_construct(
        **{name: getattr(extra if getattr(body, name) is None else body, name) for name in names}
    )


def render(result: RerankResult, body: FlatRequest, request_id: str) -> FlatResponse:
    return {
        "object": "list",
        "results": render_results(result, return_documents=_parameters(body).return_documents is True),
        "model": body.model,
        "id": request_id,
        "usage": {"total_tokens": result.total_tokens},
    }


def render_error(error: LocalRerankError, status: int, request_id: str) -> FlatError:
    code, message = code_and_message(error)
    return {
        "error": {"message": message, "type": code, "param": None, "code": code},
        "code": code,
        "message": message,
        "id": request_id,
        "request_id": request_id,
    }


dialect = Dialect(
    name="DashScope compatible",
    render_error=render_error,
    error_model=FlatError,
    prefixes=("/compatible-api", "/compatible-mode", "/v1/reranks"),
    status=STATUS,
    lists_endpoints=False,  # the hosted service has words of its own for that
)
router = dialect.router()

EXAMPLE = {
    "model": "qwen3-rerank",
    "query": QUERY,
    "documents": DOCUMENTS,
    "top_n": 2,
    "instruct": HOSTED_INSTRUCTION,
}


async def rank(http: Request, body: FlatRequest) -> JSONResponse:
    """Rank documents by their relevance to a query, as DashScope's OpenAI-compatible API does."""
    state_of(http).check_model(body.model, strict=True)
    return await answer(http, body)


async def answer(http: Request, body: FlatRequest) -> JSONResponse:
    state = state_of(http)
    result = await state.rank(http, parse(body, state.config))
    return JSONResponse(render(result, body, http.state.request_id))


add_post(
    router,
    PATHS,
    rank,
    examples={"DashScope compatible": EXAMPLE},
    summary="DashScope OpenAI-compatible rerank",
    dependencies=[Depends(refuse_async)],
    response_model=FlatResponse,
)
