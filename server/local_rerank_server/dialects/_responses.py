"""Parts of responses that several dialects share: usage, Cohere's `meta`, and an error that all clients can read."""

from __future__ import annotations

import math

from typing_extensions import TypedDict

from local_rerank.errors import InvalidRequest, LocalRerankError
from local_rerank.types import RerankResult
from local_rerank_server.errors import UnknownModel

DOCUMENTS_PER_SEARCH_UNIT = 100  # Cohere's billing unit

_AMAZON_ERRORS = {
    401: "AccessDeniedException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    408: "ModelTimeoutException",
    429: "ThrottlingException",
    503: "ServiceUnavailableException",
    504: "ModelTimeoutException",
}


class Usage(TypedDict):
    """Tokens as the model's tokenizer counts them; a reranker generates none."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PromptUsage(TypedDict):
    """Usage without the tokens that a generating model would add."""

    prompt_tokens: int
    total_tokens: int


class TotalTokens(TypedDict):
    """Instruction and query once per document, plus the documents; what the hosted DashScope service would bill."""

    total_tokens: int


class ApiVersion(TypedDict):
    version: str


class BilledUnits(TypedDict):
    search_units: int


class Tokens(TypedDict):
    input_tokens: int
    output_tokens: int


class Meta(TypedDict):
    """Usage as Cohere, Xinference and SiliconFlow report it."""

    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: Tokens


class ErrorDetail(TypedDict):
    """The part that clients of OpenAI, vLLM and llama.cpp read."""

    message: str
    type: str
    param: str | None
    code: int


class GenericError(TypedDict):
    """`error` is for OpenAI-like clients, `message` for Cohere's, `detail` for Jina's, Voyage's and Xinference's."""

    error: ErrorDetail
    message: str
    detail: str
    request_id: str


class DetailError(TypedDict):
    """The error of Voyage and Xinference."""

    detail: str


def render_detail_error(error: LocalRerankError, status: int, request_id: str) -> DetailError:
    return {"detail": str(error)}


def make_usage(*results: RerankResult) -> Usage:
    total = sum(result.total_tokens for result in results)
    return {"prompt_tokens": total, "completion_tokens": 0, "total_tokens": total}


def make_prompt_usage(result: RerankResult) -> PromptUsage:
    return {"prompt_tokens": result.total_tokens, "total_tokens": result.total_tokens}


def make_meta(result: RerankResult, num_documents: int, *, version: str) -> Meta:
    return {
        "api_version": {"version": version},
        "billed_units": {"search_units": search_units(num_documents)},
        "tokens": {"input_tokens": result.total_tokens, "output_tokens": 0},
    }


def search_units(num_documents: int) -> int:
    return math.ceil(num_documents / DOCUMENTS_PER_SEARCH_UNIT)


def amazon_error_type(status: int) -> dict[str, str]:
    """The header in which AWS's clients look for the name of an error's exception."""
    other = "ValidationException" if status < 500 else "InternalServerException"
    return {"x-amzn-errortype": _AMAZON_ERRORS.get(status, other)}


def param_of(error: LocalRerankError) -> str | None:
    """The field of the body that is wrong, for the `param` of errors like OpenAI's."""
    match error:
        case InvalidRequest():
            return error.field
        case UnknownModel():
            return "model"
        case _:
            return None


def render_generic_error(error: LocalRerankError, status: int, request_id: str) -> GenericError:
    message = str(error)
    return GenericError(
        error=ErrorDetail(message=message, type=type(error).__name__, param=param_of(error), code=status),
        message=message,
        detail=message,
        request_id=request_id,
    )
