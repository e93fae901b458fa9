"""Counts what a JSON body costs to parse, before it is parsed and while it arrives.

The JSON parser holds the GIL, so a body of 64 MiB that is structure instead of text would stop the server for seconds
and take gigabytes. Only what stands outside of strings counts, so a document may be code or JSON.
"""

from __future__ import annotations

import re

from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import MalformedBody

MIN_PARTS = 150_000  # brackets, colons, commas and strings, which parse in at most 50 ms on an AVX2 core
PARTS_PER_DOCUMENT = 10  # ... if the server takes that many documents
MAX_BYTES = 16 * 1024 * 1024  # outside of strings, white space included
MAX_INTEGER_DIGITS = 20  # as many as 2**64 has; Python parses longer ones in quadratic time
MAX_DIGITS = 100  # in a row, in a float

SLICE_BYTES = 256 * 1024  # a slice of text takes 0.2 ms, one of structure 3 ms
KEPT_BYTES = MAX_DIGITS + 28  # of the slice before, in which a number may begin
NO_STRUCTURE = bytes(set(range(256)) - set(b"[{:,"))
WHITE_SPACE = b" \t\r\n"
DIGITS_AS_0 = bytes.maketrans(b"123456789", b"000000000")
LONG_DIGITS = b"0" * (MAX_INTEGER_DIGITS + 1)
DIGITS = re.compile(rb"0{%d,}" % len(LONG_DIGITS))


class StructureCheck:
    """Checks a body slice by slice. The counts are exact as long as the body is JSON; no parser goes on after that."""

    def __init__(self, config: ServerConfig) -> None:
        self._max_parts = max(MIN_PARTS, PARTS_PER_DOCUMENT * config.max_documents)
        self._num_parts = 0  # without the strings
        self._num_quotes = 0  # around strings
        self._num_bytes = 0
        self._cut = b""  # a backslash whose escaped character is in the next slice
        self._before = b""  # the end of the slice before, without strings

    def feed(self, data: bytes) -> None:
        """Take at most `SLICE_BYTES` more; raises `MalformedBody` if the body is over a limit."""
        outside = self._outside(self._cut + data)
        self._num_bytes += len(outside)
        outside = outside.translate(DIGITS_AS_0, WHITE_SPACE)
        self._num_parts += len(outside.translate(None, NO_STRUCTURE))
        if self._num_parts + self._num_quotes // 2 > self._max_parts:
            raise _over("brackets, colons, commas and strings", self._max_parts)
        if self._num_bytes > MAX_BYTES:
            raise _over("bytes of structure, numbers and white space", MAX_BYTES)
        outside = self._before + outside
        if LONG_DIGITS in outside:  # much faster than the expression
            _check_numbers(outside)
        self._before = outside[-KEPT_BYTES:]

    def _outside(self, data: bytes) -> bytes:
        """What of `data` stands outside of strings, without their quotes."""
        num_backslashes = len(data) - len(data.rstrip(b"\\"))
        self._cut = b"\\" * (num_backslashes % 2)
        data = data[: len(data) - len(self._cut)]
        if b"\\" in data:  # an escaped backslash first: it does not escape the quote behind it
            data = data.replace(rb"\\", b"").replace(rb"\"", b"")
        parts = data.split(b'"')
        in_string = self._num_quotes % 2
        self._num_quotes += len(parts) - 1
        return b"".join(parts[in_string::2])


def _check_numbers(outside: bytes) -> None:
    for found in DIGITS.finditer(outside):
        start, end = found.span()
        if end - start > MAX_DIGITS:
            raise MalformedBody(f"the body has a number of more than {MAX_DIGITS} digits; at most that are allowed")
        in_float = outside[start - 1 : start] in (b".", b"e", b"E") or outside[end : end + 1] in (b".", b"e", b"E")
        if not in_float and end < len(outside):  # a number at the end may go on in the next slice
            raise MalformedBody(
                f"the body has an integer of {end - start} digits; at most {MAX_INTEGER_DIGITS} are allowed"
            )


def _over(what: str, limit: int) -> MalformedBody:
    return MalformedBody(
        f"the body has more than {limit} {what}; at most {limit} are allowed: send fewer documents, or only the "
        "fields that are ranked"
    )
