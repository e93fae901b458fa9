"""The server's errors, and the HTTP status of every error of the project.

    LocalRerankError                  (the library's part of the tree is in `local_rerank.errors`)
    ├── InvalidRequest
    │   ├── MissingField              a required field is absent or null
    │   ├── InvalidField              a field has the wrong type or form
    │   └── UnsupportedInput          an image, video or audio instead of a text
    ├── MalformedBody                 the body is not a JSON object in UTF-8
    ├── BodyTooLarge                  the body is over the limit; it is not read
    ├── BodyTooSlow                   the body was not received within the client timeout
    ├── UnsupportedContent            the body is compressed, or its Content-Type is not JSON
    ├── UnknownModel                  the request names a model that is not served
    ├── UnknownRoute                  the path does not exist
    ├── MethodNotAllowed              the path exists, the method does not
    ├── NotOnThisMachine              no keys are configured, and the client may not load models
    ├── ForeignOrigin                 the request comes from a web page of another server
    ├── UnknownHost                   ... or names a host that this server is not
    ├── AmbiguousBody                 the head has two lengths for the body
    ├── Overloaded
    │   ├── RequestRateExceeded       the key has used its requests of this minute
    │   └── TokenRateExceeded         the key has used its tokens of this minute
    ├── ModelUnavailable
    │   └── ModelNotLoaded            the request does not wait until its model is loaded
    ├── MissingApiKey                 keys are configured and the request has none
    ├── InvalidApiKey                 ... or has a wrong one
    ├── AsyncNotSupported             the request asks for DashScope's asynchronous mode
    └── ClientDisconnected            the client closed its connection before the response

`STATUS` maps exact types, so a new class needs a status of its own. A dialect overrides single statuses in its row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from local_rerank.errors import (
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    DeviceFailure,
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
    TooManyChunks,
    TooManyTokens,
    UnusableAfterFork,
    WrongType,
)

QUOTED_CHARS = 200


def quoted(sent: str) -> str:
    """What a client sent, cut for an error or the log: a head may have 64 KiB, a body 64 MiB."""
    return sent if len(sent) <= QUOTED_CHARS else f"{sent[: QUOTED_CHARS - 3]}..."


class MissingField(InvalidRequest):
    """`hint` says where the field is instead; it is empty or ends a sentence."""

    def __init__(self, field: str, *, hint: str = "") -> None:
        super().__init__(f"{quoted(field)} is missing{hint}", field=quoted(field))
        self.hint = hint


class InvalidField(InvalidRequest):
    """`reason` says what is wrong or what is expected, without a full stop; `sent` is the value."""

    def __init__(self, field: str, reason: str, *, sent: str | None = None) -> None:
        super().__init__(f"{quoted(field)}: {reason}" + (f", not {quoted(sent)}" if sent else ""), field=quoted(field))
        self.reason = reason


class UnsupportedInput(InvalidRequest):
    """`kind` is images, videos or audio."""

    def __init__(self, field: str, kind: str) -> None:
        self.reason = f"{kind} {'is' if kind == 'audio' else 'are'} not supported; this model ranks text"
        super().__init__(f"{quoted(field)}: {self.reason}", field=quoted(field))


class MalformedBody(LocalRerankError):
    """The body is not a JSON object in UTF-8."""


class BodyTooLarge(LocalRerankError):
    def __init__(self, *, limit: int) -> None:
        super().__init__(f"the request body is too large; at most {limit} bytes are allowed")
        self.limit = limit


class BodyTooSlow(LocalRerankError):
    def __init__(self, *, limit_seconds: int) -> None:
        super().__init__(f"the request body was not received within {limit_seconds} s")


class UnsupportedContent(LocalRerankError):
    """The body is compressed, or its Content-Type is not JSON; the message says what to send."""


class UnknownModel(LocalRerankError):
    def __init__(self, name: str, *, known: Sequence[str]) -> None:
        super().__init__(f"model {quoted(name)!r} is not served; the server has {', '.join(known)}")
        self.name = quoted(name)


class ModelNotLoaded(ModelUnavailable):
    def __init__(self, name: str, *, retry_after: float) -> None:
        super().__init__(f"model {name} is not loaded; it is being loaded now", retry_after=retry_after)


class NotOnThisMachine(LocalRerankError):
    def __init__(self) -> None:
        super().__init__("without API keys only this machine may load and unload models; set --api-key-file")


class UnknownRoute(LocalRerankError):
    """`endpoints` lists method and path of the existing routes; `address` is the server's URL for the client.

    `body_hint` says whose body it is and where to send it; it may be empty.
    """

    def __init__(
        self, path: str, *, endpoints: Sequence[str], nearest: str | None, address: str, body_hint: str = ""
    ) -> None:
        near = f"the nearest path is {nearest}" if nearest else "see the routes at /docs"
        self.hint = f"{near}; {body_hint}" if body_hint else near
        super().__init__(f"unknown path {quoted(path)}; {self.hint}")
        self.path = path
        self.endpoints = endpoints
        self.address = quoted(address)


class MethodNotAllowed(LocalRerankError):
    """`body_hint` is that of `UnknownRoute`."""

    def __init__(self, method: str, path: str, *, allowed: str, body_hint: str = "") -> None:
        self.method = quoted(method)
        self.hint = body_hint and f"; {body_hint}"
        super().__init__(f"{quoted(path)} does not take {self.method}; it takes {allowed}{self.hint}")
        self.allowed = allowed


class ForeignOrigin(LocalRerankError):
    def __init__(self, origin: str) -> None:
        super().__init__(f"web pages of {quoted(origin)} may not use this server; --cors-origins allows an origin")


class UnknownHost(LocalRerankError):
    def __init__(self, host: str) -> None:
        super().__init__(
            f"host {quoted(host)} is not served; use localhost or an IP address, or start the server with "
            "--allowed-hosts NAME"
        )


class AmbiguousBody(LocalRerankError):
    def __init__(self, reason: str) -> None:
        super().__init__(f"the length of the body is ambiguous: {reason}")


class RequestRateExceeded(Overloaded):
    def __init__(self, *, limit: int, retry_after: float) -> None:
        super().__init__(f"this key may make {limit} requests per minute", retry_after=retry_after)


class TokenRateExceeded(Overloaded):
    def __init__(self, *, limit: int, retry_after: float) -> None:
        super().__init__(f"this key may use {limit} tokens per minute", retry_after=retry_after)


class MissingApiKey(LocalRerankError):
    def __init__(self) -> None:
        super().__init__("the API key is missing; send it as `Authorization: Bearer KEY`")


class InvalidApiKey(LocalRerankError):
    def __init__(self) -> None:
        super().__init__("the API key is wrong")


class AsyncNotSupported(LocalRerankError):
    def __init__(self) -> None:
        super().__init__("asynchronous calls are not supported; remove the header X-DashScope-Async")


class ClientDisconnected(LocalRerankError):
    """The client disconnected before the response was ready."""


STATUS: Mapping[type[LocalRerankError], int] = {
    InvalidRequest: 400,
    WrongType: 400,
    EmptyQuery: 400,
    EmptyDocument: 400,
    InvalidDocumentCount: 400,
    NoDocuments: 400,
    DocumentTooLong: 400,
    TooManyCharacters: 400,
    TooManyTokens: 400,
    TextTooLong: 400,
    TooManyChunks: 400,
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
    NotOnThisMachine: 403,
    ForeignOrigin: 403,
    UnknownHost: 421,
    AmbiguousBody: 400,
    MissingApiKey: 401,
    InvalidApiKey: 401,
    AsyncNotSupported: 403,
    ClientDisconnected: 499,  # nginx's status; it appears only in our own log
    Overloaded: 429,
    RequestRateExceeded: 429,
    TokenRateExceeded: 429,
    DeadlineExceeded: 504,
    ModelUnavailable: 503,
    DeviceFailure: 503,
    ModelNotLoaded: 503,
    UnusableAfterFork: 503,
    EngineFailure: 500,
    OutOfMemory: 503,  # after retries with half of the batch; it may fit when the device is less busy
    CheckpointError: 500,
    ConfigError: 500,
}


def headers_of(error: LocalRerankError) -> dict[str, str]:
    """The response headers of an error, in every dialect."""
    match error:
        case Overloaded() | ModelUnavailable() if error.retry_after is not None:
            return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
        case BodyTooSlow() | AmbiguousBody():
            return {"connection": "close"}  # do not wait for the rest of the body, nor read it as a request
        case DeadlineExceeded():
            return {"x-should-retry": "false"}  # a retry would exceed the same deadline
        case MissingApiKey() | InvalidApiKey():
            return {"www-authenticate": "Bearer"}
        case MethodNotAllowed():
            return {"allow": error.allowed}
        case _:
            return {}
