"""The model's thread: queued jobs -> batches -> scores -> answers, until it is closed. Whatever happens, it goes on.

Admission is decided as a job is queued. A batch that does not fit into memory is tried again in halves, with a smaller
budget from then on; one that fails for another reason in halves by request, so that only the guilty request fails. A
score that is no finite number is an error of its request. A cancelled job leaves the queue at once.

Where a GPU computes, the next batch is launched before the scores of the one that runs are fetched, so that the device
does not wait while answers are written.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from local_rerank import forks
from local_rerank.engine.packing import PackedBatch, pack
from local_rerank.errors import (
    EngineFailure,
    LocalRerankError,
    ModelUnavailable,
    OutOfMemory,
    Overloaded,
    UnusableAfterFork,
)
from local_rerank.requests.pending import Job
from local_rerank.requests.scheduler import DrainRate, Entry, Scheduler
from local_rerank.requests.tokenization import num_batch_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """What one batch was, for whoever counts."""

    num_requests: int
    num_pairs: int
    num_tokens: int  # that went through the model
    num_prefix_tokens_saved: int  # that would have, had every pair computed its prefix itself
    seconds: float


@dataclass(slots=True)
class _Running:
    """A batch between its start and its answers."""

    batch: list[Entry]
    started: float  # of time.perf_counter
    log_odds: Callable[[], Tensor] | None = None  # waits for them; None where it is still to be scored


class Worker:
    """Owns the thread that alone calls `forward`. It starts with the first job, in a forked child too."""

    def __init__(
        self,
        forward: Callable[[PackedBatch], Tensor],
        *,
        max_batch_tokens: int,
        max_queued_tokens: int,
        one_pair_at_a_time: bool = False,
        launch: Callable[[PackedBatch], Callable[[], Tensor]] | None = None,
        device: str = "cpu",
    ) -> None:
        """`forward`: a batch to log-odds (num_pairs,); `one_pair_at_a_time`: every pair in a pass of its own.

        `launch`: as `forward`, of a device that works by itself: returns at once, with what waits for the log-odds.

        `device`: where the model is, as an error names it; a forked child can use only the CPU.
        """
        self.on_batch: Callable[[BatchReport], None] | None = None
        self._forward = forward
        self._launch = None if one_pair_at_a_time else launch
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._one_pair_at_a_time = one_pair_at_a_time
        self._device = device
        self._ids = itertools.count()
        self._closing = False
        self._is_in_child = False
        self._set_up()
        forks.renew_in_child(self)

    def _set_up(self) -> None:
        self._scheduler = Scheduler(self._max_batch_tokens)
        self._drain_rate = DrainRate()
        self._jobs: dict[int, Job] = {}
        self._changed = threading.Condition()  # guards scheduler, drain rate, jobs, closing and the thread's start
        self._last_done = 0.0
        self._thread: threading.Thread | None = None

    def renew(self) -> None:
        """Requests that waited are the parent's to answer."""
        self._is_in_child = True
        self._set_up()

    def _check_fork(self) -> None:
        """Raises UnusableAfterFork."""
        if self._is_in_child:
            if self._device != "cpu":
                raise UnusableAfterFork(f"the model is on {self._device}, which a forked process cannot use")
            forks.check_whole()

    @property
    def num_queued_tokens(self) -> int:
        with self._changed:
            return self._scheduler.num_queued_tokens

    @property
    def num_queued_requests(self) -> int:
        with self._changed:
            return self._scheduler.num_queued_requests

    @property
    def max_batch_tokens(self) -> int:
        """The budget of a batch; smaller than it was set to while memory is short."""
        return self._scheduler.max_batch_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the queue that a second of work takes off it; None before the first batch."""
        with self._changed:
            return self._drain_rate.tokens_per_second

    def retry_after(self) -> float:
        """Seconds until one of the requests that wait will be done, as measured."""
        with self._changed:
            num_requests = max(1, self._scheduler.num_queued_requests)
            return self._drain_rate.seconds_for(self._scheduler.num_queued_tokens / num_requests)

    def check_room(self, num_tokens: int = 1) -> None:
        """An empty queue takes any request; else what waits and what comes must fit.

        Raises Overloaded or UnusableAfterFork.
        """
        self._check_fork()
        limit = self._max_queued_tokens
        with self._changed:
            queued = self._scheduler.num_queued_tokens
            if queued and queued + num_tokens > limit:
                what = f"{queued} tokens wait and this request has {num_tokens} or more; at most {limit} may wait"
                over = min(queued, queued + num_tokens - limit)  # an empty queue takes it
                raise Overloaded(what, retry_after=self._drain_rate.seconds_for(over))

    def submit(self, job: Job) -> None:
        """Queue a job; cancelling its future frees its place at once.

        Raises Overloaded, ModelUnavailable or UnusableAfterFork.
        """
        with self._changed:
            if self._closing:
                raise ModelUnavailable("the engine is closing")
            self.check_room(num_batch_tokens(job.tokenized.pairs))
            number = next(self._ids)
            self._jobs[number] = job
            self._scheduler.add(number, job.tokenized.pairs)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="local-rerank-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        job.future.add_done_callback(lambda future: self._drop(number) if future.cancelled() else None)

    def close(self) -> None:
        """Finish the batch that runs, fail what waits with ModelUnavailable, and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        running: _Running | None = None
        while (batch := self._next_batch(wait=running is None)) is not None:
            following = self._started(batch) if batch else None
            if running is not None:
                self._finish(running)
            running = following
        if running is not None:
            self._finish(running)
        with self._changed:
            jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.fail(ModelUnavailable("the engine is closing"))

    def _started(self, batch: list[Entry]) -> _Running | None:
        """A batch that the device works on by now; None where it is done, or failed for good."""
        running = _Running(batch, time.perf_counter())
        if self._launch is None:
            self._finish(running)
            return None
        try:
            running.log_odds = self._launch(pack([entry.pair for entry in batch]))
        except Exception as error:
            logger.debug("a batch could not be launched (%s); it is tried again by itself", error)
        return running

    def _finish(self, running: _Running) -> None:
        """Score and deliver a batch, whether it was launched or not."""
        batch = running.batch
        try:
            self._score(batch, running.log_odds)
            now = time.perf_counter()
            self._report(batch, now - max(running.started, self._last_done))
            self._last_done = now
        except Exception as error:  # a fault of ours: each waiter must hear of it
            _log_failure(f"a batch of {len(batch)} pairs could not be delivered", self._names(batch), error)
            for number in {entry.request_id for entry in batch}:
                self._fail(number, EngineFailure(f"scoring failed: {type(error).__name__}: {error}"))

    def _next_batch(self, *, wait: bool) -> list[Entry] | None:
        """The next batch; without one wait for it, or return none at all. None when closing."""
        with self._changed:
            while not self._closing:
                if batch := self._scheduler.next_batch():
                    now = time.perf_counter()
                    for job in {self._jobs[entry.request_id] for entry in batch}:
                        job.first_batch = job.first_batch or now
                    return batch
                if not wait:
                    return []
                self._changed.wait()
            return None

    def _score(self, batch: list[Entry], launched: Callable[[], Tensor] | None = None) -> bool:
        """Score and deliver a batch, in parts where it fails; returns whether every request of it was served."""
        try:
            log_odds = self._log_odds(batch) if launched is None else launched().tolist()
        except OutOfMemory as error:
            return self._score_with_less_memory(batch, error)
        except Exception as error:
            return self._score_apart(batch, error)
        with self._changed:
            self._scheduler.raise_budget()
        return self._deliver(batch, log_odds)

    def _log_odds(self, batch: list[Entry]) -> list[float]:
        parts = [[entry] for entry in batch] if self._one_pair_at_a_time else [batch]
        return [odds for part in parts for odds in self._forward(pack([entry.pair for entry in part])).tolist()]

    def _score_with_less_memory(self, batch: list[Entry], error: OutOfMemory) -> bool:
        if len(batch) == 1:
            _log_failure("a single pair does not fit into memory", self._names(batch), error)
            self._fail(batch[0].request_id, error)
            return False
        num_tokens = num_batch_tokens(entry.pair for entry in batch)
        with self._changed:
            self._scheduler.lower_budget(num_tokens)
        logger.warning(
            "out of memory with %d tokens; batches have at most %d now", num_tokens, self._scheduler.max_batch_tokens
        )
        half = len(batch) // 2
        served = [self._score(part) for part in (batch[:half], batch[half:])]
        return all(served)

    def _score_apart(self, batch: list[Entry], error: Exception) -> bool:
        """Its halves by request, so that only the guilty request fails; logged once, where the guilt is known."""
        numbers, names = list(dict.fromkeys(entry.request_id for entry in batch)), self._names(batch)
        if len(numbers) == 1:
            _log_failure(f"a batch of {len(batch)} pairs failed", names, error)
            self._fail(numbers[0], EngineFailure(f"the model failed: {type(error).__name__}: {error}"))
            return False
        first = set(numbers[: len(numbers) // 2])
        halves = [[entry for entry in batch if (entry.request_id in first) is wanted] for wanted in (True, False)]
        served = [self._score(half) for half in halves]
        if all(served):
            _log_failure(f"a batch of {len(batch)} pairs failed once, and not in halves", names, error)
        return all(served)

    def _deliver(self, batch: list[Entry], log_odds: list[float]) -> bool:
        """Hand scores to their requests and answer those that are complete."""
        by_number: dict[int, list[Entry]] = {}
        for entry, value in zip(batch, log_odds, strict=True):
            if (job := self._jobs.get(entry.request_id)) is not None:
                job.log_odds[entry.position] = value
                by_number.setdefault(entry.request_id, []).append(entry)
        served = [self._deliver_to(number, entries) for number, entries in by_number.items()]
        return all(served)

    def _deliver_to(self, number: int, entries: list[Entry]) -> bool:
        job = self._jobs.get(number)
        if job is None:  # cancelled a moment ago
            return True
        job.num_computed_tokens += num_batch_tokens([entry.pair for entry in entries])
        for entry in entries:
            if not math.isfinite(value := job.log_odds[entry.position]):
                failure = EngineFailure(f"the model gave {value} as log-odds")
                _log_failure(f"pair {entry.position} has no score", self._names([entry]), failure)
                self._fail(number, failure)
                return False
        if job.is_complete:
            self._drop(number)
            job.answer()
        return True

    def _report(self, batch: list[Entry], seconds: float) -> None:
        pairs = [entry.pair for entry in batch]
        num_document_tokens = sum(len(pair.document_ids) for pair in pairs)
        num_alone = sum(pair.num_tokens for pair in pairs)
        with self._changed:
            self._drain_rate.add(num_document_tokens, seconds)
        if self.on_batch is None:
            return
        num_tokens = num_alone if self._one_pair_at_a_time else num_batch_tokens(pairs)
        self.on_batch(
            BatchReport(
                num_requests=len({entry.request_id for entry in batch}),
                num_pairs=len(pairs),
                num_tokens=num_tokens,
                num_prefix_tokens_saved=num_alone - num_tokens,
                seconds=seconds,
            )
        )

    def _names(self, batch: Iterable[Entry]) -> list[str]:
        """What the log calls the requests of a batch that are not answered yet."""
        jobs = {number: self._jobs.get(number) for number in dict.fromkeys(entry.request_id for entry in batch)}
        return [job.name or f"number {number}" for number, job in jobs.items() if job is not None]

    def _fail(self, number: int, error: LocalRerankError) -> None:
        if (job := self._drop(number)) is not None:
            job.fail(error)

    def _drop(self, number: int) -> Job | None:
        with self._changed:
            self._scheduler.discard(number)
            return self._jobs.pop(number, None)


def _log_failure(what: str, names: list[str], error: Exception) -> None:
    logger.error("%s; requests: %s", what, ", ".join(names), exc_info=error, extra={"request_ids": names})
