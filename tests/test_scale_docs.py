"""The files of docs/deploy parse and use applications and options that exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
from pathlib import Path
from typing import Any

import yaml

from local_rerank.commands.app import app
from local_rerank.config import EngineConfig
from local_rerank_server.config import ReplicaRange, ServerConfig

FOLDER = Path(__file__).parents[1] / "docs" / "deploy"


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def test_the_manifest_uses_an_existing_application_and_existing_options() -> None:
    manifest = load("rayservice.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    found = importlib.util.find_spec(module)
    assert found is not None
    assert f"def {name}(" in Path(found.origin or "").read_text(encoding="utf-8")
    known = {field.name for kind in (EngineConfig, ServerConfig) for field in dataclasses.fields(kind)}
    assert set(application["args"]) <= known | {"ingresses"}
    replicas = ReplicaRange.parse(application["args"]["replicas"])
    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert replicas.maximum == group["maxReplicas"]  # one GPU a node, one engine a GPU
    containers = [
        group["template"]["spec"]["containers"][0],
        manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0],
    ]
    assert all({"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"] for container in containers)


def test_the_command_line_of_the_compose_file_parses() -> None:
    service = load("compose.yaml")["services"]["local-rerank"]
    app.parse_args(shlex.split(service["command"]), print_error=False, exit_on_error=False)
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert int(service["stop_grace_period"].removesuffix("s")) > ServerConfig().drain_seconds
