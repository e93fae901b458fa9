"""The thread count of an engine: fixed, or following quotas and load."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from local_rerank import Reranker
from local_rerank.engine.cpu import threads
from local_rerank.engine.cpu.compute_thread import compute
from local_rerank.engine.cpu.cpu_limits import CpuLimits, Quota
from local_rerank.engine.cpu.thread_policy import Load
from local_rerank.engine.cpu.threads import POOL_NAME, LoadSensor, Threads
from tests.tiny_checkpoints import make_checkpoint

QUOTAS = Path("/sys/fs/cgroup/cpu")
STAT = "cpu  999 0 0 999 0 0 0 0 0 0\n"


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cpu_limits", lambda: CpuLimits(num_cores=2, num_allowed_cores=2, quotas=()))
    monkeypatch.setattr(threads, "default_count", lambda: 8)


class BusySensor:
    """Reports that the threads wait half of the time and that no CPU is idle."""

    def read(self, **_: bool) -> Load:
        return Load(waited=0.5, idle_cpus=0.0)


def slow_with_two(reranker: Reranker, counts: list[int]) -> None:
    """Make each layer take 60 ms with two threads and 20 ms with one, and record its thread count."""

    def sleep(*_: Any) -> None:
        counts.append(torch.get_num_threads())
        time.sleep(0.06 if counts[-1] == 2 else 0.02)

    for layer in reranker.engine.decoder.layers[:-1]:
        layer.register_forward_pre_hook(sleep)


@pytest.mark.usefixtures("two_cores")
def test_only_a_count_that_is_not_fixed_follows_the_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads, "LoadSensor", BusySensor)
    checkpoint = make_checkpoint(tmp_path, num_hidden_layers=6)
    seen = dict[str, list[int]]()
    for name, options in {"auto": {}, "fixed": {"threads": 2}, "deterministic": {"deterministic": True}}.items():
        seen[name] = []
        with Reranker(str(checkpoint), device="cpu", **options) as reranker:
            assert reranker.info.threads == 2
            slow_with_two(reranker, seen[name])
            for _ in range(4 if name == "auto" else 2):
                reranker.rank("a query", ["a document"])
    assert set(seen["fixed"]) == set(seen["deterministic"]) == {2}
    assert seen["auto"][0] == 2
    assert set(seen["auto"][-5:]) == {1}


@pytest.mark.usefixtures("two_cores")
def test_two_engines_in_one_process_keep_their_own_counts(tiny_checkpoint: Path) -> None:
    counts: list[int] = []
    model = str(tiny_checkpoint)
    with Reranker(model, device="cpu", threads=1) as one, Reranker(model, device="cpu", threads=2) as two:
        for reranker in (one, two):
            reranker.engine.decoder.layers[-1].self_attn.o_proj.register_forward_hook(
                lambda *_: counts.append(torch.get_num_threads())
            )
        for reranker in (one, two, one):
            reranker.rank("a query", ["a document"])
    assert counts == [1, 2, 1]


def test_the_count_is_the_minimum_of_the_limits_and_torchs_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quota = Quota(cpus=3, folder="/sys/fs/cgroup/pod", is_v2=True)
    limits = CpuLimits(num_cores=8, num_allowed_cores=8, quotas=(quota,))
    monkeypatch.setattr(threads, "cpu_limits", lambda: limits)
    monkeypatch.setattr(threads, "default_count", lambda: 8)
    caplog.set_level("INFO")
    assert Threads.choose(None, is_fixed=False).count == 3
    assert "Using 3 threads: cgroup quota of 3 CPUs (/sys/fs/cgroup/pod/cpu.max)" in caplog.messages
    assert Threads.choose(5, is_fixed=False).count == 5
    monkeypatch.setattr(threads, "default_count", lambda: 1)
    assert Threads.choose(None, is_fixed=False).count == 1
    assert "Using 1 thread: torch's default (OMP_NUM_THREADS or set by the program)" in caplog.messages


@pytest.mark.usefixtures("two_cores")
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs the scheduler statistics of Linux")
def test_each_compute_thread_has_its_own_sensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fork, the compute thread is a new one."""
    sensors: list[BusySensor] = []

    def new_sensor() -> BusySensor:
        sensors.append(BusySensor())
        return sensors[-1]

    monkeypatch.setattr(threads, "LoadSensor", new_sensor)
    chosen = Threads.choose(None, is_fixed=False)
    before = torch.get_num_threads()
    for expected in (1, 2):
        thread = threading.Thread(target=lambda: (chosen.begin_batch(), chosen.begin_batch()))
        thread.start()
        thread.join()
        assert len(sensors) == expected
    compute(lambda: torch.set_num_threads(before))


