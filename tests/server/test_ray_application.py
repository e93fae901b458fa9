"""The Ray Serve application that `serve deploy` and KubeRay run, behind Serve's own proxy, while its options change."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from httpx2 import Client

from local_rerank.batch.ray_cluster import ReplicaResources, connect, require_ray
from local_rerank.config import EngineConfig
from local_rerank.errors import CheckpointError, ConfigError
from local_rerank_server.config import ServerConfig
from local_rerank_server.keys import ApiKeys
from tests.serving import NATIVE, WAIT_SECONDS, until

pytestmark = pytest.mark.filterwarnings(  # of Ray
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning:ray"
)
BODY = {"query": "Which river?", "documents": ["a river", "a mountain"]}


@pytest.fixture(scope="module")
def address(tiny_checkpoint: Path) -> Iterator[str]:
    """A Ray cluster of this process, with Serve's proxy on a free port."""
    connect()
    import ray
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        deploy(tiny_checkpoint)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(checkpoint: Path, **args: Any) -> None:
    from ray import serve

    from local_rerank_server.ray_serve.application import build

    engine = {"model": str(checkpoint), "device": "cpu", "dtype": "fp32", "threads": 1, "no_self_test": True}
    serve.run(
        build(engine | {"insecure": True, "replicas": "1", "drain_seconds": 2} | args),
        name="local-rerank",
        route_prefix="/",
    )


def test_the_proxy_passes_answers_errors_and_the_request_id_on(address: str) -> None:
    with Client(base_url=address, timeout=WAIT_SECONDS) as client:
        until(lambda: client.get("/ready").status_code == 200)
        answer = client.post("/v1/local/rank", json=BODY)
        assert (answer.status_code, len(answer.json()["results"])) == (200, 2)
        assert answer.headers.get_list("x-request-id") == [answer.json()["id"]]
        named = client.post("/v1/local/rank", json=BODY, headers={"X-Request-ID": "order 17/a"})
        assert (named.headers.get_list("x-request-id"), named.json()["id"]) == (["order 17/a"], "order 17/a")
        wrong = client.post(NATIVE, json={"model": "qwen3-rerank", "query": 1, "documents": ["d"]})
        assert (wrong.status_code, wrong.json()["code"]) == (400, "InvalidParameter")
        assert client.get("/nowhere").status_code == 404


def test_a_change_of_options_rolls_through_and_fails_no_request(address: str, tiny_checkpoint: Path) -> None:
    stop = threading.Event()

    def ask(_: int) -> list[tuple[int, float]]:
        answers = []
        with Client(base_url=address, timeout=WAIT_SECONDS) as client:
            while not stop.is_set():
                answer = client.post("/v1/local/rank", json=BODY)
                answers.append((answer.status_code, answer.json()["results"][0]["log_odds"]))
        return answers

    with ThreadPoolExecutor(3) as pool:
        asking = pool.map(ask, range(3))
        try:
            deploy(tiny_checkpoint, instruction="Find mountains")
        finally:
            stop.set()
        answers = [answer for worker in asking for answer in worker]
    assert {status for status, _ in answers} == {200}
    with Client(base_url=address, timeout=WAIT_SECONDS) as client:
        after = client.post("/v1/local/rank", json=BODY).json()["results"][0]["log_odds"]
    assert abs(after - answers[0][1]) > 1e-6  # the new instruction is in force


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({}, "no api_key and no api_key_file is set"),
        ({"insecure": True, "nonsense": 1}, "unknown option 'nonsense'"),
        ({"insecure": True, "ingresses": 0}, "ingresses is 0"),
        ({"api_key": "  "}, "api_key is empty"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_deployed(args: dict[str, Any], says: str) -> None:
    require_ray()
    from local_rerank_server.ray_serve.application import build

    with pytest.raises(ConfigError, match=says):
        build(args)


def test_a10_options_from_yaml_are_typed(tmp_path: Path) -> None:
    """YAML has no paths and no tuples; one key given as a text is one key, not a key per character."""
    require_ray()
    from local_rerank_server.ray_serve.application import _pop_options

    (tmp_path / "keys").write_text("anna:sesame\n")
    args: dict[str, Any] = {"api_key": "open:door", "api_key_file": str(tmp_path / "keys"), "model_aliases": ["a", "b"]}
    config = ServerConfig(**_pop_options(args, ServerConfig))
    assert (config.model_aliases, config.api_key) == (("a", "b"), ("open:door",))
    keys = ApiKeys.from_config(config)
    assert [keys.check({"authorization": f"Bearer {key}"}) for key in ("open:door", "sesame")] == ["key-1", "anna"]


def test_a_replica_tests_itself_before_it_takes_requests(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are random, so that the self-test fails."""
    require_ray()
    from local_rerank_server.ray_serve import replica

    monkeypatch.setattr(replica, "configure_process", lambda: None)  # pytest owns this process
    monkeypatch.setattr(replica, "_stay_on_loopback", lambda: None)
    config = EngineConfig(model=str(tiny_checkpoint), device="cpu", dtype="fp32", threads=1)
    replica.EngineReplica(config, self_test=False)
    with pytest.raises(CheckpointError, match="self-test"):
        replica.EngineReplica(config, self_test=True)


def test_more_replicas_than_fit_are_refused(address: str) -> None:
    from local_rerank_server.ray_serve.replica import engine_application

    config = ServerConfig(ray=True, replicas="1000")
    with pytest.raises(ConfigError, match=r"replicas is 1000; there is room for \d+ \(1 CPUs and 0 GPUs each\)"):
        engine_application(EngineConfig(device="cpu", threads=1), config, may_grow=False)


@pytest.mark.parametrize(("replicas", "bounds"), [("1-8", (1, 8)), ("auto", (1, 5)), ("2-2", None), ("3", None)])
def test_a_range_of_replicas_follows_the_queue_and_a_number_does_not(
    replicas: str, bounds: tuple[int, int] | None
) -> None:
    require_ray()
    from ray.serve.deployment import deployment_to_schema

    from local_rerank_server.ray_serve.replica import _deployment

    config = ServerConfig(ray=True, replicas=replicas)
    made = _deployment(config.replica_range, ReplicaResources(num_cpus=1, num_gpus=0), room=5, server_config=config)
    schema = deployment_to_schema(made)
    if bounds is None:
        assert schema.num_replicas == config.replica_range.fixed
    else:
        scaling = schema.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == bounds
        assert (scaling.target_ongoing_requests, scaling.upscale_delay_s, scaling.downscale_delay_s) == (4, 10, 300)
