"""What DashScope's two APIs share: parameters, limits, the default instruction, and code and message of every error.

Messages are those of the hosted service as far as they are known. Errors of its ranking backend have the format
`<400> InternalError.Algo.InvalidParameter: <what is wrong>: <path of the field>`, where the path is that of the body
that was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NotRequired

from fastapi import Request
from pydantic import Field, StrictInt
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
from local_rerank_server.dialects._field_types import Flag, IgnoredUnlessObject, IgnoredUnlessString, String
from local_rerank_server.dialects._options import Instructed, TemplateArguments
from local_rerank_server.errors import (
    AmbiguousBody,
    AsyncNotSupported,
    BodyTooLarge,
    BodyTooSlow,
    ForeignOrigin,
    InvalidApiKey,
    InvalidField,
    MalformedBody,
    MethodNotAllowed,
    MissingApiKey,
    MissingField,
    RequestRateExceeded,
    TokenRateExceeded,
    UnknownHost,
    UnknownModel,
    UnknownRoute,
    UnsupportedContent,
    UnsupportedInput,
)

STATUS: Mapping[type[LocalRerankError], int] = {MethodNotAllowed: 400, DeadlineExceeded: 500}
"""Where the hosted service's status differs from `local_rerank_server.errors.STATUS`."""

SERVICE = "/services/rerank/text-rerank/text-rerank"
"""What the SDKs append to their base URL."""

_REQUIRED = "Required parameter(s) missing or invalid, please check the request parameters."

_CODES_AND_MESSAGES: Mapping[type[LocalRerankError], tuple[str, str]] = {
    MissingApiKey: ("InvalidApiKey", "No API-key provided."),
    InvalidApiKey: ("InvalidApiKey", "Invalid API-key provided."),
    MalformedBody: ("InvalidParameter", "Required body invalid, please check the request body format."),
    BodyTooSlow: ("RequestTimeOut", "Request timed out, {0}."),
    BodyTooLarge: ("InvalidParameter", "Required body invalid, {0}."),
    UnsupportedContent: ("InvalidParameter", "Required body invalid, {0}."),
    MethodNotAllowed: ("InvalidParameter", "Request method '{0.method}' is not supported{0.hint}."),
    UnknownModel: ("ModelNotFound", "Model can not be found."),
    ForeignOrigin: ("AccessDenied", "Access denied, {0}."),
    UnknownHost: ("AccessDenied", "Access denied, {0}."),
    AmbiguousBody: ("InvalidParameter", "Required body invalid, {0}."),
    AsyncNotSupported: ("AccessDenied", "Current user api does not support asynchronous calls."),
    Overloaded: ("Throttling.RateQuota", "Requests rate limit exceeded, please try again later."),
    RequestRateExceeded: ("Throttling.RateQuota", "Requests rate limit exceeded, please try again later."),
    TokenRateExceeded: ("Throttling.AllocationQuota", "Allocated quota exceeded, please increase your quota limit."),
    DeadlineExceeded: ("RequestTimeOut", "Request timed out, {0}."),
    ModelUnavailable: ("ModelUnavailable", "Model is unavailable, please try again later."),
    UnusableAfterFork: ("ModelUnavailable", "Model is unavailable, {0}."),
}
_UNKNOWN_ERROR = ("InternalError", "Internal server error!")


class LenientArguments(TemplateArguments):
    """`chat_template_kwargs`, which the hosted service ignores, so that no value of it is an error."""

    instruction: Annotated[str | None, IgnoredUnlessString] = None


class Parameters(Instructed):
    """The optional fields of a request; null means absent. Unlike other dialects' counts, `top_n` must be a number."""

    top_n: StrictInt | None = Field(default=None, description="How many documents to return; all by default.")
    return_documents: Flag | None = Field(default=None, description="Whether to return the documents.")
    instruction: Annotated[String | None, IgnoredUnlessString] = Field(default=None, description="Alias of instruct.")
    chat_template_kwargs: Annotated[LenientArguments | None, IgnoredUnlessObject] = None


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
    """The library's request; a blank instruction means the default one."""
    return RerankRequest(
        query=query,
        documents=tuple(documents),
        instruction=parameters.given_instruction()[1] or config.dashscope_instruction,
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
            return _missing(error)
        case UnknownRoute():
            return "NotFound", _not_found(error)
        case InvalidField(field="input"):
            return "BadRequest.IllegalInput", "The input parameter requires json format."
        case InvalidRequest():
            return "InvalidParameter", _invalid(error)
        case _:
            code, message = _CODES_AND_MESSAGES.get(type(error), _UNKNOWN_ERROR)
            return code, message.format(error)


def _not_found(error: UnknownRoute) -> str:
    if error.path.endswith(SERVICE):
        return f"Not found! The base URL must be {error.address}/api/v1."
    return f"Not found! {error.hint[0].upper()}{error.hint[1:]}."


def _missing(error: MissingField) -> tuple[str, str]:
    field = error.field
    if field == "model":
        return "BadRequest.EmptyModel", 'Required parameter "model" missing from request.'
    if field == "input":
        return "BadRequest.EmptyInput", f"Required input parameter missing from request{error.hint}."
    return "InvalidParameter", f"{_REQUIRED} Field required: {field}{error.hint}"


def _invalid(error: InvalidRequest) -> str:
    path = error.field
    match error:
        case InvalidField() if path.partition(".")[0] in ("input", "query", "documents", "model"):
            return f"{_REQUIRED} {error.reason}: {path}"
        case InvalidTopN():
            what = f"Value error, top_n is invalid, it should be greater than 0.: {path}"
        case InvalidField() | UnsupportedInput():
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
