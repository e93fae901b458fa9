"""Run the numeric tests with an older instruction set: `python -m tests.isa avx2`.

Without a name it lists the instruction sets below this CPU's own, with which `make test` runs anyway.

oneDNN, torch's own kernels and MKL are limited separately. On AMD, MKL ignores MKL_ENABLE_INSTRUCTIONS but follows
MKL_CBWR=COMPATIBLE, its slowest code (512 x 1,024 x 1,024 in fp32 on one Zen 3 core: 58 ms instead of 17).
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction set and the settings that disable newer ones."""

    flag: str  # in /proc/cpuinfo
    newer: set[str]  # flags of disabled sets; for a CPU without them this level is its own
    onednn: str
    aten: str
    mkl: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return {"ONEDNN_MAX_CPU_ISA": self.onednn, "ATEN_CPU_CAPABILITY": self.aten, **self.mkl}


LEVELS = {
    "sse41": Level(
        "sse4_1", {"avx2"}, "SSE41", "default", {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "MKL_CBWR": "COMPATIBLE"}
    ),
    "avx2": Level("avx2", {"avx_vnni", "avx512bw"}, "AVX2", "avx2", {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    "avx512": Level("avx512bw", {"avx512_vnni"}, "AVX512_CORE", "avx512", {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}),
    "vnni": Level(
        "avx512_vnni", {"avx512_bf16", "amx_tile"}, "AVX512_CORE_VNNI", "avx512", {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}
    ),
}


def levels_of(cpuinfo: str) -> list[str]:
    """The levels of a CPU, lowest first; none unless it is x86."""
    flags = _flags(cpuinfo)
    return [name for name, level in LEVELS.items() if level.flag in flags]


def older_levels_of(cpuinfo: str) -> list[str]:
    """Likewise, without the CPU's own level."""
    flags = _flags(cpuinfo)
    return [name for name in levels_of(cpuinfo) if LEVELS[name].newer & flags]


def _flags(cpuinfo: str) -> set[str]:
    return set("".join(re.findall(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)[:1]).split())


def main(arguments: list[str]) -> int:
    path = Path("/proc/cpuinfo")
    cpuinfo = path.read_text(encoding="utf-8") if path.exists() else ""
    found = levels_of(cpuinfo)
    if not arguments:
        sys.stdout.write("\n".join(older_levels_of(cpuinfo)) + "\n")
        return 0
    name, *options = arguments
    if name not in found:
        sys.stderr.write(f"ISA is {name!r}; this CPU has {', '.join(found) or 'none'}\n")
        return 2
    files = sorted(str(path) for path in TESTS.rglob("test_*.py") if "mark.numeric" in path.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "-m", "numeric", *files, *options]
    os.execve(sys.executable, command, os.environ | LEVELS[name].environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
