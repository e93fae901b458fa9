"""`local-rerank serve --ray`: a real server with two models of two replicas each, one of which is killed."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from httpx2 import Client

from local_rerank import EngineConfig, Reranker
from local_rerank.errors import DeviceFailure, ModelUnavailable
from local_rerank.requests.scores import sigmoid
from tests.command_line import command
from tests.server.conftest import Serve
from tests.serving import NATIVE, WAIT_SECONDS, Server, exchange, options, started, until
from tests.tiny_checkpoints import calibration_file, make_checkpoint

LOCAL = "/v1/local/rank"
TOLERANCE = 1e-4  # log-odds in fp32, over batches and numbers of threads
WORDS = "river mountain engine protein market treaty violin harbour glacier senate enzyme orchard".split()


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("other") / "tiny", seed=5)


@pytest.fixture(scope="module")
def server(
    tiny_reranker: Reranker, other_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Two models, one of them calibrated, with two replicas of one thread each, as soon as the port is bound."""
    log = tmp_path_factory.mktemp("ray") / "log"
    calibration = os.path.relpath(calibration_file(tiny_reranker, log.parent))  # the replicas work in other folders
    config = log.parent / "models.toml"
    config.write_text(
        f'[models.tiny-reranker]\nmodel = "{tiny_reranker.checkpoint.folder}"\ncalibration = "{calibration}"\n'
        f'[models.other]\nmodel = "{other_checkpoint}"\n'
    )
    arguments = ["local_rerank", "serve", "--ray", "--replicas", "2", "--config", str(config), "--port", "0"]
    arguments += options(tiny_reranker.checkpoint.folder)[2:]
    with started(log, *arguments, RAY_OVERRIDE_RESOURCES='{"CPU": 4}') as running:
        running.wait_for("listening on")
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(base_url=server.address, timeout=WAIT_SECONDS) as made:
        yield made


def replicas(server: Server) -> list[psutil.Process]:
    """The replicas' processes that are alive."""
    return [child for child in descendants(server) if "EngineReplica" in child.name() + " ".join(child.cmdline())]


def are_idle(server: Server) -> bool:
    """Whether all four replicas run and none computes; one that starts does."""
    before = {replica: replica.cpu_times().user for replica in replicas(server)}
    time.sleep(0.5)
    return len(before) == 4 and all(replica.cpu_times().user - used < 0.1 for replica, used in before.items())


def descendants(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def request(number: int, num_documents: int = 8) -> dict[str, Any]:
    """A request whose documents differ from each other and from those of other numbers."""
    documents = [
        f"The {WORDS[(number + i) % 12]} of {WORDS[i % 12]} number {number} and {i}" for i in range(num_documents)
    ]
    return {"query": f"Which {WORDS[number % 12]} is it?", "documents": documents}


def log_odds(answer: dict[str, Any]) -> dict[int, float]:
    return {item["index"]: item["log_odds"] for item in answer["results"]}


def expected(reranker: Reranker, asked: dict[str, Any]) -> dict[int, float]:
    return {item.index: item.log_odds for item in reranker.rank(asked["query"], asked["documents"])}


def test_the_port_answers_before_there_is_a_replica_and_ready_tells_when_there_is(
    server: Server, client: Client
) -> None:
    assert client.get("/health").status_code == 200
    assert (client.get("/ready").status_code, client.get("/ready").json()) == (503, {"status": "loading"})
    refused = client.post(NATIVE, json={"model": "qwen3-rerank", "query": "q", "documents": ["d"]})
    assert (refused.status_code, refused.json()["code"]) == (503, "ModelUnavailable")
    server.wait_for("ready: ")
    assert client.get("/ready").status_code == 200
    assert len(replicas(server)) == 4


def test_each_model_has_replicas_of_its_own(server: Server, client: Client, other_checkpoint: Path) -> None:
    server.wait_for("ready: ")
    with Reranker(other_checkpoint, device="cpu", dtype="fp32") as other:
        answer = client.post(LOCAL, json=request(1) | {"model": "other"}).json()
        assert log_odds(answer) == pytest.approx(expected(other, request(1)), abs=TOLERANCE)
    assert answer["model"] == "other"
    states = [model["state"] for model in client.get("/v1/models").json()["data"]]
    assert set(states) == {"loaded"}
    assert "this model is pinned" in client.post("/v1/models/unload", json={"model": "other"}).text


def test_answers_are_those_of_one_process(server: Server, client: Client, tiny_reranker: Reranker) -> None:
    server.wait_for("ready: ")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: client.post(LOCAL, json=request(number)).json(), range(8)))
    for number, answer in enumerate(answers):
        assert log_odds(answer) == pytest.approx(expected(tiny_reranker, request(number)), abs=TOLERANCE)
        assert answer["model"] == tiny_reranker.model_id
        for item in answer["results"]:
            assert item["probability"] == pytest.approx(sigmoid(0.5 * item["log_odds"] - 1))


