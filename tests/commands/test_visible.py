"""What others wrote cannot control a terminal: names of models and files, documents, errors, logs, progress."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

from local_rerank.batch.sources import Position, Rejected
from local_rerank.commands.batch_progress import Display
from local_rerank.commands.console import Console, LogFormatter
from local_rerank.evaluation.measures import Comparison
from local_rerank.evaluation.report import examples_table
from tests.command_line import command

CPU = ("--device", "cpu", "--dtype", "fp32", "--threads", "1")
HOSTILE = "\x1b[31mRED\x1b[0m\nFAKE LINE \u202eover \x9b2J\u2066\u200b\u061c\r\b[bold]x[/bold] [/nothing]"
"""Colours, cursor movements, a line of its own, reordering, and rich's markup."""


@pytest.fixture(scope="module")
def hostile(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose model has a name for attacks on terminals."""
    bundle = tmp_path_factory.mktemp("hostile") / "bundle"
    assert command("pack", str(tiny_checkpoint), "-o", str(bundle), "--no-self-test", *CPU).returncode == 0
    manifest = json.loads((bundle / "local-rerank.json").read_text(encoding="utf-8"))
    (bundle / "local-rerank.json").write_text(json.dumps(manifest | {"model_id": HOSTILE}), encoding="utf-8")
    return bundle


def terminal(*arguments: str) -> str:
    """All that a command writes to a terminal without colours."""
    with (
        mock.patch("rich.console.Console.is_terminal", True),
        mock.patch.dict("os.environ", TERM="xterm", NO_COLOR="1", FORCE_COLOR=""),
    ):
        done = command(*arguments)
    return done.stdout + done.stderr


def is_safe(output: str) -> bool:
    ours = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", output)  # bold and dim, the cursor of a spinner
    hidden = re.search(r"[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b\u202a-\u202e\u2066-\u2069]", ours)
    return hidden is None and "\x1b[31mRED" not in output and "\nFAKE" not in ours


@pytest.mark.parametrize("command_name", ["rank", "verify", "doctor", "pack"])
def test_what_others_wrote_is_shown_to_people_with_escapes_and_without_markup(
    command_name: str, hostile: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "again")
    arguments = {
        "rank": ["rank", HOSTILE, HOSTILE, "b", "--model", str(hostile), *CPU],
        "verify": ["verify", str(hostile), *CPU],
        "doctor": ["doctor", "--model", str(hostile), *CPU],
        "pack": ["pack", str(hostile), "-o", out, "--no-self-test", *CPU],
    }
    output = terminal(*arguments[command_name])
    assert is_safe(output), repr(output)
    assert r"\x1b[31mRED\x1b[0m\nFAKE LINE \u202eover" in output


def test_json_keeps_what_others_wrote(hostile: Path) -> None:
    found = json.loads(command("rank", "q", HOSTILE, "--json", "--model", str(hostile), *CPU).stdout)
    assert (found["model"], found["results"][0]["document"]) == (HOSTILE, HOSTILE)


@pytest.mark.parametrize(
    "arguments",
    [
        ("rank", "q", "--file", HOSTILE),
        ("rank", "q", "d", "--model", HOSTILE),
        ("rank", "q", "d", f"--{HOSTILE}"),
        ("rank", "q", "d", "--threads", HOSTILE),
        (HOSTILE,),
        ("verify", HOSTILE),
        ("pack", "x", "-o", HOSTILE),
        ("batch", HOSTILE, "--output", "x.jsonl"),
        ("compare", HOSTILE, HOSTILE, "--qrels", HOSTILE),
        ("eval", "--run", HOSTILE, "--dataset", HOSTILE),
    ],
)
def test_an_error_shows_what_others_wrote_in_one_line_with_escapes(arguments: tuple[str, ...]) -> None:
    output = terminal(*arguments)
    assert is_safe(output), repr(output)
    assert "local-rerank: " in output


def test_logs_for_people_show_what_others_wrote_with_escapes() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.WARNING, "x", 1, "of %s", (HOSTILE,), sys.exc_info())
    line = LogFormatter("%(message)s").format(record)
    assert is_safe(line), repr(line)
    assert all(rest.startswith("    ") for rest in line.splitlines()[1:])


def test_tables_and_progress_show_what_others_wrote_with_escapes() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=300, no_color=True)
    comparison = Comparison(
        system=HOSTILE, baseline=HOSTILE, measure="nDCG@10", differences={"q\x1b": 0.5}, p_value=0.5
    )
    console.print(examples_table(comparison, {"q\x1b": HOSTILE}))
    with mock.patch("sys.stderr", out):
        display = Display("bar", HOSTILE)
        display._bar.console.print(display._bar.get_renderable())
        display.report(Rejected(file=HOSTILE, number=1, error=HOSTILE, content=""), Position())
    assert is_safe(out.getvalue()), repr(out.getvalue())
    assert out.getvalue().count("[bold]x[/bold] [/nothing]") >= 4
