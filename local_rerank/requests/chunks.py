"""Cutting a long text into chunks, and a chunk into sentences. Positions are code points of the text.

A chunk ends after a sentence or a line if one ends in its last quarter, else after a word, else between two characters
that are seen as two. The next one starts within the overlap, by the same rule. Chunks are cut from the text, not from
its token ids, so that each is scored as a document of this text would be.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

MAX_SENTENCES = 64  # of a chunk; with more, neighbours are joined: each costs the tokens of the prompt's suffix

Bounds = tuple[int, int]
"""Start and end of a part of a text."""

_CLOSERS = r"[\"'”’»)\]]"
_SENTENCE_END = re.compile(
    # each alternative takes linear time on any text: no repeat can be entered at several places of one run
    rf"(?:(?<=[.!?…])|(?<=[.!?…]{_CLOSERS})|(?<=[.!?…]{_CLOSERS}{_CLOSERS}))\s++(?![a-z])"
    r"|(?<=\s[.!?])\s++"  # texts split into tokens, often in lower case
    r"|[。！？｡]++[”’」』）]*+\s*+|[\n\r\u2028\u2029]\s*+"
)
_JOINER, _SKIN_TONES = "\u200d", range(0x1F3FB, 0x1F400)


def sentence_ends(text: str) -> list[int]:
    """The positions after each sentence and line with the whitespace that follows it, without the text's end."""
    ends = (match.end() for match in _SENTENCE_END.finditer(text))
    return [end for end in ends if end < len(text) and not _is_inside(text, end)]


def sentences(text: str, bounds: Bounds) -> list[Bounds]:
    """The sentences and lines of a part of a text without the whitespace around them; at most MAX_SENTENCES."""
    start, end = bounds
    ends = [start, *(start + each for each in sentence_ends(text[start:end])), end]
    step = -(-(len(ends) - 1) // MAX_SENTENCES)
    ends = [*ends[:-1:step], end]
    stripped = (_stripped(text, first, last) for first, last in pairwise(ends))
    return [each for each in stripped if each[0] < each[1]]


def chunks(
    text: str, starts: Sequence[int], bounds: Bounds, *, num_tokens: int, num_overlap_tokens: int
) -> Iterator[Bounds]:
    """Cut a part of a text into chunks of at most `num_tokens`, which cover it.

    `starts` are the starts of the text's tokens, ascending. A chunk's text may have a few tokens more when it is
    encoded by itself.
    """
    start, end = bounds
    done = start  # where the last chunk ended
    ends = sentence_ends(text)
    num_overlap_tokens = min(num_overlap_tokens, num_tokens // 2)  # so that each chunk starts after the one before
    while True:
        first = bisect_left(starts, starts[max(0, bisect_right(starts, start) - 1)])  # of the character at `start`
        if first + num_tokens >= bisect_left(starts, end) or start + 1 == end:
            yield start, end
            return
        high = max(starts[first + num_tokens], start + 1)
        if high <= done:  # the overlap is a character of many tokens
            start = done
            continue
        low = max(starts[first + num_tokens - num_tokens // 4], done)
        done = _last_cut(text, low, high, ends)
        yield start, done
        overlap = bisect_left(starts, done) - num_overlap_tokens
        start = _first_cut(text, max(starts[overlap], start + 1), done, ends) if num_overlap_tokens else done


def _last_cut(text: str, low: int, high: int, ends: Sequence[int]) -> int:
    """The best place to end a chunk, in low + 1...high."""
    position = bisect_right(ends, high) - 1
    if position >= 0 and ends[position] > low:
        return ends[position]
    return _between(text, range(high, low, -1), default=high)


def _first_cut(text: str, low: int, high: int, ends: Sequence[int]) -> int:
    """The best place to start a chunk, in low...high: a sentence before `high`, else a word."""
    position = bisect_left(ends, low)
    if position < len(ends) and ends[position] < high:
        return ends[position]
    return _between(text, range(low, high), default=high)


def _between(text: str, places: range, *, default: int) -> int:
    """The first of some places that is the start of a word, else the first that parts two visible characters."""
    words = (place for place in places if text[place - 1].isspace() and not text[place].isspace())
    characters = (place for place in places if not _is_inside(text, place))
    return next(words, next(characters, default))


def _is_inside(text: str, place: int) -> bool:
    """Whether a place is within a visible character: before a mark, beside a joiner, in CR LF. Flags are not known."""
    before, after = text[place - 1], text[place]
    return (
        _JOINER in (before, after)
        or unicodedata.category(after).startswith("M")
        or ord(after) in _SKIN_TONES
        or (before == "\r" and after == "\n")
    )


def _stripped(text: str, start: int, end: int) -> Bounds:
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), start + len(part.rstrip())
