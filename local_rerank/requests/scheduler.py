"""The scheduling policy: picks the next batch from queued pairs. Pure data structures: no torch, no threads, no clock.

A quarter of each batch goes to the oldest request, so that none starves. The rest goes to the requests with the fewest
tokens left, so eight passages that arrive behind five hundred documents are in the next batch. Requests of about the
same size are taken in the order of their arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from local_rerank.requests.pair import Pair, num_batch_tokens

OLDEST_SHARE = 4  # the oldest request gets at least 1/4 of each batch
GOOD_BATCHES = 256  # in a row, after which a lowered budget is doubled
DRAIN_DECAY = 0.9  # weight of earlier batches in the moving average, which covers about ten batches


@dataclass(frozen=True, slots=True)
class Entry:
    """A queued pair."""

    request_id: int
    position: int  # in the request
    pair: Pair


class Scheduler:
    """The queue. A batch has at most `max_batch_tokens`, unless it is a single pair with more."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens  # lowered while memory is short
        self._configured_batch_tokens = max_batch_tokens
        self._num_good_batches = 0
        self._queued: dict[int, deque[Entry]] = {}  # by request, in order of arrival; shortest documents first
        self._tokens: dict[int, int] = {}  # queued tokens by request, with its whole prefix

    @property
    def num_queued_tokens(self) -> int:
        """Queued tokens of all requests; a request's prefix counts once."""
        return sum(self._tokens.values())

    @property
    def num_queued_requests(self) -> int:
        return len(self._queued)

    def add(self, request_id: int, pairs: Iterable[Pair], first: int = 0) -> None:
        """Queue pairs of a request that has none in the queue; `first` is the position of the first one."""
        entries = [Entry(request_id, position, pair) for position, pair in enumerate(pairs, first)]
        # attention runs over neighbours of equal length at once
        entries.sort(key=lambda entry: len(entry.pair.document))
        self._queued[request_id] = deque(entries)
        self._tokens[request_id] = num_batch_tokens(entry.pair for entry in entries)

    def discard(self, request_id: int) -> None:
        """Remove a request's pairs from the queue, if any."""
        self._queued.pop(request_id, None)
        self._tokens.pop(request_id, None)

    def lower_budget(self, num_tokens: int) -> None:
        """After a batch of `num_tokens` ran out of memory: halve the budget."""
        self.max_batch_tokens = max(1, min(self.max_batch_tokens, num_tokens) // 2)
        self._num_good_batches = 0

    def raise_budget(self) -> None:
        """After a successful batch: every `GOOD_BATCHES` batches, double a lowered budget, up to the configured one."""
        if self.max_batch_tokens == self._configured_batch_tokens:
            return
        self._num_good_batches += 1
        if self._num_good_batches == GOOD_BATCHES:
            self.max_batch_tokens = min(2 * self.max_batch_tokens, self._configured_batch_tokens)
            self._num_good_batches = 0

    def next_batch(self) -> list[Entry]:
        """Remove the next batch from the queue; empty if nothing is queued."""
        if not self._queued:
            return []
        batch: list[Entry] = []
        prefixes: set[bytes] = set()
        oldest = next(iter(self._queued))
        used = self._take(oldest, self.max_batch_tokens // OLDEST_SHARE, batch, prefixes, at_least_one=True)
        # in steps: of requests that differ by a few tokens the longer ones would wait until they are the oldest
        step = max(1, self.max_batch_tokens // OLDEST_SHARE)
        for request_id in sorted(self._queued, key=lambda number: self._tokens[number] // step):
            used += self._take(request_id, self.max_batch_tokens - used, batch, prefixes)
        for request_id in {entry.request_id for entry in batch}:
            if not self._queued[request_id]:
                self.discard(request_id)
        return batch

    def _take(
        self,
        request_id: int,
        budget: int,
        batch: list[Entry],
        prefixes: set[bytes],
        at_least_one: bool = False,
    ) -> int:
        """Move pairs of a request into the batch while they fit `budget`; returns the number of tokens added."""
        queued, used = self._queued[request_id], 0
        while queued:
            pair = queued[0].pair
            cost = pair.num_document_tokens + (0 if pair.prefix in prefixes else pair.num_prefix_tokens)
            if used + cost > budget and not (at_least_one and not batch):
                break
            batch.append(queued.popleft())
            prefixes.add(pair.prefix)
            self._tokens[request_id] -= pair.num_document_tokens
            used += cost
        return used


class DrainRate:
    """Queued tokens processed per second: a moving average over the last batches."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """None before the first batch."""
        return self._num_tokens / self._seconds if self._seconds > 0 else None

    def add(self, num_tokens: int, seconds: float) -> None:
        """Record a batch: it took `num_tokens` from the queue and ran for `seconds`."""
        self._num_tokens = DRAIN_DECAY * self._num_tokens + num_tokens
        self._seconds = DRAIN_DECAY * self._seconds + seconds

    def seconds_for(self, num_tokens: float) -> float:
        """Estimated time for `num_tokens` of the queue; 1 s before the first batch."""
        rate = self.tokens_per_second
        return num_tokens / rate if rate else 1.0
