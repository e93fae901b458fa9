"""Bundles: a checkpoint as one file or folder that needs no network. Writes, reads, unpacks and verifies them.

A bundle is a folder of plain files (config, tokenizer, safetensors, licence) and a manifest, `local-rerank.json`: the
size and sha256 of each file, the prompt template, and known pairs with their log-odds. A file bundle is the same folder
in an uncompressed zip archive, whose directory at the end gives the manifest without reading gigabytes and shows a
truncated copy at once. safetensors maps weights from a plain file, so we unpack a file bundle once, checking each
checksum, into a cache folder named by its manifest's sha256. A folder bundle is used in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import lzma
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from local_rerank.checkpoints.files import PICKLE_SUFFIXES, require_kind
from local_rerank.checkpoints.free_space import cache_folder, gigabytes, require_free_space
from local_rerank.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "local-rerank.json"
FORMAT, FORMAT_VERSION = "local-rerank bundle", 1
FILE_SUFFIX = ".zip"  # any other name (Qwen3-Reranker-0.6B has the suffix ".6B") is a folder
_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".md", "")  # no suffix: LICENSE, NOTICE
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)  # no absolute path, no "..", no drive
_DATE = (1980, 1, 1, 0, 0, 0)  # of every member, so that the same checkpoint gives the same file
_CHUNK_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 16 << 20  # usually a few KiB
_MAX_EXPANSION = 20  # unpacked size / archive size; compression shrinks weights hardly and JSON by 5
_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)  # RuntimeError: encrypted


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


def is_bundle(path: Path) -> bool:
    """Whether to open `path` as a bundle: any file, or a folder with a manifest."""
    return path.is_file() or (path / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest and check the file names in it, but not the files. Raises CheckpointError."""
    with _open(path) as source:
        return _manifest(path, source)


def open_bundle(path: Path) -> tuple[Manifest, Path]:
    """The manifest, and a folder with the bundle's files, unpacked if necessary. Raises CheckpointError.

    Unpacking checks checksums. In a folder only sizes are checked, because hashing gigabytes at every start takes
    minutes (`damaged_files` does it).
    """
    with _open(path) as source:
        manifest = _manifest(path, source)
        if not path.is_dir():
            return manifest, _unpack(path, source, manifest)
    if wrong := _wrong_sizes(path, manifest):
        raise CheckpointError(f"{path} is incomplete: {wrong[0]} is missing or has a wrong size ({len(wrong)} in all)")
    return manifest, path


def damaged_files(path: Path) -> list[str]:
    """Every file of a bundle that differs from the manifest or is not in it, with the reason."""
    with _open(path) as source:
        manifest = _manifest(path, source)
        found = [f"{name}: not in the manifest" for name in sorted(set(source.names()) - {*manifest.files, MANIFEST})]
        for name, entry in manifest.files.items():
            if fault := _fault(source, name, entry):
                found.append(f"{name}: {fault}")
    return found


