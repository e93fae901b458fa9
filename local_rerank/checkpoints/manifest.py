"""The manifest of a bundle, `local-rerank.json`: what the model is, and size and sha256 of each file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from local_rerank.checkpoints.files import PICKLE_SUFFIXES
from local_rerank.errors import CheckpointError

MANIFEST = "local-rerank.json"
FORMAT, FORMAT_VERSION = "local-rerank bundle", 1
MAX_MANIFEST_BYTES = 16 << 20  # usually a few KiB
MAX_SHOWN_CHARS = 300  # of a model's id, which may be the longest name of a folder
_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".md", "")  # no suffix: LICENSE, NOTICE
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)  # no absolute path, no "..", no drive
_MAX_FILE_BYTES = 1 << 53  # JSON's largest exact integer


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file in the manifest."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A bundle's metadata and the list of its files."""

    model_id: str
    revision: str | None
    licence: str | None
    made_by: str
    recipe: dict[str, str]  # fields of the prompt template
    expected: dict[str, Any]  # known pairs, see known_scores.py
    files: dict[str, FileEntry] = field(default_factory=dict)  # all except the manifest


def check_name(name: str, path: Path) -> None:
    """Refuse names that point outside the folder, pickles, and file types that no checkpoint needs."""
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{path} contains {name!r}; only plain relative names are allowed")
    suffix = Path(name).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path} contains {name}, a pickle, which could run code")
    if suffix not in _SUFFIXES:
        raise CheckpointError(f"{path} contains {name}; only {', '.join(filter(None, _SUFFIXES))} files are allowed")


def check_names(names: Iterable[str], path: Path) -> None:
    """Check every name, and that no two are one file where case does not count."""
    names = [*names]
    for name in names:
        check_name(name, path)
    counts = Counter(name.casefold() for name in names)
    if twice := [name for name in names if counts[name.casefold()] > 1]:
        raise CheckpointError(f"{path} contains {twice[0]} twice; each name must be there once, whatever its case")


def to_json(manifest: Manifest) -> bytes:
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    return (json.dumps(head | asdict(manifest), ensure_ascii=False, indent=2) + "\n").encode()


def from_json(text: bytes, path: Path) -> Manifest:
    """Parse the manifest of the bundle `path` and check the file names in it. Raises CheckpointError."""
    if len(text) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"the manifest of {path} has more than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = _from_json(json.loads(text))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the manifest of {path} cannot be read: {repr(error)[:MAX_SHOWN_CHARS]}") from error
    check_names([*manifest.files, MANIFEST], path)
    return manifest


def _from_json(value: Mapping[str, Any]) -> Manifest:
    if value["format"] != FORMAT or value["format_version"] != FORMAT_VERSION:
        found = f"{value['format']!r} version {value['format_version']}"
        raise ValueError(f"its format is {found}; this program reads {FORMAT!r} version {FORMAT_VERSION}")
    return Manifest(
        model_id=_text(value, "model_id"),
        revision=None if value["revision"] is None else _text(value, "revision"),
        licence=None if value["licence"] is None else _text(value, "licence"),
        made_by=_text(value, "made_by"),
        recipe={name: str(text) for name, text in value["recipe"].items()},
        expected=dict(value["expected"]),
        files={name: _file_entry(**entry) for name, entry in value["files"].items()},
    )


def _text(value: Mapping[str, Any], name: str) -> str:
    text = value[name]
    if not isinstance(text, str) or len(text) > MAX_SHOWN_CHARS:
        raise ValueError(f"its {name} must be a string of at most {MAX_SHOWN_CHARS} characters")
    text.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair, which no answer could hold
    return text


def _file_entry(*, size: int, sha256: str) -> FileEntry:
    if type(size) is not int or not 0 <= size <= _MAX_FILE_BYTES or not isinstance(sha256, str):
        raise ValueError(f"a file has size {size!r} and sha256 {sha256!r}")
    return FileEntry(size=size, sha256=sha256)
