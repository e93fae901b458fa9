"""Write files so that they survive a kill at any moment: replace them atomically, or append and truncate.

`OutputStream` takes the place of such a file where the output is standard output.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from local_rerank.errors import ConfigError


@contextmanager
def replace(file: Path, new: Path | None = None) -> Iterator[IO[bytes]]:
    """Yield a stream for the new content, which atomically replaces `file`, synced to disk, when the block ends.

    `new`: where it is written, on the same file system. Default: beside the file, with the suffix .new.
    """
    new = new or file.with_name(file.name + ".new")
    with created(new) as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
    sync_folder(file.parent)


def created(file: Path) -> IO[bytes]:
    """Open a new file for writing. What has its name is removed, and a link is never followed."""
    try:
        return file.open("xb")
    except FileExistsError:
        file.unlink()
        return file.open("xb")


def sync_folder(folder: Path) -> None:
    """Sync a directory's entries to disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AppendFile:
    """An append-only file: `commit` syncs it and returns its size, `rewind` truncates what a kill left beyond that."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: IO[bytes] | None = None

    def rewind(self, size: int) -> None:
        """Continue after the first `size` bytes; an empty file is created only when something is written."""
        self.close()
        if size == 0:
            self._file.unlink(missing_ok=True)
            return
        if self._file.is_symlink():
            raise ConfigError(f"{self._file} is a link, but the job wrote a file; --overwrite starts again")
        if not self._file.is_file() or self._file.stat().st_size < size:
            raise ConfigError(f"{self._file} is shorter than the {size} bytes the job wrote; --overwrite starts again")
        self._stream = self._file.open("r+b")
        self._stream.truncate(size)
        self._stream.seek(size)

    def append(self, data: bytes) -> None:
        if self._stream is None:
            self._stream = self._file.open("xb")  # `rewind` has removed it; a link would lead elsewhere
            sync_folder(self._file.parent)
        self._stream.write(data)

    def commit(self) -> int:
        if self._stream is None:
            return 0
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return self._stream.tell()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class OutputStream:
    """Standard output with the methods of an `AppendFile`. Nothing is buffered, so that no write is left to the end."""

    def __init__(self, stream: io.RawIOBase) -> None:
        self._stream = stream
        self._size = 0

    def rewind(self, size: int) -> None:
        assert size == 0, "what was written to a pipe cannot be taken back"

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._stream.write(rest) or 0 :]
        self._size += len(data)

    def commit(self) -> int:
        return self._size

    def close(self) -> None:
        pass
