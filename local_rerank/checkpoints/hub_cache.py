"""Finds a model's snapshot in the cache of huggingface_hub: `models--owner--name`, with its `refs` and `snapshots`.

We read the cache ourselves, because huggingface_hub finds nothing if `refs` is missing or was written by hand.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from local_rerank.checkpoints.download import silence_telemetry
from local_rerank.checkpoints.files import has_adapter, missing_files

logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"models--([\w.-]+)")


def repository_of(model_id: str) -> Path:
    """The cache folder of a hub model, which need not exist."""
    return _cache() / f"models--{model_id.replace('/', '--')}"


def repositories() -> list[tuple[str, Path]]:
    """Hub id and cache folder of each model in the cache."""
    found = ((_REPOSITORY.fullmatch(path.name), path) for path in sorted(_cache().glob("models--*")) if path.is_dir())
    return [(name[1].replace("--", "/"), path) for name, path in found if name]


def _cache() -> Path:
    silence_telemetry()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def split_cache_path(path: Path) -> tuple[str, Path, Path | None] | None:
    """Hub id, cache folder and, if `path` is one, the snapshot; None if `path` is not in a hub cache."""
    path = path.resolve()
    snapshot = path if path.parent.name == "snapshots" else None
    repository = path.parent.parent if snapshot else path.parent if path.name == "snapshots" else path
    found = _REPOSITORY.fullmatch(repository.name)
    if not found or not (repository / "snapshots").is_dir():
        return None
    return found[1].replace("--", "/"), repository, snapshot


def find_snapshot(repository: Path, revision: str | None) -> tuple[Path | None, str]:
    """A complete snapshot of a revision, or None and what was found instead.

    Without a revision and without `refs/main`, it is the newest complete snapshot. Raises CheckpointError.
    """
    if not repository.is_dir():
        return None, f"there is no {repository}"
    snapshots = {path.name: path for path in (repository / "snapshots").glob("*") if path.is_dir()}
    name = revision or "main"
    named = [snapshots[each] for each in (_commit(repository / "refs" / name), name) if each in snapshots]
    others = sorted(snapshots.values(), key=lambda path: path.stat().st_mtime, reverse=True)
    candidates = named or ([] if revision else others)
    reasons = []
    for snapshot in candidates:
        if not (missing := _missing(snapshot)):
            if not named:
                logger.warning(
                    "refs/main in %s names no snapshot; using the newest complete one, %s", repository, snapshot.name
                )
            return snapshot, ""
        reasons.append(f"{snapshot} lacks {', '.join(missing[:3])}")
    known = f" among {', '.join(sorted(snapshots))}" if snapshots else ""
    return None, "; ".join(reasons) or f"{repository / 'snapshots'} has none for {name}{known}"


def _commit(ref: Path) -> str:
    """The commit in a ref, which may end in a newline; empty if there is none."""
    return ref.read_text(encoding="utf-8", errors="replace").strip() if ref.is_file() else ""


def _missing(snapshot: Path) -> list[str]:
    is_adapter = has_adapter(snapshot) and not (snapshot / "config.json").exists()
    return [] if is_adapter else missing_files(snapshot)  # an adapter never gets complete, and has its own error
