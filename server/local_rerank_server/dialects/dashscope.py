"""DashScope's native rerank API: `input` and `parameters` in the request, `output.results` in the response.

Like the hosted service, the path also accepts the flat body of the OpenAI-compatible API, and then responds in that
API's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Body, Depends
from pydantic import Discriminator, Tag
from starlette.requests import Request
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from local_rerank.errors import LocalRerankError
from local_rerank.types import RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects import dashscope_compatible as compatible
from local_rerank_server.dialects import rerank_v1
from local_rerank_server.dialects._dashscope import (
    SERVICE,
    STATUS,
    Parameters,
    Result,
    code_and_message,
    make_request,
    refuse_async,
    render_results,
)
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import RequestBody, String, Text, Texts
from local_rerank_server.dialects._models import add_models
from local_rerank_server.dialects._responses import TotalTokens
from local_rerank_server.dialects._route import FORM_TAG, Dialect, add_post, rank_body

PATH = f"/api/v1{SERVICE}"
_NESTED, _FLAT = FORM_TAG + "nested", FORM_TAG + "flat"


class Input(RequestBody):
    query: Text
    documents: Texts


class NativeRequest(RequestBody):
    """The nested body."""

    model: String
    input: Input
    parameters: Parameters | None = None

    def names(self) -> dict[str, str]:
        """The paths of the request's fields in this body."""
        names = {"query": "input.query", "documents": "input.documents", "top_n": "parameters.top_n"}
        return names | {"instruction": f"parameters.{(self.parameters or Parameters()).given_instruction()[0]}"}


class Output(TypedDict):
    results: list[Result]


class NativeResponse(TypedDict):
    """The documents, most relevant first."""

    output: Output
    usage: TotalTokens
    request_id: str


class NativeError(TypedDict):
    """A flat error, the only shape that the dashscope SDKs read."""

    code: str
    message: str
    request_id: str


def _form_of(body: Any) -> str:
    if isinstance(body, dict) and body.get("input") is None and {"query", "documents"} <= body.keys():
        return _FLAT
    return _NESTED


def parse(body: NativeRequest, config: ServerConfig) -> RerankRequest:
    return make_request(body.input.query, body.input.documents, body.parameters or Parameters(), config)


def render(result: RerankResult, body: NativeRequest, request_id: str) -> NativeResponse:
    wanted = body.parameters is not None and body.parameters.return_documents is True
    return {
        "output": {"results": render_results(result, return_documents=wanted)},
        "usage": {"total_tokens": result.total_tokens},
        "request_id": request_id,
    }


def render_error(error: LocalRerankError, status: int, request_id: str) -> NativeError:
    code, message = code_and_message(error)
    return {"code": code, "message": message, "request_id": request_id}


dialect = Dialect(
    name="DashScope native",
    render_error=render_error,
    error_model=NativeError,
    prefixes=("/api/v1",),
    status=STATUS,
    lists_endpoints=False,  # the hosted service's 404 has only a message
)
router = dialect.router()

EXAMPLE = {
    "model": "qwen3-rerank",
    "input": {"query": QUERY, "documents": DOCUMENTS},
    "parameters": {"return_documents": True, "top_n": 5},
}


async def rank(
    http: Request,
    body: Annotated[
        Annotated[NativeRequest, Tag(_NESTED)] | Annotated[compatible.FlatRequest, Tag(_FLAT)],
        Discriminator(_form_of),
        Body(),
    ],
) -> JSONResponse:
    """Rank documents by relevance to a query, like DashScope's native API."""
    if isinstance(body, compatible.FlatRequest):
        return await compatible.rank(http, body)
    return JSONResponse(render(await rank_body(http, body, parse, strict=True), body, http.state.request_id))


async def rank_nested(http: Request, body: NativeRequest) -> JSONResponse:
    """Rank documents by relevance to a query. A body with `input.query` is DashScope's."""
    return await rank(http, body)


def takes(body: Mapping[str, Any]) -> bool:
    nested = body.get("input")
    return isinstance(nested, dict) and "query" in nested


add_post(
    router,
    [PATH],
    rank,
    examples={"nested": EXAMPLE, "flat": compatible.EXAMPLE},
    summary="DashScope text rerank",
    dependencies=[Depends(refuse_async)],
    response_model=NativeResponse | compatible.FlatResponse,
)
add_post(
    router,
    rerank_v1.PATHS,
    rank_nested,
    takes=takes,
    examples={"DashScope nested": EXAMPLE},
    summary="DashScope text rerank",
    dependencies=[Depends(refuse_async)],
    response_model=NativeResponse,
)
add_models(router, "/api/v1")
