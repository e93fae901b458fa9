"""Run targets on workloads in alternation (A B A B) and compare medians, ratios and log-odds."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from local_rerank.bench.flops import DecoderShape, gemm_ceiling, useful_flops
from local_rerank.bench.targets import RerankerTarget, Round, Target
from local_rerank.bench.workloads import Workload, make_requests
from local_rerank.engine.plan import PLATFORMS
from local_rerank.requests.pair import num_batch_tokens
from local_rerank.reranker import Reranker

CEILING_TOKENS = {name: platform.max_batch_tokens for name, platform in PLATFORMS.items()}  # rows of the GEMM
CEILING_SHARE = 0.1  # of these rows, for an estimate
WARM_UP_DOCUMENTS = 8
SHORT_SECONDS = 5.0  # a first pass that took less is repeated
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast a target is, from a first pass over a few documents."""

    seconds_per_flop: float  # of useful operations
    ceiling_seconds: float  # to measure the ceiling once

    def seconds(self, flops: float) -> float:
        """The estimated time of a round."""
        return flops * self.seconds_per_flop + self.ceiling_seconds


Begin = Callable[[str, float, int], object]
"""Called before each step of a measurement with its name, its estimated seconds and its tokens."""


class Measurement:
    """A workload, and the rounds of targets on it so far. Ratios refer to `targets[0]`, which is a RerankerTarget."""

    def __init__(
        self, workload: Workload, targets: Sequence[Target], *, reference: RerankerTarget | None, rounds: int
    ) -> None:
        first = targets[0]
        assert isinstance(first, RerankerTarget)
        self._workload, self._targets, self._reference, self._rounds = workload, targets, reference, rounds
        self._requests = make_requests(workload, first.reranker.tokenizer.count_tokens)
        self._shape = DecoderShape.from_config(first.reranker.checkpoint.config)
        tokenized = [first.reranker.tokenizer.pairs(request) for request in self._requests]
        self._flops = sum(useful_flops(self._shape, each.pairs) for each in tokenized)
        self._num_tokens = sum(num_batch_tokens(each.pairs) for each in tokenized)
        documents = self._requests[0].documents[:WARM_UP_DOCUMENTS]
        self._few = dataclasses.replace(self._requests[0], documents=documents)
        self._few_flops = useful_flops(self._shape, first.reranker.tokenizer.pairs(self._few).pairs)
        self._warm: set[str] = set()
        self._taken: dict[str, list[Round]] = {target.name: [] for target in targets}
        self._ceilings: dict[str, list[float]] = {target.name: [] for target in targets}
        self._exact: LogOdds | None = None

    def pace(self, target: RerankerTarget, *, with_ceiling: bool = True) -> Pace:
        """Warm up a target, and measure its pace. A GPU compiles and captures in the first of two passes."""
        is_cpu = target.reranker.info.device == "cpu"
        seconds = self._warm_up(target)
        if seconds < SHORT_SECONDS or not is_cpu:
            seconds = self._warm_up(target)
        ceiling_seconds = 0.0
        for _ in range(with_ceiling * (1 if is_cpu else 2)):
            start = time.perf_counter()
            _ceiling(target.reranker, self._shape, share=CEILING_SHARE)
            ceiling_seconds = (time.perf_counter() - start) / CEILING_SHARE
        return Pace(seconds_per_flop=seconds / self._few_flops, ceiling_seconds=ceiling_seconds)

    def estimate(self, paces: Mapping[str, Pace]) -> float:
        """The estimated seconds of all rounds and of the reference, from paces on any workload by name of target."""
        rounds = sum(paces[target.name].seconds(self._flops) for target in self._targets)
        last = 0.0 if self._reference is None else paces[self._reference.name].seconds(self._flops)
        return self._rounds * rounds + last

    def run(self, paces: Mapping[str, Pace] | None = None, begin: Begin = lambda *_: None) -> WorkloadResult:
        """Warm up all targets and run them in alternation, and the reference last, since an interrupt keeps rounds."""
        for target in [*self._targets, *([] if self._reference is None else [self._reference])]:
            if target.name not in self._warm:
                self._warm_up(target)
        for number in range(1, self._rounds + 1):
            for target in self._targets:
                self._begin(begin, paces, target, f"{target.name}, round {number} of {self._rounds}")
                if isinstance(target, RerankerTarget):  # in each round, because the machine's speed may change
                    self._ceilings[target.name].append(_ceiling(target.reranker, self._shape))
                self._taken[target.name].append(target.run(self._requests, concurrent=self._workload.concurrent))
        if self._reference is not None:
            self._begin(begin, paces, self._reference, self._reference.name)
            self._exact = self._reference.run(self._requests, concurrent=False).log_odds
        result = self.result
        assert result is not None
        return result

    @property
    def result(self) -> WorkloadResult | None:
        """The result of the rounds so far; None before the first one is complete."""
        taken = {name: rounds for name, rounds in self._taken.items() if rounds}
        if not taken:
            return None
        base = statistics.median(each.seconds for each in taken[self._targets[0].name])
        return WorkloadResult(
            workload=self._workload.name,
            about=self._workload.about,
            num_requests=len(self._requests),
            num_pairs=sum(len(request.documents) for request in self._requests),
            num_tokens=self._num_tokens,
            rows=tuple(
                _result(name, each, base, self._ceilings[name], self._flops, self._num_tokens, self._exact)
                for name, each in taken.items()
            ),
        )

    def _warm_up(self, target: Target) -> float:
        self._warm.add(target.name)
        return target.run([self._few], concurrent=False).seconds

    def _begin(self, begin: Begin, paces: Mapping[str, Pace] | None, target: Target, step: str) -> None:
        seconds = 0.0 if paces is None else paces[target.name].seconds(self._flops)
        begin(f"{self._workload.name}: {step}", seconds, self._num_tokens)


def _ceiling(reranker: Reranker, shape: DecoderShape, *, share: float = 1.0) -> float:
    device = torch.device(reranker.info.device)
    num_tokens = round(CEILING_TOKENS[device.type] * share)
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
