"""What can go wrong between a socket and `Reranker.submit`, and the HTTP status of every error of the project.

    LocalRerankError                  (the library's half of the tree is drawn in `local_rerank.errors`)
    ├── InvalidRequest
    │   ├── MissingField              a required field is absent or null
    │   ├── InvalidField              a field has the wrong type or form
    │   └── UnsupportedInput          an image or a video where a text is ranked
    ├── MalformedBody                 the body is not a JSON object in UTF-8
    ├── BodyTooLarge                  the body is over the limit; it is refused without being read
    ├── BodyTooSlow                   the body did not come in the time that is allowed
    ├── UnsupportedContent            the body is compressed, or declared as something other than JSON
    ├── UnknownModel                  the request names a model that is not served
    ├── UnknownRoute                  no such path
    ├── MethodNotAllowed              the path exists, the method does not
    ├── Overloaded
    │   ├── RequestRateExceeded       the key has made its requests of this minute
    │   └── TokenRateExceeded         the key has used its tokens of this minute
    ├── MissingApiKey                 keys are configured and the request brings none
    ├── InvalidApiKey                 ... or brings a wrong one
    ├── AsyncNotSupported             DashScope's asynchronous mode was asked for
    └── ClientDisconnected            the client left; nobody reads the answer

`STATUS` gives each class its status by exact type, so that a new leaf cannot hide behind its parent; a dialect whose
contract wants another status for a few of them says so in its row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from local_rerank.errors import (
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    DocumentTooLong,
    EmptyDocument,
    EmptyQuery,
    EngineFailure,
    InstructionTooLong,
    InvalidDocumentCount,
    InvalidRequest,
    InvalidTopN,
    LocalRerankError,
    ModelUnavailable,
    NoDocuments,
    OutOfMemory,
    Overloaded,
    TextTooLong,
    TooManyCharacters,
    TooManyTokens,
    UnusableAfterFork,
)


class MissingField(InvalidRequest):
    def __init__(self, field: str) -> None:
        super().__init__(f"{field} is missing", field=field)


class InvalidField(InvalidRequest):
    """`reason` says what the field should be, as a sentence without its full stop."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}", field=field)
        self.reason = reason


class UnsupportedInput(InvalidRequest):
    def __init__(self, field: str, kind: str) -> None:
        super().__init__(f"this model ranks text; {kind} input is not supported", field=field)


class MalformedBody(LocalRerankError):
    """The body is not a JSON object in UTF-8."""


class BodyTooLarge(LocalRerankError):
    def __init__(self, *, limit: int) -> None:
        super().__init__(f"the request body is too large; at most {limit} bytes are taken")
        self.limit = limit


class BodyTooSlow(LocalRerankError):
    def __init__(self, *, limit_seconds: int) -> None:
        super().__init__(f"the request body did not come within {limit_seconds} s")


class UnsupportedContent(LocalRerankError):
    """The body is compressed, or declared as something other than JSON; the message says what to send."""


class UnknownModel(LocalRerankError):
    def __init__(self, name: str, *, known: Sequence[str]) -> None:
        super().__init__(f"model {name!r} is not served here; known are {', '.join(known)}")
        self.name = name


class UnknownRoute(LocalRerankError):
    """`endpoints` are the method and path of what exists."""

    def __init__(self, path: str, *, endpoints: Sequence[str]) -> None:
        super().__init__(f"there is nothing at {path}")
        self.endpoints = endpoints


class MethodNotAllowed(LocalRerankError):
    def __init__(self, method: str, path: str, *, allowed: str) -> None:
        super().__init__(f"{path} does not take {method}; it takes {allowed}")
        self.method = method
        self.allowed = allowed


class RequestRateExceeded(Overloaded):
    def __init__(self, *, limit: int, retry_after: float) -> None:
        super().__init__(f"more than {limit} requests in a minute, which this key may make", retry_after=retry_after)


class TokenRateExceeded(Overloaded):
    def __init__(self, *, limit: int, retry_after: float) -> None:
        super().__init__(f"more than {limit} tokens in a minute, which this key may use", retry_after=retry_after)


class MissingApiKey(LocalRerankError):
    def __init__(self) -> None:
        super().__init__("no API key; send one as `Authorization: Bearer KEY`")


class InvalidApiKey(LocalRerankError):
    def __init__(self) -> None:
        super().__init__("the API key is wrong")


class AsyncNotSupported(LocalRerankError):
    def __init__(self) -> None:
        super().__init__("asynchronous calls are not supported; leave out the header X-DashScope-Async")


class ClientDisconnected(LocalRerankError):
    """The client left before its answer was ready."""


STATUS: Mapping[type[LocalRerankError], int] = {
    InvalidRequest: 400,
    EmptyQuery: 400,
    EmptyDocument: 400,
    InvalidDocumentCount: 400,
    NoDocuments: 400,
    DocumentTooLong: 400,
    TooManyCharacters: 400,
    TooManyTokens: 400,
    TextTooLong: 400,
    InstructionTooLong: 400,
    InvalidTopN: 400,
    MissingField: 400,
    InvalidField: 400,
    UnsupportedInput: 400,
    MalformedBody: 400,
    BodyTooLarge: 413,
    BodyTooSlow: 408,
    UnsupportedContent: 415,
    UnknownModel: 404,
    UnknownRoute: 404,
    MethodNotAllowed: 405,
    MissingApiKey: 401,
    InvalidApiKey: 401,
    AsyncNotSupported: 403,
    ClientDisconnected: 499,  # nginx's number; only our own log sees it
    Overloaded: 429,
    RequestRateExceeded: 429,
    TokenRateExceeded: 429,
    DeadlineExceeded: 504,
    ModelUnavailable: 503,
    UnusableAfterFork: 503,
    EngineFailure: 500,
    OutOfMemory: 503,  # a batch is tried again in halves first; the same request may fit when the device is less busy
    CheckpointError: 500,
    ConfigError: 500,
}


def headers_of(error: LocalRerankError) -> dict[str, str]:
    """The headers that go with an error in every dialect."""
    match error:
        case Overloaded():
            return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
        case BodyTooSlow():
            return {"connection": "close"}  # the rest of the body is not waited for
        case DeadlineExceeded():
            return {"x-should-retry": "false"}  # the same request would run into the same deadline
        case MissingApiKey() | InvalidApiKey():
            return {"www-authenticate": "Bearer"}
        case MethodNotAllowed():
            return {"allow": error.allowed}
        case _:
            return {}
