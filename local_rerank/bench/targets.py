"""What a benchmark measures: something that ranks requests, and what one round of it gives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from local_rerank.bench.memory import PeakMemory
from local_rerank.reranker import Reranker
from local_rerank.types import RerankRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of one target on one workload; a target may not know the optional figures."""

    seconds: float
    log_odds: tuple[tuple[float, ...], ...]  # by request, in document order
    latencies: tuple[float, ...]  # seconds by request; may be empty
    tokenize_seconds: float | None = None
    peak_bytes: int | None = None  # over the memory in use before the round, and the pool of CUDA graphs


class Target(Protocol):
    """Something that ranks requests."""

    name: str
    version: str
    start_seconds: float | None

    def run(self, requests: Sequence[RerankRequest], *, concurrent: bool) -> Round: ...


class RerankerTarget:
    """A `Reranker` in this process."""

    def __init__(
        self, name: str, reranker: Reranker, version: str, start_seconds: float | None, *, graph_bytes: int = 0
    ) -> None:
        """`graph_bytes`: of the pool of its CUDA graphs, which is allocated when it is loaded."""
        self.name, self.version, self.start_seconds = name, version, start_seconds
        self.reranker, self.graph_bytes = reranker, graph_bytes

    def run(self, requests: Sequence[RerankRequest], *, concurrent: bool) -> Round:
        with PeakMemory(self.reranker.info.device) as memory:
            start = time.perf_counter()
            if concurrent:
                futures = [self.reranker.submit(request) for request in requests]
                results = [future.result() for future in futures]
            else:
                results = [self.reranker.submit(request).result() for request in requests]
            seconds = time.perf_counter() - start
        return Round(
            seconds=seconds,
            log_odds=tuple(
                tuple(item.log_odds for item in sorted(result, key=lambda item: item.index)) for result in results
            ),
            latencies=tuple(result.total_ms / 1e3 for result in results),
            tokenize_seconds=sum(result.tokenize_ms for result in results) / 1e3,
            peak_bytes=memory.peak_bytes + self.graph_bytes,
        )
