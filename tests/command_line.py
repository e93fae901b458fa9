"""Runs `local-rerank ...` in this process, because importing torch takes seconds; test_app.py has real processes."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from local_rerank.commands.app import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: str) -> Done:
    """Run a command line on a wide terminal."""
    out, err = io.StringIO(), io.StringIO()
    status: object = None
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict("os.environ", COLUMNS="200"),
        mock.patch("local_rerank.commands.app.configure_process"),  # this one is pytest's
    ):
        try:
            main(arguments)
        except SystemExit as exit:
            status = exit.code
    assert isinstance(status, int), status
    return Done(status, out.getvalue(), err.getvalue())


def run_script(file: Path, *arguments: str) -> str:
    """The output of a script, run in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), mock.patch.object(sys, "argv", [str(file), *arguments]):
        runpy.run_path(str(file), run_name="__main__")
    return out.getvalue()