def write_bundle(output: Path, folder: Path, names: Sequence[str], manifest: Manifest) -> Manifest:
    """Write the files `names` of `folder` and the manifest, in which they replace `files`; returns what was written.

    `output` appears once complete. Raises CheckpointError.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists already; remove it or choose another name")
    for name in names:
        _check_name(name, output)
    require_free_space(output.parent, sum((folder / name).stat().st_size for name in names))
    partial = output.with_name(output.name + ".partial")
    _remove(partial)
    try:
        with _writer(output, partial) as add:
            manifest = replace(manifest, files={name: _add_file(add, folder, name) for name in sorted(names)})
            with add(MANIFEST) as target:
                target.write(_to_json(manifest))
        partial.rename(output)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}") from error
    finally:
        _remove(partial)
    return manifest


class _Source:
    """The files of a bundle, in an archive or in a folder."""

    def __init__(self, path: Path, archive: zipfile.ZipFile | None) -> None:
        self._path = path
        self._archive = archive

    def names(self) -> list[str]:
        if self._archive is not None:
            return self._archive.namelist()
        files = (path for path in self._path.rglob("*") if path.is_file())
        return [path.relative_to(self._path).as_posix() for path in files]

    def open(self, name: str) -> IO[bytes]:
        return (self._path / name).open("rb") if self._archive is None else self._archive.open(name)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_Source]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_file() and path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path} is a pickle, which could run code; use safetensors weights")
    try:
        if path.is_dir():
            yield _Source(path, None)
            return
        if not zipfile.is_zipfile(path):
            require_kind(path)
        if path.suffix in (".safetensors", ".json"):
            raise CheckpointError(f"{path} is one file of a checkpoint; pass its folder, {path.parent}")
        with zipfile.ZipFile(path) as archive:
            _refuse_bomb(path, archive)
            yield _Source(path, archive)
    except _BROKEN as error:
        raise CheckpointError(f"{path} is not a bundle, or an incomplete one: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _refuse_bomb(path: Path, archive: zipfile.ZipFile) -> None:
    """Limit what an archive unpacks to; zipfile never reads more than the size that a member declares."""
    packed, unpacked = path.stat().st_size, sum(member.file_size for member in archive.infolist())
    if unpacked > _MAX_EXPANSION * packed:
        what = f"{path} has {gigabytes(packed)} and would unpack to {gigabytes(unpacked)}"
        raise CheckpointError(f"{what}; at most {_MAX_EXPANSION} times its size is allowed")


def _manifest(path: Path, source: _Source) -> Manifest:
    """Read and check the manifest, and that an archive contains exactly the files in it."""
    try:
        with source.open(MANIFEST) as stream:
            text = stream.read(_MAX_MANIFEST_BYTES + 1)
    except (KeyError, FileNotFoundError) as error:
        raise CheckpointError(f"{path} is not a bundle of local-rerank: it has no {MANIFEST}") from error
    if len(text) > _MAX_MANIFEST_BYTES:
        raise CheckpointError(f"the manifest of {path} has more than {_MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = _from_json(json.loads(text))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the manifest of {path} cannot be read: {error!r}") from error
    for name in manifest.files:
        _check_name(name, path)
    if path.is_file():
        names = source.names()
        for name in names:
            _check_name(name, path)
        if sorted(names) != sorted([*manifest.files, MANIFEST]):
            odd = sorted(set(names) ^ {*manifest.files, MANIFEST}) or [name for name in names if names.count(name) > 1]
            raise CheckpointError(f"{path} does not contain the files of its manifest; see {odd[0]!r}")
    return manifest


def _check_name(name: str, path: Path) -> None:
    """Refuse names that point outside the folder, pickles, and file types that no checkpoint needs."""
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{path} contains {name!r}; only plain relative names are allowed")
    suffix = Path(name).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path} contains {name}, a pickle, which could run code")
    if suffix not in _SUFFIXES:
        raise CheckpointError(f"{path} contains {name}; only {', '.join(filter(None, _SUFFIXES))} files are allowed")


def _unpack(path: Path, source: _Source, manifest: Manifest) -> Path:
    """Unpack the archive into its cache folder unless it is there. Several processes may do this at once."""
    with source.open(MANIFEST) as stream:
        key = hashlib.sha256(stream.read()).hexdigest()
    folder = cache_folder() / "bundles" / key
    if not _wrong_sizes(folder, manifest):
        return folder
    num_bytes = sum(entry.size for entry in manifest.files.values())
    require_free_space(folder, num_bytes)
    logger.info("unpacking %s, %s, into %s", path, gigabytes(num_bytes), folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=key + ".partial-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be unpacked into {folder.parent}: {error}. "
            "Unpack it yourself and pass that folder as --model"
        ) from error
    try:
        for name in (*manifest.files, MANIFEST):
            _extract(path, source, name, manifest.files.get(name), partial)
        if _wrong_sizes(folder, manifest):  # missing or damaged; otherwise another process was first
            _remove(folder)
            with contextlib.suppress(OSError):
                partial.rename(folder)
    finally:
        _remove(partial)
    if _wrong_sizes(folder, manifest):
        raise CheckpointError(f"{path} could not be unpacked into {folder}")
    return folder


def _extract(path: Path, source: _Source, name: str, entry: FileEntry | None, folder: Path) -> None:
    """Copy a file and compare it with `entry`, which is None for the manifest."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open(name) as read, target.open("wb") as write:
        copied = _copy(read, write, max_bytes=_MAX_MANIFEST_BYTES if entry is None else entry.size)
    if entry is not None and copied != entry:
        raise CheckpointError(f"{path} is damaged: {name} does not have the checksum in the manifest")


