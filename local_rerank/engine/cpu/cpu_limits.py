"""How many CPUs this process may use: physical cores, CPU affinity and cgroup quotas -> CpuLimits.

Only Linux has affinity and cgroups. On other systems the number of cores is the only limit.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """The CPU time that all processes of a cgroup share."""

    cpus: float  # CPU seconds per second
    folder: str  # of the cgroup
    is_v2: bool

    def __str__(self) -> str:
        name = "cpu.max" if self.is_v2 else "cpu.cfs_quota_us"
        return f"cgroup quota of {self.cpus:g} CPUs ({self.folder}/{name})"


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuLimits:
    """The limits of a process."""

    num_cores: int  # physical cores of the machine, or logical CPUs if the former are unknown
    num_allowed_cores: int | None  # physical cores that the affinity allows; None if the system has no affinity
    quotas: tuple[Quota, ...]  # of the process's cgroup and its ancestors

    @property
    def quota(self) -> Quota | None:
        """The smallest quota."""
        return min(self.quotas, key=lambda quota: quota.cpus, default=None)

    @property
    def num_cpus(self) -> float:
        """The lowest limit."""
        limits = [self.num_cores, self.num_allowed_cores, *(quota.cpus for quota in self.quotas)]
        return min(limit for limit in limits if limit is not None)

    @property
    def num_threads(self) -> int:
        """As many threads as can run, at least 1; a fraction of a CPU counts as one (figures: docs/performance.md)."""
        return max(1, math.ceil(self.num_cpus))

    @property
    def reason(self) -> str:
        """Names the lowest limit."""
        if self.quota is not None and self.quota.cpus == self.num_cpus < (self.num_allowed_cores or self.num_cores):
            return str(self.quota)
        if self.num_allowed_cores is not None and self.num_allowed_cores < self.num_cores:
            return f"affinity to {_counted(self.num_allowed_cores)} of {self.num_cores}"
        return _counted(self.num_cores)


def _counted(num_cores: int) -> str:
    return f"{num_cores} physical core{'' if num_cores == 1 else 's'}"


def cpu_limits(root: Path = ROOT) -> CpuLimits:
    """The limits of this process. `root` replaces / in the paths of /proc and /sys."""
    num_cores: int = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed: int | None = None
    if hasattr(os, "sched_getaffinity"):
        allowed = min(num_cores, len({_core_of(cpu, root) for cpu in os.sched_getaffinity(0)}))
    try:
        quotas = tuple(_quotas(root))
    except ValueError:  # a system that writes these files in another format
        quotas = ()
    return CpuLimits(num_cores=num_cores, num_allowed_cores=allowed, quotas=quotas)


def _core_of(cpu: int, root: Path) -> tuple[str, ...]:
    """Equal for the hardware threads of one core; the CPU's own number if the topology is unknown."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    names = ("physical_package_id", "core_id")
    try:
        return tuple((topology / name).read_text().strip() for name in names)
    except OSError:
        return (str(cpu),)


def _quotas(root: Path) -> Iterator[Quota]:
    for folder, is_v2 in cgroup_folders(root, "cpu"):
        names = ["cpu.max"] if is_v2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        if (cpus := _ratio(*[word for name in names for word in _words(folder / name)][:2])) is not None:
            yield Quota(cpus=cpus, folder=f"/{folder.relative_to(root)}", is_v2=is_v2)


def cgroup_folders(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the process's cgroup and its ancestors, as far as they are mounted, and whether they are cgroup v2.

    `controller` is cpu or memory. A hybrid host has it in v1 and others in v2. A container's mount may show only a part
    of the hierarchy; then the mount's root is a path in the hierarchy. If no mount shows the cgroup, the mounts' roots
    count.
    """
    mounts = list(_mounts(root, controller))
    for path, is_v2 in _cgroup_paths(root, controller):
        of_version = [(within, point) for within, point, mounted_v2 in mounts if mounted_v2 == is_v2]
        shown = [(point, below) for within, point in of_version if (below := _below(path, within)) is not None]
        for point, below in shown or [(point, PurePosixPath()) for _, point in of_version]:
            for folder in (below, *below.parents):
                yield root / point.relative_to("/") / folder, is_v2


def _below(path: PurePosixPath, within: PurePosixPath) -> PurePosixPath | None:
    """`path` relative to `within`; None if it is not below. /../x is outside the namespace's root."""
    if not path.is_relative_to(within):
        return None
    below = path.relative_to(within)
    return None if ".." in below.parts else below


def _cgroup_paths(root: Path, controller: str) -> Iterator[tuple[PurePosixPath, bool]]:
    """Cgroups that the controller can limit, from the lines `hierarchy:controllers:path` of /proc/self/cgroup."""
    for line in _lines(root / "proc/self/cgroup"):
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" or controller in controllers.split(","):
            yield PurePosixPath(path), hierarchy == "0"


def _mounts(root: Path, controller: str) -> Iterator[tuple[PurePosixPath, PurePosixPath, bool]]:
    """Cgroup mounts in /proc/self/mountinfo (proc(5)): root within the hierarchy, mount point, whether it is v2."""
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        within, point = (PurePosixPath(_unescaped(field)) for field in mount.split(" ")[3:5])
        kind, _, options = source.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            yield within, point, kind == "cgroup2"


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not Linux
        return []


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []


def _ratio(quota: str = "max", period: str = "") -> float | None:
    """None without a limit ("max", -1) or if the numbers are malformed."""
    if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
        return None
    return int(quota) / int(period)
