"""Carry what a bare GPU machine lacks: packages of the server and of the tests, and Qwen's tokenizer.

    benchmarks/gpu.sh --pack                              # here, into dist/gpu-pack, which git ignores
    python benchmarks/gpu_pack.py --unpack FOLDER         # there; gpu.sh does it and puts FOLDER on PYTHONPATH

Packing downloads wheels in the versions of this environment, for each Python of PYTHONS. Unpacking takes the wheels
that fit the Python there, of packages that it does not have or has too old for these. All else that the machine has
stays as it is, because torch and transformers there may need it so. benchmarks/bare stands in for what the library
imports and nothing that is measured uses.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[1]
PACK = ROOT / "dist" / "gpu-pack"
TOKENIZER = PACK / "tokenizer.json.gz"
BARE = ROOT / "benchmarks" / "bare"
WANTED = ("local-rerank", "hypothesis", "pytest", "pytest-xdist")
SMALL = {"typing-extensions"}  # comes with torch, but maybe older than pydantic needs it
PYTHONS = ("3.12",)  # of that machine; each more adds 4 MiB
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 35)] + ["manylinux1_x86_64", "manylinux2014_x86_64"]
LEFT_OUT = {"local-rerank", "zstandard", "hf-xet"}
"""The project itself; 9 MB for reading zstd and for downloads, which nothing that is measured does."""
MAX_MIB = 64  # of the tree and the pack, which may be sent to that machine


def pack() -> None:
    names = {name: version for name, version in needed().items() if name not in LEFT_OUT}
    shutil.rmtree(PACK, ignore_errors=True)
    PACK.mkdir(parents=True)
    for python in PYTHONS:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", python, "--implementation", "cp", "--dest", str(PACK)]
        command += [text for platform in PLATFORMS for text in ("--platform", platform)]
        subprocess.run([*command, *(f"{name}=={version}" for name, version in names.items())], check=True)
    sys.path.insert(0, str(ROOT))
    from tests.tiny_checkpoints import qwen_tokenizer_json

    TOKENIZER.write_bytes(gzip.compress(qwen_tokenizer_json().encode()))
    check_size()


def check_size() -> None:
    """Say how large the pack is. Raises SystemExit if it and the tree are too large to be sent."""
    size, in_all = size_of(PACK.iterdir()), size_of((*PACK.iterdir(), *tree()))
    print(f"{PACK.relative_to(ROOT)}: {size:.1f} MiB, with the tree {in_all:.1f}, for Python {', '.join(PYTHONS)}")
    if in_all > MAX_MIB:
        raise SystemExit(f"all may have {MAX_MIB} MiB: remove files that git neither has nor ignores")


def tree() -> list[Path]:
    """The files of the project that are there, those that git does not have, too, but does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [file for name in names if name and (file := ROOT / name).is_file()]


def size_of(files: Iterable[Path]) -> float:
    """In MiB."""
    return sum(file.lstat().st_size for file in files) / 2**20


def needed() -> dict[str, str]:
    """Names and versions of the packages that WANTED needs and that torch and transformers do not bring."""
    there = closure(["torch"]).keys() | {"transformers", "triton", *map(canonicalize_name, direct("transformers"))}
    there -= SMALL
    return {name: version for name, version in closure(WANTED).items() if name not in there}


def closure(names: Iterable[str]) -> dict[str, str]:
    """Names and versions of the packages that these need, in this environment."""
    found: dict[str, str] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        if (key := canonicalize_name(name)) not in found:
            found[key] = metadata.version(name)
            todo += direct(name)
    return found


def direct(name: str) -> list[str]:
    """The installed packages that a package names, with those of its extras that are installed."""
    needs = [Requirement(text) for text in metadata.requires(name) or ()]
    return [
        need.name
        for need in needs
        if (need.marker is None or need.marker.evaluate({"extra": ""})) and is_installed(need.name)
    ]


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def unpack(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fitting = set(sys_tags())
    wheels: dict[str, Path] = {}
    names: set[str] = set()
    for wheel in PACK.glob("*.whl"):
        name, _, _, tags = parse_wheel_filename(wheel.name)
        names.add(name)
        if not tags.isdisjoint(fitting):
            wheels[name] = wheel
    missing = {name for name in names if not is_installed(name)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    todo = [*missing, *too_old(map(Requirement, needs))]
    unpacked: set[str] = set()
    while todo:
        if (name := todo.pop()) in wheels.keys() - unpacked:
            unpacked.add(name)
            todo += too_old(extract(wheels[name], folder))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    stands_in = [file for file in sorted(BARE.glob("*.py")) if importlib.util.find_spec(file.stem) is None]
    for file in stands_in:
        shutil.copy(file, folder)
    print(f"unpacked: {' '.join(sorted(unpacked)) or 'nothing'}")
    print(f"no wheel for this Python: {' '.join(sorted(missing - unpacked)) or 'none'}")
    print(f"stand-ins: {' '.join(file.stem for file in stands_in) or 'none'}", flush=True)


def extract(wheel: Path, folder: Path) -> list[Requirement]:
    """Put a package into `folder`; returns what it needs."""
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder)
        about = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
    return [Requirement(text) for text in metadata.Distribution.at((folder / about).parent).requires or ()]


def too_old(needs: Iterable[Requirement]) -> list[str]:
    """The names of packages that are installed in another version than is needed."""
    return [
        canonicalize_name(need.name)
        for need in needs
        if (need.marker is None or need.marker.evaluate({"extra": ""}))
        and is_installed(need.name)
        and not need.specifier.contains(metadata.version(need.name), prereleases=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unpack", type=Path, metavar="FOLDER")
    folder = parser.parse_args().unpack
    unpack(folder) if folder else pack()


if __name__ == "__main__":
    main()
