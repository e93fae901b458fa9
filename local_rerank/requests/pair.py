"""A pair of query and document as token ids, the pairs of a request, and the size of a batch of pairs.

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
    def ids_before_document(self) -> bytes:
        """Those of everything before the document's own tokens."""
        return self.prefix + self.document[: ID_BYTES * self.num_query_tokens]

    @property
    def num_prefix_tokens(self) -> int:
        return len(self.prefix) // ID_BYTES

    @property
    def num_document_tokens(self) -> int:
        return len(self.document) // ID_BYTES

    @property
    def num_tokens(self) -> int:
        return (len(self.prefix) + len(self.document)) // ID_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRequest:
    """The pairs of a request, one for each chunk of each distinct document, and the token counts of its result."""

    pairs: tuple[Pair, ...]
    pairs_of_document: tuple[range, ...]  # per document: positions in `pairs`; several if it was cut into chunks
    bounds: tuple[tuple[int, int], ...] | None = None  # per pair: its characters in the document, if asked for
    text_starts: tuple[int, ...] | None = None  # per document that was unwrapped: characters before the text
    num_best_chunks: int = 1  # whose mean is a document's score
    num_truncated_tokens: tuple[int, ...]  # per document
    num_query_tokens: int
    num_query_truncated_tokens: int
    num_suffix_tokens: int
    num_unbilled_tokens: int  # of each pair: the template's, which total_tokens does not count
    total_tokens: int  # as the hosted service counts usage
    unwrapped: bool  # whether the client had rendered the prompts
    has_default_instruction: bool  # to which a calibration applies

    def bounds_as_sent(self, index: int, pair: int) -> tuple[int, int] | None:
        """The characters of a pair in a document as it was sent; None if nobody asked for them."""
        if self.bounds is None:
            return None
        (start, end), shift = self.bounds[pair], 0 if self.text_starts is None else self.text_starts[index]
        return start + shift, end + shift

    def num_document_tokens(self, index: int) -> int:
        pairs = (self.pairs[i] for i in self.pairs_of_document[index])
        return sum(pair.num_document_tokens - pair.num_query_tokens - self.num_suffix_tokens for pair in pairs)


def num_batch_tokens(pairs: Iterable[Pair]) -> int:
    """Tokens of a packed batch of `pairs`, in which each prefix counts once."""
    prefixes: set[bytes] = set()
    num_bytes = 0
    for pair in pairs:
        prefixes.add(pair.prefix)
        num_bytes += len(pair.document)
    return (num_bytes + sum(map(len, prefixes))) // ID_BYTES
