"""What the commands share in speaking to a person: parameters without a variable, a spinner, a line to copy."""

from __future__ import annotations

from functools import partial

from cyclopts import Parameter
from rich.console import Console
from rich.status import Status

option = partial(Parameter, negative="", show_env_var=False)
"""A parameter of one call: variables are for settings, not for one call's input."""


def status(message: str) -> Status:
    """A spinner on standard error while the block runs; nothing where that is no terminal."""
    return Console(stderr=True).status(message + " ...")


def say(line: str) -> None:
    """One line, neither wrapped nor coloured, so that it can be copied as it is."""
    Console().print(line, markup=False, highlight=False, soft_wrap=True)
