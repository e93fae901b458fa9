"""How many threads should compute while other processes want the CPUs: measured times in, a number out.

Pure: time is passed in, and nothing is read or set. As long as the threads do not wait for a CPU nothing is tried. When
they do, decoder layers of the same batch run with the present number of threads and with a smaller one in turn, and the
faster stays. While the number is reduced and CPUs are idle, a larger one is tried in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LOOK_SECONDS = 0.5  # between two looks at the load
MAX_WAITED = 0.05  # share of waiting that is not worth a trial; alone on two cores it is .01 to .02
MIN_PAIRS = 3
MIN_TRIAL_SECONDS = 0.1  # of layers that count, so that short ones are not judged by a few time slices of the kernel
CLEAR_RATIO = 1.5  # by which one number is so much faster that two pairs are enough
CLEAR_PAIRS = 2
MAX_RATIO_OF_FEWER = 0.9  # of the times: fewer threads must be clearly faster, more threads only faster
REST_SECONDS = (1.0, 4.0)  # after a trial that changed nothing: at first, and after several
REST_RATIO = 10  # of the rest to the time of the trial, whose layers may be slower
MIN_LAYERS = 4  # of a batch, without which no pair is complete


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What happened since the last look."""

    waited: float  # share of the time in which the threads could have run that they waited for a CPU
    idle_cpus: float | None  # of those that this process may use; None where it is not known


@dataclass(slots=True)
class _Trial:
    """Layers with the present number of threads and another, in turn within a batch.

    The first layer of a batch and the first after a change do not count: oneDNN generates code for each number of
    threads, and caches are cold.
    """

    counts: tuple[int, int]  # present and other
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of the layers of complete pairs
    num_pairs: int = 0
    turn: int = 0  # whose layer runs: an index of `counts`
    is_first: bool = True
    present: float = 0.0  # seconds of the layer whose partner is still to come
    spent: float = 0.0  # seconds of all layers

    def begin_batch(self) -> None:
        self.turn, self.is_first = 0, True

    def add_layer(self, seconds: float) -> None:
        self.spent += seconds
        if self.is_first:
            self.is_first = False
            return
        if self.turn == 0:
            self.present = seconds
        else:
            self.seconds[0] += self.present
            self.seconds[1] += seconds
            self.num_pairs += 1
        self.turn, self.is_first = 1 - self.turn, True

    @property
    def is_decided(self) -> bool:
        fast, slow = sorted(self.seconds)
        num_needed = CLEAR_PAIRS if slow > fast * CLEAR_RATIO else MIN_PAIRS
        return self.num_pairs >= num_needed and fast + slow >= MIN_TRIAL_SECONDS

    @property
    def winner(self) -> int:
        present, other = self.counts
        limit = MAX_RATIO_OF_FEWER if other < present else 1.0
        return other if self.seconds[1] < self.seconds[0] * limit else present


class ThreadPolicy:
    """Decides after each layer how many threads compute the next; at most `most`."""

    def __init__(self, most: int) -> None:
        self.settled = most  # the number outside of trials
        self._most = most
        self._trial: _Trial | None = None
        self._next_look = 0.0
        self._next_trial = 0.0
        self._rest = REST_SECONDS[0]

    @property
    def count(self) -> int:
        """Threads of the next layer."""
        return self.settled if self._trial is None else self._trial.counts[self._trial.turn]

    @property
    def is_reduced(self) -> bool:
        return self.settled < self._most

    @property
    def is_trying(self) -> bool:
        return self._trial is not None

    def wants_load(self, now: float) -> bool:
        return self._trial is None and now >= self._next_look

    def look(self, load: Load, now: float) -> None:
        """Start a trial where the load is a reason for one."""
        self._next_look = now + LOOK_SECONDS
        if now < self._next_trial:
            return
        other = self._candidate(load)
        if other != self.settled:
            self._trial = _Trial((self.settled, other))

    def _candidate(self, load: Load) -> int:
        if load.waited > MAX_WAITED:
            return min(max(1, self.settled - 1), max(1, int(self.settled * (1 - load.waited))))
        if load.idle_cpus is None:
            return self._most
        return min(self._most, self.settled + round(load.idle_cpus))

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
        self._next_look = now + LOOK_SECONDS
        if trial.winner != self.settled:
            self.settled, self._rest = trial.winner, REST_SECONDS[0]
            return
        self._next_trial = now + max(self._rest, trial.spent * REST_RATIO)
        self._rest = min(2 * self._rest, REST_SECONDS[1])
