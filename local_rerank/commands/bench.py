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
from typing import TYPE_CHECKING, Annotated, Any, Literal

from local_rerank.commands.console import Console, JsonOutput, option, print_json, progress, repeatable, status
from local_rerank.config import DType, EngineConfig
from local_rerank.errors import ConfigError
from local_rerank.text_files import visible

if TYPE_CHECKING:
    from local_rerank.bench.measure import WorkloadResult
    from local_rerank.bench.targets import RerankerTarget
    from local_rerank.reranker import Reranker

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
        option(help="Use random weights in the shape of qwen3-reranker-0.6b, -4b or -8b instead of a model."),
    ] = None,
    weights: Annotated[
        Path | None, option(help="Folder that keeps the random weights for the next run. Default: they are deleted.")
    ] = None,
    rounds: Annotated[int, option(help="Rounds per workload and precision; results are medians.")] = 3,
    skip_reference: Annotated[bool, option(help="Do not compare log-odds with fp32.")] = False,
    skip_start: Annotated[bool, option(help="Do not measure the start-up time.")] = False,
    json_output: JsonOutput = False,
    engine: EngineConfig | None = None,
) -> None:
    """Measure throughput, latency, memory and exactness of a model on this machine."""
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
        results = _measure(workload or ("passages",), targets, reference, rounds)
    report = _report(shape, targets, results)
    if json_output:
        print_json(report)
    else:
        _print_tables(report, results)


def random_weights(stack: ExitStack, shape: str, weights: Path | None) -> Path:
    from local_rerank.bench.shapes import make_checkpoint

    folder = weights or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="local-rerank-"))) / shape
    with status(f"making random weights in the shape of {shape}"):
        return make_checkpoint(folder, shape)


def _load(stack: ExitStack, config: EngineConfig, dtype: DType, skip_start: bool) -> RerankerTarget:
    from local_rerank import __version__
    from local_rerank.bench.targets import RerankerTarget
    from local_rerank.reranker import Reranker

    config = dataclasses.replace(config, dtype=dtype)
    start = None if skip_start else _start_seconds(config)
    reranker = stack.enter_context(Reranker(config=config))
    exact = len(reranker.info.unquantized)
    version = f"local-rerank {__version__}" + (f", {exact} linear layers left in fp32" if exact else "")
    return RerankerTarget(f"local-rerank {reranker.info.dtype}", reranker, version, start)


def _start_seconds(config: EngineConfig) -> float:
    """Measure the time from the start of a process to its first answer."""
    options = ["--device", config.device, "--dtype", config.dtype]
    options += ["--model", config.model] if config.model else []
    options += ["--threads", str(config.threads)] if config.threads else []
    start = time.perf_counter()
    command = [sys.executable, "-m", "local_rerank", "rank", "a query", "a document", "--json", *options]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def load_reference(stack: ExitStack, config: EngineConfig) -> Reranker:
    """Load the model in fp32 with the dense attention mask, by which scores are defined."""
    from local_rerank.reranker import Reranker

    return stack.enter_context(Reranker(config=dataclasses.replace(config, dtype="fp32", attention="dense")))


def _measure(
    names: Sequence[str], targets: Sequence[RerankerTarget], reference: Reranker | None, rounds: int
) -> list[WorkloadResult]:
    from local_rerank.bench.measure import measure
    from local_rerank.bench.workloads import WORKLOADS

    results = []
    for name in dict.fromkeys(names):
        with progress(f"{name}: rounds", rounds * len(targets)) as advance:
            results.append(measure(WORKLOADS[name], targets, reference=reference, rounds=rounds, advance=advance))
    return results


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
