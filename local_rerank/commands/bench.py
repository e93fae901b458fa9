"""The command `local-rerank bench`: how fast is a model here, how near to the hardware's limit, against what else?"""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from local_rerank.commands.console import option
from local_rerank.config import DType, EngineConfig
from local_rerank.errors import ConfigError

if TYPE_CHECKING:
    from local_rerank.bench.measure import Measured, ScalingStep
    from local_rerank.bench.systems import Ours, System
    from local_rerank.reranker import Reranker

PeerName = Literal["card", "sentence-transformers", "vllm"]
WorkloadName = Literal["titles", "passages", "chunks", "longquery", "rag", "small"]
_repeated = partial(Parameter, negative="", show_env_var=False, show_default=False)
SCALING_SIZES = (8, 16, 32, 64)


def bench(
    *,
    workload: Annotated[tuple[WorkloadName, ...], _repeated(help="May be repeated; without it passages.")] = (),
    mode: Annotated[
        tuple[DType, ...], _repeated(help="A precision to measure; may be repeated. Without it that of --dtype.")
    ] = (),
    shape: Annotated[
        str | None, option(help="Random weights in the shape of qwen3-reranker-0.6b, -4b or -8b instead of a model.")
    ] = None,
    weights: Annotated[
        Path | None, option(help="Folder that keeps the random weights for the next run; else they are thrown away.")
    ] = None,
    peer: Annotated[tuple[PeerName, ...], _repeated(help="Other code to measure in turn; may be repeated.")] = (),
    peer_dtype: Annotated[Literal["fp32", "bf16", "fp16"], option(help="Precision of the peers.")] = "bf16",
    vllm_python: Annotated[str | None, option(help="Path of a Python that has vLLM; without it this one.")] = None,
    st_python: Annotated[
        str | None, option(help="Path of a Python that has sentence-transformers; without it this one.")
    ] = None,
    rounds: Annotated[int, option(help="Rounds of each system over each workload, in turn; medians are told.")] = 3,
    scaling: Annotated[
        bool, option(help="Passages in growing number, too: does the cost grow with the tokens?")
    ] = False,
    skip_reference: Annotated[bool, option(help="Do not compare log-odds with those in fp32.")] = False,
    skip_start: Annotated[bool, option(help="Do not measure how long a start takes.")] = False,
    json_output: Annotated[bool, option(name="--json", help="Print everything as JSON.")] = False,
    plot: Annotated[Path | None, option(help="Write pairs per second as a picture (.svg).")] = None,
    engine: EngineConfig | None = None,
) -> None:
    """Measure throughput, latency, memory and exactness, beside the hardware's limit and other people's code.

    Systems take turns, so that a change of the machine's speed meets all of them alike: trust the ratios.
    """
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; it must be at least 1")
    if plot is not None and plot.suffix != ".svg":
        raise ConfigError(f"plot is {plot}; only .svg can be written")
    if weights is not None and shape is None:
        raise ConfigError("weights is the folder of random weights; it needs a shape")
    config = engine or EngineConfig()
    pythons = {"vllm": vllm_python, "sentence-transformers": st_python}
    with ExitStack() as stack:
        if shape is not None:
            config = dataclasses.replace(config, model=str(_random_weights(stack, shape, weights)))
        ours = [_load(stack, config, each, skip_start) for each in dict.fromkeys(mode) or (config.dtype,)]
        reference = None if skip_reference else _reference(stack, config)
        systems: list[System] = [*ours, *_peers(stack, ours[0].reranker, dict.fromkeys(peer), pythons, peer_dtype)]
        measured, steps = _measure(workload or ("passages",), systems, reference, rounds, scaling)
    if plot is not None:
        _write_plot(plot, measured)
    report = _report(shape, ours, systems, measured, steps)
    if json_output:
        from rich.console import Console

        Console().out(json.dumps(report, indent=2), highlight=False)
    else:
        _print_tables(report, measured, steps)


def _random_weights(stack: ExitStack, shape: str, weights: Path | None) -> Path:
    from local_rerank.bench.shapes import make_checkpoint
    from local_rerank.commands.console import status

    folder = weights or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="local-rerank-"))) / shape
    with status(f"making random weights in the shape of {shape}"):
        return make_checkpoint(folder, shape)


def _load(stack: ExitStack, config: EngineConfig, mode: str, skip_start: bool) -> Ours:
    """One of ours, loaded; its start is measured in a process of its own."""
    from local_rerank import __version__
    from local_rerank.bench.systems import Ours
    from local_rerank.reranker import Reranker

    config = dataclasses.replace(config, dtype=mode)  # type: ignore[arg-type]  # one of DType
    start = None if skip_start else _start_seconds(config)
    reranker = stack.enter_context(Reranker(config=config))
    exact = len(reranker.info.unquantized)
    version = f"local-rerank {__version__}" + (f", {exact} linear layers left in fp32" if exact else "")
    return Ours(f"local-rerank {reranker.info.dtype}", reranker, version, start)


