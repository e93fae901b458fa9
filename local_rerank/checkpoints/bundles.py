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
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from local_rerank.checkpoints.files import PICKLE_SUFFIXES, loaded_files, require_kind
from local_rerank.checkpoints.free_space import cache_folder, gigabytes, require_free_space
from local_rerank.checkpoints.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    check_names,
    from_json,
    to_json,
)
from local_rerank.errors import CheckpointError

logger = logging.getLogger(__name__)

FILE_SUFFIX = ".zip"  # any other name (Qwen3-Reranker-0.6B has the suffix ".6B") is a folder
STATES = ".unpacked"  # in the cache, JSON: the size and time of each file when it was unpacked
_DATE = (1980, 1, 1, 0, 0, 0)  # of every member, so that the same checkpoint gives the same file
_CHUNK_BYTES = 1 << 20
_MAX_EXPANSION = 20  # unpacked size / archive size; compression shrinks weights hardly and JSON by 5
_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, ValueError, RuntimeError)
"""What zipfile raises on a damaged archive; RuntimeError: encrypted, or compressed in another way."""


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
    if unlisted := [name for name in loaded_files(path) if name not in manifest.files and (path / name).exists()]:
        raise CheckpointError(f"{path} contains {unlisted[0]}, which its manifest does not name; remove it")
    return manifest, path


def damaged_files(path: Path) -> list[str]:
    """Every file of a bundle that differs from the manifest or is not in it, with the reason."""
    with _open(path) as source:
        return _faults(source, _manifest(path, source))


def unpacked_copy(path: Path) -> tuple[Path, list[str]] | None:
    """Where an archive is unpacked, and the damaged files there, as in `damaged_files`; None if it is not unpacked."""
    with _open(path) as source:
        manifest = _manifest(path, source)
        if path.is_dir() or not (folder := _copy_folder(source)).is_dir():
            return None
        return folder, _faults(_Source(folder, None), manifest)


def unpacked_copies() -> list[Path]:
    """The folders of all unpacked archives, also of those that were interrupted."""
    return sorted(path for path in _copies().glob("*") if path.is_dir())


def _faults(source: _Source, manifest: Manifest) -> list[str]:
    unlisted = sorted({*source.names()} - {*manifest.files, MANIFEST})
    faults = {name: _fault(source, name, entry) for name, entry in manifest.files.items()}
    return [
        *(f"{name}: not in the manifest" for name in unlisted),
        *(f"{name}: {fault}" for name, fault in faults.items() if fault is not None),
    ]


def write_bundle(output: Path, folder: Path, names: Sequence[str], manifest: Manifest) -> Manifest:
    """Write the files `names` of `folder` and the manifest, in which they replace `files`; returns what was written.

    `output` appears once complete. Raises CheckpointError.
    """
    if os.path.lexists(output):
        raise CheckpointError(f"{output} exists already; remove it or choose another name")
    check_names(names, output)
    require_free_space(output.parent, sum((folder / name).stat().st_size for name in names))
    folder_of_partial = None
    try:
        folder_of_partial = Path(tempfile.mkdtemp(prefix=output.name + ".partial-", dir=output.parent))
        partial = folder_of_partial / output.name
        with _writer(output, partial) as add:
            manifest = replace(manifest, files={name: _add_file(add, folder, name) for name in sorted(names)})
            with add(MANIFEST) as target:
                target.write(to_json(manifest))
        partial.rename(output)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}") from error
    finally:
        if folder_of_partial is not None:
            _remove(folder_of_partial)
    return manifest


class _Source:
    """The files of a bundle, in an archive or in a folder."""

    def __init__(self, path: Path, archive: zipfile.ZipFile | None) -> None:
        self._path = path
        self._archive = archive

    def names(self) -> list[str]:
        if self._archive is not None:
            return self._archive.namelist()
        files = (path.relative_to(self._path).as_posix() for path in self._path.rglob("*") if path.is_file())
        return [name for name in files if name != STATES]

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
            text = stream.read(MAX_MANIFEST_BYTES + 1)
    except (KeyError, FileNotFoundError) as error:
        raise CheckpointError(f"{path} is not a bundle of local-rerank: it has no {MANIFEST}") from error
    manifest = from_json(text, path)
    if path.is_file():
        names = source.names()
        check_names(names, path)
        if odd := sorted({*names} ^ {*manifest.files, MANIFEST}):
            raise CheckpointError(f"{path} does not contain the files of its manifest; see {odd[0]!r}")
    return manifest


def _copy_folder(source: _Source) -> Path:
    """Where the unpacked copy of an archive is kept."""
    with source.open(MANIFEST) as stream:
        return _copies() / hashlib.sha256(stream.read()).hexdigest()


def _copies() -> Path:
    return cache_folder() / "bundles"


def _unpack(path: Path, source: _Source, manifest: Manifest) -> Path:
    """Unpack the archive into its cache folder unless it is there. Several processes may do this at once."""
    folder = _copy_folder(source)
    if (change := _change(folder, manifest)) is None:
        return folder
    if folder.exists():
        logger.warning("unpacking %s again, because %s in %s", path, change, folder)
    num_bytes = sum(entry.size for entry in manifest.files.values())
    require_free_space(folder, num_bytes)
    logger.info("unpacking %s, %s, into %s", path, gigabytes(num_bytes), folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=folder.name + ".partial-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be unpacked into {folder.parent}: {error}. "
            "Unpack it yourself and pass that folder as --model"
        ) from error
    try:
        for name in (*manifest.files, MANIFEST):
            _extract(path, source, name, manifest.files.get(name), partial)
        (partial / STATES).write_text(json.dumps(_states(partial)), encoding="utf-8")
        if _change(folder, manifest):  # otherwise another process was first
            _remove(folder)
            with contextlib.suppress(OSError):
                partial.rename(folder)
    finally:
        _remove(partial)
    if change := _change(folder, manifest):
        raise CheckpointError(f"{path} could not be unpacked into {folder}: {change}; remove that folder")
    return folder


def _change(folder: Path, manifest: Manifest) -> str | None:
    """What has changed in an unpacked copy since it was written, by size and time; None if nothing has."""
    try:
        written, found = json.loads((folder / STATES).read_bytes()), _states(folder)
    except (OSError, ValueError, RecursionError):
        return f"{STATES} is missing or damaged"
    for name in sorted({*found, *manifest.files, MANIFEST}):
        if name not in found:
            return f"{name} is missing"
        if name not in manifest.files and name != MANIFEST:
            return f"{name} was added"
        if not isinstance(written, dict) or written.get(name) != found[name]:
            return f"{name} has changed"
    return None


def _states(folder: Path) -> dict[str, list[int]]:
    """Size and modification time in ns of each file, of a link those of the link."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    found = {name: path.lstat() for name, path in paths.items() if name != STATES}
    return {
        name: [state.st_size, state.st_mtime_ns] for name, state in found.items() if not stat.S_ISDIR(state.st_mode)
    }


def _extract(path: Path, source: _Source, name: str, entry: FileEntry | None, folder: Path) -> None:
    """Copy a file and compare it with `entry`, which is None for the manifest."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open(name) as read, target.open("wb") as write:
        copied = _copy(read, write, max_bytes=MAX_MANIFEST_BYTES if entry is None else entry.size)
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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()
