"""Helpers of the commands: parameters without an environment variable, progress on standard error, plain output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

option = partial(Parameter, negative="", show_env_var=False)
"""A parameter of a single call. Only settings of engine and server have environment variables."""

repeatable = partial(option, show_default=False)

JsonOutput = Annotated[bool, option(name="--json", help="Print the full result as JSON.")]


def status(message: str) -> Status:
    """Show a spinner on standard error during a block, if that is a terminal."""
    return Console(stderr=True).status(message + " ...")


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], object]]:
    """Show a bar on standard error during a block; yields the function to call after each step."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield partial(bar.advance, bar.add_task(description, total=total))


def say(line: str) -> None:
    """Print a line without wrapping or colours, so that it can be copied."""
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


def warn(lines: str) -> None:
    """Print lines, if any, on standard error, each in one piece."""
    if lines:
        Console(stderr=True).print(lines, markup=False, highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    Console().out(json.dumps(value, ensure_ascii=False, indent=2), highlight=False)
