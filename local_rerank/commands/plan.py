"""The command `local-rerank plan`: estimate the time, machines and cost of a job, and the replicas for a latency."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Any

from local_rerank.commands.console import JsonOutput, option, print_json, say, warn
from local_rerank.config import CHUNK_OVERLAP_TOKENS, CHUNK_TOKENS, EngineConfig
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.types import LongDocuments

if TYPE_CHECKING:
    from local_rerank.bench.kept_speeds import CpuSpeeds
    from local_rerank.planning.rates import Plan, Range, Rate
    from local_rerank.planning.simulation import SimulationResult

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2560, 16384  # as in engine.plan, which imports torch
THIS_CPU = "cpu"  # as in --gpus


def plan(
    *,
    pairs: Annotated[float, option(help="Pairs to score, for example 1e9.")] = 1e6,
    tokens: Annotated[int, option(help="Tokens per pair: template, instruction, query and document.")] = 300,
    shared_tokens: Annotated[
        int, option(help="Tokens per pair that all pairs of a query share and that are computed once.")
    ] = 69,
    documents: Annotated[int, option(help="Documents per query.")] = 100,
    long_documents: Annotated[
        LongDocuments, option(help="chunk: documents beyond --chunk-tokens are scored in overlapping chunks.")
    ] = "truncate",
    chunk_tokens: Annotated[int, option(help="Maximum tokens of a chunk.")] = CHUNK_TOKENS,
    chunk_overlap_tokens: Annotated[
        int, option(help="Tokens that a chunk repeats of the one before.")
    ] = CHUNK_OVERLAP_TOKENS,
    gpus: Annotated[
        str, option(help="Number and kind of devices, for example 8xH200; cpu: machines with this one's CPU.")
    ] = THIS_CPU,
    model: Annotated[str, option(help="Name of the model.")] = "qwen3-reranker-0.6b",
    tokens_per_second: Annotated[
        float | None, option(help="Measured tokens per second of one device. Default: from the table, or estimated.")
    ] = None,
    price: Annotated[float | None, option(help="Dollars per device and hour. Default: from the table.")] = None,
    requests_per_second: Annotated[
        float | None, option(help="Incoming requests per second, to compute the number of replicas.")
    ] = None,
    p99_ms: Annotated[float, option(help="Target p99 latency in milliseconds.")] = 500.0,
    json_output: JsonOutput = False,
) -> None:
    """Estimate the time, machines and cost of a job, and the replicas that a p99 latency needs."""
    from local_rerank.planning.rates import DEVICES_PER_MACHINE, SUFFIX_TOKENS, chunks_of, find_device, make_plan

    num_devices, device_name = _devices(gpus)
    on_this_cpu = device_name == THIS_CPU
    for name, value in (
        ("pairs", pairs),
        ("documents", documents),
        ("tokens_per_second", tokens_per_second),
        ("price", price),
        ("requests_per_second", requests_per_second),
        ("p99_ms", p99_ms),
    ):
        if value is not None and not 0 < value < 1e18:
            raise InvalidRequest(f"{name} is {value:g}; it must be more than 0 and less than 1e18", field=name)
    if not 0 <= shared_tokens < tokens:
        what = f"shared_tokens is {shared_tokens}; it must be less than tokens, which is {tokens}"
        raise InvalidRequest(what, field="shared_tokens", limit=tokens, value=shared_tokens)
    chunking = EngineConfig(
        long_documents=long_documents, chunk_tokens=chunk_tokens, chunk_overlap_tokens=chunk_overlap_tokens
    )
    num_chunks, num_more_tokens = 1, 0
    if chunking.in_chunks:
        num_chunks, num_more_tokens = chunks_of(
            tokens - shared_tokens - SUFFIX_TOKENS, chunk_tokens, chunk_overlap_tokens
        )
    speeds = _cpu_speeds(model) if on_this_cpu and tokens_per_second is None else None
    rate = _rate(speeds, device_name, model, tokens_per_second)
    made = make_plan(
        pairs=pairs,
        tokens=tokens + num_more_tokens,
        shared_tokens=shared_tokens,
        documents=documents,
        num_devices=num_devices,
        devices_per_machine=1 if on_this_cpu else DEVICES_PER_MACHINE,
        device=find_device(device_name, price),
        rate=rate,
    )
    replicas = None
    if requests_per_second is not None:
        replicas = _replicas(
            rate,
            requests_per_second=requests_per_second,
            documents=documents * num_chunks,
            document_tokens=(tokens - shared_tokens + num_more_tokens) / num_chunks,
            shared_tokens=shared_tokens,
            max_batch_tokens=CPU_BATCH_TOKENS if on_this_cpu else GPU_BATCH_TOKENS,
            p99_ms=p99_ms,
        )
    if json_output:
        _print_json(made, replicas, speeds)
    else:
        if speeds is not None:
            _print_speeds(speeds)
        in_chunks = f" in {num_chunks} chunks" if num_chunks > 1 else ""
        job = f"{pairs:,.0f} pairs of {tokens} tokens{in_chunks}, {model}"
        _print(made, replicas, job, num_devices, device_name, p99_ms)


def _cpu_speeds(model: str) -> CpuSpeeds:
    """The speed of this machine's CPU: kept, or measured now and kept. Raises ConfigError without one for `model`."""
    from local_rerank.bench import kept_speeds
    from local_rerank.checkpoints.find import ALIASES

    if model not in ALIASES:
        names = ", ".join(ALIASES)
        raise ConfigError(f"model is {model!r}; on this CPU it must be {names}, or give --tokens-per-second")
    if (speeds := kept_speeds.read()) is None:
        warn("measuring this CPU once, with three random layers in the shape of qwen3-reranker-0.6b: some 10 s ...")
        from local_rerank.bench.cpu_speed import measure_speeds

        speeds = kept_speeds.write(*measure_speeds())
    return speeds


