"""The command `local-rerank bench`: measure how fast a model runs here, compared with the limit of the hardware."""

from __future__ import annotations

import dataclasses
import datetime
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from local_rerank.commands.console import (
    INTERRUPTED,
    Console,
    JsonOutput,
    complain,
    duration,
    option,
    print_json,
    repeatable,
    status,
    warn,
)
from local_rerank.config import DType, EngineConfig
from local_rerank.errors import ConfigError
from local_rerank.text_files import visible

if TYPE_CHECKING:
    from local_rerank.bench.measure import WorkloadResult
    from local_rerank.bench.targets import RerankerTarget
    from local_rerank.requests.worker import BatchReport

WorkloadName = Literal["titles", "passages", "chunks", "longquery", "rag", "small"]


def bench(
    *,
    workload: Annotated[
        tuple[WorkloadName, ...], repeatable(help="Workload to run; may be repeated. Default: passages.")
    ] = (),
    mode: Annotated[
        tuple[DType, ...], repeatable(help="Precision to measure; may be repeated. Default: that of --dtype.")
    ] = (),
    shape: Annotated[
        str | None,
        option(
            help="Use random weights instead of a model, in the shape of qwen3-reranker-0.6b, -4b or -8b, minilm-l6, "
            "bge-reranker-base or bge-reranker-v2-m3."
        ),
    ] = None,
    weights: Annotated[
        Path | None, option(help="Folder that keeps the random weights for the next run. Default: they are deleted.")
    ] = None,
    rounds: Annotated[int, option(help="Rounds per workload and precision; results are medians.")] = 3,
    skip_reference: Annotated[bool, option(help="Do not compare log-odds with fp32.")] = False,
    skip_start: Annotated[bool, option(help="Do not measure the start-up time.")] = False,
    json_output: JsonOutput = False,
    engine: EngineConfig | None = None,
) -> int:
    """Measure throughput, latency, memory and exactness of a model on this machine, and return the exit status.

    After Ctrl-C it prints what was measured until then.
    """
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; it must be at least 1")
    if weights is not None and shape is None:
        raise ConfigError("weights is a folder for random weights, so it needs --shape")
    config = engine or EngineConfig()
    with ExitStack() as stack:
        if shape is not None:
            config = dataclasses.replace(config, model=str(random_weights(stack, shape, weights)))
        targets = [_load(stack, config, each, skip_start) for each in dict.fromkeys(mode) or (config.dtype,)]
        reference = None if skip_reference else load_reference(stack, config)
        results, is_interrupted = _measure(workload or ("passages",), targets, reference, rounds)
        if is_interrupted:
            complain("interrupted; " + ("these results are incomplete" if results else "no round was complete"))
        if results or not is_interrupted:
            report = _report(shape, targets, results) | {"interrupted": is_interrupted}
            print_json(report) if json_output else _print_tables(report, results)
    return INTERRUPTED if is_interrupted else 0


def random_weights(stack: ExitStack, shape: str, weights: Path | None) -> Path:
    from local_rerank.bench.shapes import make_checkpoint

    folder = weights or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="local-rerank-"))) / shape
    with status(f"making random weights in the shape of {shape}"):
        return make_checkpoint(folder, shape)


def _load(stack: ExitStack, config: EngineConfig, dtype: DType, skip_start: bool) -> RerankerTarget:
    from local_rerank import __version__
    from local_rerank.bench.memory import graph_bytes
    from local_rerank.bench.targets import RerankerTarget
    from local_rerank.reranker import Reranker

    config = dataclasses.replace(config, dtype=dtype)
    start = None
    if not skip_start:
        with status(f"measuring the start of a process (dtype {dtype})"):
            start = _start_seconds(config)
    of_others = graph_bytes()
    with status(f"loading the model (dtype {dtype})"):
        reranker = stack.enter_context(Reranker(config=config))
    exact = len(reranker.info.unquantized)
    version = f"local-rerank {__version__}" + (f", {exact} linear layers left in fp32" if exact else "")
    name, of_its_graphs = f"local-rerank {reranker.info.dtype}", graph_bytes() - of_others
    return RerankerTarget(name, reranker, version, start, graph_bytes=of_its_graphs)


