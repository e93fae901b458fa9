"""Run the parts of PLAN, each in a process with a time limit, and end with a table of figures and bars; see gpu.sh.

A part prints a figure as it comes, and it is in the file of results before the next line is read. So a part that
fails or is cut off keeps what it measured, and a later call with `--resume` runs what is not done.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `benchmarks` is a package here, unlike in a wheel

from benchmarks.gpu_pack import TOKENIZER
from benchmarks.gpu_table import Figures, table

MARK = "FIGURE "
CALLS = (450, 190)
"""Seconds of the two calls that PLAN is made for."""


@dataclass(frozen=True)
class Part:
    name: str
    function: str  # module:function, which yields figures
    call: int  # the first to run it; 3: only if time is left
    limit: float  # seconds, with the start of its process and loading; STRETCH times that while time is left
    shape: str = ""  # another than that of the run


PLAN = (
    Part("checkpoint", "gpu_parts:checkpoint", 1, 30),
    Part("kernels", "gpu_checks:kernels", 1, 45),
    Part("gpu_tests", "gpu_checks:gpu_tests", 1, 75),
    Part("throughput", "gpu_parts:throughput", 1, 40),
    Part("serving", "gpu_serving:serving", 1, 100),
    Part("latency", "gpu_parts:latency", 1, 30),
    Part("peer", "gpu_parts:peer", 1, 40),
    Part("precision", "gpu_parts:precision", 1, 30),
    Part("fp8", "gpu_parts:fp8", 1, 40),
    Part("breakdown", "gpu_parts:breakdown", 1, 20),
    Part("memory", "gpu_checks:memory", 2, 20),
    Part("fp8_4b", "gpu_parts:fp8", 2, 65, shape="qwen3-reranker-4b"),
    Part("tuning", "gpu_kernels:tuning", 2, 35),
    Part("sanitizer", "gpu_checks:sanitizer", 2, 40),
    Part("encoders", "gpu_parts:encoders", 3, 40),
    Part("attention", "gpu_kernels:attention", 3, 40),
)
"""What the table needs comes first. If kernels or tests fail, the sanitizer is next."""
LEAST_SHARE = 0.4  # of its limit, without which a part is not begun
STRETCH = 1.5
"""Parts end earlier than their limits on average, and one that is cut off runs again in the next call."""
MUST_PASS = {"kernels": "passed", "gpu_tests": "passed_all"}


def main() -> None:
    options = arguments()
    if options.part:
        run_part(options)
        return
    if options.table:
        print(table(read(options.table)))
        return
    if not (TOKENIZER.is_file() or importlib.util.find_spec("dashscope")):
        raise SystemExit(
            "Qwen's tokenizer is missing; `benchmarks/gpu.sh --pack` collects it where dashscope is installed"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that what runs ends, too
    with tempfile.TemporaryDirectory() as folder, Results(options.out, options.resume) as results:
        try:
            run_all(options, Path(folder), results)
        finally:
            print(table(results.figures), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="results, a line for each figure")
    parser.add_argument("--limit", type=float, default=CALLS[0], help="seconds of the whole run")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="results of an earlier call: runs what it left")
    parser.add_argument("--only", type=lambda names: names.split(","), help="parts to run, as latency,peer")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of some results")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU, to see that every part runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="qwen3-reranker-0.6b")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry:
        options.device, options.shape, options.limit = "cpu", "tiny", 3600
    return options


class Results:
    """The figures by part, and the file that has them."""

    def __init__(self, out: Path, earlier: Path | None) -> None:
        self.figures: Figures = {} if earlier is None else read(earlier)
        self._file: IO[str] = out.open("w", encoding="utf-8")
        for part, figures in self.figures.items():
            self._write({"part": part, **figures})

    def add(self, part: str, figures: dict[str, Any]) -> None:
        self.figures.setdefault(part, {}).update(figures)
        self._write({"part": part, **figures})
        print(f"{part}: {json.dumps(figures, ensure_ascii=False)}", flush=True)

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._file, flush=True)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read(file: Path) -> Figures:
    figures: Figures = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        figures.setdefault(entry.pop("part"), {}).update(entry)
    return figures


def run_all(options: argparse.Namespace, folder: Path, results: Results) -> None:
    end = time.monotonic() + options.limit
    done = {part for part, figures in results.figures.items() if figures.get("end") in ("done", "failed")}
    # a second call has a new machine, so that it makes the checkpoint again
    waiting = [part for part in PLAN if part.name == "checkpoint" or wanted(part, options, done)]
    made: set[str] = set()
    while waiting:
        part = waiting.pop(0)
        shape = options.shape if options.dry else part.shape or options.shape
        limit = min(part.limit * STRETCH, end - time.monotonic()) if not options.dry else part.limit * 5
        if limit < LEAST_SHARE * part.limit:
            results.add(part.name, {"end": "no time left"})
            continue
        if part.name != "checkpoint" and shape not in made:
            limit -= run(part_named("checkpoint"), shape, folder / shape, limit, options, results)
        made.add(shape)
        run(part, shape, folder / shape, limit, options, results)
        if part.name == "checkpoint" and results.figures[part.name]["end"] != "done":
            raise SystemExit("there is no checkpoint, without which no part runs")
        must = MUST_PASS.get(part.name)
        if must and not results.figures[part.name].get(must) and not options.dry:
            waiting.sort(key=lambda each: each.name != "sanitizer")


def wanted(part: Part, options: argparse.Namespace, done: set[str]) -> bool:
    return part.name in options.only if options.only else part.name not in done


def part_named(name: str) -> Part:
    return next(part for part in PLAN if part.name == name)


def run(part: Part, shape: str, folder: Path, limit: float, options: argparse.Namespace, results: Results) -> float:
    """Run a part in a process, add its figures as they come and how it ended; returns the seconds it took."""
    command = [sys.executable, __file__, "--part", part.name, "--device", options.device]
    command += ["--shape", shape, "--folder", str(folder)]
    began = time.monotonic()
    for figures in figures_of(command, limit):
        results.add(part.name, figures)
    return time.monotonic() - began


def figures_of(command: list[str], limit: float) -> Iterator[dict[str, Any]]:
    """Run a process, print what it prints and yield its figures; the last one says how it ended."""
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        timer = threading.Timer(limit, end_group, (process,))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                figures = figures_in(line)
                if figures is None:
                    print(f"  {line}", end="", flush=True)
                else:
                    yield figures
            process.wait()
        finally:
            timer.cancel()
            end_group(process)
    seconds = time.monotonic() - began
    ended = {0: "done", -signal.SIGKILL: "cut off" if seconds >= limit else "failed"}
    yield {"end": ended.get(process.returncode, "failed"), "seconds": round(seconds, 1)}


def figures_in(line: str) -> dict[str, Any] | None:
    """The figures that a line of a part's output has, if it has any."""
    with suppress(ValueError):  # something else was written into the line
        if line.startswith(MARK):
            return dict(json.loads(line.removeprefix(MARK)))
    return None


def end_group(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_part(options: argparse.Namespace) -> None:
    """Run one part in this process, and print its figures."""
    module, _, function = part_named(options.part).function.partition(":")
    part = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    import torch

    from benchmarks.gpu_setup import Setting

    device = torch.device(options.device)
    figures = part(Setting(options.folder, options.shape, device, quick=device.type == "cpu"))
    for each in [figures] if isinstance(figures, dict) else figures:
        sys.stdout.write(f"{MARK}{json.dumps(each)}\n")  # at once, unlike print: warnings go to the same pipe
        sys.stdout.flush()


if __name__ == "__main__":
    main()
