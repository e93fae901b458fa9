"""What `eval`, `compare` and `batch` leave out of their files, with one rule and one wording for all three.

The work goes on without it. Of a document or an id that appears twice, the first counts.
"""

from __future__ import annotations

from collections import Counter

UNKNOWN_DOCUMENT = "document {} is not in the corpus"
UNKNOWN_QUERY = "query {} is not in the queries"
REPEATED_DOCUMENT = "document {} is repeated"
REPEATED_ID = "the id {} is that of an earlier text"
EMPTY_QUERY = "query {} has no text"
NO_FINITE_SCORE = "the score is {}; it must be a finite number"


class LeftOut:
    """Counts what is left out by reason, and keeps the first case of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, value: str, where: str) -> None:
        """`reason` is one of the constants above, `value` what stands for its braces."""
        self._counts[reason] += 1
        self._first.setdefault(reason, f"{where}: {reason.format(value)}")

    def as_json(self) -> list[dict[str, object]]:
        return [{"count": count, "first": self._first[reason]} for reason, count in self._counts.items()]

    def __str__(self) -> str:
        """One line for each reason; empty if nothing is left out."""
        return "\n".join(f"left out: {count}, first {self._first[reason]}" for reason, count in self._counts.items())
