"""Waiting pairs and a token budget -> the next batch. A pure data structure: no torch, no threads, no clock.

Requests wait as tokens. Each batch gives the oldest request a quarter of the budget, so that none starves, and the rest
to the requests with the fewest tokens left: eight passages that arrive behind five hundred documents are in the very
next batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from local_rerank.tokenization import Pair, num_batch_tokens

OLDEST_SHARE = 4  # the oldest request is sure of 1/4 of each batch


@dataclass(frozen=True, slots=True)
class Entry:
    """A pair and where it came from."""

    request_id: int
    position: int  # the pair's place in its request
    pair: Pair


class Scheduler:
    """Holds what waits. `max_batch_tokens` bounds a batch; a single pair that is larger goes alone."""

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._waiting: dict[int, deque[Entry]] = {}  # by request, in order of arrival; documents shortest first
        self._tokens: dict[int, int] = {}  # tokens left per request, its prefix counted to the end

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that wait, over all requests: documents, and each request's shared prefix once."""
        return sum(self._tokens.values())

    @property
    def num_queued_requests(self) -> int:
        return len(self._waiting)

    def add(self, request_id: int, pairs: Iterable[Pair]) -> None:
        entries = [Entry(request_id, position, pair) for position, pair in enumerate(pairs)]
        # neighbours of equal length make the longest runs for attention
        entries.sort(key=lambda entry: len(entry.pair.document_ids))
        self._waiting[request_id] = deque(entries)
        self._tokens[request_id] = num_batch_tokens(entry.pair for entry in entries)

    def discard(self, request_id: int) -> None:
        """Forget what waits for a request; one that has nothing left is no error."""
        self._waiting.pop(request_id, None)
        self._tokens.pop(request_id, None)

    def next_batch(self) -> list[Entry]:
        """Take the next batch; empty when nothing waits."""
        if not self._waiting:
            return []
        batch: list[Entry] = []
        prefixes: set[tuple[int, ...]] = set()
        oldest = next(iter(self._waiting))
        used = self._take(oldest, self._max_batch_tokens // OLDEST_SHARE, batch, prefixes, at_least_one=True)
        for request_id in sorted(self._waiting, key=self._tokens.__getitem__):
            used += self._take(request_id, self._max_batch_tokens - used, batch, prefixes)
        for request_id in {entry.request_id for entry in batch}:
            if not self._waiting[request_id]:
                self.discard(request_id)
        return batch

    def _take(
        self,
        request_id: int,
        budget: int,
        batch: list[Entry],
        prefixes: set[tuple[int, ...]],
        at_least_one: bool = False,
    ) -> int:
        """Move pairs of a request into the batch while they fit `budget`; returns the tokens they add."""
        waiting, used = self._waiting[request_id], 0
        while waiting:
            pair = waiting[0].pair
            cost = len(pair.document_ids) + (0 if pair.prefix_ids in prefixes else len(pair.prefix_ids))
            if used + cost > budget and not (at_least_one and not batch):
                break
            batch.append(waiting.popleft())
            prefixes.add(pair.prefix_ids)
            self._tokens[request_id] -= len(pair.document_ids)
            used += cost
        return used
