"""What Prometheus reads at `/metrics`: every name once, who feeds it, and the text.

Requests are fed in by the middleware, results by `ServerState.rank`, batches by the model's thread; what is a state
rather than an event (queue, memory) is looked up as the page is asked for. Labels have few values: no path, no key.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

import local_rerank

if TYPE_CHECKING:
    from local_rerank.requests.worker import BatchReport
    from local_rerank.types import ModelInfo, RerankResult
    from local_rerank_server.state import ServerState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper bounds of buckets
TOKENS = tuple(float(2**power) for power in range(6, 18))  # 64 ... 131,072
DOCUMENTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
GPU_MEMORY = ("allocated", "reserved")


class Metrics:
    """The counters of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # process_resident_memory_bytes and the like

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"local_rerank_{name}", help, labels, registry=registry)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(f"local_rerank_{name}", help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"local_rerank_{name}", help, labels, registry=registry, buckets=buckets)

        self._requests = counter("requests", "Requests answered", "dialect", "status")
        self._request_seconds = histogram(
            "request_seconds", "From the head of a request to its answer", SECONDS, "dialect", "status"
        )
        self._refusals = counter("refusals", "Requests answered with an error, by its kind", "reason")
        self._documents = histogram("request_documents", "Documents of a ranked request", DOCUMENTS)
        self._queue_seconds = histogram("queue_seconds", "From tokenized to the first batch", SECONDS)
        self._billed_tokens = counter("billed_tokens", "Tokens of ranked requests, as usage counts them")
        self._truncated_documents = counter("truncated_documents", "Documents that were cut")
        self._truncated_queries = counter("truncated_queries", "Queries that were cut")
        self._batch_tokens = histogram("batch_tokens", "Tokens of a batch", TOKENS)
        self._batch_seconds = histogram("batch_seconds", "Time of a batch", SECONDS)
        self._batch_requests = histogram("batch_requests", "Requests that share a batch", DOCUMENTS)
        self._pairs = counter("pairs", "Pairs scored")
        self._computed_tokens = counter("computed_tokens", "Tokens that went through the model")
        self._prefix_tokens_saved = counter("prefix_tokens_saved", "Prefix tokens that pairs shared")
        self._ready = gauge("ready", "1 while requests are ranked")
        self._in_flight = gauge("requests_in_flight", "Requests that are let in and not answered")
        self._body_bytes = gauge("request_body_bytes", "Bytes of the request bodies held")
        self._queued_tokens = gauge("queued_tokens", "Tokens that wait for the model")
        self._queued_requests = gauge("queued_requests", "Requests of which something waits for the model")
        self._budget = gauge("batch_budget_tokens", "Most tokens of a batch; lower while memory is short")
        self._drain_rate = gauge("drain_tokens_per_second", "Queued tokens worked off a second of the model's time")
        self._gpu_memory = gauge("gpu_memory_bytes", "Memory of torch on the GPU", "kind")
        self._model = gauge(
            "model_info", "What is served, always 1",
            "model", "source", "device", "dtype", "attention", "version",
        )  # fmt: skip

    def add_request(self, *, dialect: str, status: int, seconds: float, reason: str | None) -> None:
        """One answered request; `reason` is the kind of its error."""
        self._requests.labels(dialect, str(status)).inc()
        self._request_seconds.labels(dialect, str(status)).observe(seconds)
        if reason is not None:
            self._refusals.labels(reason).inc()

    def add_result(self, result: RerankResult, *, num_documents: int) -> None:
        self._documents.observe(num_documents)
        self._queue_seconds.observe(result.queue_ms / 1e3)
        self._billed_tokens.inc(result.total_tokens)
        self._truncated_documents.inc(result.num_truncated_documents)
        self._truncated_queries.inc(int(result.num_query_truncated_tokens > 0))

    def add_batch(self, report: BatchReport) -> None:
        """Called in the model's thread."""
        self._batch_tokens.observe(report.num_tokens)
        self._batch_seconds.observe(report.seconds)
        self._batch_requests.observe(report.num_requests)
        self._pairs.inc(report.num_pairs)
        self._computed_tokens.inc(report.num_tokens)
        self._prefix_tokens_saved.inc(report.num_prefix_tokens_saved)

    def set_model(self, info: ModelInfo) -> None:
        labels = (info.model_id, info.source, info.device, info.dtype, info.kernel, local_rerank.__version__)
        self._model.labels(*labels).set(1)

    def render(self, state: ServerState) -> bytes:
        """The page, in Prometheus' text format."""
        self._ready.set(state.status == "ready")
        self._in_flight.set(state.num_admitted)
        self._body_bytes.set(state.num_body_bytes)
        if state.status != "loading":
            reranker = state.reranker
            self._queued_tokens.set(reranker.num_queued_tokens)
            self._queued_requests.set(reranker.num_queued_requests)
            self._budget.set(reranker.max_batch_tokens)
            self._drain_rate.set(reranker.tokens_per_second or 0)
            self._look_at_gpu(reranker.info.device)
        return generate_latest(self.registry)

    def _look_at_gpu(self, device: str) -> None:
        torch = sys.modules["torch"]  # loaded with the model
        if not device.startswith("cuda") or not torch.cuda.is_initialized():  # the model may be in another process
            return
        for kind in GPU_MEMORY:
            self._gpu_memory.labels(kind).set(getattr(torch.cuda, f"memory_{kind}")(device))
