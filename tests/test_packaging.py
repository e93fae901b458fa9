"""The contents of the wheel and the sdist, and exact pins for every dependency."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest

from local_rerank_server.dialects import playground

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN_FILES = [ROOT / "constraints.txt", *sorted((ROOT / "tests" / "clients").glob("*.txt"))]
MAX_WHEEL_BYTES = 45_000_000  # of which the built-in model has 37 MB
PIN = re.compile(r"([\w.-]+)==([\w.]+)")


def pins(path: Path) -> dict[str, str]:
    """Versions by normalised name. Every line must be a comment or an exact pin."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    matches = [PIN.fullmatch(line) for line in lines]
    assert all(matches), f"{path.name}: {[line for line, match in zip(lines, matches, strict=True) if not match]}"
    return {normalised(match[1]): match[2] for match in matches if match}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this tree's wheel and sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def wheel_names(built: Path) -> list[str]:
    (wheel,) = built.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_contains_every_file_of_the_packages(built: Path) -> None:
    packages = {"local_rerank": ROOT / "local_rerank", "local_rerank_server": ROOT / "server" / "local_rerank_server"}
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in packages.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel_names(built) if ".dist-info/" not in name} == expected
    assert {"local_rerank/py.typed", "local_rerank_server/py.typed", "local_rerank/nano/model.safetensors"} <= expected
    assert {f"local_rerank_server/playground/{file.name}" for file in playground.FILES.values()} <= expected


def test_the_sdist_contains_the_files_to_build_it(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "local_rerank/nano/model.safetensors"} <= names
    assert {name.split("/")[0] for name in names if "/" in name} == {"local_rerank", "server"}


def test_wheel_and_sdist_are_below_the_size_limit(built: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in built.iterdir() if path.is_file()}
    assert len(sizes) == 2
    assert max(sizes.values()) <= MAX_WHEEL_BYTES, sizes


@pytest.mark.parametrize("path", PIN_FILES, ids=lambda path: path.stem)
def test_every_requirement_is_an_exact_pin(path: Path) -> None:
    assert pins(path)


def test_the_constraints_pin_every_dependency() -> None:
    declared = [*PROJECT["dependencies"], *chain.from_iterable(PROJECT["optional-dependencies"].values())]
    names = {normalised(re.split(r"[^\w.-]", requirement)[0]) for requirement in declared} - {"local-rerank"}
    pinned = pins(ROOT / "constraints.txt")
    assert names <= pinned.keys()
    assert pinned["torch"] == "2.13.0"


@pytest.mark.parametrize("path", PIN_FILES[1:], ids=lambda path: path.stem)
def test_no_client_environment_installs_a_second_torch(path: Path) -> None:
    heavy = [name for name in pins(path) if name in {"torch", "triton"} or name.startswith(("nvidia-", "cuda-"))]
    assert not heavy
