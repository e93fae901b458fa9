"""What commands write: in any encoding, to closed pipes, full disks, files and terminals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from local_rerank import Reranker
from local_rerank.commands.app import main
from local_rerank.commands.console import PIPE_CLOSED
from local_rerank.engine.cpu.process_setup import NO_HOME
from tests.command_line import command

TEXTS = ["巴黎 café", "Rome", "x " * 300]
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
HOMES = {"HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "TMPDIR"}
NEEDLESS = {  # packages that `rank` must not import; together they take several times as long as torch
    "transformers", "huggingface_hub", "accelerate", "scipy", "sklearn", "pandas", "pydantic", "fastapi", "uvicorn",
    "sympy", "triton", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx",
}  # fmt: skip


def in_encoding(encoding: str, *arguments: str) -> str:
    """The bytes that a command writes to a pipe of an encoding, as the text of that encoding, or of UTF-8 for JSON."""
    pipe = io.BytesIO()
    stream = io.TextIOWrapper(pipe, encoding=encoding)
    with (
        mock.patch.object(sys, "stdout", stream),
        mock.patch("local_rerank.commands.app.configure_process"),
        pytest.raises(SystemExit) as exit,
    ):
        main(arguments)
    assert not exit.value.code
    return pipe.getvalue().decode("utf-8" if "--json" in arguments else encoding)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16"])
def test_b2_json_is_utf8_whatever_the_encoding(encoding: str, model: tuple[str, ...]) -> None:
    results = json.loads(in_encoding(encoding, "rank", "q", *TEXTS, "--json", *model))["results"]
    assert {item["document"] for item in results} == set(TEXTS)


@pytest.mark.parametrize(
    ("encoding", "shown", "bar"),
    [("cp1252", r"\u5df4\u9ece café", "#"), ("ascii", r"\u5df4\u9ece caf\xe9", "#"), ("utf-8", "巴黎 café", "█")],
)
def test_b2_text_that_an_encoding_lacks_is_escaped_and_bars_are_ascii(
    encoding: str, shown: str, bar: str, model: tuple[str, ...]
) -> None:
    output = in_encoding(encoding, "rank", "q", *TEXTS, *model)
    assert shown in output
    assert bar * 2 in output
    assert in_encoding(encoding, "rank", "--help").isascii() == (bar == "#")


def test_c18_rank_prints_whole_texts_into_a_pipe_and_cuts_them_on_a_terminal(model: tuple[str, ...]) -> None:
    lines = command("rank", "q", *TEXTS, *model).stdout.splitlines()
    assert len(lines) == 1 + len(TEXTS) + 1
    assert any(line.endswith(TEXTS[2].strip()) for line in lines)
    with (
        mock.patch("rich.console.Console.is_terminal", True),
        mock.patch.dict("os.environ", COLUMNS="90", TERM="xterm"),
    ):
        cut = in_encoding("utf-8", "rank", "q", *TEXTS, *model)
    assert max(map(len, cut.splitlines()[1:-1])) == 90
    assert "…" in cut


@dataclass(frozen=True)
class Process:
    results: list[dict[str, object]]
    modules: set[str]
    home: str


@pytest.fixture(scope="module")
def process() -> Process:
    """Ranks with the built-in model, in an ASCII locale and without home, user name or folder for temporary files."""
    script = (
        "import atexit, json, os, pwd, sys, tempfile\n"
        "pwd.getpwuid = {}.__getitem__\n"
        "tempfile._candidate_tempdir_list = list\n"
        "atexit.register(lambda: print(json.dumps([os.environ['HOME'], list(sys.modules)]), file=sys.stderr))\n"
        "from local_rerank.commands.app import main\n"
        "main()"
    )
    documents = [text.encode() for text in TEXTS] + [b"caf\xe9"]
    done = subprocess.run(
        [sys.executable, "-c", script, "rank", "巴黎", *documents, "--json", "--device", "cpu"],
        env={name: value for name, value in os.environ.items() if name not in HOMES} | ASCII_LOCALE,
        capture_output=True,
        check=True,
        timeout=120,
    )
    home, modules = json.loads(done.stderr)
    return Process(json.loads(done.stdout)["results"], set(modules), home)


def test_a8_arguments_are_utf8_whatever_the_locale(process: Process, nano: Reranker) -> None:
    expected = nano.rank("巴黎", [*TEXTS, "caf\ufffd"])
    assert [item["document"] for item in process.results] == [item.document for item in expected]
    log_odds = [item["log_odds"] for item in process.results]
    assert log_odds == pytest.approx([item.log_odds for item in expected], abs=1e-4)


def test_b7_a_user_without_a_home_has_one_that_libraries_can_look_into(process: Process) -> None:
    assert process.home == NO_HOME


@pytest.mark.parametrize(
    "arguments", [("bench", "--shape", "qwen3-reranker-0.6b"), ("rank", "q", "d", "--device-map", "auto")]
)
def test_b7_without_a_folder_for_temporary_files_the_remedy_is_named(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("local-rerank: no folder for temporary files can be written; set TMPDIR to one")
    assert done.stderr.count("\n") == 1


def test_d3_rank_imports_nothing_that_it_does_not_use(process: Process) -> None:
    """Nor does `import local_rerank.reranker`, which is part of it."""
    assert process.modules >= {"torch", "tokenizers", "local_rerank.reranker"}
    assert process.modules & NEEDLESS == set()


@pytest.mark.parametrize(
    ("command_line", "status", "error"),
    [
        ("plan --gpus H100 | true", PIPE_CLOSED, ""),
        ("plan --gpus H100 --json | true", PIPE_CLOSED, ""),
        ("--help | true", PIPE_CLOSED, ""),
        ("plan --gpus H100 >&-", 0, ""),
        (
            "rank q <&-",
            1,
            "local-rerank: standard input has no documents; give them as arguments, with --file or on standard input\n",
        ),
        ("plan --gpus H100 >/dev/full", 1, "local-rerank: the output cannot be written: No space left on device\n"),
        (
            "plan --gpus H100 --json >/dev/full",
            1,
            "local-rerank: the output cannot be written: No space left on device\n",
        ),
    ],
)
def test_c9_a_closed_pipe_or_a_full_disk_is_no_traceback(command_line: str, status: int, error: str) -> None:
    script = f'"{sys.executable}" -m local_rerank {command_line}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (status, error)