def _rate(speeds: CpuSpeeds | None, device: str, model: str, tokens_per_second: float | None) -> Rate:
    """The rate of this CPU with what --dtype auto chooses, or that of another device."""
    from local_rerank.planning.rates import Range, Rate, find_rate

    if speeds is None:
        return find_rate(device, model, tokens_per_second)
    auto = speeds.models[model]["auto"]
    source = f"{speeds.cpu}, {speeds.threads} threads, {auto.arithmetic} (auto), on {speeds.date}"
    bounds = Range(low=auto.tokens_per_second, high=auto.tokens_per_second)
    return Rate(tokens_per_second=bounds, kind="measured", source=source)


def _devices(text: str) -> tuple[int, str]:
    found = re.fullmatch(r"(?:(\d+)x)?(\S+)", text)
    if found is None or (found[1] is not None and int(found[1]) < 1):
        raise ConfigError(f"gpus is {text!r}; it must be a number and a device, for example 8xH200")
    return int(found[1] or 1), THIS_CPU if found[2].lower() == THIS_CPU else found[2]


def _replicas(
    rate: Rate,
    *,
    requests_per_second: float,
    documents: int,
    document_tokens: float,
    shared_tokens: int,
    max_batch_tokens: int,
    p99_ms: float,
) -> tuple[int, SimulationResult]:
    """Simulate at the lower bound of the rate."""
    from local_rerank.planning.simulation import Speed, Traffic, replicas_for

    traffic = Traffic(
        requests_per_second=requests_per_second,
        num_documents=documents,
        document_tokens=document_tokens,
        prefix_tokens=shared_tokens,
    )
    speed = Speed(token_seconds=1 / rate.tokens_per_second.low, max_batch_tokens=max_batch_tokens)
    try:
        return replicas_for(traffic, speed, p99_ms=p99_ms)
    except ValueError as error:
        raise ConfigError(f"p99_ms is {p99_ms:g}; {error}") from None


def _print_speeds(speeds: CpuSpeeds) -> None:
    for number, model in enumerate(speeds.models):
        say(f"{'' if number else 'this CPU':8}  {speeds.in_words(model)}")
    if speeds.was_busy:
        say("          other processes used the CPU: estimated from CPU time, as if it were idle")


def _print(
    made: Plan, replicas: tuple[int, SimulationResult] | None, job: str, num_devices: int, device: str, p99_ms: float
) -> None:
    from local_rerank.planning.rates import published

    rate = made.rate
    label = {"measured": "measured", "given": "given", "estimate": "ESTIMATE, not measured"}[rate.kind]
    say(f"job       {job}, of which {made.computed_tokens_per_pair:.0f} are computed")
    say(f"rate      {_span(rate.tokens_per_second)} tokens/s per {device}: {label}; {rate.source}")
    digits = 0 if made.pairs_per_second.high >= 10 else 2
    say(f"          {_span(made.pairs_per_second, digits)} pairs/s with {num_devices}")
    say(f"time      {_span(made.hours, 1 if made.hours.high >= 1 else 3)} hours")
    say(f"machines  {made.num_machines}" + ("" if device == THIS_CPU else ", with up to 8 devices each"))
    if made.dollars is None:
        say("cost      unknown; give --price in dollars per device and hour")
    else:
        say(f"cost      ${_span(made.dollars, 2)} for {_span(made.device_hours, 1)} device hours ({made.price_source})")
    if replicas is not None:
        number, outcome = replicas
        say(
            f"replicas  {number} for p99 <= {p99_ms:g} ms: p50 {outcome.p50_ms:.0f}, p95 {outcome.p95_ms:.0f}, "
            f"p99 {outcome.p99_ms:.0f} ms, engines {outcome.utilisation:.0%} busy (simulated at the lower rate)"
        )
    for line in published(device):
        say(f"others    {line}")


def _span(bounds: Range, digits: int = 0) -> str:
    low, high = f"{bounds.low:,.{digits}f}", f"{bounds.high:,.{digits}f}"
    return low if low == high else f"{low}-{high}"


def _print_json(made: Plan, replicas: tuple[int, SimulationResult] | None, speeds: CpuSpeeds | None) -> None:
    shown: dict[str, Any] = dataclasses.asdict(made)
    if speeds is not None:
        shown["this_cpu"] = dataclasses.asdict(speeds)
    if replicas is not None:
        shown["replicas"] = {"number": replicas[0], **dataclasses.asdict(replicas[1])}
    print_json(shown)
