"""Room on disk: asked before gigabytes are written, so that nothing fails half-way through them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from local_rerank.errors import CheckpointError


def cache_folder() -> Path:
    """Where this package keeps what it unpacks: $XDG_CACHE_HOME or ~/.cache, then local-rerank."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "local-rerank"


def require_free_space(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError if `folder`, which need not exist yet, has no room for that many bytes."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise CheckpointError(f"{folder} needs {gigabytes(num_bytes)} of free disk space; {gigabytes(free)} are free")


def gigabytes(num_bytes: int) -> str:
    """A size to read, in units of 10^9 bytes as disks and hubs count them."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e6 else f"{num_bytes} bytes"
