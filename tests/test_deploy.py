"""compose.yaml and the files of docs/deploy parse, and use images, applications, options and routes that exist."""

from __future__ import annotations

import configparser
import dataclasses
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compose_pydantic
import pytest
import yaml

from local_rerank.commands.app import ENV_PREFIX, app, option_names
from local_rerank.config import EngineConfig
from local_rerank_server.config import ServerConfig
from local_rerank_server.process import KEEP_ALIVE_SECONDS
from local_rerank_server.ray_serve.replica_range import ReplicaRange
from tests.test_dockerfile import all_of, environment

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "deploy"
COMPOSE = {ROOT / "compose.yaml": "Dockerfile", FOLDER / "compose.yaml": "Dockerfile.gpu"}  # and the image of each
OURS = {ENV_PREFIX + name.upper() for name in option_names()}
USER = int(all_of("USER", "Dockerfile")[0])


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def check_arguments(arguments: list[str]) -> None:
    app.parse_args(arguments, print_error=False, exit_on_error=False)


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


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_compose_file_meets_the_specification_and_uses_existing_options(file: Path) -> None:
    project = yaml.safe_load(file.read_text(encoding="utf-8"))
    compose_pydantic.ComposeSpecification.model_validate(project)  # models of the specification's JSON schema
    service = project["services"]["local-rerank"]
    check_arguments(shlex.split(service.get("command", "serve")))
    variables = environment(COMPOSE[file]) | service["environment"]
    assert {name for name in variables if name.startswith(ENV_PREFIX)} <= OURS
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert int(service["stop_grace_period"].removesuffix("s")) > ServerConfig().drain_seconds
    assert set(service["secrets"]) == project["secrets"].keys()
    volumes = {volume.partition(":")[0] for volume in service["volumes"] if not volume.startswith(".")}
    assert volumes == project.get("volumes", {}).keys()


def test_the_compose_file_locks_the_container_up_and_asks_whether_it_is_ready() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["local-rerank"]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    (secret,) = service["secrets"]
    assert service["environment"]["LOCAL_RERANK_API_KEY_FILE"] == f"/run/secrets/{secret}"
    (check,) = all_of("HEALTHCHECK", "Dockerfile")
    assert yaml.safe_load(check.partition(" CMD ")[2]) == service["healthcheck"]["test"][1:]
    folders = {environment("Dockerfile")[name] for name in ("HF_HOME", "XDG_CACHE_HOME")}
    assert {f"{Path(folder).parent}" for folder in folders} == {service["volumes"][0].partition(":")[2]}


def test_the_kubernetes_manifest_fits_the_image_and_the_server() -> None:
    """Its form was checked once with kubernetes-validate, for 1.30 and 1.37: 17,000 files of schemas."""
    documents = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    claim, deployment, service = documents
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (patched,) = load("kubernetes-gpu.yaml")["spec"]["template"]["spec"]["containers"]
    assert patched["name"] == container["name"]
    variables = {variable["name"]: variable["value"] for variable in container["env"] + patched["env"]}
    assert variables.keys() <= OURS | {"HF_HUB_OFFLINE"}
    assert pod["enableServiceLinks"] is False, "the Service's variables look like ours"
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == USER
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    (port,) = container["ports"]
    assert port["containerPort"] == int(environment("Dockerfile")["LOCAL_RERANK_PORT"])
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + ServerConfig().drain_seconds


def test_the_unit_of_systemd_is_valid_and_starts_an_existing_command(tmp_path: Path) -> None:
    text = (FOLDER / "local-rerank.service").read_text(encoding="utf-8")
    program, *arguments = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)[0].split()
    check_arguments(arguments)
    named = re.findall(rf"\b{ENV_PREFIX}\w+", text)
    assert len(named) == 2
    assert set(named) <= OURS
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # keys keep their capitals
    unit.read_string(text)
    assert int(unit["Service"]["TimeoutStopSec"]) > ServerConfig().drain_seconds
    if shutil.which("systemd-analyze") is None:
        return
    copy = tmp_path / "local-rerank.service"
    copy.write_text(text.replace(program, str(Path(sys.executable).with_name("local-rerank"))), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if copy.name in line] == []


def test_the_limits_of_nginx_fit_those_of_the_server() -> None:
    text = (FOLDER / "nginx.conf").read_text(encoding="utf-8")
    values = dict(re.findall(r"^\s*(\w+) ([^;{]+);", text, re.MULTILINE))
    assert int(values["proxy_read_timeout"].removesuffix("s")) > ServerConfig().request_timeout_ms / 1000
    assert int(values["keepalive_timeout"].removesuffix("s")) < KEEP_ALIVE_SECONDS
    assert values["server"] == f"127.0.0.1:{ServerConfig().port}"
    assert "proxy_set_header Host $http_host;" in text, "else the page cannot rank"
    assert (values["client_max_body_size"], values["proxy_request_buffering"]) == ("0", "off")
