"""Dockerfile.gpu uses only paths, options, packages and programs that exist. Needs no docker."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import huggingface_hub.constants
import pytest
import triton

from local_rerank.commands.app import ENV_PREFIX, app, option_names
from local_rerank.errors import ConfigError
from local_rerank_server.config import ServerConfig

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent  # of an environment installed with constraints.txt


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of each instruction, without comments and with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile.gpu").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(keyword, rest.strip()) for keyword, rest in re.findall(r"^([A-Z]+)\s+(.*)$", joined, re.MULTILINE)]


def all_of(keyword: str) -> list[str]:
    return [rest for word, rest in instructions() if word == keyword]


def environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(all_of("ENV"))))


def position(text: str) -> int:
    (found,) = (number for number, (_, rest) in enumerate(instructions()) if text in rest)
    return found


@pytest.mark.parametrize("copied", all_of("COPY"))
def test_every_copied_path_exists(copied: str) -> None:
    *sources, _ = copied.replace("${HASHES}", "").split()
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_every_file_of_the_build_is_copied() -> None:
    copied = {source for rest in all_of("COPY") for source in rest.split()[:-1]}
    files = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE", "local_rerank", "server"}
    assert {*files, "${HASHES}"} == copied


def test_base_image_and_hashes_are_arguments_and_with_hashes_nothing_is_installed_without_them() -> None:
    arguments = dict(rest.split("=") for rest in all_of("ARG"))
    assert all_of("FROM") == ["${BASE}"]
    assert re.fullmatch(r"nvidia/cuda:[\w.-]+", arguments["BASE"]), "a digest is stated by who has read it"
    assert arguments["HASHES"] == '""'
    (install,) = (rest for rest in all_of("RUN") if "pip install" in rest)
    by_hash, package, plain = re.findall(r"pip install ([^;&]+)", install)
    assert '--require-hashes --requirement "$HASHES"' in by_hash
    assert "--no-index --no-deps --no-build-isolation" in package
    assert "--constraint constraints.txt" in plain


@pytest.mark.skipif(shutil.which("make") is None, reason="this system has no make")
@pytest.mark.parametrize(("target", "says"), [("hashes", "--generate-hashes"), ("sbom", "cyclonedx-py environment")])
def test_make_has_a_target_for_hashes_and_for_an_sbom_whose_tools_have_versions(target: str, says: str) -> None:
    done = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True)
    assert says in done.stdout, done.stderr
    assert re.search(r"/pip install --quiet (pip-tools|cyclonedx-bom)==[\d.]+\n", done.stdout)
    assert "index-url" not in done.stdout.replace("--no-emit-index-url", "")


def test_every_option_it_sets_is_an_option() -> None:
    ours = {ENV_PREFIX + name.upper() for name in option_names()}
    sources = inspect.getsource(huggingface_hub.constants) + inspect.getsource(triton.knobs)
    assert environment().keys() <= {"PATH", *ours, *re.findall(r'"(\w+)"', sources)}


def config_in_the_image(monkeypatch: pytest.MonkeyPatch, **variables: str) -> ServerConfig:
    """The server's config from the image's variables and from those that a user adds."""
    for name, value in {**environment(), "LOCAL_RERANK_REVISION": "", **variables}.items():
        if name.startswith(ENV_PREFIX):
            monkeypatch.setenv(name, value)
    _, bound, *_ = app.parse_args(["serve"], exit_on_error=False, print_error=False)
    return cast("ServerConfig", bound.arguments["server"])


def test_the_image_needs_a_key_or_insecure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"host 0\.0\.0\.0 can be reached .* no api_key is set; .* --insecure"):
        config_in_the_image(monkeypatch)
    assert config_in_the_image(monkeypatch, LOCAL_RERANK_API_KEY="secret").has_keys
    monkeypatch.delenv("LOCAL_RERANK_API_KEY")
    assert config_in_the_image(monkeypatch, LOCAL_RERANK_INSECURE="true").insecure


def test_the_entry_point_is_a_command() -> None:
    (entry,), (command,) = (json.loads(all_of(keyword)[0]) for keyword in ("ENTRYPOINT", "CMD"))
    assert (PROGRAMS / entry).exists()
    assert command in set(app)


def test_the_download_program_is_installed() -> None:
    script = " ".join(all_of("RUN"))
    assert re.search(r"\bhf download\b", script)
    done = subprocess.run([PROGRAMS / "hf", "download", "--help"], capture_output=True, text=True, check=True)
    assert "--revision" in done.stdout


@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="this system has no apt")
def test_every_system_package_it_installs_exists() -> None:
    (packages,) = re.findall(r"apt-get install ((?:-\S+ )*)([^&]+)", " ".join(all_of("RUN")))
    for name in packages[1].split():
        done = subprocess.run(["apt-cache", "show", name], capture_output=True, text=True)
        assert f"Package: {name}" in done.stdout, name


def test_the_image_runs_as_an_unprivileged_user() -> None:
    (user,) = all_of("USER")
    assert user not in {"root", "0"}
    assert any("useradd" in rest and rest.endswith(user) for rest in all_of("RUN"))


def test_the_image_is_offline_after_the_download() -> None:
    values = environment()
    assert (values["HF_HUB_OFFLINE"], values["HF_HUB_DISABLE_TELEMETRY"]) == ("1", "1")
    assert position("HF_HUB_OFFLINE=1") > position("hf download")


def test_the_health_check_uses_the_exposed_port() -> None:
    (check,) = all_of("HEALTHCHECK")
    port = environment()["LOCAL_RERANK_PORT"]
    assert f"http://127.0.0.1:{port}/ready" in check
    assert all_of("EXPOSE") == [port]
