"""The parts of a document that are scored: all of it, what is left when its end or start is cut off, or its chunks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tokenizers import Tokenizer

from local_rerank.config import CHUNK_OVERLAP_TOKENS, CHUNK_TOKENS
from local_rerank.errors import TooManyChunks, TooManyTokens
from local_rerank.requests.chunks import Bounds, chunks
from local_rerank.requests.encoders import Encode
from local_rerank.requests.pair import ID_BYTES
from local_rerank.types import LongDocuments, RerankRequest, Truncation

Part = tuple[Bounds, bytes]
"""The characters of a part in its document, and the ids of its text, after a space for a decoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    """Limits in tokens. A longer query is truncated; a longer document is truncated or cut into chunks."""

    max_length: int  # of the whole prompt
    max_query_tokens: int
    max_document_tokens: int  # of a document or a chunk
    long_documents: LongDocuments = "truncate"  # these are defaults for models whose config.json states none
    chunk_tokens: int = CHUNK_TOKENS
    chunk_overlap_tokens: int = CHUNK_OVERLAP_TOKENS
    num_best_chunks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """What a request wants to be done with long documents."""

    in_chunks: bool
    max_part_tokens: int  # less if a prompt has less room
    max_read_tokens: int | None  # of a document that is cut into chunks
    num_overlap_tokens: int
    max_chunks: int | None  # beyond which a document is cut off
    truncation: Truncation
    with_bounds: bool  # whether the result says where the parts are

    @classmethod
    def of(cls, request: RerankRequest, limits: PromptLimits) -> Cutting:
        most, wanted, overlap = limits.max_document_tokens, request.max_document_tokens, request.chunk_overlap_tokens
        in_chunks = (request.long_documents or limits.long_documents) == "chunk"
        return cls(
            in_chunks=in_chunks,
            max_part_tokens=min(most, ((request.chunk_tokens or limits.chunk_tokens) if in_chunks else wanted) or most),
            max_read_tokens=wanted,
            num_overlap_tokens=limits.chunk_overlap_tokens if overlap is None else overlap,
            max_chunks=request.max_chunks_per_document,
            truncation=request.truncation,
            with_bounds=in_chunks or request.spans,
        )


def parts_of(
    text: str, ids: bytes, room: int, cutting: Cutting, tokenizer: Tokenizer, *, encode: Encode, lead: str
) -> tuple[list[Part], int]:
    """The parts of a document with `ids`, of at most `room` tokens each, and how many of its tokens are in none.

    `lead` is encoded before each part, as before a document.
    """
    num_tokens, most = len(ids) // ID_BYTES, min(room, cutting.max_part_tokens)
    num_read = min(num_tokens, (cutting.max_read_tokens or num_tokens) if cutting.in_chunks else most)
    if num_read == num_tokens <= most:
        return [((0, len(text)), ids)], 0
    from_start = cutting.truncation == "start"
    first, last = (num_tokens - num_read, num_tokens) if from_start else (0, num_read)
    starts = _token_starts(tokenizer, text, lead) if cutting.with_bounds else []
    read = (starts[first] if first else 0, starts[last] if last < num_tokens else len(text)) if starts else (0, 0)
    if num_read <= most:
        return [(read, ids[ID_BYTES * first : ID_BYTES * last])], num_tokens - num_read
    parts = _chunks(text, starts, read, most, cutting.num_overlap_tokens, encode, lead)
    if cutting.max_chunks is not None and len(parts) > cutting.max_chunks:
        parts = parts[-cutting.max_chunks :] if from_start else parts[: cutting.max_chunks]
    (start, _), (_, end) = parts[0][0], parts[-1][0]
    num_read = (num_tokens if end == len(text) else bisect_left(starts, end)) - bisect_left(starts, start)
    return parts, num_tokens - num_read


def check_num_chunks(request: RerankRequest, field: str, *, num_chunks: int, num_request_chunks: int) -> None:
    """Raises TooManyChunks; `field` is the document's."""
    limits = request.limits
    checks = (
        (field, limits.max_document_chunks, num_chunks),
        ("documents", limits.max_request_chunks, num_request_chunks),
    )
    for name, limit, value in checks:
        if limit is not None and value > limit:
            raise TooManyChunks(field=name, limit=limit, value=value)


def check_num_tokens(request: RerankRequest, num_tokens: int) -> None:
    """Raises TooManyTokens."""
    limit = request.limits.max_request_tokens
    if limit is not None and num_tokens > limit:
        raise TooManyTokens(limit=limit, value=num_tokens)


def _token_starts(tokenizer: Tokenizer, text: str, lead: str) -> list[int]:
    """The start of each token of lead + text in the text, ascending. By tokenizers: fastokens has no offsets."""
    offsets = tokenizer.encode(lead + text, add_special_tokens=False).offsets
    return list(accumulate((max(0, start - len(lead)) for start, _ in offsets), max))


def _chunks(
    text: str, starts: Sequence[int], read: Bounds, most: int, num_overlap_tokens: int, encode: Encode, lead: str
) -> list[Part]:
    """Chunks of a text that have at most `most` tokens when each is encoded as a document."""
    num_tokens = most
    while True:
        bounds = list(chunks(text, starts, read, num_tokens=num_tokens, num_overlap_tokens=num_overlap_tokens))
        ids = encode([lead + text[start:end] for start, end in bounds])
        excess = max(map(len, ids)) // ID_BYTES - most
        if excess <= 0 or num_tokens <= excess:  # the latter in a room of a few tokens
            return [(each, part[: ID_BYTES * most]) for each, part in zip(bounds, ids, strict=True)]
        num_tokens -= excess