def test_a_stream_and_a_deadline_work_with_replicas(server: Server, client: Client, tiny_reranker: Reranker) -> None:
    server.wait_for("ready: ")
    asked = request(3)
    *items, last = client.post(LOCAL, json=asked | {"stream": True}).text.splitlines()
    assert [json.loads(item)["index"] for item in items] == list(log_odds(json.loads(last)))
    late = request(4, 500) | {"on_deadline": "partial"}
    answer = client.post(LOCAL, json=late, headers={"X-Request-Timeout-Ms": "150"})
    if answer.status_code == 504:  # nothing was scored by then
        assert "not answered within 150 ms" in answer.text
    else:
        body = answer.json()
        assert len(body["results"]) + len(body["not_scored"]) == 500
        assert log_odds(body) == pytest.approx(
            {item.index: item.log_odds for item in tiny_reranker.rank(late["query"], late["documents"])
             if item.index not in body["not_scored"]}, abs=TOLERANCE,
        )  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (LOCAL, {"query": "q", "documents": ["one two three four"], "max_document_tokens": 1, "truncation": "error"}),
        (LOCAL, {"query": "q", "documents": ["d"], "instruction": "word " * 1100}),
        (LOCAL, {"query": "q", "documents": []}),
        (NATIVE, {"model": "qwen3-rerank", "query": "q", "documents": ["a long text " * 100] * 500}),
        (NATIVE, {"model": "unknown", "query": "q", "documents": ["d"]}),
        (NATIVE, {"model": "qwen3-rerank", "query": 1, "documents": ["d"]}),
    ],
    ids=["cut", "instruction", "no documents", "tokens", "model", "type"],
)
async def test_errors_are_those_of_one_process_whoever_raises_them(
    server: Server, serve: Serve, tiny_reranker: Reranker, path: str, body: dict[str, Any]
) -> None:
    server.wait_for("ready: ")
    async with serve(tiny_reranker) as alone:
        without = await alone.post(path, json=body)
    with Client(base_url=server.address, timeout=WAIT_SECONDS) as client:
        with_replicas = client.post(path, json=body)
    assert with_replicas.status_code == without.status_code
    assert 400 <= without.status_code < 500
    assert without_ids(with_replicas.json()) == without_ids(without.json())


def without_ids(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("request_id", "id")}


def test_ray_listens_on_loopback_alone_and_sends_no_usage_statistics(server: Server) -> None:
    server.wait_for("ready: ")
    processes = [psutil.Process(server.process.pid), *descendants(server)]
    assert any("raylet" in process.name() for process in processes)
    for process in processes:
        for connection in process.net_connections("inet"):
            local, remote = connection.laddr, connection.raddr
            assert is_loopback(local.ip), (process.cmdline(), connection)
            assert not remote or is_loopback(remote.ip), (process.cmdline(), connection)
        if process.name() in ("gcs_server", "raylet"):  # the others overwrite their environment with their titles
            assert process.environ().get("RAY_USAGE_STATS_ENABLED") == "0", process.cmdline()


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.removeprefix("::ffff:")).is_loopback


