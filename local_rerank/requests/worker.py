"""The thread that runs the model: it takes batches from the scheduler, scores them and resolves each request's future.

A failing batch never ends the thread. One that runs out of memory is retried in halves, and later batches get a smaller
token budget. Any other failure is retried with half of the requests, until only the request that causes it fails. A
score that is not finite fails its request.

The thread ends if the device fails for good: a CUDA error such as an illegal address makes every later call fail, too.
All requests, also later ones, then fail with DeviceFailure.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from local_rerank import forks
from local_rerank.errors import (
    DeviceFailure,
    EngineFailure,
    LocalRerankError,
    ModelUnavailable,
    OutOfMemory,
    Overloaded,
    UnusableAfterFork,
)
from local_rerank.requests.launches import Launch, Launched, Launches, Outcome, outcome_of
from local_rerank.requests.pair import Pair, num_batch_tokens
from local_rerank.requests.pending import PendingRequest
from local_rerank.requests.scheduler import DrainRate, Entry, Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """The size and duration of a batch, for metrics."""

    num_requests: int
    num_pairs: int
    num_tokens: int  # that went through the model
    num_prefix_tokens_saved: int  # that sharing prefixes saved
    seconds: float


class Worker:
    """Owns the one thread that scores. The thread starts with the first request, also in a forked child."""

    def __init__(
        self,
        score: Callable[[Sequence[Pair]], list[float]],
        *,
        max_batch_tokens: int,
        max_queued_tokens: int,
        one_pair_at_a_time: bool = False,
        launch: Launch | None = None,
        device: str = "cpu",
        is_alive: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`score`: pairs to log-odds; `one_pair_at_a_time`: each pair in a forward pass of its own.

        `launch`: like `score`, but returns before the device is done, with a function that waits for the log-odds.
        `device`: the model's, for error messages; a forked child can use only a model on the CPU.
        `is_alive`: whether the device still computes; called after a failure. `clock`: seconds.
        """
        self.on_batch: Callable[[BatchReport], None] | None = None
        self.on_failure: Callable[[DeviceFailure], None] = lambda failure: None
        self._score_pairs = score
        self._launch = None if one_pair_at_a_time else launch
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._one_pair_at_a_time = one_pair_at_a_time
        self._device = device
        self._is_alive, self._clock = is_alive, clock
        self._failed: str | None = None  # why the device is not used any more
        self._ids = itertools.count()
        self._closing = self._is_in_child = False
        self._set_up()
        forks.renew_in_child(self)

    def _set_up(self) -> None:
        self._scheduler = Scheduler(self._max_batch_tokens)
        self._drain_rate = DrainRate()
        self._requests: dict[int, PendingRequest] = {}
        self._changed = threading.Condition()  # guards scheduler, drain rate, requests, closing and the thread's start
        self._last_done = 0.0
        self._thread: threading.Thread | None = None

    def renew(self) -> None:
        """After a fork: queued requests are answered by the parent."""
        self._is_in_child = True
        self._set_up()

    def _check_fork(self) -> None:
        """Raises UnusableAfterFork."""
        if self._is_in_child:
            if self._device != "cpu":
                raise UnusableAfterFork(f"the model is on {self._device}, which a forked process cannot use")
            forks.check_usable()

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
        """The token budget of a batch; below the configured one while memory is short."""
        return self._scheduler.max_batch_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Queued tokens processed per second; None before the first batch."""
        with self._changed:
            return self._drain_rate.tokens_per_second

    def retry_after(self) -> float:
        """Estimated seconds until one of the queued requests is done."""
        with self._changed:
            num_requests = max(1, self._scheduler.num_queued_requests)
            return self._drain_rate.seconds_for(self._scheduler.num_queued_tokens / num_requests)

    def check_room(self, num_tokens: int = 1) -> None:
        """Check that the queue has room for `num_tokens`; an empty queue accepts any request.

        Raises Overloaded, DeviceFailure or UnusableAfterFork.
        """
        self._check_fork()
        if self._failed is not None:
            raise DeviceFailure(self._failed)
        limit = self._max_queued_tokens
        with self._changed:
            queued = self._scheduler.num_queued_tokens
            if queued and queued + num_tokens > limit:
                what = f"{queued} tokens are queued, this request has {num_tokens} or more"
                after = self._drain_rate.seconds_for(min(queued, queued + num_tokens - limit))
                raise Overloaded(f"{what}; at most {limit} can be queued", retry_after=after)

    def submit(self, request: PendingRequest) -> None:
        """Queue a request; when its future is done or cancelled, what is left of it is removed.

        Raises Overloaded, ModelUnavailable, DeviceFailure or UnusableAfterFork.
        """
        with self._changed:
            if self._closing and self._failed is None:
                raise ModelUnavailable("the engine is closing")
            self.check_room(num_batch_tokens(request.tokenized.pairs))
            number = next(self._ids)
            self._requests[number] = request
            self._scheduler.add(number, request.tokenized.pairs)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="local-rerank-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        request.future.add_done_callback(lambda _: self._drop(number))  # cancelled, or its timeout has passed

    def close(self) -> None:
        """Finish the running batch, fail queued requests with ModelUnavailable, and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if (thread := self._thread) is not None and thread is not threading.current_thread():  # not in its callback
            thread.join()

    def _work(self) -> None:
        launches = None if self._launch is None else Launches(self._launch, self._changed, self._clock)
        with suppress(DeviceFailure):
            self._run_batches(launches)
        for number in list(self._requests):
            closing = ModelUnavailable("the engine is closing")
            self._fail(number, DeviceFailure(self._failed) if self._failed else closing)
        if launches is not None:  # last, because after a failure it waits for a batch that nobody takes
            launches.close()

    def _run_batches(self, launches: Launches | None) -> None:
        """Score and deliver batches until closing. Raises DeviceFailure."""
        while (batch := self._next_batch(launches)) is not None:
            if launches is None:
                self._finish(Launched(batch, self._clock()))
            elif batch:
                launches.launch(batch)
            else:
                self._finish(launches.take())
        while launches:
            self._finish(launches.take())

    def _next_batch(self, launches: Launches | None) -> list[Entry] | None:
        """Wait for the next batch; empty if a launched one is done before that. None when closing."""
        with self._changed:
            while not self._closing:
                if (not launches or launches.has_room) and (batch := self._scheduler.next_batch()):
                    now = time.perf_counter()
                    for request in {self._requests[entry.request_id] for entry in batch}:
                        request.first_batch = request.first_batch or now
                    return batch
                if launches and launches.is_first_done:
                    return []
                self._changed.wait()  # for a request or for a batch that is done
            return None

    def _finish(self, launched: Launched) -> None:
        """Score a batch that has no outcome yet, and deliver the results. Raises DeviceFailure."""
        batch = launched.batch
        try:
            self._score(batch, launched.outcome)
            now = self._clock()
            self._report(batch, now - max(launched.started, self._last_done))
            self._last_done = now
        except DeviceFailure:
            raise
        except Exception as error:  # a bug of ours: every waiting caller must get an error
            numbers = {entry.request_id for entry in batch}
            _log_failure(f"a batch of {len(batch)} pairs could not be delivered", self._names(numbers), error)
            for number in numbers:
                self._fail(number, EngineFailure(f"scoring failed: {type(error).__name__}: {error}"))

    def _give_up(self, batch: list[Entry], error: Exception) -> DeviceFailure:
        """Refuse requests from now on, and say why in one line of the log, with the requests of the batch."""
        what = str(error).partition("\n")[0]  # torch's other lines say how to debug it
        with self._changed:
            self._failed = f"{self._device} failed: {type(error).__name__}: {what}"
        failure, names = DeviceFailure(self._failed), self._names(entry.request_id for entry in batch)
        logger.critical("%s; requests: %s", failure, ", ".join(names), extra={"request_ids": names})
        logger.debug("where the device failed", exc_info=error)
        self.on_failure(failure)
        return failure

    def _score(self, batch: list[Entry], outcome: Outcome | None = None) -> bool:
        """Score a batch without an outcome, and deliver it; whether all requests succeeded. Raises DeviceFailure."""
        outcome = outcome_of(lambda: self._log_odds(batch)) if outcome is None else outcome
        if isinstance(outcome, list):
            with self._changed:
                self._scheduler.raise_budget()
            return self._deliver(batch, outcome)
        if not self._is_alive():
            raise self._give_up(batch, outcome)
        if isinstance(outcome, OutOfMemory):
            return self._score_with_less_memory(batch, outcome)
        return self._score_apart(batch, outcome)

    def _log_odds(self, batch: list[Entry]) -> list[float]:
        parts = [[entry] for entry in batch] if self._one_pair_at_a_time else [batch]
        return [value for part in parts for value in self._score_pairs([entry.pair for entry in part])]

    def _score_with_less_memory(self, batch: list[Entry], error: OutOfMemory) -> bool:
        if len(batch) == 1:
            _log_failure("a single pair does not fit into memory", self._names([batch[0].request_id]), error)
            self._fail(batch[0].request_id, error)
            return False
        num_tokens = num_batch_tokens(entry.pair for entry in batch)
        with self._changed:
            self._scheduler.lower_budget(num_tokens)
        what = "out of memory with %d tokens; batches have at most %d from now on"
        logger.warning(what, num_tokens, self._scheduler.max_batch_tokens)
        half = len(batch) // 2
        served = [self._score(part) for part in (batch[:half], batch[half:])]
        return all(served)

    def _score_apart(self, batch: list[Entry], error: Exception) -> bool:
        """Retry halves of the requests until the one that fails is found; it is logged once, then."""
        names = self._names(numbers := list(dict.fromkeys(entry.request_id for entry in batch)))
        if len(numbers) == 1:
            _log_failure(f"a batch of {len(batch)} pairs failed", names, error)
            self._fail(numbers[0], EngineFailure(f"the model failed: {type(error).__name__}: {error}"))
            return False
        first = set(numbers[: len(numbers) // 2])
        served = [self._score([each for each in batch if (each.request_id in first) is part]) for part in (True, False)]
        if all(served):
            _log_failure(f"a batch of {len(batch)} pairs failed once and succeeded in halves", names, error)
        return all(served)

    def _deliver(self, batch: list[Entry], log_odds: list[float]) -> bool:
        """Store log-odds in their requests and resolve those that are complete."""
        by_number: dict[int, list[Entry]] = {}
        for entry, value in zip(batch, log_odds, strict=True):
            if (request := self._requests.get(entry.request_id)) is not None:
                request.log_odds[entry.position] = value
                by_number.setdefault(entry.request_id, []).append(entry)
        served = [self._deliver_to(number, entries) for number, entries in by_number.items()]
        return all(served)

    def _deliver_to(self, number: int, entries: list[Entry]) -> bool:
        request = self._requests.get(number)
        if request is None:  # cancelled a moment ago
            return True
        request.num_computed_tokens += num_batch_tokens([entry.pair for entry in entries])
        for entry in entries:
            if not math.isfinite(value := request.log_odds[entry.position]):
                failure = EngineFailure(f"the model gave {value} as log-odds")
                _log_failure(f"pair {entry.position} has no score", self._names([number]), failure)
                self._fail(number, failure)
                return False
        request.report()
        if request.is_complete:
            if pairs := request.more_pairs():  # of a request that was admitted before
                with self._changed:
                    if number in self._requests:  # else cancelled a moment ago
                        self._scheduler.add(number, pairs, first=len(request.log_odds))
            else:
                self._drop(number)
                request.answer()
        return True

    def _report(self, batch: list[Entry], seconds: float) -> None:
        pairs = [entry.pair for entry in batch]
        num_document_tokens = sum(pair.num_document_tokens for pair in pairs)
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

    def _names(self, numbers: Iterable[int]) -> list[str]:
        """Names, for the log, of those of the requests that have no answer yet."""
        requests = {number: self._requests.get(number) for number in numbers}
        return [request.name or f"number {number}" for number, request in requests.items() if request is not None]

    def _fail(self, number: int, error: LocalRerankError) -> None:
        if (request := self._drop(number)) is not None:
            request.fail(error)

    def _drop(self, number: int) -> PendingRequest | None:
        with self._changed:
            self._scheduler.discard(number)
            return self._requests.pop(number, None)


def _log_failure(what: str, names: list[str], error: Exception) -> None:
    logger.error("%s; requests: %s", what, ", ".join(names), exc_info=error, extra={"request_ids": names})
