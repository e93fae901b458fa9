"""One server with several models: by name, on demand, unloaded, failed, and after a restart; and its config file."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from httpx2 import Client, Response

from local_rerank import EngineConfig, Reranker
from local_rerank.config import DEFAULT_INSTRUCTION
from local_rerank.models.loader import EngineLoader
from tests.command_line import command
from tests.serving import NATIVE, serving, until
from tests.tiny_checkpoints import make_checkpoint

QUERY, DOCUMENTS = "q", ["one", "two", "three"]
BODY = {"query": QUERY, "documents": DOCUMENTS}
FILE = """
port = 0
no_self_test = true
device = "cpu"
dtype = "fp32"
threads = 1
max-batch-tokens = 64
keep_alive = "never"
max_model_bytes = {room}
model_aliases = ["qwen3-rerank"]
dashscope_instruction = "{instruction}"

[models.first]
model = "{folder}/first"

[models.second]
model = "{folder}/second"
aliases = ["two"]

[models.third]
model = "{folder}/third"

[models.broken]
model = "{folder}/broken"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, one that is cut off, and a file with room for two of them."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second", "third")):
        make_checkpoint(folder / name, seed=seed)
    shutil.copytree(folder / "third", folder / "broken")
    weights = (folder / "broken/model.safetensors").read_bytes()
    (folder / "broken/model.safetensors").write_bytes(weights[:-1000])
    config = EngineConfig(model=str(folder / "first"), device="cpu", dtype="fp32", max_batch_tokens=64)
    _, _, needed = EngineLoader(self_test=False).inspect(config)
    text = FILE.format(folder=folder, instruction=DEFAULT_INSTRUCTION, room=needed + len(weights) * 3 // 2)
    (folder / "local-rerank.toml").write_text(text, encoding="utf-8")
    return folder


def scores(answer: Response) -> dict[int, float]:
    body = answer.json()
    assert answer.status_code == 200, body
    return {item["index"]: item["relevance_score"] for item in body.get("results") or body["output"]["results"]}


def models(client: Client) -> dict[str, Any]:
    return {model["id"]: model for model in client.get("/v1/models").json()["data"]}


def states(client: Client) -> list[str]:
    return [models(client)[name]["state"] for name in ("first", "second", "third", "broken")]


def test_a_day_with_three_models_and_room_for_two(folder: Path, tmp_path: Path) -> None:
    expected = {}
    for name in ("first", "second", "third"):
        with Reranker(folder / name, device="cpu", dtype="fp32") as reranker:
            expected[name] = pytest.approx(
                {item.index: item.relevance_score for item in reranker.rank(QUERY, DOCUMENTS)}, abs=1e-5
            )
    config = ("--config", str(folder / "local-rerank.toml"))
    with serving(tmp_path / "log", *config) as server, Client(base_url=server.address, timeout=60) as client:

        def rank(name: str | None, path: str = "/v1/rerank", **headers: str) -> Response:
            return client.post(path, json=BODY | ({} if name is None else {"model": name}), headers=headers)

        assert states(client) == ["loaded", "on demand", "on demand", "failed"]
        listed = models(client)
        assert "copy or download it again" in listed["broken"]["reason"]
        assert listed["second"]["size_bytes"] > 0
        assert list(listed) == ["first", "qwen3-rerank", "second", "two", "third", "broken"]
        for name in ("first", "qwen3-rerank", None, "unknown"):
            assert scores(rank(name)) == expected["first"]
        native = {"model": "second", "input": BODY}
        assert scores(client.post(NATIVE, json=native)) == expected["second"]
        assert states(client)[:3] == ["loaded", "loaded", "on demand"]
        assert scores(rank("two", "/v1/local/rank")) == expected["second"]
        assert rank("second", "/v1/local/rank").json()["model"] == "second"

        rejected = rank("third", **{"x-cold-start": "reject"})
        assert (rejected.status_code, int(rejected.headers["retry-after"]) >= 1) == (503, True)
        assert "model third is not loaded" in rejected.text
        until(lambda: states(client)[:3] == ["on demand", "loaded", "loaded"])
        assert scores(rank("third", "/v2/rerank", **{"x-cold-start": "reject"})) == expected["third"]
        assert rank("third", **{"x-cold-start": "yes"}).status_code == 400

        with ThreadPoolExecutor(6) as threads:  # each model is unloaded and loaded again
            names = ["first", "second", "third"] * 4
            assert [scores(answer) for answer in threads.map(rank, names)] == [expected[name] for name in names]
        refused = rank("broken")
        assert (refused.status_code, "model broken cannot be loaded" in refused.text) == (503, True)
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        shutil.copy(folder / "third/model.safetensors", folder / "broken/model.safetensors")
        assert client.post("/v1/models/load", json={"model": "broken"}).json()["state"] == "loaded"
        assert scores(rank("broken")) == expected["third"]
        assert client.post("/v1/models/unload", json={"model": "broken"}).json()["state"] == "on demand"
        plain = client.post("/v1/models/load", content='{"model": "broken"}', headers={"content-type": "text/plain"})
        assert plain.status_code == 415
        assert client.post("/v1/models/load", content='{"model": "broken"}').status_code == 415
        assert client.post("/v1/models/load", json={"model": str(folder / "first")}).status_code == 404
        page = client.get("/metrics").text
        assert 'local_rerank_pairs_total{model="second"} ' in page
        assert 'local_rerank_model_loaded{model="broken"} 0.0' in page

    flags = (*config, "--model", "third", "--keep-alive", "1s", "--api-key", "k", "--strict-models")
    with serving(tmp_path / "again", *flags) as server, Client(base_url=server.address, timeout=60) as client:
        assert client.post("/v1/models/load", json={"model": "first"}).status_code == 401
        client.headers["authorization"] = "Bearer k"
        until(lambda: states(client) == ["on demand"] * 4)
        assert client.get("/ready").status_code == 200
        assert scores(client.post("/v1/rerank", json=BODY)) == expected["third"], "the flag's model is the default"
        assert client.post("/v1/rerank", json=BODY | {"model": "fourth"}).status_code == 404


@pytest.mark.parametrize("alias", ["second", "two"])
def test_an_alias_that_another_model_has_stops_the_start(
    folder: Path, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineLoader, "load", ZeroDivisionError)  # the server ends in any case
    done = command("serve", "--config", str(folder / "local-rerank.toml"), "--model-aliases", alias)
    assert done.returncode == 1
    assert f"alias {alias} is a name of two models, first and second; remove that alias" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown key 'prot'; the nearest is port"),
        ("[models.x]\nfoo = 1", "[models.x]: unknown key 'foo'; docs/options.md lists them"),
        ("[models.x]\nthreads = '2'", "[models.x]: threads is '2'; it must be an int or None"),
        ("[models.x]\naliases = 'a'", "[models.x]: aliases is 'a'; it must be a list of names"),
        ("[models.x]\naliases = ['']", "[models.x]: aliases is ['']; it must be a list of names"),
        ("[models.'']", "the name is empty; give the model a name"),
        ("port = 1.5", "port is 1.5; it must be a text, a whole number, true or false"),
        ("port = 'abc'", 'unable to convert "abc" into int'),
        ("models = 3", "models must be sections, [models.NAME]"),
        ("port = ", "cannot be read"),
    ],
)
def test_a_wrong_config_file_stops_the_start_and_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file.toml").write_text(text, encoding="utf-8")
    done = command("serve", "--config", str(tmp_path / "file.toml"))
    assert done.returncode in (1, 2)
    assert "file.toml" in done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_model_that_looks_like_json_is_a_model() -> None:
    from local_rerank.models.options import models_of

    (model,) = models_of(['{"name": 1}'], EngineConfig())
    assert model.engine.model == '{"name": 1}'


def test_flags_and_variables_win_over_the_file(tmp_path: Path) -> None:
    from local_rerank.commands.app import app
    from local_rerank.models.options import models_of

    (tmp_path / "file.toml").write_text(
        f"port = 1\nhost = 'localhost'\ndtype = 'bf16'\n[models.x]\nmodel = {json.dumps(str(tmp_path))}\n"
        "dtype = 'fp16'\nmax_length = 9\npinned = true\n"
    )

    def options(*arguments: str) -> tuple[Any, ...]:
        line = ["serve", "--config", str(tmp_path / "file.toml"), *arguments]
        given = app.parse_args(line, print_error=False, exit_on_error=False)[1].arguments
        (model,) = models_of(given["server"].model, given["engine"])
        engine = model.engine
        return given["server"].port, given["server"].host, engine.dtype, engine.max_length, model.pinned, model.name

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LOCAL_RERANK_PORT", "2")
        assert options() == (2, "localhost", "fp16", 9, True, "x")
        assert options("--dtype", "fp32", "--port", "3") == (3, "localhost", "fp32", 9, True, "x")
