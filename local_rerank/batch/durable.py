"""Files that survive a kill at any moment: replaced whole, or appended to and cut back to what was counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from local_rerank.errors import ConfigError


@contextmanager
def replace(file: Path) -> Iterator[IO[bytes]]:
    """A stream for the new content of `file`, which takes the old one's place, whole and on disk, as the block ends."""
    new = file.with_name(file.name + ".new")
    with new.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AppendFile:
    """A file that grows. `commit` says how far it is on disk, `rewind` cuts what a kill left behind that."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: IO[bytes] | None = None

    def rewind(self, size: int) -> None:
        """Go on behind the first `size` bytes; a file of 0 bytes is not made before it is written to."""
        self.close()
        if size == 0:
            self._file.unlink(missing_ok=True)
            return
        if not self._file.is_file() or self._file.stat().st_size < size:
            raise ConfigError(
                f"{self._file} has lost some of the {size} bytes that were counted; --overwrite begins anew"
            )
        self._stream = self._file.open("r+b")
        self._stream.truncate(size)
        self._stream.seek(size)

    def append(self, data: bytes) -> None:
        if self._stream is None:
            self._stream = self._file.open("wb")
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
