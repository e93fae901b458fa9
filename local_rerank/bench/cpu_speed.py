"""Measure in seconds how fast this machine's CPU runs the official models, without making or downloading one.

A decoder of three layers in the shape of the 0.6B model, with random weights (`CONFIG`), is planned and prepared like a
checkpoint. Its useful operations per second give the time of every official shape, as if all did the same number.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from local_rerank.bench.flops import DecoderShape, useful_flops
from local_rerank.bench.kept_speeds import DTYPES, PASSAGES, CpuSpeed
from local_rerank.bench.shapes import COMMON, DEVIATION, SHAPES
from local_rerank.checkpoints.find import Checkpoint
from local_rerank.checkpoints.recipes import RECIPES
from local_rerank.config import DType, EngineConfig
from local_rerank.engine.cpu.compute_thread import compute
from local_rerank.engine.cpu.cpu_limits import cpu_limits
from local_rerank.engine.cpu.int8_search import quantize_layers
from local_rerank.engine.cpu.prepare import prepare
from local_rerank.engine.cpu.thread_policy import MAX_WAITED
from local_rerank.engine.cpu.threads import LoadSensor, Threads
from local_rerank.engine.dtypes import name_of
from local_rerank.engine.engine import Engine
from local_rerank.engine.load import kernel_of
from local_rerank.engine.plan import make_plan
from local_rerank.engine.qwen3 import Qwen3
from local_rerank.errors import ConfigError
from local_rerank.requests.pair import Pair, num_batch_tokens

MEASURED = "qwen3-reranker-0.6b"
CONFIG: dict[str, Any] = COMMON | SHAPES[MEASURED] | {
    "num_hidden_layers": 3,  # the last one computes little; the others have 63 MB of bf16 weights
    "vocab_size": 16,
}  # fmt: skip
PREFIX_TOKENS = 85  # template, default instruction and a query of some ten words
DOCUMENT_TOKENS = 125  # 100 English words have about 115; the rest is the suffix
BATCH_DOCUMENTS = 8  # 1,085 tokens: short passes, of which other processes leave some alone
WARM_UP_DOCUMENTS = 2
MAX_PASSES = 8  # the best counts
MAX_SECONDS = 1.5  # no pass begins after that


def measure_speeds() -> tuple[dict[str, dict[str, CpuSpeed]], bool]:
    """The speed of each official model, by value of --dtype, and whether other processes used the CPU meanwhile.

    Without int8 if this CPU or torch cannot run it.
    """
    return compute(_measure)


def _measure() -> tuple[dict[str, dict[str, CpuSpeed]], bool]:
    sensor = None
    with contextlib.suppress(OSError):  # no Linux, or a sandbox with an incomplete or read-only /proc
        sensor = LoadSensor()  # before the first operator
    batch, was_busy = _pairs(BATCH_DOCUMENTS), False
    shapes = {model: DecoderShape.from_config(COMMON | shape) for model, shape in SHAPES.items()}
    models: dict[str, dict[str, CpuSpeed]] = {model: {} for model in shapes}
    for dtype in DTYPES:  # int8 last, because it changes how the process multiplies fp32 (`routes_fp32`)
        try:
            engine, arithmetic = _random_engine(dtype)
        except ConfigError:
            if dtype == "auto":
                raise
            continue
        seconds, is_busy = _best_pass(engine, batch, sensor)
        was_busy |= is_busy
        flops_per_second = useful_flops(DecoderShape.from_config(CONFIG), batch) / seconds
        for model, shape in shapes.items():
            models[model][dtype] = CpuSpeed(
                arithmetic=arithmetic,
                tokens_per_second=num_batch_tokens(batch) * flops_per_second / useful_flops(shape, batch),
                seconds=useful_flops(shape, _pairs(PASSAGES)) / flops_per_second,
            )
    return models, was_busy


def _pairs(num_documents: int) -> list[Pair]:
    return [Pair.of([1] * PREFIX_TOKENS, [2] * DOCUMENT_TOKENS) for _ in range(num_documents)]


def _random_engine(dtype: DType) -> tuple[Engine, str]:
    """An engine as for a checkpoint of `CONFIG`, and the dtype of its products. Raises ConfigError as loading does."""
    checkpoint = Checkpoint(  # what `make_plan` reads; there are no files
        model_id=MEASURED,
        folder=Path(),
        source="folder",
        revision=None,
        architecture=CONFIG["architectures"][0],
        config=CONFIG,
        weights=(),
        recipe=RECIPES[0],
        recipe_reason="the measured shape is Qwen3's",
    )
    plan = make_plan(EngineConfig(device="cpu", dtype=dtype), checkpoint)
    with torch.device("meta"):  # neither allocates nor initializes weights
        model = Qwen3(SimpleNamespace(**CONFIG), CONFIG["rope_theta"], None)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    weights = {name: torch.empty(shape, dtype=plan.weights).normal_(std=DEVIATION) for name, shape in shapes.items()}
    model.load_state_dict(weights, assign=True)
    decoder = prepare(model, plan)
    if plan.quantization == "int8":
        quantize_layers(decoder.layers)
    engine = Engine(
        decoder,
        torch.zeros(2, CONFIG["hidden_size"]),
        kernel=kernel_of(plan),
        device=plan.device,
        threads=Threads.choose(None, is_fixed=True),
    )
    return engine, plan.quantization or name_of(plan.arithmetic)


def _best_pass(engine: Engine, batch: list[Pair], sensor: LoadSensor | None) -> tuple[float, bool]:
    """Seconds of the best pass, and False; on a busy CPU an estimate of what they would be, and True.

    Threads that wait for each other on busy cores make a pass several times as long and use up to twice the CPU time.
    So the estimate is the CPU time of one thread, divided by the CPUs, as if threads cost nothing.
    """
    engine.score(batch[:WARM_UP_DOCUMENTS])
    if sensor is not None:
        sensor.read(with_idle=False)
    quiet = [seconds for seconds, _, waited in _passes(engine, batch, sensor) if waited <= MAX_WAITED]
    if quiet:
        return min(quiet), False
    assert engine.threads is not None
    num_cpus = min(engine.threads.count, cpu_limits().num_cpus)
    engine.threads = Threads.choose(1, is_fixed=True)
    return min(cpu_seconds for _, cpu_seconds, _ in _passes(engine, batch, sensor)) / num_cpus, True


def _passes(engine: Engine, batch: list[Pair], sensor: LoadSensor | None) -> Iterator[tuple[float, float, float]]:
    """Seconds, CPU seconds, and the share of the time in which threads waited for a CPU, of several passes."""
    end = time.perf_counter() + MAX_SECONDS
    for number in range(MAX_PASSES):
        start, cpu_start = time.perf_counter(), time.process_time()
        if number and start > end:
            return
        engine.score(batch)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        yield seconds, cpu_seconds, 0.0 if sensor is None else sensor.read(with_idle=False).waited
