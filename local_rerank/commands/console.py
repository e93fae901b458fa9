"""Helpers of the commands: parameters without an environment variable, progress on standard error, plain output.

No character fails to be written: text falls back to escapes, decoration to ASCII, and JSON is always UTF-8. What people
read has control characters as escapes, because names, documents and errors may come from others. JSON stays as it is.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, TextIO

import rich.console
from cyclopts import Parameter
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from local_rerank.checkpoints.free_space import require_temporary_folder
from local_rerank.errors import CheckpointError
from local_rerank.text_files import visible

option = partial(Parameter, negative="", show_env_var=False)
"""A parameter of a single call. Only settings of engine and server have environment variables."""

repeatable = partial(option, show_default=False)

JsonOutput = Annotated[bool, option(name="--json", help="Print the full result as JSON.")]

MinScore = Annotated[
    float | None, option(help="Leave out documents whose relevance score is lower. Default: none is left out.")
]

INTERRUPTED = 130  # exit status, as shells report a program that SIGINT has ended
PIPE_CLOSED = 141  # exit status, as shells report a program that SIGPIPE has ended
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Console(rich.console.Console):
    """rich's console with the encoding of the stream that it writes to, which rich takes for UTF-8."""

    @property
    def encoding(self) -> str:
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    @property
    def is_ascii_only(self) -> bool:
        return self.options.ascii_only

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See rich's. Text has no control characters but line feeds; rich's own colours are no text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text, keep_lines=True))

    def on_broken_pipe(self) -> None:
        raise  # rich calls this while it handles the BrokenPipeError, and would exit with status 1


class LogFormatter(logging.Formatter):
    """Logs for people: nothing in a record can look like another record or control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep_lines=True).replace("\n", "\n    ")


def set_up_streams() -> None:
    """Let the standard streams take every character, also where the caller has closed them (`>&-`)."""
    if logging.lastResort is not None:  # which writes the library's warnings, where nobody has configured logging
        logging.lastResort.setFormatter(LogFormatter())
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  # until the end
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # if its descriptor was replaced by a terminal after Python has started
                stream.reconfigure(errors="backslashreplace")


def failed(error: OSError) -> tuple[int, str]:
    """The exit status and message for an error of output or of temporary files; raises any other error again."""
    if isinstance(error, BrokenPipeError):  # the reader has seen enough, like `| head`
        forget(sys.stdout, sys.stderr)
        return PIPE_CLOSED, ""
    if error.filename is None and error.errno in UNWRITABLE:
        forget(sys.stdout)
        return 1, f"the output cannot be written: {error.strerror}"
    try:
        require_temporary_folder()
    except CheckpointError as cause:
        return 1, str(cause)
    raise error


def missing_package(error: Exception) -> str:
    """What to do about a package that is not installed or cannot be loaded; empty for other errors and our modules."""
    package = ((isinstance(error, ImportError) and error.name) or "").partition(".")[0]
    if package in {"", "local_rerank", "local_rerank_server"}:
        return ""
    if package == "torch":
        fix = "install the build for this machine: https://pytorch.org/get-started/locally/"
    else:
        fix = f"`{sys.executable} -m pip check` lists what is missing"
    return f"{error}, in the Python at {sys.executable}; {fix}"


def forget(*streams: TextIO) -> None:
    """Drop what streams still hold and what is yet to come; Python would try to write it when it ends."""
    with Path(os.devnull).open("wb") as nowhere:
        for stream in streams:
            with suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), stream.fileno())


def complain(error: object) -> None:
    """Print an error as one line on standard error."""
    with suppress(OSError):
        sys.stderr.write(f"local-rerank: {visible(str(error))}\n")
        sys.stderr.flush()


def status(message: str) -> Status:
    """Show a spinner on standard error during a block, if that is a terminal."""
    console = Console(stderr=True)
    return console.status(Text(f"{visible(message)} ..."), spinner="line" if console.is_ascii_only else "dots")


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], object]]:
    """Show a bar on standard error during a block; yields the function to call after each step."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield partial(bar.advance, bar.add_task(description, total=total))


def duration(seconds: float) -> str:
    """A rounded time for people.

    >>> duration(7.2), duration(130), duration(5000)
    ('8 s', '2 min', '1.4 h')
    """
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def say(line: str) -> None:
    """Print a line without wrapping or colours, so that it can be copied."""
    Console().print(visible(line), markup=False, highlight=False, soft_wrap=True)


def warn(lines: str) -> None:
    """Print lines, if any, on standard error, each in one piece."""
    if lines:
        Console(stderr=True).print(lines, markup=False, highlight=False, soft_wrap=True)


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print JSON in UTF-8, whatever the locale; `indent=None` prints one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # JSON's own escapes for lone surrogates
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=indent) + "\n")
    sys.stdout.flush()
