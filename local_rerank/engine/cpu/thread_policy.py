"""Decide how many threads to use while other processes compete for the CPUs: layer times and load -> thread count.

Pure: the clock is an argument, and nothing is read or set. If the threads wait for CPUs, a trial starts: decoder layers
of the same batch alternate between the current thread count and a smaller one, and the faster count wins. While the
count is reduced and CPUs are idle, a larger one is tried in the same way. Hysteresis: fewer threads must be clearly
faster, and the time between trials that change nothing grows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

POLL_SECONDS = 0.5  # between two samples of the load
MAX_WAITED = 0.05  # no trial up to this share of waiting; alone on two cores it is 0.01 to 0.02
MIN_PAIRS = 3
MIN_TRIAL_SECONDS = 0.1  # of measured layers, so that a few scheduler time slices do not decide
CLEAR_RATIO = 1.5  # two pairs are enough if one count is this much faster
CLEAR_PAIRS = 2
MAX_RATIO_OF_FEWER = 0.9  # fewer threads win if their time is below this share; more threads if they are faster at all
BACKOFF_SECONDS = (1.0, 4.0)  # pause after a trial that changed nothing: initial and maximum
BACKOFF_RATIO = 10  # minimum ratio of the pause to the trial's duration, because a trial may run slower layers
MIN_LAYERS = 4  # per batch; fewer complete no pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The load since the last sample."""

    waited: float  # share of the threads' runnable time in which they waited for a CPU
    idle_cpus: float | None  # idle CPUs among those that this process may use; None if unknown


@dataclass(slots=True)
class _Trial:
    """A comparison of two thread counts, which alternate between the layers of a batch.

    The first layer of a batch and the first after a change are warm-up: oneDNN generates code for each thread count,
    and caches are cold.
    """

    counts: tuple[int, int]  # current and other
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of the layers in complete pairs, per count
    num_pairs: int = 0
    turn: int = 0  # index into `counts` of the layer that runs
    is_warm_up: bool = True
    unpaired: float = 0.0  # seconds of the current count's layer in the pair that is not complete yet
    spent: float = 0.0  # seconds of all layers

    def begin_batch(self) -> None:
        self.turn, self.is_warm_up = 0, True

    def add_layer(self, seconds: float) -> None:
        self.spent += seconds
        if self.is_warm_up:
            self.is_warm_up = False
            return
        if self.turn == 0:
            self.unpaired = seconds
        else:
            self.seconds[0] += self.unpaired
            self.seconds[1] += seconds
            self.num_pairs += 1
        self.turn, self.is_warm_up = 1 - self.turn, True

    @property
    def is_decided(self) -> bool:
        fast, slow = sorted(self.seconds)
        num_needed = CLEAR_PAIRS if slow > fast * CLEAR_RATIO else MIN_PAIRS
        return self.num_pairs >= num_needed and fast + slow >= MIN_TRIAL_SECONDS

    @property
    def winner(self) -> int:
        current, other = self.counts
        limit = MAX_RATIO_OF_FEWER if other < current else 1.0
        return other if self.seconds[1] < self.seconds[0] * limit else current


class ThreadPolicy:
    """Decides after each layer how many threads run the next one."""

    def __init__(self, max_threads: int) -> None:
        self.settled = max_threads  # the count outside of trials
        self._max_threads = max_threads
        self._trial: _Trial | None = None
        self._next_poll = 0.0
        self._next_trial = 0.0
        self._backoff = BACKOFF_SECONDS[0]

    @property
    def count(self) -> int:
        """The thread count for the next layer."""
        return self.settled if self._trial is None else self._trial.counts[self._trial.turn]

    @property
    def is_reduced(self) -> bool:
        return self.settled < self._max_threads

    @property
    def is_trying(self) -> bool:
        return self._trial is not None

    def wants_load(self, now: float) -> bool:
        return self._trial is None and now >= self._next_poll

    def add_load(self, load: Load, now: float) -> None:
        """Start a trial if the load is a reason for one."""
        self._next_poll = now + POLL_SECONDS
        if now < self._next_trial:
            return
        other = self._candidate(load)
        if other != self.settled:
            self._trial = _Trial((self.settled, other))

    def _candidate(self, load: Load) -> int:
        """The thread count to try; the settled one if there is nothing to try."""
        if load.waited > MAX_WAITED:
            return max(1, min(self.settled - 1, int(self.settled * (1 - load.waited))))
        if load.idle_cpus is None:
            return self._max_threads
        return min(self._max_threads, self.settled + round(load.idle_cpus))

    def begin_batch(self) -> None:
        if self._trial is not None:
            self._trial.begin_batch()

    def add_layer(self, seconds: float, now: float) -> None:
        if self._trial is None:
            return
        self._trial.add_layer(seconds)
        if self._trial.is_decided:
            self._end(self._trial, now)

    def _end(self, trial: _Trial, now: float) -> None:
        self._trial = None
        self._next_poll = now + POLL_SECONDS
        if trial.winner != self.settled:
            self.settled, self._backoff = trial.winner, BACKOFF_SECONDS[0]
            return
        self._next_trial = now + max(self._backoff, trial.spent * BACKOFF_RATIO)
        self._backoff = min(2 * self._backoff, BACKOFF_SECONDS[1])
