"""With a local model, no command opens a connection to another machine: a socket that does ends the process."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from local_rerank.commands.app import app
from tests.no_network import STATUS, THEN, forbid_in_children
from tests.serving import WAIT_SECONDS, started

NEEDS_A_NETWORK = {"pull"}
TESTED_ELSEWHERE = {"serve", "rm"}  # below; rm deletes what is in a cache


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and the rule against connections in every process."""
    for name in [name for name in os.environ if name.startswith(("HF_", "LOCAL_RERANK_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "rule").mkdir()
    for name, value in {"HOME": str(tmp_path), **forbid_in_children(tmp_path / "rule")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.no_network", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT_SECONDS, check=False)


def command_lines(home: Path, folder: Path) -> list[list[str]]:
    """A command line for every command, with input files in `home` and the checkpoint in `folder`."""
    texts = {"corpus": {"d1": "a cat", "d2": "the dog barks"}, "queries": {"q1": "cat", "q2": "who barks?"}}
    for name, rows in texts.items():
        lines = [json.dumps({"id": key, "text": text}) for key, text in rows.items()]
        (home / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (home / "qrels.txt").write_text("q1 0 d1 1\nq2 0 d2 1\n", encoding="utf-8")
    lines = [
        f"{query} Q0 {document} 1 {score} x" for query in ("q1", "q2") for document, score in (("d2", 2), ("d1", 1))
    ]
    (home / "first.run").write_text("\n".join(lines), encoding="utf-8")
    rows = [json.dumps({"query": "cat", "documents": ["a cat", "a dog"]})]
    (home / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    labelled = [json.dumps({"query": f"q{i % 5}", "document": f"d{i}", "label": i // 5 % 2}) for i in range(20)]
    (home / "labelled.jsonl").write_text("\n".join(labelled), encoding="utf-8")
    texts_at = ["--corpus", str(home / "corpus.jsonl"), "--queries", str(home / "queries.jsonl")]
    judged = ["--qrels", str(home / "qrels.txt")]
    first, reranked, bundle = str(home / "first.run"), str(home / "second.run"), str(home / "bundle.zip")
    model = ["--model", str(folder), "--device", "cpu", "--dtype", "fp32", "--threads", "1"]
    return [
        ["rank", "cat", "a cat", "a dog", *model],
        ["batch", str(home / "pairs.jsonl"), "--output", str(home / "scored.jsonl"), *model],
        ["batch", first, "--output", reranked, *texts_at, *judged, *model],
        ["compare", first, reranked, *judged],
        ["calibrate", str(home / "labelled.jsonl"), "--output", str(home / "calibration.json"), *model],
        ["eval", *texts_at, *judged, "--run", first, "--blend", "bm25=1", "--plot", str(home / "plot.svg"), *model],
        ["doctor"],
        ["models", str(folder.parent)],
        ["pack", str(folder), "--output", bundle, "--no-self-test", *model[2:]],
        ["verify", bundle, *model[2:]],
        ["plan", "--gpus", "H100"],
        ["completion", "bash"],
        ["bench", "--workload", "titles", "--rounds", "1", "--skip-reference", *model],
    ]


def test_every_command_runs_without_connections_to_other_machines(home: Path, tiny_checkpoint: Path) -> None:
    lines = command_lines(home, tiny_checkpoint)
    assert {line[0] for line in lines} == set(app) - NEEDS_A_NETWORK - TESTED_ELSEWHERE - {"--help", "-h", "--version"}
    joined = list(itertools.chain.from_iterable([*line, THEN] for line in lines))
    # a hub model that is not cached needs the network; the process must end there, or the rule does not work
    done = run(*joined, "rank", "q", "d", "--model", "owner/not-cached")
    if done.returncode != STATUS or "forbidden: socket." not in done.stderr:
        pytest.fail(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    assert done.stderr.count("forbidden: ") == 1
    assert re.findall(r"^done: (\w+)$", done.stdout, re.MULTILINE) == [line[0] for line in lines]


def test_serve_runs_without_connections_to_other_machines(home: Path) -> None:
    with started(
        home / "log", "tests.no_network", "serve", "--port", "0", "--device", "cpu", "--threads", "1"
    ) as server:
        server.wait_for("ready: ")
        for path in ("/", "/docs", "/openapi.json", "/metrics", "/limits", "/v1/models"):
            with urllib.request.urlopen(server.address + path, timeout=WAIT_SECONDS) as answer:
                assert answer.status == 200
        body = json.dumps({"model": "qwen3-rerank", "query": "q", "documents": ["a", "b"]}).encode()
        request = urllib.request.Request(f"{server.address}/v1/reranks", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
            assert len(json.load(answer)["results"]) == 2
        assert server.stop() == 0
    assert "forbidden" not in server.output
