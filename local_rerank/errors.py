"""The errors that local-rerank raises.

    LocalRerankError
    ├── InvalidRequest                the request cannot be ranked; `field`, `limit` and `value` say why
    │   ├── WrongType                 an argument has the wrong type; also a TypeError
    │   ├── EmptyQuery                the query is empty or blank
    │   ├── EmptyDocument             a document is empty or blank, and the server refuses that
    │   ├── InvalidDocumentCount      more documents than the limit
    │   │   └── NoDocuments           no documents
    │   ├── DocumentTooLong           a document has more characters than the limit
    │   ├── TooManyCharacters         the query or the instruction has more characters than the limit
    │   ├── TooManyTokens             a request has more tokens than the limit
    │   ├── TextTooLong               a text is longer than its limit, and the request forbids truncation
    │   ├── InstructionTooLong        the instruction leaves no room in the prompt
    │   └── InvalidTopN               top_n below 1
    ├── Overloaded                    the queue is full; retry after `retry_after` seconds
    ├── DeadlineExceeded              no result within the client's or the server's timeout
    ├── ModelUnavailable              the model is still loading, or the engine is closing
    │   └── DeviceFailure             the GPU failed; only a new process can use it again
    ├── UnusableAfterFork             the process was forked, and the model cannot be used in the child
    ├── EngineFailure                 the model failed on this request's batch
    │   └── OutOfMemory               the batch does not fit into memory
    ├── CheckpointError               the model cannot be loaded, or is not a reranker
    └── ConfigError                   a setting is unknown or malformed

`local_rerank_server.errors` adds the server's errors (unknown model, bad key, ...) and maps each error to an HTTP
status.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable


class LocalRerankError(Exception):
    """Base class. Errors can be pickled, because an engine in another process sends them."""

    def __reduce__(self) -> tuple[Callable[..., LocalRerankError], tuple[object, ...]]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[LocalRerankError], args: tuple[object, ...], fields: dict[str, object]) -> LocalRerankError:
    """Unpickle without `__init__`, which takes other arguments in every subclass."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class InvalidRequest(LocalRerankError):
    """The request cannot be ranked, because of a value of `field`."""

    def __init__(self, message: str, *, field: str, limit: int | None = None, value: int | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.limit = limit
        self.value = value


class WrongType(InvalidRequest, TypeError):
    def __init__(self, value: object, *, field: str, expected: str) -> None:
        found = f"{type(value).__name__} ({reprlib.repr(value)})"  # shortened, because it may be a whole corpus
        super().__init__(f"{field} must be {expected}, not {found}", field=field)


class EmptyQuery(InvalidRequest):
    def __init__(self) -> None:
        super().__init__("query is empty; it must hold some text", field="query")


class EmptyDocument(InvalidRequest):
    def __init__(self, *, index: int) -> None:
        super().__init__(f"documents[{index}] is empty; this server refuses empty documents", field="documents")
        self.index = index


class InvalidDocumentCount(InvalidRequest):
    def __init__(self, *, limit: int | None, value: int) -> None:
        most = "" if limit is None else f" and at most {limit} are taken"
        super().__init__(f"{value} documents; at least 1 is needed{most}", field="documents", limit=limit, value=value)


class NoDocuments(InvalidDocumentCount):
    def __init__(self, *, limit: int | None) -> None:
        super().__init__(limit=limit, value=0)


class DocumentTooLong(InvalidRequest):
    def __init__(self, *, index: int, limit: int, value: int) -> None:
        what = f"documents[{index}] has {value} characters; at most {limit} are taken"
        super().__init__(what, field="documents", limit=limit, value=value)
        self.index = index


class TooManyCharacters(InvalidRequest):
    def __init__(self, *, field: str, limit: int, value: int) -> None:
        what = f"{field} has {value} characters; at most {limit} are taken"
        super().__init__(what, field=field, limit=limit, value=value)


class TooManyTokens(InvalidRequest):
    def __init__(self, *, limit: int, value: int) -> None:
        what = f"the request has {value} tokens or more; at most {limit} are taken"
        super().__init__(what, field="documents", limit=limit, value=value)


class TextTooLong(InvalidRequest):
    def __init__(self, *, field: str, limit: int, value: int) -> None:
        what = f"{field} has {value} tokens, {limit} fit, and this request forbids cutting"
        super().__init__(what, field=field, limit=limit, value=value)


class InstructionTooLong(InvalidRequest):
    def __init__(self, *, limit: int, value: int) -> None:
        what = f"instruction has {value} tokens; at most {limit} are taken"
        super().__init__(what, field="instruction", limit=limit, value=value)


class InvalidTopN(InvalidRequest):
    def __init__(self, *, value: int) -> None:
        super().__init__(f"top_n is {value}; it must be at least 1", field="top_n", limit=1, value=value)


class Overloaded(LocalRerankError):
    """The queue is full."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class DeadlineExceeded(LocalRerankError):
    """`remedy` says what would make such a request succeed, without a full stop."""

    def __init__(self, *, timeout_ms: float, remedy: str | None = None) -> None:
        super().__init__(f"not answered within {timeout_ms:.0f} ms" + (f"; {remedy}" if remedy else ""))
        self.timeout_ms = timeout_ms


class ModelUnavailable(LocalRerankError):
    """The model is still loading, or the engine is closing."""


class DeviceFailure(ModelUnavailable):
    """The GPU failed, and this process cannot use it again: this call and every later one raises this."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; this process cannot use the device again, start a new one")
        self.reason = reason


class UnusableAfterFork(LocalRerankError):
    """The process was forked after the model was loaded, and the model cannot be used in the child."""

    def __init__(self, why: str) -> None:
        fix = "create the reranker after the fork (gunicorn: without --preload), or use multiprocessing's spawn"
        super().__init__(f"{why}; {fix}")


class EngineFailure(LocalRerankError):
    """The model failed on this request's batch."""


class OutOfMemory(EngineFailure):
    """A batch of `num_tokens` does not fit into the device's memory."""

    def __init__(self, *, num_tokens: int) -> None:
        super().__init__(f"out of memory in a batch of {num_tokens} tokens; set a smaller --max-batch-tokens")
        self.num_tokens = num_tokens


class CheckpointError(LocalRerankError):
    """The model cannot be loaded, or is not a reranker."""


class ConfigError(LocalRerankError):
    """A setting is unknown or malformed."""