def test_a_replica_that_is_killed_at_work_fails_no_request_and_is_replaced(
    server: Server, client: Client, tiny_reranker: Reranker
) -> None:
    server.wait_for("ready: ")

    def ask(number: int) -> tuple[int, dict[str, Any]]:
        answer = client.post(LOCAL, json=request(number, num_documents=300))
        return answer.status_code, answer.json()

    def kill_one(pool: ThreadPoolExecutor) -> list[tuple[int, dict[str, Any]]]:
        until(lambda: are_idle(server))  # a replica that starts is no victim: it has no work
        before = {replica: replica.cpu_times().user for replica in replicas(server)}
        list(pool.map(ask, range(4)))  # after its first requests, a replica that uses the CPU has work
        victim = max(before, key=lambda replica: replica.cpu_times().user - before[replica])  # of the model asked for
        idle = victim.cpu_times().user
        asking = pool.map(ask, range(8))
        until(lambda: victim.cpu_times().user > idle + 0.1)
        victim.kill()
        answers = list(asking)
        until(lambda: len({process.pid for process in replicas(server)} - {victim.pid}) == 4)
        return [*answers, *pool.map(ask, range(8, 10))]

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):  # on a busy machine a replica may be killed between two requests
            answers = kill_one(pool)
            assert [status for status, _ in answers if status != 200] == []
            if "the replica died" in server.output:  # it had work when it died, and that work was sent on
                break
        else:
            pytest.fail("no replica had work when it was killed")
    for number, (_, answer) in enumerate(answers):
        assert log_odds(answer) == pytest.approx(expected(tiny_reranker, request(number, 300)), abs=TOLERANCE)


def test_a_replica_whose_gpu_fails_ends_and_its_requests_are_sent_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from local_rerank_server.ray_serve import replica

    ended: list[int] = []
    engine = mock.Mock()
    monkeypatch.setattr("local_rerank.Reranker", lambda config: engine)
    monkeypatch.setattr(replica, "configure_process", lambda: None)  # this one is pytest's, and Ray runs elsewhere
    monkeypatch.setattr(replica, "_stay_on_loopback", lambda: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    replica.EngineReplica(EngineConfig(), self_test=False)
    ((observer,), _) = engine.observe_failure.call_args
    observer(DeviceFailure("cuda:0 failed"))
    assert ended == [1]
    assert issubclass(DeviceFailure, ModelUnavailable), "which RemoteReranker tries again if an answer comes at all"


def test_sigterm_lets_accepted_requests_finish_and_leaves_no_process(server: Server) -> None:
    server.wait_for("ready: ")
    processes = descendants(server)
    body = json.dumps(request(1, num_documents=40)).encode()
    head = f"POST {LOCAL} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode())
        assert b" 100 " in connection.recv(1000)  # the handler asks for the body: the request was accepted
        connection.sendall(body[:-1])
        server.process.send_signal(signal.SIGTERM)
        with Client(base_url=server.address, timeout=WAIT_SECONDS) as client:
            until(lambda: client.get("/ready").json() == {"status": "draining"})
        answer = exchange(connection, body[-1:])
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert server.process.wait(WAIT_SECONDS) == 0
    _, left = psutil.wait_procs(processes, timeout=WAIT_SECONDS)
    assert not left
    ending = server.output.partition("stopping: ")[2]  # before, Ray may print that a killed replica died while starting
    assert ending
    assert "Traceback" not in ending
    assert "***" not in ending  # Ray's own signal handler, which would end the process early


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--replicas", "2"], "which needs --ray"),
        (["--ray", "--replicas", "none"], "it must be auto, a number from 1, or a range such as 1-8"),
    ],
)
def test_contradicting_options_are_one_line(arguments: list[str], says: str) -> None:
    done = command("serve", "--port", "0", *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
