"""Batches on a device that computes on its own, and the thread that waits for them.

The next batch is launched behind the running one as soon as pairs wait. The device then stays busy while the host
writes responses. To wait until the running one is almost done makes batches fuller and nothing faster (docs/log.md).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from local_rerank.errors import OutOfMemory
from local_rerank.requests.pair import Pair, num_batch_tokens
from local_rerank.requests.scheduler import DrainRate, Entry

logger = logging.getLogger(__name__)

SHORT_SECONDS = 0.0005  # handing a batch to the other thread and back costs a fifth of that
NUM_RECENT = 10  # batches; the thread that waits may be late for some
MAX_LAUNCHED = 2  # the running batch and the next one; all other pairs are in the queue, where the policy orders them

Launch = Callable[[Sequence[Pair]], Callable[[], list[float]]]
"""Starts a batch; the returned function waits for its log-odds."""
Outcome = list[float] | Exception
"""The log-odds of a batch, or why there are none."""


@dataclass(slots=True)
class Launched:
    """A batch, on the device unless `fetch` is None."""

    batch: list[Entry]
    started: float  # before it was packed
    launched: float = 0.0
    num_tokens: int = 0
    fetch: Callable[[], list[float]] | None = None
    outcome: Outcome | None = None  # None: not known yet, or the batch was not launched
    is_short: bool = False  # takes less than SHORT_SECONDS: `take` waits for it, without the other thread

    @property
    def is_done(self) -> bool:
        return self.fetch is None or self.outcome is not None


class LaunchTimes:
    """What batches take, by the measured rate. All times are seconds of one clock."""

    def __init__(self) -> None:
        self._rate = DrainRate()
        self._last_done = float("-inf")
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)  # seconds of the last batches

    def add(self, num_tokens: int, *, launched: float, done: float) -> None:
        """Record a batch that is done. A device starts one when the one before it is done."""
        self._recent.append(done - max(launched, self._last_done))
        self._rate.add(num_tokens, self._recent[-1])
        self._last_done = done

    def is_short(self, num_tokens: int) -> bool:
        """Whether a batch takes less than SHORT_SECONDS, as a recent one did: a GPU takes milliseconds for any."""
        return max(min(self._recent, default=1.0), self._rate.seconds_for(num_tokens)) < SHORT_SECONDS


class Launches:
    """The batches that were launched and not taken yet, oldest first. One thread uses it."""

    def __init__(self, launch: Launch, changed: threading.Condition, clock: Callable[[], float]) -> None:
        """`changed` is notified whenever a batch is done; it also guards this object against the waiting thread."""
        self._launch = launch
        self._changed = changed
        self._clock = clock
        self._times = LaunchTimes()
        self._batches: deque[Launched] = deque()
        self._to_fetch: SimpleQueue[Launched | None] = SimpleQueue()  # None ends the thread
        self._thread = threading.Thread(target=self._fetch_all, name="local-rerank-device", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def is_first_done(self) -> bool:
        """Whether `take` returns within SHORT_SECONDS."""
        return bool(self._batches) and (self._batches[0].is_done or self._batches[0].is_short)

    @property
    def has_room(self) -> bool:
        """Whether a batch may be launched before the first one is taken."""
        return len(self._batches) < MAX_LAUNCHED

    def launch(self, batch: list[Entry]) -> None:
        """Launch a batch. If that fails, it is taken in its turn: without an outcome, unless memory ran out."""
        pairs = [entry.pair for entry in batch]
        launched = Launched(batch, self._clock(), num_tokens=num_batch_tokens(pairs))
        self._batches.append(launched)
        try:
            launched.fetch = self._launch(pairs)
        except OutOfMemory as error:
            launched.outcome = error.with_traceback(None)  # its frames refer to the batch and to the model
            return
        except Exception as error:
            logger.debug("a batch could not be launched (%s); retrying it on its own", error)
            return
        launched.launched = self._clock()
        with self._changed:
            launched.is_short = self._times.is_short(launched.num_tokens)
        if not launched.is_short:
            self._to_fetch.put(launched)

    def take(self) -> Launched:
        """Wait for the first batch, and remove it."""
        first = self._batches.popleft()
        if first.is_short:
            self._fetch(first)
        with self._changed:
            self._changed.wait_for(lambda: first.is_done)
        return first

    def close(self) -> None:
        """Wait for the batches that are launched, and end the thread, which refers to the model through `launch`."""
        self._to_fetch.put(None)
        self._thread.join()

    def _fetch_all(self) -> None:
        while (launched := self._to_fetch.get()) is not None:
            self._fetch(launched)

    def _fetch(self, launched: Launched) -> None:
        assert launched.fetch is not None
        outcome = outcome_of(launched.fetch)
        with self._changed:
            if isinstance(outcome, list):
                self._times.add(launched.num_tokens, launched=launched.launched, done=self._clock())
            launched.outcome = outcome
            self._changed.notify_all()


def outcome_of(score: Callable[[], list[float]]) -> Outcome:
    """What `score` returns or raises. Errors of a retry have no context, because the first one is handled by then."""
    try:
        return score()
    except Exception as error:
        return error
