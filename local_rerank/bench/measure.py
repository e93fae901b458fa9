"""All systems over all workloads, in turn (A B A B), and what they are compared by: medians and ratios."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from local_rerank.bench.flops import Shape, gemm_ceiling, kendall_tau, useful_flops
from local_rerank.bench.systems import Ours, Sample, System
from local_rerank.bench.workloads import Workload, make_requests
from local_rerank.engine.plan import PLATFORMS
from local_rerank.reranker import Reranker
from local_rerank.types import RerankRequest

CEILING_TOKENS = {name: platform.max_batch_tokens for name, platform in PLATFORMS.items()}  # of the GEMM
WARM_UP_DOCUMENTS = 8
LogOdds = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far log-odds are from those of the fp32 reference, over all pairs, and how alike they rank."""

    largest: float
    mean: float
    kendall_tau: float  # mean over requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system over one workload. Rates are of the median round; None where a peer does not tell."""

    system: str
    seconds: tuple[float, ...]  # by round
    pairs_per_second: float
    tokens_per_second: float  # tokens of the prompts, each prefix once per request: what ours has to compute
    ratio: float  # median time of this system over that of the first one
    useful_tflops: float | None
    ceiling_tflops: float | None  # GEMM at the model's shapes, median over the rounds
    useful_share: float | None  # median over the rounds of useful operations per second over the ceiling
    latency_ms: dict[str, float]  # p50, p95, p99 over all requests of all rounds
    num_latencies: int
    peak_bytes: int | None
    tokenize_share: float | None
    agreement: Agreement | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A workload and what each system did with it."""

    workload: str
    about: str
    num_requests: int
    num_pairs: int
    num_tokens: int
    rows: tuple[Row, ...]


def measure(
    workload: Workload,
    systems: Sequence[System],
    *,
    reference: Reranker | None,
    rounds: int,
    advance: Callable[[], None],
) -> Measured:
    """Warm every system up with a few documents, then take turns; `systems[0]` is what the ratios refer to."""
    ours = next(system for system in systems if isinstance(system, Ours))
    requests = workload_requests(workload, ours.reranker)
    tokenized = [ours.reranker.tokenizer.pairs(request) for request in requests]
    shape = Shape.from_config(ours.reranker.checkpoint.config)
    flops = sum(useful_flops(shape, each.pairs) for each in tokenized)
    num_tokens = sum(len(each.pairs[0].prefix_ids) + sum(len(p.document_ids) for p in each.pairs) for each in tokenized)
    exact = None if reference is None else Ours("reference", reference, "", None).run(requests, concurrent=False)
    samples: dict[str, list[Sample]] = {system.name: [] for system in systems}
    ceilings: dict[str, list[float]] = {system.name: [] for system in systems if isinstance(system, Ours)}
    few = dataclasses.replace(requests[0], documents=requests[0].documents[:WARM_UP_DOCUMENTS])
    for system in systems:
        system.run([few], concurrent=False)
    for _ in range(rounds):
        for system in systems:
            if isinstance(system, Ours):
                ceilings[system.name].append(_ceiling(system.reranker, shape))
            samples[system.name].append(system.run(requests, concurrent=workload.concurrent))
            advance()
    base = statistics.median(sample.seconds for sample in samples[systems[0].name])
    rows = [
        _row(name, taken, base, ceilings.get(name), flops, num_tokens, None if exact is None else exact.log_odds)
        for name, taken in samples.items()
    ]
    num_pairs = sum(len(request.documents) for request in requests)
    return Measured(
        workload=workload.name, about=workload.about, num_requests=len(requests), num_pairs=num_pairs,
        num_tokens=num_tokens, rows=tuple(rows),
    )  # fmt: skip


def workload_requests(
    workload: Workload, reranker: Reranker, *, num_documents: int | None = None
) -> list[RerankRequest]:
    """The requests of a workload in the tokens of that model."""
    return make_requests(workload, reranker.tokenizer.count_tokens, num_documents=num_documents)


def _ceiling(reranker: Reranker, shape: Shape) -> float:
    """What the hardware can do in the arithmetic of that engine, now: the machine may be slower than a minute ago."""
    device = torch.device(reranker.info.device)
    num_tokens = CEILING_TOKENS[device.type]
    return gemm_ceiling(shape, arithmetic=reranker.info.compute_dtype, num_tokens=num_tokens, device=device)


def _row(
    name: str,
    samples: Sequence[Sample],
    base_seconds: float,
    ceilings: Sequence[float] | None,
    flops: float,
    num_tokens: int,
    exact: LogOdds | None,
) -> Row:
    seconds = statistics.median(sample.seconds for sample in samples)
    latencies = sorted(latency for sample in samples for latency in sample.latencies)
    tokenize = [sample.tokenize_seconds / sample.seconds for sample in samples if sample.tokenize_seconds is not None]
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    shares = [flops / s.seconds / ceiling for s, ceiling in zip(samples, ceilings or (), strict=False)]
    return Row(
        system=name,
        seconds=tuple(sample.seconds for sample in samples),
        pairs_per_second=sum(map(len, samples[0].log_odds)) / seconds,
        tokens_per_second=num_tokens / seconds,
        ratio=seconds / base_seconds,
        useful_tflops=flops / seconds / 1e12 if ceilings else None,
        ceiling_tflops=statistics.median(ceilings) / 1e12 if ceilings else None,
        useful_share=statistics.median(shares) if shares else None,
        latency_ms={f"p{q}": 1e3 * _percentile(latencies, q) for q in (50, 95, 99)} if latencies else {},
        num_latencies=len(latencies),
        peak_bytes=max(peaks) if peaks else None,
        tokenize_share=statistics.median(tokenize) if tokenize else None,
        agreement=None if exact is None else agreement(samples[-1].log_odds, exact),
    )


def _percentile(ordered: Sequence[float], q: int) -> float:
    """The smallest value that q percent of the values do not pass."""
    return ordered[max(0, -(-len(ordered) * q // 100) - 1)]


def agreement(scores: LogOdds, exact: LogOdds) -> Agreement:
    """Compare log-odds, request by request."""
    gaps = [abs(a - b) for row, other in zip(scores, exact, strict=True) for a, b in zip(row, other, strict=True)]
    taus = [kendall_tau(row, other) for row, other in zip(scores, exact, strict=True)]
    return Agreement(largest=max(gaps), mean=statistics.fmean(gaps), kendall_tau=statistics.fmean(taus))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingStep:
    """One size of the scaling sweep."""

    num_documents: int
    num_tokens: int
    seconds: float  # median
    seconds_per_token: float
    growth: float | None  # time over that of the step before, divided by the tokens over those before; 1 is linear


def scaling(
    workload: Workload, ours: Ours, sizes: Sequence[int], *, rounds: int, advance: Callable[[], None]
) -> list[ScalingStep]:
    """The first request of a workload with more and more documents, sizes in turn."""
    requests = [workload_requests(workload, ours.reranker, num_documents=size)[:1] for size in sizes]
    counts = []
    for each in requests:
        pairs = ours.reranker.tokenizer.pairs(each[0]).pairs
        counts.append(len(pairs[0].prefix_ids) + sum(len(pair.document_ids) for pair in pairs))
    ours.run(requests[0], concurrent=False)
    times: list[list[float]] = [[] for _ in sizes]
    for _ in range(rounds):
        for taken, request in zip(times, requests, strict=True):
            taken.append(ours.run(request, concurrent=False).seconds)
            advance()
    steps: list[ScalingStep] = []
    for size, count, taken in zip(sizes, counts, times, strict=True):
        seconds = statistics.median(taken)
        before = steps[-1] if steps else None
        growth = None if before is None else seconds / before.seconds / (count / before.num_tokens)
        steps.append(
            ScalingStep(
                num_documents=size, num_tokens=count, seconds=seconds, seconds_per_token=seconds / count, growth=growth
            )
        )
    return steps