@pytest.mark.usefixtures("two_cores")
def test_the_count_is_fixed_if_the_load_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError("comm is read-only")

    monkeypatch.setattr(threads, "LoadSensor", refuse)
    chosen = Threads.choose(None, is_fixed=False)
    compute(chosen.begin_batch)
    assert compute(torch.get_num_threads) == chosen.current == 2


def fake_proc(root: Path, schedstats: dict[str, tuple[str, int, int]], ticks: dict[str, tuple[int, int]]) -> None:
    """`schedstats`: name, nanoseconds run and waited, by thread id. `ticks`: idle and busy ticks by CPU."""
    for thread, (name, ran, waited) in schedstats.items():
        task = root / "self/task" / thread
        task.mkdir(parents=True, exist_ok=True)
        (task / "comm").write_text(f"{name}\n")
        (task / "schedstat").write_text(f"{ran} {waited} 7\n")
    lines = [f"{name} {busy} 0 0 {idle - 1} 1 0 0 0 50 0\n" for name, (idle, busy) in ticks.items()]
    (root / "stat").write_text(STAT + "".join(lines) + "intr 5 0\n")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_only_the_pools_threads_and_the_allowed_cpus_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    own, second = str(threading.get_native_id()), "7000001"
    ms = 10**6
    fake_proc(tmp_path, {own: ("x", 0, 0), second: (POOL_NAME, 100 * ms, 100 * ms), "7000002": ("python", 0, 0)}, {
        "cpu0": (100, 100), "cpu1": (100, 100), "cpu2": (100, 100),
    })  # fmt: skip
    sensor = LoadSensor(tmp_path)
    fake_proc(tmp_path, {
        own: (POOL_NAME, 300 * ms, 20 * ms),
        second: (POOL_NAME, 160 * ms, 120 * ms),
        "7000002": ("python", 0, 900 * ms),  # not a thread of the pool
    }, {"cpu0": (125, 175), "cpu1": (200, 100), "cpu2": (150, 150)})  # fmt: skip
    load = sensor.read()
    assert load.waited == pytest.approx(40 / 400)
    assert load.idle_cpus == pytest.approx(25 / 100 + 50 / 100)
    assert sensor.read() == Load(waited=0.0, idle_cpus=None)  # the counters have not changed


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs the scheduler statistics of Linux")
def test_the_threads_of_openmps_pool_inherit_the_name() -> None:
    code = """
import threading, torch
from local_rerank.engine.cpu.threads import LoadSensor
torch.set_num_threads(2)
threading.Thread(target=threading.Event().wait, daemon=True).start()
sensor = LoadSensor()
x = torch.ones(3000, 3000)
for _ in range(3): x.add_(1)
print(len(dict(sensor.pool_times())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"


@pytest.fixture
def quota_of_one_cpu() -> Iterator[Path]:
    """A cgroup with a quota of one CPU, for a child process."""
    group = QUOTAS / f"local-rerank-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError as error:
        pytest.skip(f"cannot create a cgroup with a quota: {error}")
    yield group
    group.rmdir()


@pytest.mark.skipif((os.cpu_count() or 1) == 1, reason="a quota of one CPU needs a machine with more")
def test_a_quota_of_one_cpu_gives_one_thread(quota_of_one_cpu: Path) -> None:
    code = f"""
import os, pathlib
pathlib.Path({str(quota_of_one_cpu / "cgroup.procs")!r}).write_text(str(os.getpid()))
from local_rerank.engine.cpu.threads import Threads
threads = Threads.choose(None, is_fixed=False)
threads.begin_batch()
import torch
print(threads.reason, torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"cgroup quota of 1 CPUs ({quota_of_one_cpu}/cpu.cfs_quota_us) 1\n"
