"""The thread count of torch's CPU operators: the user's, or one that follows the limits and the load.

Without a user's setting, the count is at most that of `cpu_limits.py`. On Linux it also follows the load between
decoder layers: `ThreadPolicy` decides from layer times and from the scheduler's statistics.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from local_rerank.engine.cpu.cpu_limits import cpu_limits
from local_rerank.engine.cpu.thread_policy import MIN_LAYERS, Load, ThreadPolicy

logger = logging.getLogger(__name__)

POOL_NAME = "rerank-compute"  # at most 15 characters; the threads of OpenMP's pool inherit it
MIN_NANOSECONDS = 20_000_000  # of running and waiting; below that their ratio is noise

Counters = dict[str, tuple[int, int]]


class Threads:
    """The thread count of one engine. Use it in the compute thread, because libgomp keeps one count per thread."""

    def __init__(self, count: int, reason: str, *, is_fixed: bool) -> None:
        logger.info("Using %d thread%s: %s", count, "" if count == 1 else "s", reason)
        self.count = count  # maximum
        self.reason = reason  # for this maximum
        self._follows_load = not is_fixed and count > 1 and Path("/proc/self/schedstat").exists()
        self._governor: _Governor | None = None

    @classmethod
    def choose(cls, wanted: int | None, *, is_fixed: bool) -> Threads:
        """`wanted`: the user's count. Without one, the process's limits decide, and the load unless `is_fixed`."""
        default = default_count()
        if wanted is not None:
            return cls(wanted, "set by the user", is_fixed=True)
        limits = cpu_limits()
        if default < limits.num_threads:
            return cls(default, "torch's default (OMP_NUM_THREADS or set by the program)", is_fixed=is_fixed)
        return cls(limits.num_threads, limits.reason, is_fixed=is_fixed)

    @property
    def current(self) -> int:
        """The count for the next layer."""
        return self.count if self._governor is None else self._governor.count

    def watch(self, layers: nn.ModuleList) -> None:
        """Follow the load between these layers, unless the count is fixed."""
        if self._follows_load and len(layers) >= MIN_LAYERS:
            for layer in layers:
                layer.register_forward_hook(self._after_layer)

    def begin_batch(self) -> None:
        """Set torch's thread count, which another engine of this process may have changed."""
        if self._follows_load and (self._governor is None or self._governor.thread != threading.get_native_id()):
            self._govern()  # the first time, and after a fork
        if self._governor is not None:
            self._governor.begin_batch()
        _set_count(self.current)

    def _govern(self) -> None:
        try:
            self._governor = _Governor(self.count)
        except OSError as error:  # a sandbox with an incomplete or read-only /proc
            self._governor, self._follows_load = None, False
            logger.info("the number of threads does not follow the load: %s", error)

    def _after_layer(self, *_: Any) -> None:
        if self._governor is not None:
            self._governor.after_layer()
            _set_count(self.current)


@cache
def default_count() -> int:
    """torch's default, read before we set another count."""
    return torch.get_num_threads()


def _set_count(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


class _Governor:
    """Feeds a policy with layer times and load, in one thread."""

    def __init__(self, max_threads: int) -> None:
        self.thread = threading.get_native_id()
        self._policy = ThreadPolicy(max_threads)
        self._sensor = LoadSensor()
        self._since = 0.0

    @property
    def count(self) -> int:
        return self._policy.count

    def begin_batch(self) -> None:
        self._policy.begin_batch()
        self._since = time.perf_counter()

    def after_layer(self) -> None:
        now = time.perf_counter()
        policy, before, was_trying = self._policy, self._policy.settled, self._policy.is_trying
        policy.add_layer(now - self._since, now)
        if was_trying and not policy.is_trying:
            self._sensor.read()  # the load during a trial must not cause another
        elif policy.wants_load(now):
            policy.add_load(self._sensor.read(with_idle=policy.is_reduced), now)
        if policy.settled != before:
            logger.info("Threads: %d instead of %d; faster under the current load", policy.settled, before)
        self._since = time.perf_counter()


class LoadSensor:
    """Linux's counters for the threads of OpenMP's pool and for the CPUs that this process may use."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        """Call this in the compute thread before its pool has threads: they inherit its name."""
        self._proc = proc
        (proc / f"self/task/{threading.get_native_id()}/comm").write_text(POOL_NAME)
        self._names: dict[str, str] = {}  # by thread id
        self._times: Counters = {}
        self._ticks: Counters = {}
        self.read()

    def read(self, *, with_idle: bool = True) -> Load:
        """The load since the last call. `idle_cpus` is since the last call with `with_idle`."""
        times = dict(self.pool_times())
        threads = _growth(self._times, times)
        self._times = times
        waited = sum(waited for _, waited in threads)
        total = waited + sum(ran for ran, _ in threads)
        return Load(
            waited=waited / total if total > MIN_NANOSECONDS else 0.0,
            idle_cpus=self._read_idle() if with_idle else None,
        )

    def _read_idle(self) -> float | None:
        ticks = dict(self._read_ticks())
        shares = [idle / total for idle, total in _growth(self._ticks, ticks) if total]
        self._ticks = ticks
        return sum(shares) if shares else None

    def pool_times(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Nanoseconds that each thread of the pool ran and waited for a CPU, by thread id."""
        tasks = f"{self._proc}/self/task"
        for thread in os.listdir(tasks):  # noqa: PTH208  # pathlib takes three times as long
            with contextlib.suppress(OSError):  # the thread has ended
                if thread not in self._names:
                    self._names[thread] = _text(f"{tasks}/{thread}/comm").strip()
                if self._names[thread] == POOL_NAME:
                    ran, waited, _ = _text(f"{tasks}/{thread}/schedstat").split()
                    yield thread, (int(ran), int(waited))

    def _read_ticks(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Idle ticks and all ticks of each CPU."""
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        for line in (self._proc / "stat").read_text().splitlines():
            name, *fields = line.split()
            if name in allowed:
                ticks = [int(field) for field in fields[:8]]  # without guest time, which user time includes
                yield name, (ticks[3] + ticks[4], sum(ticks))  # idle and iowait


def _text(path: str) -> str:
    with open(path) as file:  # noqa: PTH123  # as above
        return file.read()


def _growth(before: Counters, now: Counters) -> list[tuple[int, int]]:
    """Increases of the counters that existed before."""
    return [(a - before[name][0], b - before[name][1]) for name, (a, b) in now.items() if name in before]
