"""A pair of query and document as token ids, and the size of a batch of pairs.

Ids are bytes, four for each id: bytes are compared and hashed as one value, and joined without a Python integer for
each token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

ID_BYTES = 4


def to_bytes(ids: Iterable[int]) -> bytes:
    return array("I", ids).tobytes()


def to_ids(data: bytes) -> tuple[int, ...]:
    return tuple(memoryview(data).cast("I"))


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One query with one document, as token ids."""

    prefix: bytes  # prompt up to and including `<Document>:`; pairs with equal prefixes share it
    document: bytes  # " " + document + suffix; for an encoder the whole pair
    num_query_tokens: int = 0  # for an encoder: tokens of `document` before the document itself
    first_typed: int = 0  # for an encoder: index in `document` of the first token of type 1

    @classmethod
    def of(cls, prefix_ids: Iterable[int], document_ids: Iterable[int]) -> Pair:
        return cls(to_bytes(prefix_ids), to_bytes(document_ids))

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        return to_ids(self.prefix)

    @property
    def document_ids(self) -> tuple[int, ...]:
        return to_ids(self.document)

    @property
    def num_prefix_tokens(self) -> int:
        return len(self.prefix) // ID_BYTES

    @property
    def num_document_tokens(self) -> int:
        return len(self.document) // ID_BYTES

    @property
    def num_tokens(self) -> int:
        return (len(self.prefix) + len(self.document)) // ID_BYTES


def num_batch_tokens(pairs: Iterable[Pair]) -> int:
    """Tokens of a packed batch of `pairs`, in which each prefix counts once."""
    prefixes: set[bytes] = set()
    num_bytes = 0
    for pair in pairs:
        prefixes.add(pair.prefix)
        num_bytes += len(pair.document)
    return (num_bytes + sum(map(len, prefixes))) // ID_BYTES
