"""How fast this machine's CPU runs the official models: measured once, then read from a file in the cache folder.

The file's name is a hash of everything that affects the figures. Reading it needs no torch; `cpu_speed` measures.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from local_rerank import __version__
from local_rerank.checkpoints.find import ALIASES
from local_rerank.checkpoints.free_space import cache_folder, write_atomically
from local_rerank.checkpoints.hub_cache import find_snapshot, repository_of
from local_rerank.config import DType, EngineConfig
from local_rerank.engine.cpu.cpu_limits import cpu_limits
from local_rerank.engine.cpu.process_setup import KERNEL_VARIABLES
from local_rerank.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # of the file; also increase it when the measurement changes
DTYPES: tuple[DType, ...] = ("auto", "int8")  # values of --dtype that are measured
PASSAGES, WORDS = 20, 100
CPU_FIELDS = (  # of /proc/cpuinfo: those of x86, then those of aarch64
    "vendor_id", "cpu family", "model", "model name", "flags",
    "CPU implementer", "CPU architecture", "CPU part", "Features",
)  # fmt: skip
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSpeed:
    """One model with one value of --dtype."""

    arithmetic: str  # dtype in which the linear layers multiply
    tokens_per_second: float
    seconds: float  # for `PASSAGES` passages of `WORDS` words


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSpeeds:
    """This machine's CPU with each official model."""

    cpu: str
    threads: int
    date: str
    was_busy: bool  # other processes used the CPU during the measurement; the figures are estimated from CPU time
    models: Mapping[str, Mapping[str, CpuSpeed]]  # by alias and value of --dtype; int8 only if the CPU can

    def in_words(self, model: str) -> str:
        """Like "20 passages of 100 words: 2.9 s with qwen3-reranker-0.6b in bf16 (auto), 1.7 s in int8"."""
        auto, int8 = self.models[model]["auto"], self.models[model].get("int8")
        words = f"{PASSAGES} passages of {WORDS} words: {_seconds(auto)} with {model} in {auto.arithmetic} (auto)"
        return words if int8 is None else f"{words}, {_seconds(int8)} in int8"


def facts() -> dict[str, Any]:
    """Everything that affects the figures, as JSON values."""
    limits = cpu_limits()
    return {
        "format_version": FORMAT_VERSION,
        "versions": {"local-rerank": __version__, "torch": metadata.version("torch")},
        "machine": platform.machine(),
        "cpu": _cpu(),
        "threads": limits.num_threads,
        "num_cpus": limits.num_cpus,  # a quota may be a fraction
        "variables": {name: os.environ[name] for name in (*KERNEL_VARIABLES, *THREAD_VARIABLES) if name in os.environ},
        "dtypes": list(DTYPES),
    }


def read() -> CpuSpeeds | None:
    """The figures as `write` kept them for a machine with these facts; None without a valid file."""
    try:
        stored = json.loads(_path(facts()).read_text(encoding="utf-8"))
        if stored["facts"] != facts():
            raise ValueError("its facts differ")
        return _speeds(stored)
    except FileNotFoundError:
        return None
    except (OSError, CheckpointError, RecursionError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.info("cannot use the kept speed of this CPU: %r", error)
        return None


def write(models: Mapping[str, Mapping[str, CpuSpeed]], was_busy: bool) -> CpuSpeeds:
    """Keep the figures. If the folder cannot be written, the next plan measures again."""
    shown = {model: {name: asdict(speed) for name, speed in speeds.items()} for model, speeds in models.items()}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    stored = {"date": today, "was_busy": was_busy, "models": shown, "facts": facts()}
    try:
        write_atomically(_path(facts()), json.dumps(stored, ensure_ascii=False, indent=2) + "\n")
    except (OSError, CheckpointError) as error:
        logger.info("cannot keep the speed of this CPU, so the next plan measures it again: %r", error)
    return _speeds(stored)


def before_download(config: EngineConfig) -> str:
    """One line with the kept speed if `config` will download an official model onto this CPU, else an empty string."""
    given = (config.model or "").lower()
    model = next((alias for alias, hub_id in ALIASES.items() if given in (alias, hub_id.lower())), "")
    if not model or config.device not in ("auto", "cpu") or _is_here(config, ALIASES[model]):
        return ""
    speeds = read()
    if speeds is None or config.threads not in (None, speeds.threads):
        return ""
    if config.device == "auto":
        import torch

        if torch.cuda.is_available():
            return ""
    return f"on this CPU, {speeds.in_words(model)} (measured by `local-rerank plan`)"


def _is_here(config: EngineConfig, hub_id: str) -> bool:
    """Whether a folder or the hub's cache has the model; also if that cannot be told, which loading will report."""
    try:
        return (
            Path(str(config.model)).exists()
            or find_snapshot(repository_of(hub_id), config.revision or None)[0] is not None
        )
    except OSError:
        return True


def _path(of: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "cpu-speed" / f"{key}.json"


def _speeds(stored: Mapping[str, Any]) -> CpuSpeeds:
    """Raises KeyError, TypeError or ValueError if a figure is missing or is none."""
    models = {model: {name: CpuSpeed(**speed) for name, speed in stored["models"][model].items()} for model in ALIASES}
    for speeds in models.values():
        if "auto" not in speeds or not speeds.keys() <= set(DTYPES):
            raise ValueError(f"its dtypes are {sorted(speeds)}")
        for speed in speeds.values():
            if not (0 < speed.seconds < math.inf and 0 < speed.tokens_per_second < math.inf):
                raise ValueError(f"it holds {speed}")
    cpu = stored["facts"]["cpu"].get("model name") or stored["facts"]["machine"]
    return CpuSpeeds(
        cpu=str(cpu),
        threads=int(stored["facts"]["threads"]),
        date=str(stored["date"]),
        was_busy=bool(stored["was_busy"]),
        models=models,
    )


def _cpu() -> dict[str, str]:
    """What tells one CPU from another: the fields of the first one in /proc/cpuinfo; on other systems one name."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {"model name": platform.processor()}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields if name.strip() in CPU_FIELDS}


def _seconds(speed: CpuSpeed) -> str:
    return f"{speed.seconds:.2g} s" if speed.seconds < 10 else f"{speed.seconds:,.0f} s"
