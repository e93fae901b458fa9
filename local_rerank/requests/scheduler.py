"""Waiting pairs and a token budget -> the next batch. Pure data structures: no torch, no threads, no clock.

Requests wait as tokens. Each batch gives the oldest request a quarter of the budget, so that none starves, and the rest
to the requests with the fewest tokens left: eight passages that arrive behind five hundred documents are in the very
next batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from local_rerank.requests.tokenization import Pair, num_batch_tokens

OLDEST_SHARE = 4  # the oldest request is sure of 1/4 of each batch
GOOD_BATCHES = 256  # that fit into a lowered budget before a larger one is tried again
DRAIN_MEMORY = 0.9  # weight of what was measured before, at each batch: some ten batches are remembered


@dataclass(frozen=True, slots=True)
class Entry:
    """A pair and where it came from."""

    request_id: int
    position: int  # the pair's place in its request
    pair: Pair


class Scheduler:
    """Holds what waits. `max_batch_tokens` bounds a batch; a single pair that is larger goes alone."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens  # less than it was set to while memory is short
        self._set_batch_tokens = max_batch_tokens
        self._num_good_batches = 0
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

    def lower_budget(self, num_tokens: int) -> None:
        """A batch of `num_tokens` did not fit into memory: make batches at most half as large from now on."""
        self.max_batch_tokens = max(1, min(self.max_batch_tokens, num_tokens) // 2)
        self._num_good_batches = 0

    def raise_budget(self) -> None:
        """A batch fitted; after enough of them double a lowered budget, up to what was set."""
        if self.max_batch_tokens == self._set_batch_tokens:
            return
        self._num_good_batches += 1
        if self._num_good_batches == GOOD_BATCHES:
            self.max_batch_tokens = min(2 * self.max_batch_tokens, self._set_batch_tokens)
            self._num_good_batches = 0

    def next_batch(self) -> list[Entry]:
        """Take the next batch; empty when nothing waits."""
        if not self._waiting:
            return []
        batch: list[Entry] = []
        prefixes: set[tuple[int, ...]] = set()
        oldest = next(iter(self._waiting))
        used = self._take(oldest, self.max_batch_tokens // OLDEST_SHARE, batch, prefixes, at_least_one=True)
        for request_id in sorted(self._waiting, key=self._tokens.__getitem__):
            used += self._take(request_id, self.max_batch_tokens - used, batch, prefixes)
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


class DrainRate:
    """How fast what waits is worked off, as measured over the last batches."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the queue that go in a second of work; None before the first batch."""
        return self._num_tokens / self._seconds if self._seconds > 0 else None

    def add(self, num_tokens: int, seconds: float) -> None:
        """A batch took `num_tokens` off the queue and `seconds` of the model's time."""
        self._num_tokens = DRAIN_MEMORY * self._num_tokens + num_tokens
        self._seconds = DRAIN_MEMORY * self._seconds + seconds

    def seconds_for(self, num_tokens: float) -> float:
        """How long `num_tokens` of the queue will take; a second where nothing was measured yet."""
        rate = self.tokens_per_second
        return num_tokens / rate if rate else 1.0
