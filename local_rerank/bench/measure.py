"""Run targets on workloads in alternation (A B A B) and compare medians, ratios and log-odds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from local_rerank.bench.flops import DecoderShape, gemm_ceiling, useful_flops
from local_rerank.bench.targets import RerankerTarget, Round, Target
from local_rerank.bench.workloads import Workload, make_requests
from local_rerank.engine.plan import PLATFORMS
from local_rerank.requests.pair import num_batch_tokens
from local_rerank.reranker import Reranker

CEILING_TOKENS = {name: platform.max_batch_tokens for name, platform in PLATFORMS.items()}  # rows of the GEMM
WARM_UP_DOCUMENTS = 8
LogOdds = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How close log-odds and rankings are to those of the fp32 reference."""

    largest: float
    mean: float
    kendall_tau: float  # mean over requests


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetResult:
    """One target on one workload. Rates are of the median round; None means that the target does not report it."""

    system: str
    seconds: tuple[float, ...]  # by round
    pairs_per_second: float
    tokens_per_second: float  # prompt tokens, counting the prefix once per request
    ratio: float  # median time over that of the first target
    useful_tflops: float | None
    ceiling_tflops: float | None  # GEMM at the model's shapes, median of the rounds
    useful_share: float | None  # useful operations per second over the ceiling, median of the rounds
    latency_ms: dict[str, float]  # p50, p95, p99 over all requests of all rounds
    num_latencies: int
    peak_bytes: int | None
    tokenize_share: float | None
    agreement: Agreement | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadResult:
    """All targets on one workload."""

    workload: str
    about: str
    num_requests: int
    num_pairs: int
    num_tokens: int
    rows: tuple[TargetResult, ...]


def measure(
    workload: Workload,
    targets: Sequence[Target],
    *,
    reference: Reranker | None,
    rounds: int,
    advance: Callable[[], object],
) -> WorkloadResult:
    """Warm up all targets, then run them in alternation. Ratios refer to `targets[0]`, which is a RerankerTarget."""
    first = targets[0]
    assert isinstance(first, RerankerTarget)
    requests = make_requests(workload, first.reranker.tokenizer.count_tokens)
    tokenized = [first.reranker.tokenizer.pairs(request) for request in requests]
    shape = DecoderShape.from_config(first.reranker.checkpoint.config)
    flops = sum(useful_flops(shape, each.pairs) for each in tokenized)
    num_tokens = sum(num_batch_tokens(each.pairs) for each in tokenized)
    exact = None
    if reference is not None:
        exact = RerankerTarget("reference", reference, "", None).run(requests, concurrent=False).log_odds
    taken: dict[str, list[Round]] = {target.name: [] for target in targets}
    ceilings: dict[str, list[float]] = {target.name: [] for target in targets}
    few = dataclasses.replace(requests[0], documents=requests[0].documents[:WARM_UP_DOCUMENTS])
    for target in targets:
        target.run([few], concurrent=False)
    for _ in range(rounds):
        for target in targets:
            if isinstance(target, RerankerTarget):  # in each round, because the machine's speed may change
                ceilings[target.name].append(_ceiling(target.reranker, shape))
            taken[target.name].append(target.run(requests, concurrent=workload.concurrent))
            advance()
    base = statistics.median(each.seconds for each in taken[first.name])
    rows = [_result(name, each, base, ceilings[name], flops, num_tokens, exact) for name, each in taken.items()]
    return WorkloadResult(
        workload=workload.name,
        about=workload.about,
        num_requests=len(requests),
        num_pairs=sum(len(request.documents) for request in requests),
        num_tokens=num_tokens,
        rows=tuple(rows),
    )


def _ceiling(reranker: Reranker, shape: DecoderShape) -> float:
    device = torch.device(reranker.info.device)
    num_tokens = CEILING_TOKENS[device.type]
    return gemm_ceiling(shape, arithmetic=reranker.info.compute_dtype, num_tokens=num_tokens, device=device)


def _result(
    name: str,
    rounds: Sequence[Round],
    base_seconds: float,
    ceilings: Sequence[float],
    flops: float,
    num_tokens: int,
    exact: LogOdds | None,
) -> TargetResult:
    seconds = statistics.median(each.seconds for each in rounds)
    latencies = sorted(latency for each in rounds for latency in each.latencies)
    tokenize = [each.tokenize_seconds / each.seconds for each in rounds if each.tokenize_seconds is not None]
    peaks = [each.peak_bytes for each in rounds if each.peak_bytes is not None]
    shares = [flops / each.seconds / ceiling for each, ceiling in zip(rounds, ceilings, strict=False)]
    return TargetResult(
        system=name,
        seconds=tuple(each.seconds for each in rounds),
        pairs_per_second=sum(map(len, rounds[0].log_odds)) / seconds,
        tokens_per_second=num_tokens / seconds,
        ratio=seconds / base_seconds,
        useful_tflops=flops / seconds / 1e12 if ceilings else None,
        ceiling_tflops=statistics.median(ceilings) / 1e12 if ceilings else None,
        useful_share=statistics.median(shares) if shares else None,
        latency_ms={f"p{q}": 1e3 * percentile(latencies, q) for q in (50, 95, 99)} if latencies else {},
        num_latencies=len(latencies),
        peak_bytes=max(peaks) if peaks else None,
        tokenize_share=statistics.median(tokenize) if tokenize else None,
        agreement=None if exact is None else agreement(rounds[-1].log_odds, exact),
    )


def percentile(ordered: Sequence[float], q: int) -> float:
    """Return the smallest value that at least q percent of the sorted values do not exceed."""
    return ordered[max(0, -(-len(ordered) * q // 100) - 1)]


def agreement(scores: LogOdds, exact: LogOdds) -> Agreement:
    """Compare log-odds request by request."""
    gaps = [abs(a - b) for row, other in zip(scores, exact, strict=True) for a, b in zip(row, other, strict=True)]
    taus = [kendall_tau(row, other) for row, other in zip(scores, exact, strict=True)]
    return Agreement(largest=max(gaps), mean=statistics.fmean(gaps), kendall_tau=statistics.fmean(taus))


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau-b of two lists of scores, or 1 if all pairs are tied."""
    concordance = ties_first = ties_second = pairs = 0
    for i in range(len(first)):
        for j in range(i):
            a, b = first[i] - first[j], second[i] - second[j]
            pairs += 1
            ties_first += a == 0
            ties_second += b == 0
            concordance += (a * b > 0) - (a * b < 0)
    scale = ((pairs - ties_first) * (pairs - ties_second)) ** 0.5
    return concordance / scale if scale else 1.0
