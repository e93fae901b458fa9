"""Prometheus metrics of one process, served at `/metrics`.

Counters and histograms are updated as things happen: requests by the middleware, results by `ServerState.rank`, batches
by the engine's thread. Gauges (queue, memory) are read when the page is rendered. The label `model` is a name from the
start. No label holds what a client chose, such as a path, a key or a User-Agent that is not in `CLIENTS`, so the number
of time series stays small.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

import local_rerank
from local_rerank.types import STATUS_KINDS

if TYPE_CHECKING:
    from local_rerank.models.served import ServedModel
    from local_rerank.requests.worker import BatchReport
    from local_rerank.types import ModelInfo, RerankResult
    from local_rerank_server.admission import Admission

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper bounds of buckets
TOKENS = tuple(float(2**power) for power in range(6, 18))  # 64 ... 131,072
DOCUMENTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
GPU_MEMORY = ("allocated", "reserved")
CLIENTS = frozenset(
    """
    ai ai-sdk boto3 cohere cohere-ai dashscope dashscope-v2-python infinity isaacus langchain litellm local-rerank
    langchain-nvidia-ai-endpoints mixedbread nvidia openai @pinecone-database python-client together voyageai
    zeroentropy
    apache-httpasyncclient apache-httpclient aws-sdk-go-v2 aws-sdk-java aws-sdk-js aws-sdk-rust axios botocore dart
    deno fasthttp go-http-client guzzlehttp java java-http-client node node-fetch okhttp python python-httpx
    python-httpx2 python-requests python-urllib python-urllib3 reactornetty reqwest rest-client ruby undici ureq
    apachebench curl httpie insomnia k6 mozilla oha postmanruntime wget
    consul elb-healthchecker googlehc kube-probe prometheus traefik uptime-kuma
    """.split()
)
"""First words of the User-Agent headers of SDKs, HTTP libraries, tools and probes; all others are `other`.

`python-client` is Pinecone's SDK, `python` aiohttp, `mozilla` a browser, and Node's fetch sends `node`.
"""
MAX_CLIENT_CHARS = 40  # of a User-Agent; the longest of these names has 29


class Metrics:
    """The metrics of one process, in a registry of their own."""

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
            "request_seconds", "Time from the request head to the response", SECONDS, "dialect", "status"
        )
        self._client_requests = counter(
            "client_requests",
            "Requests by the first word of their User-Agent; outcome: answered, refused (4xx) or failed",
            "dialect", "client", "outcome",
        )  # fmt: skip
        self._by_model: dict[str, ModelMetrics] = {}
        self._by_labels: dict[tuple[str, int, str], tuple[Counter, Histogram, Counter]] = {}
        self._refusals = counter("refusals", "Requests answered with an error, by error class", "reason")
        self._documents = histogram("request_documents", "Documents per ranked request", DOCUMENTS, "model")
        self._queue_seconds = histogram(
            "queue_seconds", "Time between tokenization and the first batch", SECONDS, "model"
        )
        self._billed_tokens = counter("billed_tokens", "Tokens of ranked requests, as reported in usage", "model")
        self._truncated_documents = counter("truncated_documents", "Documents that were truncated", "model")
        self._truncated_queries = counter("truncated_queries", "Queries that were truncated", "model")
        self._batch_tokens = histogram("batch_tokens", "Tokens per batch", TOKENS, "model")
        self._batch_seconds = histogram("batch_seconds", "Compute time per batch", SECONDS, "model")
        self._batch_requests = histogram("batch_requests", "Requests per batch", DOCUMENTS, "model")
        self._pairs = counter("pairs", "Pairs scored", "model")
        self._computed_tokens = counter("computed_tokens", "Tokens computed by the model", "model")
        self._prefix_tokens_saved = counter(
            "prefix_tokens_saved", "Tokens not computed because pairs share a prefix", "model"
        )
        self._results = counter(
            "results", "Rankings by what their status says; one may count under several", "model", "status"
        )
        self._ready = gauge("ready", "1 while the server accepts requests")
        self._in_flight = gauge("requests_in_flight", "Requests admitted and not answered yet")
        self._body_bytes = gauge("request_body_bytes", "Bytes of request bodies in memory")
        self._queued_tokens = gauge("queued_tokens", "Tokens waiting for the model", "model")
        self._queued_requests = gauge("queued_requests", "Requests with tokens waiting for the model", "model")
        self._budget = gauge("batch_budget_tokens", "Maximum tokens per batch; lower while memory is short", "model")
        self._drain_rate = gauge("drain_tokens_per_second", "Queued tokens processed per second of model time", "model")
        self._loaded = gauge("model_loaded", "1 while the model is loaded", "model")
        self._loads = counter("model_loads", "Times that the model was loaded", "model")
        self._model_bytes = gauge("model_bytes", "Bytes of the weights while the model is loaded", "model")
        self._gpu_memory = gauge("gpu_memory_bytes", "GPU memory of torch's allocator", "device", "kind")
        self._model = gauge(
            "model_info", "The served model; always 1",
            "model", "source", "device", "dtype", "attention", "version",
        )  # fmt: skip

    def add_request(self, *, dialect: str, status: int, seconds: float, reason: str | None, user_agent: str) -> None:
        """Count an answered request; `reason` is the class name of its error. Status 0: the client left before it."""
        key = (dialect, status, _client_of(user_agent[:MAX_CLIENT_CHARS]))
        if (bound := self._by_labels.get(key)) is None:  # finding a labelled metric takes longer than counting
            labels, outcome = (dialect, str(status)), _outcome_of(status)
            of_client = self._client_requests.labels(dialect, key[2], outcome)
            bound = self._requests.labels(*labels), self._request_seconds.labels(*labels), of_client
            self._by_labels[key] = bound
        num_requests, times, of_client = bound
        num_requests.inc()
        times.observe(seconds)
        of_client.inc()
        if reason is not None:
            self._refusals.labels(reason).inc()

    def of(self, model: str) -> ModelMetrics:
        """The metrics of a model, by its name."""
        if (found := self._by_model.get(model)) is None:  # finding a labelled metric takes longer than counting
            found = self._by_model[model] = ModelMetrics(self, model)
        return found

    def set_model(self, model: str, info: ModelInfo) -> None:
        """Count a load."""
        labels = (model, info.source, info.device, info.dtype, info.kernel, local_rerank.__version__)
        self._model.labels(*labels).set(1)
        self._loads.labels(model).inc()

    def render(self, *, ready: bool, admission: Admission, models: Sequence[ServedModel]) -> bytes:
        """The page in Prometheus' text format; `models` is empty while the default one loads for the first time."""
        self._ready.set(ready)
        self._in_flight.set(admission.num_requests)
        self._body_bytes.set(admission.num_body_bytes)
        for model in models:
            engine, name = model.ranker, model.name
            self._loaded.labels(name).set(engine is not None)
            self._model_bytes.labels(name).set(model.num_bytes if engine else 0)
            self._queued_tokens.labels(name).set(engine.num_queued_tokens if engine else 0)
            self._queued_requests.labels(name).set(engine.num_queued_requests if engine else 0)
            self._budget.labels(name).set(engine.max_batch_tokens if engine else 0)
            self._drain_rate.labels(name).set((engine.tokens_per_second if engine else None) or 0)
        if any(model.info is not None and model.info.device.startswith("cuda") for model in models):
            self._read_gpu_memory()
        return generate_latest(self.registry)

    def _read_gpu_memory(self) -> None:
        torch = sys.modules["torch"]  # imported with the model
        if not torch.cuda.is_initialized():  # the engine may be in another process
            return
        for index in range(torch.cuda.device_count()):  # all of them, because a model may be spread over several
            for kind in GPU_MEMORY:
                self._gpu_memory.labels(f"cuda:{index}", kind).set(getattr(torch.cuda, f"memory_{kind}")(index))


