"""The errors that local-rerank raises.

    LocalRerankError
    ├── InvalidRequest
    │   ├── WrongType (also a TypeError)
    │   ├── EmptyQuery, EmptyDocument
    │   ├── InvalidDocumentCount
    │   │   └── NoDocuments
    │   ├── DocumentTooLong, TooManyCharacters    in characters
    │   ├── TooManyTokens, TextTooLong, InstructionTooLong    in tokens
    │   ├── TooManyChunks
    │   └── InvalidTopN
    ├── Overloaded
    ├── DeadlineExceeded
    ├── ModelUnavailable
    │   └── DeviceFailure
    ├── UnusableAfterFork
    ├── EngineFailure
    │   └── OutOfMemory
    ├── CheckpointError
    └── ConfigError

`local_rerank_server.errors` adds the server's errors (unknown model, bad key, ...) and maps each error to an HTTP
status.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable


class LocalRerankError(Exception):
    """Base class of all errors. They can be pickled, because an engine in another process sends them."""

    def __reduce__(self) -> tuple[Callable[..., LocalRerankError], tuple[object, ...]]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[LocalRerankError], args: tuple[object, ...], fields: dict[str, object]) -> LocalRerankError:
    """Unpickle without `__init__`, which takes other arguments in every subclass."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class InvalidRequest(LocalRerankError):
    """The request cannot be ranked, because of the value of an argument or field.

    `field` names it; `limit` and `value` are the limit and the request's value where there are any, else None. Raised
    by `RerankRequest` and by every call that ranks or scores, before anything is queued. Most are one of the errors
    below. Itself it is raised for a limit in tokens below 1, for `max_prompt_tokens` without room for a text, and by
    `CrossEncoder` for an argument that is not supported.
    """

    def __init__(self, message: str, *, field: str, limit: float | None = None, value: float | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.limit = limit
        self.value = value


class WrongType(InvalidRequest, TypeError):
    """An argument has the wrong type, for example a dict as documents or a number as a text. Also a TypeError."""

    def __init__(self, value: object, *, field: str, expected: str) -> None:
        found = f"{type(value).__name__} ({reprlib.repr(value)})"  # shortened, because it may be a whole corpus
        super().__init__(f"{field} must be {expected}, not {found}", field=field)


class EmptyQuery(InvalidRequest):
    """The query is empty or blank."""

    def __init__(self) -> None:
        super().__init__("query is empty; it must hold some text", field="query")


class EmptyDocument(InvalidRequest):
    """A document is empty or blank, and `Limits.allow_empty_documents` is False. `index` is its position."""

    def __init__(self, *, index: int) -> None:
        super().__init__(f"documents[{index}] is empty; this server refuses empty documents", field="documents")
        self.index = index


class InvalidDocumentCount(InvalidRequest):
    """More documents than `Limits.max_documents`."""

    def __init__(self, *, limit: int | None, value: int) -> None:
        most = "" if limit is None else f" and at most {limit} are taken"
        super().__init__(f"{value} documents; at least 1 is needed{most}", field="documents", limit=limit, value=value)


class NoDocuments(InvalidDocumentCount):
    """`documents` is empty."""

    def __init__(self, *, limit: int | None) -> None:
        super().__init__(limit=limit, value=0)


class DocumentTooLong(InvalidRequest):
    """A document has more characters than `Limits.max_document_chars`. `index` is its position."""

    def __init__(self, *, index: int, limit: int, value: int) -> None:
        what = f"documents[{index}] has {value} characters; at most {limit} are taken"
        super().__init__(what, field="documents", limit=limit, value=value)
        self.index = index


class TooManyCharacters(InvalidRequest):
    """The query or the instruction has more characters than its limit in `Limits`."""

    def __init__(self, *, field: str, limit: int, value: int) -> None:
        what = f"{field} has {value} characters; at most {limit} are taken"
        super().__init__(what, field=field, limit=limit, value=value)


class TooManyTokens(InvalidRequest):
    """The request has more tokens than `Limits.max_request_tokens`, query tokens counted once per document."""

    def __init__(self, *, limit: int, value: int) -> None:
        what = f"the request has {value} tokens or more; at most {limit} are taken"
        super().__init__(what, field="documents", limit=limit, value=value)


class TextTooLong(InvalidRequest):
    """The query or a document has more tokens than fit, and the request has `truncation="error"`."""

    def __init__(self, *, field: str, limit: int, value: int) -> None:
        what = f"{field} has {value} tokens, {limit} fit, and this request forbids cutting"
        super().__init__(what, field=field, limit=limit, value=value)


class TooManyChunks(InvalidRequest):
    """A document has more chunks than `Limits.max_document_chunks`, or a request than `Limits.max_request_chunks`."""

    def __init__(self, *, field: str, limit: int, value: int) -> None:
        name = "the request" if field == "documents" else field
        what = f"{name} has {value} chunks or more; at most {limit} are taken"
        cut = "set max_chunks_per_document, beyond which a document is cut off"
        super().__init__(f"{what}. Send less text, raise chunk_tokens, or {cut}", field=field, limit=limit, value=value)


class InstructionTooLong(InvalidRequest):
    """The instruction has more than 1,024 tokens, or leaves no room for query and document in a prompt."""

    def __init__(self, *, limit: int, value: int) -> None:
        what = f"instruction has {value} tokens; at most {limit} are taken"
        super().__init__(what, field="instruction", limit=limit, value=value)


class InvalidTopN(InvalidRequest):
    """`top_n` is below 1."""

    def __init__(self, *, value: int) -> None:
        super().__init__(f"top_n is {value}; it must be at least 1", field="top_n", limit=1, value=value)


class Overloaded(LocalRerankError):
    """The queue has no room: it holds work, and this request would exceed `max_queued_tokens`.

    Retry after `retry_after` seconds, or use `rank_batch`, which waits. The server also raises it at its own limits.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class DeadlineExceeded(LocalRerankError):
    """The request has a timeout, of `timeout_ms` milliseconds, and was not answered by then.

    The message ends with what would make such a request succeed.
    """

    def __init__(self, *, timeout_ms: float, remedy: str | None = None) -> None:
        super().__init__(f"not answered within {timeout_ms:.10g} ms" + (f"; {remedy}" if remedy else ""))
        self.timeout_ms = timeout_ms


class ModelUnavailable(LocalRerankError):
    """The reranker is closed or closing, or the server is starting or stopping, or its model cannot be loaded.

    Raised by calls, and set on futures of requests that were queued when `close` was called. Retry after `retry_after`
    seconds, if it is known when that may succeed.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class DeviceFailure(ModelUnavailable):
    """The GPU failed, and this process cannot use it again: this call and every later one raises this."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; this process cannot use the device again, start a new one")
        self.reason = reason


class UnusableAfterFork(LocalRerankError):
    """The process was forked, and the model cannot be used in the child: it is on a GPU or behind Ray, or the fork
    happened while a model was loading or was running an operator for ten minutes.
    """

    def __init__(self, why: str) -> None:
        fix = "create the reranker after the fork (gunicorn: without --preload), or use multiprocessing's spawn"
        super().__init__(f"{why}; {fix}")


class EngineFailure(LocalRerankError):
    """The model failed on this request, or gave a score that is not finite. Others in its batch are answered."""


class OutOfMemory(EngineFailure):
    """A pair of this request does not fit into the device's memory, even alone; it has `num_tokens` tokens."""

    def __init__(self, *, num_tokens: int) -> None:
        super().__init__(f"out of memory in a batch of {num_tokens} tokens; set a smaller --max-batch-tokens")
        self.num_tokens = num_tokens


class CheckpointError(LocalRerankError):
    """The model cannot be found, downloaded or loaded, or is not a reranker.

    Raised by `Reranker(...)` and `CrossEncoder(...)`, and by every call of an `AsyncReranker`.
    """


class ConfigError(LocalRerankError):
    """An option is unknown, has the wrong type or is out of range, or this machine or this model cannot meet it.

    Raised by constructors. What only loading shows is raised by every call of an `AsyncReranker`.
    """
