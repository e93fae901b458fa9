"""A celery worker that creates a Reranker and then forks: each of its processes returns the same scores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from local_rerank import Reranker

NUM_PROCESSES = 2
START_SECONDS = 120  # importing torch alone takes 10 s on a busy machine with a cold disk
STOP_SECONDS = 40
QUERY, DOCUMENTS = "a query", ["one document", "another"]
CLOSE = 1e-4  # tolerance of fp32 log-odds in different batches

TASKS = """
import os
import time

from local_rerank import Reranker
from tests.test_celery import make_app

app = make_app({folder!r})
reranker = Reranker({model!r}, device="cpu", dtype="fp32", threads=1)

@app.task(name="rank")
def rank(query, documents):
    time.sleep(0.1)  # so that the other process takes the next one
    return os.getpid(), [item.log_odds for item in sorted(reranker.rank(query, documents), key=lambda item: item.index)]
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork")


def make_app(folder: str) -> Any:
    """An app whose messages and results are files."""
    names = {name: Path(folder, name) for name in ("messages", "control", "results")}
    for path in names.values():
        path.mkdir(exist_ok=True)
    app = Celery("tasks", broker="filesystem://", backend=names["results"].as_uri())
    app.conf.broker_transport_options = {
        "data_folder_in": str(names["messages"]),
        "data_folder_out": str(names["messages"]),
        "control_folder": str(names["control"]),
    }
    app.conf.worker_prefetch_multiplier = 1
    return app


def test_every_process_of_a_celery_worker_gives_the_same_scores(
    tmp_path: Path, tiny_checkpoint: Path, tiny_reranker: Reranker
) -> None:
    (tmp_path / "tasks.py").write_text(TASKS.format(folder=str(tmp_path), model=str(tiny_checkpoint)))
    log = tmp_path / "log"
    command = [sys.executable, "-m", "celery", "--workdir", str(tmp_path), "-A", "tasks", "worker", "--pool", "prefork"]
    command += ["-c", str(NUM_PROCESSES), "--without-gossip", "--without-mingle", "--without-heartbeat"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with log.open("w") as output:
        worker = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        app = make_app(str(tmp_path))
        tasks = [app.send_task("rank", (QUERY, DOCUMENTS)) for _ in range(4)]
        end = time.monotonic() + START_SECONDS
        while not all(task.ready() for task in tasks):
            assert worker.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        answers = [task.get(disable_sync_subtasks=False) for task in tasks]
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(STOP_SECONDS) == 0, log.read_text()
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    ranked = sorted(tiny_reranker.rank(QUERY, DOCUMENTS), key=lambda item: item.index)
    assert len({pid for pid, _ in answers} - {worker.pid}) == NUM_PROCESSES
    for _, log_odds in answers:
        assert log_odds == pytest.approx([item.log_odds for item in ranked], abs=CLOSE)
    assert "Traceback" not in log.read_text()
