"""The thread count follows the load: a `ThreadPolicy` on simulated machines with a simulated clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from local_rerank.engine.cpu.thread_policy import Load, ThreadPolicy

QUIET = Load(waited=0.01, idle_cpus=0.0)


@dataclass
class Machine:
    """Runs batches of layers under a policy."""

    policy: ThreadPolicy
    seconds: Callable[[int], float]  # of a layer, by thread count
    load: Callable[[int], Load]  # by thread count
    num_layers: int = 5
    warm_up_seconds: float = 0.0  # extra time of the first layer after a change of the thread count
    now: float = 100.0
    counts: list[int] = field(default_factory=list)  # thread count of each layer
    num_samples: int = 0
    num_run: int = 0  # layers

    def run(self, seconds: float) -> list[int]:
        """Run layers for some time; returns the thread count of each layer."""
        self.counts, end = [], self.now + seconds
        while self.now < end:
            if self.num_run % self.num_layers == 0:
                self.policy.begin_batch()
            self.num_run += 1
            self._run_layer()
        return self.counts

    def _run_layer(self) -> None:
        count = self.policy.count
        spent = self.seconds(count) + (self.warm_up_seconds if self.counts and self.counts[-1] != count else 0.0)
        self.counts.append(count)
        self.now += spent
        self.policy.add_layer(spent, self.now)
        if self.policy.wants_load(self.now):
            self.num_samples += 1
            self.policy.add_load(self.load(count), self.now)


def even(seconds: float) -> Callable[[int], float]:
    """Layer times on an idle machine."""
    return lambda count: seconds / count


def shared(seconds: float, *, num_free: int, slowness: float = 4.0) -> Callable[[int], float]:
    """Layer times where more threads than free CPUs are slower than one thread."""
    return lambda count: seconds / count if count <= num_free else seconds * slowness


def contended(num_free: int) -> Callable[[int], Load]:
    return lambda count: Load(waited=max(0.0, count - num_free) / count, idle_cpus=max(0.0, num_free - count))


def test_an_idle_machine_is_sampled_twice_a_second_and_never_tried() -> None:
    machine = Machine(ThreadPolicy(2), even(0.01), lambda _: QUIET)
    assert set(machine.run(10)) == {2}
    assert machine.num_samples <= 21


@pytest.mark.parametrize("seconds", [0.0005, 0.01, 0.2])
@pytest.mark.parametrize("num_layers", [5, 27])
def test_contention_reduces_the_threads_and_idle_cpus_restore_them(seconds: float, num_layers: int) -> None:
    policy = ThreadPolicy(2)
    machine = Machine(policy, shared(seconds, num_free=1), contended(1), num_layers=num_layers)
    counts = machine.run(10)
    assert policy.settled == 1
    assert counts[-1] == 1
    assert counts.count(2) <= 2 + 0.5 / (4 * seconds) + max(6, 0.1 / seconds)  # until the first sample, and one trial
    machine.seconds, machine.load = even(seconds), contended(2)
    machine.run(4)
    assert policy.settled == 2


def test_more_threads_are_not_tried_while_no_cpu_is_idle() -> None:
    machine = Machine(ThreadPolicy(2), shared(0.01, num_free=1), contended(1))
    machine.run(3)
    assert set(machine.run(30)) == {1}


def test_more_threads_are_tried_occasionally_if_idle_time_is_unknown() -> None:
    policy = ThreadPolicy(2)
    machine = Machine(policy, shared(0.01, num_free=1), lambda count: Load(waited=0.5 * (count - 1), idle_cpus=None))
    machine.run(3)
    counts = machine.run(60)
    assert policy.settled == 1
    assert 0 < counts.count(2) < 0.02 * len(counts)
    machine.seconds, machine.load = even(0.01), lambda _: Load(waited=0.0, idle_cpus=None)
    machine.run(4.9)
    assert policy.settled == 2


def test_the_thread_count_settles_at_the_number_of_free_cpus() -> None:
    policy = ThreadPolicy(8)
    machine = Machine(policy, shared(0.08, num_free=5), contended(5))
    counts = machine.run(10)
    assert policy.settled == 5
    assert 1 not in counts
    machine.load = contended(8)
    machine.seconds = even(0.08)
    machine.run(10)
    assert policy.settled == 8


@pytest.mark.parametrize("with_one", [0.0095, 0.0105])
def test_a_count_that_is_not_clearly_faster_is_rejected_and_tried_less_often(with_one: float) -> None:
    """Other threads of the process make the pool's threads wait, but two are as fast nevertheless."""
    policy = ThreadPolicy(2)
    machine = Machine(policy, lambda count: (0.0, with_one, 0.010)[count], lambda _: Load(waited=0.3, idle_cpus=0.0))
    machine.run(60)
    assert policy.settled == 2
    counts = machine.run(60)
    assert 0 < counts.count(1) < 0.03 * len(counts)


def test_the_pause_after_a_trial_without_change_is_proportional_to_its_duration() -> None:
    policy = ThreadPolicy(2)
    machine = Machine(policy, even(1.0), lambda _: Load(waited=0.3, idle_cpus=0.0), num_layers=27)
    counts = machine.run(600)
    assert policy.settled == 2
    assert counts.count(1) < 0.05 * len(counts)


def test_the_first_layer_after_a_change_is_warm_up() -> None:
    """Code generation and cold caches make it slower than the old count is under contention."""
    policy = ThreadPolicy(2)
    machine = Machine(policy, shared(0.01, num_free=1, slowness=1.5), contended(1), warm_up_seconds=0.5)
    machine.run(20)
    assert policy.settled == 1


def test_batch_sizes_do_not_matter() -> None:
    """Counts are compared within a batch; here batches alternate between 1 and 10 ms per layer."""
    policy = ThreadPolicy(2)
    seconds = 0.001
    machine = Machine(policy, lambda count: seconds / count, lambda _: Load(waited=0.3, idle_cpus=0.0))
    for _ in range(2000):
        seconds = 0.011 - seconds
        counts = [machine.run(1e-9)[0] for _ in range(machine.num_layers)]
        assert policy.settled == counts[0] == 2


def test_one_thread_is_never_reduced() -> None:
    machine = Machine(ThreadPolicy(1), even(0.01), lambda _: Load(waited=0.9, idle_cpus=0.0))
    assert set(machine.run(5)) == {1}