class ModelMetrics:
    """The counters and histograms of one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._documents = metrics._documents.labels(model)
        self._queue_seconds = metrics._queue_seconds.labels(model)
        self._billed_tokens = metrics._billed_tokens.labels(model)
        self._truncated_documents = metrics._truncated_documents.labels(model)
        self._truncated_queries = metrics._truncated_queries.labels(model)
        self._batch_tokens = metrics._batch_tokens.labels(model)
        self._batch_seconds = metrics._batch_seconds.labels(model)
        self._batch_requests = metrics._batch_requests.labels(model)
        self._pairs = metrics._pairs.labels(model)
        self._computed_tokens = metrics._computed_tokens.labels(model)
        self._prefix_tokens_saved = metrics._prefix_tokens_saved.labels(model)
        kinds = ("ok", *STATUS_KINDS)
        self._results = {kind: metrics._results.labels(model, kind) for kind in kinds}  # 0, or a rate misses the first

    def add_result(self, result: RerankResult, *, num_documents: int) -> None:
        self._documents.observe(num_documents)
        self._queue_seconds.observe(result.queue_ms / 1e3)
        self._billed_tokens.inc(result.total_tokens)
        self._truncated_documents.inc(result.num_truncated_documents)
        self._truncated_queries.inc(int(result.num_query_truncated_tokens > 0))
        for kind in result.status_counts or ("ok",):
            self._results[kind].inc()

    def add_batch(self, report: BatchReport) -> None:
        """Count a batch; called in the engine's thread."""
        self._batch_tokens.observe(report.num_tokens)
        self._batch_seconds.observe(report.seconds)
        self._batch_requests.observe(report.num_requests)
        self._pairs.inc(report.num_pairs)
        self._computed_tokens.inc(report.num_tokens)
        self._prefix_tokens_saved.inc(report.num_prefix_tokens_saved)


@lru_cache(maxsize=256)
def _client_of(user_agent: str) -> str:
    """`python-requests` of `python-requests/2.34.2` and `python-client` of Pinecone's `python-client-10.2.0`.

    Clients made by Stainless put Async before their names.
    """
    word = re.split(r"[/;\s]|-\d", user_agent.strip().lower(), maxsplit=1)[0].removeprefix("async")
    return word if word in CLIENTS else "other"


def _outcome_of(status: int) -> str:
    if 0 < status < 400:
        return "answered"
    return "refused" if 400 <= status < 500 else "failed"
