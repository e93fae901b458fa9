"""CPU affinity and cgroup quotas, read from file trees like those of Linux."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from local_rerank.engine.cpu.cpu_limits import CpuLimits, Quota, cpu_limits

V2 = "31 23 0:28 {root} {point} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {root} {point} rw,relatime - cgroup cgroup rw,cpu,cpuacct"
OTHERS = ("30 1 8:1 / / rw - ext4 /dev/root rw", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory")
POINT = "/sys/fs/cgroup"

Files = dict[str, str]


def v2(path: str, *, root: str = "/", point: str = POINT) -> Files:
    return _proc(f"0::{path}", V2.format(root=root, point=point))


def v1(path: str, *, root: str = "/", point: str = f"{POINT}/cpu,cpuacct") -> Files:
    return _proc(f"4:memory:/elsewhere\n3:cpu,cpuacct:{path}\n2:cpuset:/", V1.format(root=root, point=point))


def hybrid(path: str, path_v2: str) -> Files:
    """The `cpu` controller in v1 and a v2 hierarchy."""
    mounts = (V1.format(root="/", point=f"{POINT}/cpu"), V2.format(root="/", point=f"{POINT}/unified"))
    return _proc(f"9:name=systemd:/\n1:cpu:{path}\n0::{path_v2}", *mounts)


def _proc(cgroup: str, *mounts: str) -> Files:
    return {"proc/self/cgroup": f"{cgroup}\n", "proc/self/mountinfo": "\n".join((*OTHERS, *mounts)) + "\n"}


def quota_v1(folder: str, quota: str, period: str = "100000\n") -> Files:
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


def quotas_of(root: Path, *trees: Files) -> dict[str, float]:
    """Write the files, and return the quotas read from them by cgroup folder."""
    for name, content in (item for tree in trees for item in tree.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {quota.folder: quota.cpus for quota in cpu_limits(root).quotas}


def test_a_v2_quota_and_those_of_all_ancestors_are_read(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a/cpu.max": "300000 200000\n",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a/b/c/cpu.max": "400000 100000\n",
        "sys/fs/cgroup/a/sibling/cpu.max": "10000 100000\n",
        "sys/fs/cgroup/a/b/c/child/cpu.max": "10000 100000\n",
    }
    assert quotas_of(tmp_path, v2("/a/b/c"), files) == {f"{POINT}/a": 1.5, f"{POINT}/a/b/c": 4}


def test_a_v1_quota_and_those_of_all_ancestors_are_read(tmp_path: Path) -> None:
    files = quota_v1("sys/fs/cgroup/cpu,cpuacct", "-1\n")
    files |= quota_v1("sys/fs/cgroup/cpu,cpuacct/a", "100000\n")
    files |= quota_v1("sys/fs/cgroup/cpu,cpuacct/a/b", "100000\n", "50000\n")
    assert quotas_of(tmp_path, v1("/a/b"), files) == {f"{POINT}/cpu,cpuacct/a": 1, f"{POINT}/cpu,cpuacct/a/b": 2}
    assert str(cpu_limits(tmp_path).quota) == f"cgroup quota of 1 CPUs ({POINT}/cpu,cpuacct/a/cpu.cfs_quota_us)"


def test_both_versions_are_read_on_a_hybrid_host(tmp_path: Path) -> None:
    files = quota_v1("sys/fs/cgroup/cpu/a", "250000\n") | {"sys/fs/cgroup/unified/b/cpu.max": "50000 100000\n"}
    assert quotas_of(tmp_path, hybrid("/a", "/b"), files) == {f"{POINT}/cpu/a": 2.5, f"{POINT}/unified/b": 0.5}


@pytest.mark.parametrize(
    ("path", "root", "folder"),
    [
        ("/docker/id", "/docker/id", POINT),  # the host's paths; the mount shows only the container's cgroup
        ("/docker/id/worker", "/docker/id", f"{POINT}/worker"),
        ("/", "/", POINT),  # a cgroup namespace
        ("/docker/id", "/docker/other", POINT),  # no mount shows the cgroup: the mount's root is read
        ("/docker/identical", "/docker/id", POINT),
        ("/../other", "/", POINT),  # outside the namespace's root, so not visible
        ("/../other/worker", "/../other", f"{POINT}/worker"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container_paths_are_relative_to_the_root_of_the_mount(
    tmp_path: Path, path: str, root: str, folder: str, version: int
) -> None:
    for index, place in enumerate(("", "/worker", "/../other", "/docker/id")):
        below = f"sys/fs/cgroup{place}"
        files = quota_v1(below, f"{index + 1}00000\n") | {f"{below}/cpu.max": f"{index + 1}00000 100000\n"}
        quotas_of(tmp_path, files)
    tree = v1(path, root=root, point=POINT) if version == 1 else v2(path, root=root)
    quotas = quotas_of(tmp_path, tree)
    assert max(quotas, key=len) == folder
    assert quotas[POINT] == 1


def test_a_mount_point_may_have_spaces(tmp_path: Path) -> None:
    tree = v2("/", point="/my\\040groups")
    assert quotas_of(tmp_path, tree, {"my groups/cpu.max": "150000 100000\n"}) == {"/my groups": 1.5}


@pytest.mark.parametrize("text", ["", "max\n", "100000\n", "x 100000\n", "100000 0\n", "0 100000\n", "-1 100000\n"])
def test_a_malformed_quota_is_ignored(tmp_path: Path, text: str) -> None:
    assert quotas_of(tmp_path, v2("/"), {"sys/fs/cgroup/cpu.max": text}) == {}
    quota, _, period = text.partition(" ")
    assert quotas_of(tmp_path, v1("/"), quota_v1("sys/fs/cgroup/cpu,cpuacct", quota, period)) == {}


@pytest.mark.parametrize("name", ["cgroup", "mountinfo"])
def test_files_in_another_format_are_ignored(tmp_path: Path, name: str) -> None:
    files = {f"proc/self/{name}": "something else - entirely\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}
    assert quotas_of(tmp_path, v2("/") | files) == {}


def test_without_proc_the_number_of_cores_is_the_only_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS and Windows
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    limits = cpu_limits(tmp_path)
    assert limits == CpuLimits(num_cores=8, num_allowed_cores=None, quotas=())
    assert (limits.num_threads, limits.reason) == (8, "8 physical cores")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_hardware_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6})
    for cpu in range(8):  # CPUs n and n + 4 share a core
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "core_id").write_text(f"{cpu % 4}\n")
        (topology / "physical_package_id").write_text("0\n")
    limits = cpu_limits(tmp_path)
    assert (limits.num_cores, limits.num_allowed_cores, limits.num_threads) == (4, 3, 3)
    assert limits.reason == "affinity to 3 physical cores of 4"


@pytest.mark.parametrize(
    ("num_cores", "num_allowed", "cpus", "num_threads", "reason"),
    [
        (4, 4, [], 4, "4 physical cores"),
        (1, None, [], 1, "1 physical core"),
        (4, 2, [3.0], 2, "affinity to 2 physical cores of 4"),
        (4, 4, [4.0], 4, "4 physical cores"),
        (4, 4, [8.0, 1.0, 2.0], 1, "cgroup quota of 1 CPUs (/sys/fs/cgroup/1/cpu.max)"),
        (4, 2, [1.5], 2, "cgroup quota of 1.5 CPUs (/sys/fs/cgroup/0/cpu.max)"),
        (4, 4, [0.1], 1, "cgroup quota of 0.1 CPUs (/sys/fs/cgroup/0/cpu.max)"),
    ],
)
def test_the_lowest_limit_decides_and_is_named(
    num_cores: int, num_allowed: int | None, cpus: list[float], num_threads: int, reason: str
) -> None:
    quotas = tuple(Quota(cpus=n, folder=f"{POINT}/{i}", is_v2=True) for i, n in enumerate(cpus))
    limits = CpuLimits(num_cores=num_cores, num_allowed_cores=num_allowed, quotas=quotas)
    assert (limits.num_threads, limits.reason) == (num_threads, reason)
