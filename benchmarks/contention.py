"""Compare the adaptive thread count with fixed ones while other processes or quotas limit the CPUs.

    python -m benchmarks.contention [--model FOLDER] [--seconds 2] [--rounds 3] [--only quota]

Prints pairs per second next to a busy process (pinned to a core or not) and under cgroup quotas, the time to full speed
after that process ends, and the cost of adapting on an idle machine. Quotas need a writable `cpu` controller of cgroup
v1; everything then runs in a cgroup with a large weight, to reduce the influence of other work.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from local_rerank.engine.cpu.process_setup import configure_process

configure_process()  # must run before torch is imported

from local_rerank import Reranker  # noqa: E402
from local_rerank.engine.cpu.cpu_limits import cpu_limits  # noqa: E402

CPU_CONTROLLER = Path("/sys/fs/cgroup/cpu")
GROUP = "local-rerank-contention"
WEIGHT = 262_144  # the maximum; the default is 1,024
DOCUMENTS = ["word " * 60] * 8
FULL_SPEED = 1.1  # relative to the time of a batch on an idle machine
BATCHES_AT_FULL_SPEED = 5


@dataclass(frozen=True)
class Case:
    name: str
    neighbour: str | None = None  # pinned or free
    quota: float | None = None  # CPUs


CASES = (
    Case("alone"),
    Case("busy process on one core", neighbour="pinned"),
    Case("busy process, not pinned", neighbour="free"),
    Case("quota of 1 CPU", quota=1),
    Case("quota of 1.5 CPUs", quota=1.5),
    Case("quota of 1 CPU, busy process", neighbour="pinned", quota=1),
    Case("quota of 1.5 CPUs, busy process", neighbour="pinned", quota=1.5),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=2.0, help="per turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="run only cases whose name contains this, or 'recovery' or 'cost'")
    options = parser.parse_args()
    most = cpu_limits().num_threads
    if most == 1:
        sys.exit("this machine has one CPU, so there is nothing to compare")
    with ExitStack() as stack:
        group = stack.enter_context(cpu_group())
        fixed = {
            f"{count} thread{'s' if count > 1 else ''}": stack.enter_context(load(options.model, count))
            for count in (1, most)
        }
        print(f"{'':34}{''.join(f'{name:>12}' for name in (*fixed, 'auto'))}   auto / better (threads at load, at end)")
        for case in CASES:
            if options.only in case.name:
                if case.quota is not None and group is None:
                    print(f"{case.name:34}not measured: {CPU_CONTROLLER} is not cgroup v1 or cannot be written")
                else:
                    compare(case, fixed, group, options)
        if options.only in "recovery":
            with load(options.model) as auto:
                recovery(auto, group)
        if options.only in "cost":
            with load(options.model) as auto, load(options.model, most) as again:
                cost(auto, fixed[f"{most} threads"], again, options.seconds * options.rounds * 3)


def load(model: str | None, threads: int | None = None) -> Reranker:
    return Reranker(model, device="cpu", threads=threads)


def compare(case: Case, fixed: dict[str, Reranker], group: Path | None, options: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = {}
    with quota(group, case.quota), neighbour(case.neighbour, group), load(options.model) as auto:
        systems = {**fixed, "auto": auto}
        for reranker in systems.values():
            run(reranker, 1.0)
        for _ in range(options.rounds):
            for name, reranker in systems.items():
                rates.setdefault(name, []).append(run(reranker, options.seconds))
        at_load, at_end = auto.info.threads, threads_of(auto)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["auto"] / max(medians[name] for name in fixed)
    print(f"{case.name:34}{''.join(f'{rate:12.1f}' for rate in medians.values())}   {ratio:.2f} ({at_load}, {at_end})")


def recovery(auto: Reranker, group: Path | None) -> None:
    """Print the seconds from the end of a busy process to full speed."""
    alone = statistics.median(batch(auto) for _ in range(60))
    with neighbour("pinned", group):
        run(auto, 5.0)
        beside = threads_of(auto)
    ended, seconds = time.perf_counter(), list[float]()
    while (
        len(seconds) < BATCHES_AT_FULL_SPEED or statistics.median(seconds[-BATCHES_AT_FULL_SPEED:]) > alone * FULL_SPEED
    ):
        seconds.append(batch(auto))
        if time.perf_counter() - ended > 60:
            sys.exit("no full speed within 60 s")
    print(f"full speed {time.perf_counter() - ended:.1f} s after the busy process ended ({beside} thread beside it)")


def cost(auto: Reranker, fixed: Reranker, again: Reranker, seconds: float) -> None:
    """Print the cost of adapting on an idle machine, and the spread between two equal systems."""
    systems, times = (fixed, auto, again), ([], [], [])  # type: tuple[Reranker, ...], tuple[list[float], ...]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for index in random.sample(range(len(systems)), len(systems)):
            times[index].append(batch(systems[index]))
    first, second, third = (statistics.median(of_system) for of_system in times)
    print(f"alone, time of a batch: auto {second / first:.3f} of fixed threads, an equal system {third / first:.3f}")


def run(reranker: Reranker, seconds: float) -> float:
    """Return pairs per second."""
    start, num_pairs = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        batch(reranker)
        num_pairs += len(DOCUMENTS)
    return num_pairs / (time.perf_counter() - start)


def batch(reranker: Reranker) -> float:
    start = time.perf_counter()
    reranker.rank("a query", DOCUMENTS)
    return time.perf_counter() - start


def threads_of(reranker: Reranker) -> int:
    threads = reranker.engine.threads
    return threads.current


@contextmanager
def neighbour(kind: str | None, group: Path | None) -> Iterator[None]:
    """Run a process that keeps one CPU busy."""
    if kind is None:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            if kind == "pinned":
                os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
            if group is not None:
                (group / "cgroup.procs").write_text(str(process.pid))
            yield
        finally:
            process.kill()


@contextmanager
def cpu_group() -> Iterator[Path | None]:
    """Make a cgroup with a large weight and move this process into a group below it; yields None if impossible."""
    group = CPU_CONTROLLER / GROUP
    try:
        (group / "measured").mkdir(parents=True, exist_ok=True)
        (group / "cpu.shares").write_text(str(WEIGHT))
        (group / "measured/cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        (CPU_CONTROLLER / "cgroup.procs").write_text(str(os.getpid()))
        (group / "measured").rmdir()
        group.rmdir()


@contextmanager
def quota(group: Path | None, cpus: float | None) -> Iterator[None]:
    if group is None or cpus is None:
        yield
        return
    path = group / "measured/cpu.cfs_quota_us"
    path.write_text(str(int(cpus * 100_000)))
    try:
        yield
    finally:
        path.write_text("-1")


if __name__ == "__main__":
    main()