def _wrong_sizes(folder: Path, manifest: Manifest) -> list[str]:
    def size(name: str) -> int | None:
        return (folder / name).stat().st_size if (folder / name).is_file() else None

    return [name for name, entry in manifest.files.items() if size(name) != entry.size]


def _fault(source: _Source, name: str, entry: FileEntry) -> str | None:
    try:
        with source.open(name) as stream:
            found = _copy(stream, None)
    except FileNotFoundError:
        return "missing"
    except (*_BROKEN, OSError) as error:
        return f"damaged ({error})"
    if found.size != entry.size:
        return f"{found.size} bytes instead of {entry.size}"
    return None if found == entry else f"sha256 is {found.sha256} instead of {entry.sha256}"


def _copy(source: IO[bytes], target: IO[bytes] | None, *, max_bytes: int | None = None) -> FileEntry:
    """Copy a stream, or only read it; returns its size and sha256. Stops once it has more than `max_bytes`."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        if max_bytes is not None and size > max_bytes:
            break
        if target is not None:
            target.write(chunk)
    return FileEntry(size=size, sha256=digest.hexdigest())


def _add_file(add: Callable[[str], contextlib.AbstractContextManager[IO[bytes]]], folder: Path, name: str) -> FileEntry:
    with (folder / name).open("rb") as source, add(name) as target:
        return _copy(source, target)


@contextlib.contextmanager
def _writer(output: Path, partial: Path) -> Iterator[Callable[[str], contextlib.AbstractContextManager[IO[bytes]]]]:
    """A function that opens a member of the new bundle for writing."""
    if output.suffix == FILE_SUFFIX:
        with zipfile.ZipFile(partial, "x", zipfile.ZIP_STORED) as archive:
            yield lambda name: archive.open(zipfile.ZipInfo(name, _DATE), "w", force_zip64=True)
        return

    def open_file(name: str) -> IO[bytes]:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        return (partial / name).open("xb")

    yield open_file


def _to_json(manifest: Manifest) -> bytes:
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    return (json.dumps(head | asdict(manifest), ensure_ascii=False, indent=2) + "\n").encode()


def _from_json(value: Mapping[str, Any]) -> Manifest:
    if value["format"] != FORMAT or value["format_version"] != FORMAT_VERSION:
        found = f"{value['format']!r} version {value['format_version']}"
        raise ValueError(f"its format is {found}; this program reads {FORMAT!r} version {FORMAT_VERSION}")
    return Manifest(
        model_id=str(value["model_id"]),
        revision=value["revision"],
        licence=value["licence"],
        made_by=str(value["made_by"]),
        recipe={str(name): str(text) for name, text in value["recipe"].items()},
        expected=dict(value["expected"]),
        files={str(name): _file_entry(**entry) for name, entry in value["files"].items()},
    )


def _file_entry(*, size: int, sha256: str) -> FileEntry:
    if type(size) is not int or size < 0 or not isinstance(sha256, str):
        raise ValueError(f"a file has size {size!r} and sha256 {sha256!r}")
    return FileEntry(size=size, sha256=sha256)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()
