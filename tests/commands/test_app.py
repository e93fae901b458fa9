"""The command line: output, exit status and options, with a real process for each kind of exit."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from local_rerank import EngineConfig, Reranker, __version__
from local_rerank.commands.app import kubernetes_variables, option_names, serve_options
from local_rerank.commands.console import missing_package
from local_rerank.engine.cpu.process_setup import CACHE_VARIABLES, OPENMP_VARIABLES
from local_rerank_server.config import ServerConfig
from tests.command_line import Done, command


def plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("LOCAL_RERANK_")}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "local_rerank", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=plain_environment() | variables,
        check=False,
    )


def run_here(*arguments: str, **variables: str) -> Done:
    with mock.patch.dict("os.environ", plain_environment() | variables, clear=True):
        return command(*arguments)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32")


def test_rank_prints_a_table_in_order_of_relevance(
    model: tuple[str, ...], tiny_reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"first\n\nsecond [bold]\nthird\n")))
    done = run_here("rank", "q", "--file", "-", *model)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:-1]
    expected = tiny_reranker.rank("q", ["first", "second [bold]", "third"])
    assert [int(row.split()[0]) for row in rows] == [item.index for item in expected]
    assert "second [bold]" in done.stdout, "brackets in a document are not markup"


def test_rank_prints_the_full_result_as_json(model: tuple[str, ...], tiny_reranker: Reranker) -> None:
    done = run_here("rank", "q", "first", "second", "--json", "--top-n", "1", *model)
    result, expected = json.loads(done.stdout), tiny_reranker.rank("q", ["first", "second"], top_n=1)
    assert result["results"][0]["document"] == expected[0].document
    assert result["results"][0]["log_odds"] == pytest.approx(expected[0].log_odds, abs=1e-5)
    assert result["total_tokens"] == expected.total_tokens


def test_rank_reads_documents_from_a_file(model: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "d.JSONL").write_bytes('\ufeff"one\u2028line"\r\n{"text": "two"}\n'.encode())
    done = run_here("rank", "q", "--json", "--file", str(tmp_path / "d.JSONL"), *model)
    assert {item["document"] for item in json.loads(done.stdout)["results"]} == {"one\u2028line", "two"}


def test_one_document_that_is_the_name_of_a_file_gets_a_note(model: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("a document")
    assert "with --file it ranks" in run_here("rank", "q", str(tmp_path / "d.txt"), *model).stderr
    assert "with --file" not in run_here("rank", "q", "d" * 5000, *model).stderr


def test_show_prompt_prints_the_prompt_and_its_token_ids(model: tuple[str, ...], tiny_reranker: Reranker) -> None:
    done = run_here("rank", "the query", "the document", "--show-prompt", *model)
    prompt, ids = tiny_reranker.explain("the query", "the document")
    assert prompt in done.stdout
    assert " ".join(map(str, ids)) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (("rank", "q", "d", "--device", "tpu"), {}, "device is 'tpu'"),
        (("rank", "q", "d", "--device", "cuda:99"), {}, "device is 'cuda:99'"),
        (("rank", "q", "d", "--attention", "fast"), {}, "attention is 'fast'"),
        (("rank", "q", "d", "--dtype", "int3"), {}, "--dtype"),
        (("rank", "q", "d", "--threads", "x"), {}, "--threads"),
        (("rank", "q", "d", "--treads", "2"), {}, "--treads"),
        (("rank", "q", "--file", "nowhere.txt"), {}, "nowhere.txt"),
        (("rank", "q", "d", "--file", "nowhere.txt"), {}, "both as arguments and with --file"),
        (("rank", "q", "d", "--max-document-tokens", "-5"), {}, "max_document_tokens is -5"),
        (("rank", "q", "d", "--model", "a/b..c"), {}, "model 'a/b..c' is no folder or bundle"),
        (("rank", " ", "d"), {}, "query is empty"),
        (("rank",), {}, "rank needs QUERY; `local-rerank rank --help` shows how"),
        (("batch", "in.jsonl"), {}, "batch needs --output; `local-rerank batch --help` shows how"),
        (("batch", "in.jsonl", "--output"), {}, "--output requires an argument"),
        (("rank", "q", "d", "--top-n", "0"), {}, "top_n is 0"),
        (("rank", "q", "d"), {"LOCAL_RERANK_THREADS": "x"}, "LOCAL_RERANK_THREADS"),
    ],
)
def test_an_error_is_one_line_that_names_the_cause(
    arguments: tuple[str, ...], variables: dict[str, str], words: str
) -> None:
    check_error(run_here(*arguments, **variables), words)


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (("rank", "q", "d", "--model", "./nowhere"), {}, "'./nowhere' is no folder"),
        (("rank", "q", "d"), {"LOCAL_RERANK_TREADS": "2"}, "LOCAL_RERANK_TREADS"),
        (("rnk", "q", "d"), {}, '"rnk"'),
    ],
)
def test_a_process_exits_with_that_line(arguments: tuple[str, ...], variables: dict[str, str], words: str) -> None:
    check_error(run(*arguments, **variables), words)


def test_a_missing_torch_is_one_line_that_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    done = run("rank", "q", "d", PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    check_error(done, f"No module named 'torch', in the Python at {sys.executable}; install the build for this machine")


def test_a_missing_package_that_is_ours_is_a_fault_and_keeps_its_traceback() -> None:
    assert "pip check" in missing_package(ImportError("No module named 'x'", name="x"))
    assert missing_package(ImportError("No module named 'y'", name="local_rerank.y")) == ""


def check_error(done: Done | subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout


def test_flags_override_variables_and_variables_override_defaults(
    model: tuple[str, ...], tiny_reranker: Reranker
) -> None:
    odds = []
    for flags, variables in (
        ((), {}),
        ((), {"LOCAL_RERANK_INSTRUCTION": "other"}),
        (("--instruction", "flag"), {"LOCAL_RERANK_INSTRUCTION": "other"}),
    ):
        done = run_here("rank", "q", "d", "--json", *flags, *model, **variables)
        odds.append(json.loads(done.stdout)["results"][0]["log_odds"])
    expected = [tiny_reranker.rank("q", ["d"], instruction=text)[0].log_odds for text in (None, "other", "flag")]
    assert odds == pytest.approx(expected, abs=1e-4)  # another instruction changes them a hundred times more


KUBERNETES = {  # for Services named local-rerank and local-rerank-nano
    "LOCAL_RERANK_SERVICE_HOST": "10.0.0.1",
    "LOCAL_RERANK_SERVICE_PORT": "8000",
    "LOCAL_RERANK_SERVICE_PORT_HTTP": "8000",
    "LOCAL_RERANK_PORT": "tcp://10.0.0.1:8000",
    "LOCAL_RERANK_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "LOCAL_RERANK_PORT_8000_TCP_ADDR": "10.0.0.1",
    "LOCAL_RERANK_NANO_SERVICE_HOST": "10.0.0.2",
    "LOCAL_RERANK_NANO_PORT": "udp://10.0.0.2:53",
    "LOCAL_RERANK_NANO_PORT_53_UDP_PROTO": "udp",
}


def test_b1_variables_of_kubernetes_are_passed_over(model: tuple[str, ...]) -> None:
    for arguments in (("--version",), ("--help",), ("serve", "--help"), ("rank", "q", "d", *model)):
        done = run_here(*arguments, **KUBERNETES)
        assert (done.returncode, done.stderr) == (0, "")
    with mock.patch.dict("os.environ", plain_environment() | KUBERNETES, clear=True):
        assert serve_options()[1] == ServerConfig()
        assert kubernetes_variables() == sorted(KUBERNETES)


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "http://10.0.0.1:80"), ("PORT", "80 80"), ("NANO_PORT", "80"), ("PORT_8000", "1"), ("SERVICE", "1")],
)
def test_b1_other_variables_are_refused(name: str, value: str) -> None:
    check_error(
        run_here("serve", **{f"LOCAL_RERANK_{name}": value}), f"LOCAL_RERANK_{name}" if value != "80 80" else ""
    )


def test_c10_an_empty_variable_is_unset(model: tuple[str, ...]) -> None:
    empty = {f"LOCAL_RERANK_{name.upper()}": "" for name in option_names()}
    assert run_here("rank", "q", "d", *model, **empty).returncode == 0
    with mock.patch.dict("os.environ", plain_environment() | empty, clear=True):
        assert serve_options() == (EngineConfig(), ServerConfig())


def test_a10_the_variable_holds_bare_keys_separated_by_spaces() -> None:
    for value, keys in (("carol:sk:carol", ("carol:sk:carol",)), ("a -b:c\n", ("a", "-b:c"))):
        with mock.patch.dict("os.environ", plain_environment() | {"LOCAL_RERANK_API_KEY": value}, clear=True):
            assert serve_options()[1].api_key == keys
    check_error(run_here("serve", LOCAL_RERANK_API_KEY=" "), "api_key is empty")


@pytest.mark.parametrize("arguments", [("--api-key", "a", "SECRET"), ("--api-key", "-SECRET", "--prot", "1")])
def test_a10_a_usage_error_quotes_no_key(arguments: tuple[str, ...]) -> None:
    done = run_here("serve", *arguments)
    assert (done.returncode, "SECRET" in done.stderr) == (2, False)


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (("--log-format", "json", "--prot", "1"), {}, "--prot"),
        (("--log-format=json", "--port", "99999"), {}, "port is 99999"),
        (("--port", "x"), {"LOCAL_RERANK_LOG_FORMAT": "json"}, "--port"),
    ],
)
def test_c16_a_usage_error_of_serve_is_json(arguments: tuple[str, ...], variables: dict[str, str], words: str) -> None:
    error = json.loads(run_here("serve", *arguments, **variables).stderr)
    assert words in error["message"]
    assert error["level"] == "CRITICAL"


def test_serve_shows_the_ten_options_that_matter_first() -> None:
    done = run_here("serve", "--help")
    first = "model device dtype threads instruction host port api-key api-key-file insecure"
    assert re.findall(r"^│ --([\w-]+)", done.stdout, re.MULTILINE)[:10] == first.split()
    assert re.findall(r"^╭─ ([\w, ]+) ─", done.stdout, re.MULTILINE)[:2] == ["Model", "Address and keys"]


def test_completion_help_says_where_the_script_goes_and_names_no_variable() -> None:
    text = " ".join(run_here("completion", "--help").stdout.split())
    assert "bash-completion/completions/local-rerank" in text
    assert "LOCAL_RERANK_SHELL" not in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell: str) -> None:
    script = run_here("completion", shell).stdout
    for name in ("serve", "batch", "api-key-file", "top-n", "fp32"):
        assert name in script, name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["b"], {"batch", "bench"}),
        (["rank", "--ser"], {"--server"}),
        (["serve", "--dtype", "fp"], {"fp32", "fp16", "fp8"}),
        (["batch", "in"], {"in.jsonl"}),
        (["serve", "--model", "in"], {"in.jsonl"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], tmp_path: Path) -> None:
    """The last case and the one before need readline: `-o default` completes files where the script offers nothing."""
    (tmp_path / "in.jsonl").touch()
    (tmp_path / "script").write_text(run_here("completion", "bash").stdout, encoding="utf-8")
    line = " ".join(map(repr, ["local-rerank", *words]))
    program = (
        f"source ./script; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _local_rerank\n"
        '[[ ${COMPREPLY[*]} ]] || { complete -p local-rerank | grep -q " -o default " && '
        f"COMPREPLY=($(compgen -f -- {words[-1]})); }}\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected
    assert done.stderr == ""


def test_version_prints_the_version_of_the_package() -> None:
    assert run("--version").stdout.strip() == __version__


def test_help_and_import_load_neither_torch_nor_a_web_framework() -> None:
    program = (
        "import sys, local_rerank, local_rerank.types, local_rerank.config\n"
        "from local_rerank.commands.app import app\n"
        "app(['--help'], exit_on_error=False, result_action='return_value')\n"
        "app(['serve', '--help'], exit_on_error=False, result_action='return_value')\n"
        "print(sorted({'torch', 'transformers', 'fastapi', 'starlette', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "passive 20000 256 16 False"),
        ({"OMP_WAIT_POLICY": "active", "LRU_CACHE_CAPACITY": "5"}, "active None 256 5 False"),
    ],
    ids=["default", "from the environment"],
)
def test_variables_that_torch_reads_are_set_before_it_is_imported(variables: dict[str, str], expected: str) -> None:
    script = (
        "import os, sys; from local_rerank.commands import app\n"
        "try: app.main(['--version'])\n"
        "except SystemExit: pass\n"
        f"print(*map(os.environ.get, {[*OPENMP_VARIABLES, *CACHE_VARIABLES]}), 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP_VARIABLES | CACHE_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == expected
