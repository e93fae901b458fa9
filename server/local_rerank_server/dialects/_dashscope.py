"""What DashScope's two APIs share: parameters, limits, the default instruction, and code and message of every error.

Messages are those of the hosted service as far as they are known. Errors of its ranking backend have the format
`<400> InternalError.Algo.InvalidParameter: <what is wrong>: <path of the field>`, and name the nested path of a field
even for a flat body, because both APIs share that backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired

from fastapi import Request
from pydantic import Field
from typing_extensions import TypedDict

from local_rerank.errors import (
    DeadlineExceeded,
    DocumentTooLong,
    InvalidDocumentCount,
    InvalidRequest,
    InvalidTopN,
    LocalRerankError,
    ModelUnavailable,
    Overloaded,
    TooManyTokens,
    UnusableAfterFork,
)
from local_rerank.types import RankedDocument, RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._field_types import Count, Flag, RequestBody, String
from local_rerank_server.errors import (
    AsyncNotSupported,
    BodyTooLarge,
    BodyTooSlow,
    InvalidApiKey,
    InvalidField,
    MalformedBody,
    MethodNotAllowed,
    MissingApiKey,
    MissingField,
    RequestRateExceeded,
    TokenRateExceeded,
    UnknownModel,
    UnknownRoute,
    UnsupportedContent,
)

STATUS: Mapping[type[LocalRerankError], int] = {MethodNotAllowed: 400, DeadlineExceeded: 500}
"""Where the hosted service's status differs from `local_rerank_server.errors.STATUS`."""

_NESTED_PATHS = {
    "query": "input.query",
    "documents": "input.documents",
    "top_n": "parameters.top_n",
    "return_documents": "parameters.return_documents",
    "instruct": "parameters.instruct",
    "instruction": "parameters.instruct",
}
_REQUIRED = "Required parameter(s) missing or invalid, please check the request parameters."

_CODES_AND_MESSAGES: Mapping[type[LocalRerankError], tuple[str, str]] = {
    MissingApiKey: ("InvalidApiKey", "No API-key provided."),
    InvalidApiKey: ("InvalidApiKey", "Invalid API-key provided."),
    MalformedBody: ("InvalidParameter", "Required body invalid, please check the request body format."),
    BodyTooSlow: ("RequestTimeOut", "Request timed out, {0}."),
    BodyTooLarge: ("InvalidParameter", "Required body invalid, {0}."),
    UnsupportedContent: ("InvalidParameter", "Required body invalid, {0}."),
    MethodNotAllowed: ("InvalidParameter", "Request method '{0.method}' is not supported."),
    UnknownModel: ("ModelNotFound", "Model can not be found."),
    UnknownRoute: ("NotFound", "Not found!"),
    AsyncNotSupported: ("AccessDenied", "Current user api does not support asynchronous calls."),
    Overloaded: ("Throttling.RateQuota", "Requests rate limit exceeded, please try again later."),
    RequestRateExceeded: ("Throttling.RateQuota", "Requests rate limit exceeded, please try again later."),
    TokenRateExceeded: ("Throttling.AllocationQuota", "Allocated quota exceeded, please increase your quota limit."),
    DeadlineExceeded: ("RequestTimeOut", "Request timed out, please try again later."),
    ModelUnavailable: ("ModelUnavailable", "Model is unavailable, please try again later."),
    UnusableAfterFork: ("ModelUnavailable", "Model is unavailable, {0}."),
}
_UNKNOWN_ERROR = ("InternalError", "Internal server error!")


class Parameters(RequestBody):
    """The optional fields of a request; null means absent."""

    top_n: Count | None = Field(default=None, description="How many documents to return; all by default.")
    return_documents: Flag | None = Field(default=None, description="Whether to return the documents.")
    instruct: String | None = Field(default=None, description="What makes a document relevant, in one sentence.")


class Document(TypedDict):
    """A document in the response."""

    text: str


class Result(TypedDict):
    """One ranked document; `index` is its position in the request."""

    document: NotRequired[Document]
    index: int
    relevance_score: float


def refuse_async(http: Request) -> None:
    """A dependency that refuses DashScope's asynchronous mode, whose responses no rerank client can read."""
    if http.headers.get("x-dashscope-async", "").strip().lower() == "enable":
        raise AsyncNotSupported()


def make_request(query: str, documents: list[str], parameters: Parameters, config: ServerConfig) -> RerankRequest:
    """The library's request; a blank `instruct` means the default instruction."""
    has_instruction = (parameters.instruct or "").strip()
    return RerankRequest(
        query=query,
        documents=tuple(documents),
        instruction=parameters.instruct if has_instruction else config.dashscope_instruction,
        top_n=parameters.top_n,
        limits=config.dashscope_route_limits,
    )


def render_results(result: RerankResult, *, return_documents: bool) -> list[Result]:
    return [_render_item(item, return_documents) for item in result]


def _render_item(item: RankedDocument, return_documents: bool) -> Result:
    if return_documents:
        return {"document": {"text": item.document}, "index": item.index, "relevance_score": item.relevance_score}
    return {"index": item.index, "relevance_score": item.relevance_score}


def code_and_message(error: LocalRerankError) -> tuple[str, str]:
    """The hosted service's code and message for an error."""
    match error:
        case MissingField():
            return _missing(error.field)
        case InvalidField(field="input"):
            return "BadRequest.IllegalInput", "The input parameter requires json format."
        case InvalidRequest():
            return "InvalidParameter", _invalid(error)
        case _:
            code, message = _CODES_AND_MESSAGES.get(type(error), _UNKNOWN_ERROR)
            return code, message.format(error)


def _missing(field: str) -> tuple[str, str]:
    if field == "model":
        return "BadRequest.EmptyModel", 'Required parameter "model" missing from request.'
    if field == "input":
        return "BadRequest.EmptyInput", "Required input parameter missing from request."
    return "InvalidParameter", f"{_REQUIRED} Field required: {_path(field)}"


def _invalid(error: InvalidRequest) -> str:
    path = _path(error.field)
    match error:
        case InvalidField() if path.startswith("input.") or path == "model":
            return f"{_REQUIRED} {error.reason}: {path}"
        case InvalidTopN() | InvalidField(field="top_n" | "parameters.top_n"):
            what = f"Value error, top_n is invalid, it should be greater than 0.: {path}"
        case InvalidField():
            what = f"{error.reason}: {path}"
        case InvalidDocumentCount():
            what = (
                "Value error, batch size of documents is invalid, "
                f"it should not be empty or larger than {error.limit}.: {path}"
            )
        case DocumentTooLong():
            what = (
                f"Value error, document index:{error.index} is invalid, "
                f"it should not be larger than {error.limit}: {path}"
            )
        case TooManyTokens():
            what = f"Range of input length should be [1, {error.limit}]"
        case _:
            what = f"Value error, {error}: {path}"
    return f"<400> InternalError.Algo.InvalidParameter: {what}"


def _path(field: str) -> str:
    name, dot, rest = field.partition(".")
    return _NESTED_PATHS.get(name, name) + dot + rest
