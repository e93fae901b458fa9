"""Where files can be written, and whether there is room for gigabytes, so that a write does not fail half-way."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from local_rerank.errors import CheckpointError


def cache_folder() -> Path:
    """This package's cache: `local-rerank` in $XDG_CACHE_HOME or ~/.cache. Raises CheckpointError without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "local-rerank"
    except RuntimeError as error:
        what = "this user has no home folder; set XDG_CACHE_HOME to a folder that can be written"
        raise CheckpointError(what) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that another process reads all of it or none; makes its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def require_temporary_folder() -> None:
    """Raise CheckpointError if there is no folder for temporary files, which transformers needs to be imported."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        what = "no folder for temporary files can be written; set TMPDIR to one (in Kubernetes: mount an emptyDir)"
        raise CheckpointError(what) from error


def require_free_space(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError if `folder`, which need not exist yet, has less than `num_bytes` of free space."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise CheckpointError(f"{folder} needs {gigabytes(num_bytes)} of free disk space; {gigabytes(free)} are free")


def gigabytes(num_bytes: int) -> str:
    """A size as text, in units of 10^9 bytes."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e6 else f"{num_bytes} bytes"