def _start_seconds(config: EngineConfig) -> float:
    """Measure the time from the start of a process to its first answer. Raises ConfigError with its own message."""
    options = ["--device", config.device, "--dtype", config.dtype]
    options += ["--model", config.model] if config.model else []
    options += ["--threads", str(config.threads)] if config.threads else []
    start = time.perf_counter()
    command = [sys.executable, "-m", "local_rerank", "rank", "a query", "a document", "--json", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(done.stderr.strip().removeprefix("local-rerank: ") or f"exit status {done.returncode}")
    return time.perf_counter() - start


def load_reference(stack: ExitStack, config: EngineConfig) -> RerankerTarget | None:
    """Load the model in fp32 with the dense attention mask, by which scores are defined. None, and a warning, if it
    does not fit into memory beside the models to measure.
    """
    from local_rerank.bench.targets import RerankerTarget
    from local_rerank.engine.out_of_memory import is_out_of_memory
    from local_rerank.reranker import Reranker

    config = dataclasses.replace(config, dtype="fp32", attention="dense")
    try:
        with status("loading the reference in fp32"):
            return RerankerTarget("reference", stack.enter_context(Reranker(config=config)), "", None)
    except ConfigError as error:
        if not is_out_of_memory(error):
            raise
        warn(f"log-odds are not compared with fp32, which does not fit into memory beside the model: {error}")
        return None


def _measure(
    names: Sequence[str], targets: Sequence[RerankerTarget], reference: RerankerTarget | None, rounds: int
) -> tuple[list[WorkloadResult], bool]:
    """Measure all workloads; returns the results and whether Ctrl-C made them incomplete."""
    from local_rerank.bench.measure import Measurement
    from local_rerank.bench.workloads import WORKLOADS

    measurements: list[Measurement] = []
    is_interrupted = False
    try:
        with status("estimating how long this takes"):
            measurements += [
                Measurement(WORKLOADS[name], targets, reference=reference, rounds=rounds)
                for name in dict.fromkeys(names)
            ]
            first = measurements[0]
            paces = {target.name: first.pace(target) for target in targets}
            if reference is not None:
                paces[reference.name] = first.pace(reference, with_ceiling=False)
        seconds = [each.estimate(paces) for each in measurements]
        parts = [f"{len(seconds)} workloads" if len(seconds) > 1 else names[0], f"{rounds * len(targets)} rounds"]
        about = duration(sum(seconds)) + f" for {', '.join(parts)}" + (" and the reference" if reference else "")
        warn(f"about {about}; Ctrl-C prints what is measured until then")
        with _Bar(sum(seconds)) as bar:
            for target in [*targets, *([] if reference is None else [reference])]:
                target.reranker.observe_batches(bar.advance)
            for each in measurements:
                each.run(paces, bar.begin)
    except KeyboardInterrupt:
        is_interrupted = True
    return [each.result for each in measurements if each.result is not None], is_interrupted


class _Bar:
    """A bar on standard error, if that is a terminal, that counts estimated seconds."""

    def __init__(self, seconds: float) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        console = Console(stderr=True)
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=seconds)
        self._end = self._seconds_per_token = 0.0  # of the running step

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, step: str, seconds: float, num_tokens: int) -> None:
        """The step before is over, and this one begins."""
        self._bar.update(self._task, completed=self._end, description=visible(step))
        self._end += seconds
        self._seconds_per_token = seconds / num_tokens

    def advance(self, batch: BatchReport) -> None:
        """Count a batch; called in the worker's thread."""
        done = self._bar.tasks[0].completed + batch.num_tokens * self._seconds_per_token
        self._bar.update(self._task, completed=min(done, self._end))


def _report(shape: str | None, targets: Sequence[RerankerTarget], results: Sequence[WorkloadResult]) -> dict[str, Any]:
    from local_rerank.selftest.machine_report import describe

    reranker = targets[0].reranker
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": shape or reranker.model_id,
        "random_weights": shape is not None,
        "machine": dataclasses.asdict(describe(reranker.info, reranker.checkpoint)),
        "systems": [
            {"name": each.name, "version": each.version, "start_seconds": each.start_seconds} for each in targets
        ],
        "engines": [dataclasses.asdict(each.reranker.info) for each in targets],
        "workloads": [dataclasses.asdict(each) for each in results],
    }


def _print_tables(report: dict[str, Any], results: Sequence[WorkloadResult]) -> None:
    from local_rerank.bench.report import all_tables

    console = Console(highlight=False)
    machine = report["machine"]
    about = " (random weights)" if report["random_weights"] else ""
    device, threads = machine["device"]["value"], machine["threads"]["value"]
    console.print(f"{visible(report['model'])}{about} on {device}, threads: {threads}", markup=False)
    for system in report["systems"]:
        start = "" if system["start_seconds"] is None else f", ready after {system['start_seconds']:.1f} s"
        console.print(f"{visible(system['name'])}: {system['version']}{start}", markup=False)
    for table in all_tables(results):
        console.print()
        console.print(table)
