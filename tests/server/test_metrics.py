"""Metrics, and the Grafana dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import anyio
import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from local_rerank import Reranker
from local_rerank.errors import ModelUnavailable
from local_rerank.types import STATUS_KINDS
from local_rerank_server.errors import STATUS
from local_rerank_server.metrics import GPU_MEMORY, Metrics
from tests.server.conftest import HeldRanker, Serve
from tests.serving import NATIVE

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "docs" / "grafana-dashboard.json"
ALERTS = yaml.safe_load((ROOT / "docs" / "deploy" / "alerts.yaml").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = ALERTS["groups"][0]["rules"]
LOCAL = "/v1/local/rank"
BODY: dict[str, Any] = {"model": "qwen3-rerank", "query": "q", "documents": ["a", "bb", "c" * 9000]}


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
        counted = ("local_rerank_batch_tokens_sum", frozenset({("model", "tiny-reranker")}))
        found: dict[Any, float] = {}
        for _ in range(100):  # a batch is counted after its requests have their answers
            found = samples((await client.get("/metrics")).text)
            if found.get(counted):
                break
            await anyio.sleep(0.01)

    def value(name: str, **labels: str) -> float:
        return found[f"local_rerank_{name}", frozenset(labels.items())]

    assert value("requests_total", dialect="local-rerank", status="200") == 1
    assert value("requests_total", dialect="DashScope native", status="400") == 1
    assert value("request_seconds_count", dialect="local-rerank", status="200") == 1
    assert value("client_requests_total", dialect="local-rerank", client="python-httpx2", outcome="answered") == 1
    assert value("client_requests_total", dialect="DashScope native", client="python-httpx2", outcome="refused") == 1
    assert value("refusals_total", reason="MissingField") == 1
    model = {"model": "tiny-reranker"}
    assert value("pairs_total", **model) == value("request_documents_sum", **model) == 3
    num_computed = value("computed_tokens_total", **model)
    assert num_computed == value("batch_tokens_sum", **model) == ranked["num_computed_tokens"]
    assert value("billed_tokens_total", **model) == ranked["total_tokens"]
    assert value("truncated_documents_total", **model) == 1
    assert value("prefix_tokens_saved_total", **model) >= 0
    assert value("ready") == value("model_loaded", **model) == value("model_loads_total", **model) == 1
    assert value("queued_tokens", **model) == value("queued_requests", **model) == 0
    assert value("batch_budget_tokens", **model) == tiny_reranker.max_batch_tokens
    assert value("drain_tokens_per_second", **model) > 0
    assert found["process_resident_memory_bytes", frozenset()] > 1 << 20
    info = next(dict(labels) for name, labels in found if name == "local_rerank_model_info")
    assert (info["model"], info["dtype"], info["device"]) == ("tiny-reranker", "fp32", "cpu")


@pytest.mark.anyio
async def test_clients_that_only_get_errors_are_counted_by_a_fixed_list_of_names(serve: Serve) -> None:
    sent = {
        "voyageai/0.4.0": "voyageai",
        "Boto3/1.44.8 md/Botocore#1.44.8": "boto3",
        "AsyncOpenAI/Python 3.54.0": "openai",
        "dashscope/2.0.2; python/3.11.7": "dashscope",
        "Python/3.11 aiohttp/3.14.5": "python",
        "python-client-10.2.0": "python-client",
        "@pinecone-database/pinecone v8.2.0; lang=typescript": "@pinecone-database",
        "Together/Python 3.1.0": "together",
        "curl": "curl",
        "": "other",
        "/": "other",
        "x" * 10_000: "other",
        "a made-up name": "other",
        "curly/1": "other",
    }
    async with serve(HeldRanker(ModelUnavailable("no"))) as client:
        for agent in sent:
            await client.post("/v1/rerankin", json={"query": "q", "texts": ["a"]}, headers={"User-Agent": agent})
            await client.post("/rerank", json={"query": "q", "texts": ["a"]}, headers={"User-Agent": agent})
        found = samples((await client.get("/metrics")).text)
    counted = {labels: value for (name, labels), value in found.items() if name == "local_rerank_client_requests_total"}
    for name in set(sent.values()):
        for outcome in ("refused", "failed"):
            labels = {"dialect": "Text Embeddings Inference", "client": name, "outcome": outcome}
            assert counted.pop(frozenset(labels.items())) == list(sent.values()).count(name)
    assert counted == {}


@pytest.mark.anyio
async def test_metrics_work_while_the_model_loads_and_need_the_key(serve: Serve) -> None:
    async with serve(None, api_key=("k",)) as client:
        assert (await client.get("/metrics")).status_code == 401
        loading = await client.get("/metrics", headers={"Authorization": "Bearer k"})
    assert loading.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert samples(loading.text)["local_rerank_ready", frozenset()] == 0


def test_each_gpu_has_its_own_memory_also_after_its_model_was_unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = [100, 200]
    for name, simulated in (
        ("is_initialized", lambda: True),
        ("device_count", lambda: 2),
        ("memory_allocated", lambda index: allocated[index]),
        ("memory_reserved", lambda index: 2 * allocated[index]),
    ):
        monkeypatch.setattr(torch.cuda, name, simulated)
    metrics, admission = Metrics(), Mock(num_requests=0, num_body_bytes=0)
    models: list[Any] = [Mock(ranker=None, info=Mock(device=f"cuda:{index}")) for index in range(2)]
    for model in models:
        model.name = model.info.device
    for allocated[1] in (200, 0):
        found = samples(metrics.render(ready=True, admission=admission, models=models).decode())
        memory = {labels: value for (name, labels), value in found.items() if name == "local_rerank_gpu_memory_bytes"}
        assert memory == {
            frozenset({("device", f"cuda:{index}"), ("kind", kind)}): allocated[index] * times
            for index in range(2)
            for kind, times in (("allocated", 1), ("reserved", 2))
        }


@pytest.mark.anyio
async def test_the_dashboard_and_the_alerts_use_metrics_and_labels_that_exist(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker) as client:
        await client.post(LOCAL, json=BODY)
        await client.post(NATIVE, json={"model": "x"})
        found = samples((await client.get("/metrics")).text)
    labels: dict[str, set[str]] = {"local_rerank_gpu_memory_bytes": {"device", "kind"}}  # only where there is a GPU
    assert GPU_MEMORY
    for name, pairs in found:
        labels.setdefault(name, set()).update(label for label, _ in pairs)
    panels = [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(expressions) >= 12
    for expression in [*expressions, *(rule["expr"] for rule in RULES)]:
        used = re.findall(r"\b((?:local_rerank|process)_\w+)", expression)
        assert used, expression
        assert set(used) <= labels.keys(), expression
        for group in re.findall(r"by \(([^)]*)\)", expression):
            known = set().union({"instance"}, *(labels[name] for name in used))
            assert {name.strip() for name in group.split(",")} <= known, expression
        for name, label, value in re.findall(r'(\w+)\{(\w+)=~?"([^"]*)"\}', expression):
            assert label in labels[name], expression
            assert label != "reason" or value in {kind.__name__ for kind in STATUS}
            assert name != "local_rerank_results_total" or value in STATUS_KINDS
    ours = {name for name in labels if name.startswith("local_rerank") and not name.endswith("_created")}
    shown = {family(name) for name in re.findall(r"\blocal_rerank_\w+", " ".join(expressions))}
    assert {family(name) for name in ours} <= shown, "every metric is on the dashboard"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_rule_has_what_prometheus_requires(rule: dict[str, Any]) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"[A-Z]\w+", rule["alert"])
    assert re.fullmatch(r"\d+m", rule["for"])
    assert rule["expr"].count("(") == rule["expr"].count(")")
    assert rule["labels"]["severity"] in ("warning", "critical")
    grouped = re.findall(r"by \(([^)]*)\)", rule["expr"])
    shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert shown <= {"instance"} | {name.strip() for group in grouped for name in group.split(",")}


def test_the_alerts_cover_saturation_errors_and_rankings_that_say_nothing() -> None:
    assert [group["name"] for group in ALERTS["groups"]] == ["local-rerank"]
    for metric in ('refusals_total{reason="Overloaded"}', "dialect", 'results_total{status="constant"}'):
        assert any(metric in rule["expr"] for rule in RULES), metric


def family(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)
