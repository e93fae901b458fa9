"""What commands write: in any encoding, to closed pipes, full disks, files and terminals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from local_rerank import Reranker
from local_rerank.commands.app import main
from local_rerank.commands.console import PIPE_CLOSED
from tests.command_line import command

TEXTS = ["巴黎 café", "Rome", "x " * 300]
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
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


@pytest.fixture(scope="module")
def process() -> tuple[dict[str, object], set[str]]:
    """The output of a process that ranks with the built-in model in an ASCII locale, and the modules that it loaded."""
    script = (
        "import atexit, json, sys\n"
        "from local_rerank.commands.app import main\n"
        "atexit.register(lambda: print(json.dumps(list(sys.modules)), file=sys.stderr))\n"
        "main()"
    )
    documents = [text.encode() for text in TEXTS] + [b"caf\xe9"]
    done = subprocess.run(
        [sys.executable, "-c", script, "rank", "巴黎", *documents, "--json", "--device", "cpu"],
        env=os.environ | ASCII_LOCALE,
        capture_output=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout), set(json.loads(done.stderr))


def test_a8_arguments_are_utf8_whatever_the_locale(process: tuple[dict[str, object], set[str]], nano: Reranker) -> None:
    expected = nano.rank("巴黎", [*TEXTS, "caf\ufffd"])
    results: list[dict[str, object]] = process[0]["results"]  # type: ignore[assignment]
    assert [item["document"] for item in results] == [item.document for item in expected]
    assert [item["log_odds"] for item in results] == pytest.approx([item.log_odds for item in expected], abs=1e-4)


def test_d3_rank_imports_nothing_that_it_does_not_use(process: tuple[dict[str, object], set[str]]) -> None:
    """So does `import local_rerank.reranker`, which is part of it."""
    modules = process[1]
    assert modules >= {"torch", "tokenizers", "local_rerank.reranker"}
    assert modules & NEEDLESS == set()


@pytest.mark.parametrize(
    ("command_line", "status", "error"),
    [
        ("plan | true", PIPE_CLOSED, ""),
        ("plan --json | true", PIPE_CLOSED, ""),
        ("--help | true", PIPE_CLOSED, ""),
        ("plan >&-", 0, ""),
        ("rank q <&-", 1, "local-rerank: 0 documents; at least 1 is needed\n"),
        ("plan >/dev/full", 1, "local-rerank: the output cannot be written: No space left on device\n"),
        ("plan --json >/dev/full", 1, "local-rerank: the output cannot be written: No space left on device\n"),
    ],
)
def test_c9_a_closed_pipe_or_a_full_disk_is_no_traceback(command_line: str, status: int, error: str) -> None:
    script = f'"{sys.executable}" -m local_rerank {command_line}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (status, error)