def _start_seconds(config: EngineConfig) -> float:
    """Seconds from the start of a process to its first answer."""
    options = ["--device", config.device, "--dtype", config.dtype]
    options += ["--model", config.model] if config.model else []
    options += ["--threads", str(config.threads)] if config.threads else []
    start = time.perf_counter()
    command = [sys.executable, "-m", "local_rerank", "rank", "a query", "a document", "--json", *options]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def _reference(stack: ExitStack, config: EngineConfig) -> Reranker:
    """fp32 with the dense mask, by which attention is defined."""
    from local_rerank.reranker import Reranker

    return stack.enter_context(Reranker(config=dataclasses.replace(config, dtype="fp32", attention="dense")))


def _peers(
    stack: ExitStack, reranker: Reranker, names: Iterable[str], pythons: dict[str, str | None], dtype: str
) -> Iterator[System]:
    """Those that are there; of the others it is said that they are not."""
    from rich.console import Console

    from local_rerank.bench.systems import Peer, PeerMissing
    from local_rerank.commands.console import status

    for name in names:
        try:
            with status(f"starting {name}"):
                peer = Peer(name, pythons.get(name) or sys.executable, reranker, dtype)
        except PeerMissing as missing:
            Console(stderr=True).print(f"not measured: {missing}", markup=False, soft_wrap=True)
        else:
            yield stack.enter_context(peer)


def _measure(
    names: Sequence[str], systems: Sequence[System], reference: Reranker | None, rounds: int, with_scaling: bool
) -> tuple[list[Measured], list[ScalingStep]]:
    from local_rerank.bench.measure import measure, scaling
    from local_rerank.bench.systems import Ours
    from local_rerank.bench.workloads import WORKLOADS

    measured: list[Measured] = []
    steps: list[ScalingStep] = []
    for name in dict.fromkeys(names):
        with _progress(name, rounds * len(systems)) as advance:
            measured.append(measure(WORKLOADS[name], systems, reference=reference, rounds=rounds, advance=advance))
    if with_scaling:
        first = next(system for system in systems if isinstance(system, Ours))
        with _progress("scaling", rounds * len(SCALING_SIZES)) as advance:
            steps = scaling(WORKLOADS["passages"], first, SCALING_SIZES, rounds=rounds, advance=advance)
    return measured, steps


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error; yields what to call after each step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield partial(progress.advance, progress.add_task(f"{name}: rounds", total=total))


def _report(
    shape: str | None,
    ours: Sequence[Ours],
    systems: Sequence[System],
    measured: Sequence[Measured],
    steps: Sequence[ScalingStep],
) -> dict[str, Any]:
    from local_rerank.selftest.machine_report import describe

    reranker = ours[0].reranker
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": shape or reranker.model_id,
        "random_weights": shape is not None,
        "machine": dataclasses.asdict(describe(reranker.info, reranker.checkpoint)),
        "systems": [
            {"name": each.name, "version": each.version, "start_seconds": each.start_seconds} for each in systems
        ],
        "engines": [dataclasses.asdict(each.reranker.info) for each in ours],
        "workloads": [dataclasses.asdict(each) for each in measured],
        "scaling": [dataclasses.asdict(step) for step in steps],
    }


def _print_tables(report: dict[str, Any], measured: Sequence[Measured], steps: Sequence[ScalingStep]) -> None:
    from rich.console import Console

    from local_rerank.bench.report import agreement_table, latency_table, scaling_table, workload_table

    console = Console(highlight=False)
    machine = report["machine"]
    about = " (random weights)" if report["random_weights"] else ""
    device, threads = machine["device"]["value"], machine["threads"]["value"]
    console.print(f"{report['model']}{about} on {device}, threads: {threads}", markup=False)
    for system in report["systems"]:
        start = "" if system["start_seconds"] is None else f", ready after {system['start_seconds']:.1f} s"
        console.print(f"{system['name']}: {system['version']}{start}", markup=False)
    for each in measured:
        console.print()
        console.print(workload_table(each))
    console.print()
    console.print(latency_table(measured))
    if any(row.agreement is not None for each in measured for row in each.rows):
        console.print()
        console.print(agreement_table(measured))
    if steps:
        console.print()
        console.print(scaling_table("passages", steps))


def _write_plot(file: Path, measured: Sequence[Measured]) -> None:
    from local_rerank.bench.report import speed_plot

    try:
        file.write_text(speed_plot(measured), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"plot {file} cannot be written: {error.strerror}") from error
