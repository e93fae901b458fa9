"""The error object that clients of several dialects understand at once, and the id in every answer."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from local_rerank.errors import InvalidRequest, LocalRerankError
from local_rerank_server.errors import UnknownRoute


class ErrorDetail(TypedDict):
    """The part that OpenAI, vLLM and llama.cpp clients read."""

    message: str
    type: str
    param: str | None
    code: int


class GenericError(TypedDict):
    """`error` for OpenAI-like clients, `message` for Cohere's, `detail` for Jina's, Voyage's and Xinference's."""

    error: ErrorDetail
    message: str
    detail: str
    request_id: str
    endpoints: NotRequired[list[str]]  # only where nothing is served: what is


def render_generic_error(error: LocalRerankError, status: int, request_id: str) -> GenericError:
    message = str(error)
    param = error.field if isinstance(error, InvalidRequest) else None
    body = GenericError(
        error=ErrorDetail(message=message, type=type(error).__name__, param=param, code=status),
        message=message,
        detail=message,
        request_id=request_id,
    )
    if isinstance(error, UnknownRoute):
        body["endpoints"] = list(error.endpoints)
    return body
