"""DashScope's OpenAI-compatible rerank API: a flat body in the request, top-level `results` in the response."""

from __future__ import annotations

from typing import Annotated, Self

from fastapi import Depends
from pydantic import PrivateAttr, model_validator
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
    code_and_message,
    make_request,
    refuse_async,
    render_results,
)
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import IgnoredUnlessObject, RequestBody, String, Text, Texts
from local_rerank_server.dialects._models import add_models
from local_rerank_server.dialects._responses import TotalTokens, param_of
from local_rerank_server.dialects._route import Dialect, add_post, rank_body

PATHS = (
    "/compatible-api/v1/reranks",
    "/compatible-api/v1/rerank",
    "/compatible-mode/v1/reranks",  # for clients configured with the base URL of the chat API
    "/compatible-mode/v1/rerank",
    "/api/v1/reranks",  # for clients configured with the base URL of the native API
    "/v1/reranks",
)


class _Required(RequestBody):
    model: String
    query: Text
    documents: Texts


class FlatRequest(Parameters, _Required):  # in this order pydantic validates the fields of _Required first
    """All fields at one level. Some clients also send a `parameters` object, which fills absent fields."""

    parameters: Annotated[Parameters | None, IgnoredUnlessObject] = None

    _filled: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fill_from_parameters(self) -> Self:
        for name in Parameters.model_fields if self.parameters else ():
            if getattr(self, name) is None and (value := getattr(self.parameters, name)) is not None:
                setattr(self, name, value)
                self._filled[name] = f"parameters.{name}"
        return self

    def names(self) -> dict[str, str]:
        """The paths of the request's fields in this body, where they are not its own names."""
        name, dot, rest = self.given_instruction()[0].partition(".")
        return self._filled | {"instruction": self._filled.get(name, name) + dot + rest}


class FlatResponse(TypedDict):
    """The documents, most relevant first."""

    object: str
    results: list[Result]
    model: str
    id: str
    usage: TotalTokens


class FlatErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


class FlatError(TypedDict):
    """An error with the fields of OpenAI's clients and those of DashScope's."""

    error: FlatErrorDetail
    code: str
    message: str
    id: str
    request_id: str


def parse(body: FlatRequest, config: ServerConfig) -> RerankRequest:
    return make_request(body.query, body.documents, body, config)


def render(result: RerankResult, body: FlatRequest, request_id: str) -> FlatResponse:
    return {
        "object": "list",
        "results": render_results(result, return_documents=body.return_documents is True),
        "model": body.model,
        "id": request_id,
        "usage": {"total_tokens": result.total_tokens},
    }


def render_error(error: LocalRerankError, status: int, request_id: str) -> FlatError:
    code, message = code_and_message(error)
    return {
        "error": {"message": message, "type": code, "param": param_of(error), "code": code},
        "code": code,
        "message": message,
        "id": request_id,
        "request_id": request_id,
    }


dialect = Dialect(
    name="DashScope compatible",
    render_error=render_error,
    error_model=FlatError,
    prefixes=("/compatible-api", "/compatible-mode", "/api/v1/reranks", "/v1/reranks"),
    status=STATUS,
    lists_endpoints=False,  # the hosted service's 404 has only a message
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
    """Rank documents by relevance to a query, like DashScope's OpenAI-compatible API."""
    return JSONResponse(render(await rank_body(http, body, parse, strict=True), body, http.state.request_id))


add_post(
    router,
    PATHS,
    rank,
    examples={"DashScope compatible": EXAMPLE},
    summary="DashScope OpenAI-compatible rerank",
    dependencies=[Depends(refuse_async)],
    response_model=FlatResponse,
)
add_models(router, "/compatible-api/v1", "/compatible-mode/v1")
