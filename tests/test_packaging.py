"""The wheel and the sdist: their contents, the wheel in a clean environment; and exact pins for every dependency."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from itertools import chain
from pathlib import Path

import pytest

from local_rerank import __version__
from local_rerank_server.dialects import playground

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN_FILES = [ROOT / "constraints.txt", *sorted((ROOT / "tests" / "clients").glob("*.txt"))]
MAX_WHEEL_BYTES = 45_000_000  # of which the built-in model has 40 MB
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
    build(ROOT, folder, "wheel", "sdist")
    return folder


def build(tree: Path, folder: Path, *targets: str) -> None:
    options = [option for target in targets for option in ("-t", target)]
    command = [sys.executable, "-m", "hatchling", "build", *options, "-d", str(folder)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)


def files_of(folder: Path) -> dict[str, str]:
    """Digests of the files that a wheel has, by name, from its list of them."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        rows = csv.reader(archive.read(record).decode().splitlines())
        files = {name: digest for name, digest, _ in rows if name != record}
        assert {*files, record} == set(archive.namelist())
    return files


def tree_files() -> set[str]:
    """The files of both packages, by their paths in the wheel."""
    parents = {"local_rerank": ROOT, "local_rerank_server": ROOT / "server"}
    paths = [(parent, path) for name, parent in parents.items() for path in (parent / name).rglob("*")]
    files = [(parent, path) for parent, path in paths if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(parent).as_posix() for parent, path in files}


def test_the_wheel_contains_every_file_of_the_packages_and_its_metadata(built: Path) -> None:
    names, folder = set(files_of(built)), f"local_rerank-{__version__}.dist-info"
    assert {name for name in names if not name.startswith(folder)} == tree_files()
    own = {"METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE"}
    assert {name for name in names if name.startswith(folder)} == {f"{folder}/{name}" for name in own}
    assert {"local_rerank/py.typed", "local_rerank_server/py.typed", "local_rerank/planning/throughput.toml"} <= names
    assert {f"local_rerank/nano/{name}" for name in ("LICENSE", "NOTICE", "model.safetensors")} <= names
    assert {f"local_rerank_server/playground/{file.name}" for file in playground.FILES.values()} <= names


def test_the_sdist_has_what_the_wheel_is_built_from_and_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    packages = {path.replace("local_rerank_server", "server/local_rerank_server", 1) for path in tree_files()}
    beside = "pyproject.toml PKG-INFO README.md LICENSE NOTICE CHANGELOG.md constraints.txt .gitignore"
    assert names == packages | set(beside.split())
    build(unpacked, tmp_path, "wheel")
    assert files_of(tmp_path) == files_of(built)


def test_the_wheel_ranks_in_a_clean_environment(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LOCAL_RERANK_"))}

    def run(*command: str | Path) -> str:
        return subprocess.run(
            command, cwd=tmp_path, env=clean, check=True, capture_output=True, text=True, timeout=120
        ).stdout

    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-index", "--no-deps", wheel)
    folder = Path(run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # the dependencies, without our own package there: a line of a .pth file adds a folder, but not its .pth files
    (folder / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    imported = run(
        programs / "python", "-c", "import local_rerank as l, local_rerank_server as s; print(l.__file__, s.__file__)"
    )
    assert [Path(file).parents[1] for file in imported.split()] == [folder, folder]
    ranked = run(
        programs / "local-rerank", "rank", "capital of France", "Rome is in Italy", "Paris is in France", "--json"
    )
    assert [document["index"] for document in json.loads(ranked)["results"]] == [1, 0]


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
    cuda = ("nvidia-cu", "nvidia-n", "cuda-")  # nvidia-haystack is a client
    heavy = [name for name in pins(path) if name in {"torch", "triton"} or name.startswith(cuda)]
    assert not heavy
