"""Metrics, the Grafana dashboard, logs and traces."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from httpx2 import Client
from prometheus_client.parser import text_string_to_metric_families

from local_rerank import Reranker
from local_rerank.errors import ModelUnavailable
from local_rerank_server.config import ServerConfig
from local_rerank_server.logs import make_formatter
from local_rerank_server.metrics import GPU_MEMORY
from tests.server.conftest import HeldRanker, Serve
from tests.server.test_process import NATIVE, WAIT_SECONDS, options, started, until

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "docs" / "grafana-dashboard.json"
LOCAL = "/v1/local/rank"
BODY: dict[str, Any] = {"model": "qwen3-rerank", "query": "q", "documents": ["a", "bb", "c" * 9000]}
SECRET = "a-secret-that-no-log-contains"


def samples(page: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


@pytest.mark.anyio
async def test_requests_refusals_batches_and_tokens_are_counted(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        ranked = (await client.post(LOCAL, json=BODY)).json()
        await client.post(NATIVE, json={"model": "x"})
        found = samples((await client.get("/metrics")).text)

    def value(name: str, **labels: str) -> float:
        return found[f"local_rerank_{name}", frozenset(labels.items())]

    assert value("requests_total", dialect="local-rerank", status="200") == 1
    assert value("requests_total", dialect="DashScope native", status="400") == 1
    assert value("request_seconds_count", dialect="local-rerank", status="200") == 1
    assert value("refusals_total", reason="MissingField") == 1
    assert value("pairs_total") == value("request_documents_sum") == 3
    assert value("computed_tokens_total") == value("batch_tokens_sum") == ranked["num_computed_tokens"]
    assert value("billed_tokens_total") == ranked["total_tokens"]
    assert value("truncated_documents_total") == 1
    assert value("prefix_tokens_saved_total") >= 0
    assert value("ready") == 1
    assert value("queued_tokens") == value("queued_requests") == 0
    assert value("batch_budget_tokens") == tiny_reranker.max_batch_tokens
    assert value("drain_tokens_per_second") > 0
    assert found["process_resident_memory_bytes", frozenset()] > 1 << 20
    model = next(dict(labels) for name, labels in found if name == "local_rerank_model_info")
    assert (model["model"], model["dtype"], model["device"]) == ("tiny-reranker", "fp32", "cpu")


@pytest.mark.anyio
async def test_metrics_work_while_the_model_loads_and_need_the_key(serve: Serve) -> None:
    async with serve(None, api_key=("k",)) as client:
        assert (await client.get("/metrics")).status_code == 401
        loading = await client.get("/metrics", headers={"Authorization": "Bearer k"})
    assert loading.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert samples(loading.text)["local_rerank_ready", frozenset()] == 0


@pytest.mark.anyio
async def test_the_dashboard_uses_metrics_and_labels_that_exist(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        await client.post(LOCAL, json=BODY)
        await client.post(NATIVE, json={"model": "x"})
        found = samples((await client.get("/metrics")).text)
    labels: dict[str, set[str]] = {"local_rerank_gpu_memory_bytes": {"kind"}}  # only where there is a GPU
    assert GPU_MEMORY
    for name, pairs in found:
        labels.setdefault(name, set()).update(label for label, _ in pairs)
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    assert len(expressions) >= 12
    for expression in expressions:
        used = re.findall(r"\b((?:local_rerank|process)_\w+)", expression)
        assert used, expression
        assert set(used) <= labels.keys(), expression
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert {name.strip() for name in group.split(",")} <= set().union(*(labels[name] for name in used))
    ours = {name for name in labels if name.startswith("local_rerank") and not name.endswith("_created")}
    shown = {family(name) for name in re.findall(r"\blocal_rerank_\w+", " ".join(expressions))}
    assert {family(name) for name in ours} <= shown, "every metric is on the dashboard"


def family(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def test_dashboard_panels_have_a_title_a_unit_and_distinct_positions() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()]
    assert len(set(places)) == len(places)
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels())


def test_json_logs_have_the_fields_of_the_record() -> None:
    record = logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": "said %s", "args": ("é",), "status": 200})
    line = make_formatter(ServerConfig(log_format="json")).format(record)
    said = json.loads(line)
    assert (said["level"], said["logger"], said["message"], said["status"]) == ("INFO", "n", "said é", 200)
    assert "time" in said


@pytest.mark.anyio
async def test_the_access_log_has_key_error_and_id(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serve(HeldRanker(), api_key=("anna:a",)) as client:
        answer = await client.post(LOCAL, json={}, headers={"Authorization": "Bearer a"})
    (record,) = [record for record in caplog.records if record.name == "local_rerank_server.middleware"]
    request_id = answer.headers["x-request-id"]
    assert record.getMessage().endswith(f" ms key=anna error=MissingField id={request_id}")
    fields = record.__dict__
    assert (fields["request_id"], fields["status"], fields["key"], fields["error"]) == (
        request_id, 400, "anna", "MissingField",
    )  # fmt: skip


SECRET_BODY = {
    "model": "qwen3-rerank", "query": SECRET, "documents": [SECRET], "instruct": SECRET, "instruction": SECRET,
}  # fmt: skip


@pytest.mark.anyio
async def test_texts_are_logged_only_with_log_texts(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for log_texts in (False, True):
        async with serve(HeldRanker(ModelUnavailable("no")), log_texts=log_texts) as client:
            await client.post(LOCAL, json=SECRET_BODY)
        assert (SECRET in caplog.text) is log_texts


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OTLP receiver on this machine: its URL, and the bodies received."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Suppress the access log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as receiver:
        thread = threading.Thread(target=receiver.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{receiver.server_port}/v1/traces", bodies
        finally:
            receiver.shutdown()
            thread.join()


def test_a_server_logs_no_text_at_any_level_and_sends_a_span_per_request(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bad = [
        SECRET_BODY | {"query": [SECRET]}, SECRET_BODY | {"documents": {"a": SECRET}}, SECRET_BODY | {"model": SECRET},
        [SECRET], SECRET,
    ]  # fmt: skip
    with collector() as (endpoint, bodies):
        arguments = [*options(tiny_checkpoint), "--port", "0", "--otlp-endpoint", endpoint]
        arguments += ["--log-level", "debug", "--log-format", "json"]
        with started(tmp_path / "log", "local_rerank", "serve", *arguments) as server:
            server.wait_for("ready: ")
            with Client(base_url=server.address, timeout=WAIT_SECONDS) as client:
                request_id = client.post("/v1/rerank", json=BODY | {"query": SECRET}).headers["x-request-id"]
                statuses = [
                    client.post(path, json=one).status_code for path in (NATIVE, LOCAL) for one in [SECRET_BODY, *bad]
                ]
                client.post(NATIVE, content=f'{{"query": "{SECRET}'.encode())
                client.post(NATIVE, json=SECRET_BODY, headers={"X-Request-Timeout-Ms": SECRET})
            assert {200, 400, 404} <= set(statuses)
            assert server.stop() == 0, "the remaining spans are sent on exit"
            until(lambda: bodies)
        assert LOCAL in server.output
        assert SECRET not in server.output
    spans = [
        span
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (span,) = [span for span in spans if span.name.endswith(" /v1/rerank")]
    assert request_id in str(span)
    assert SECRET not in str(spans)
