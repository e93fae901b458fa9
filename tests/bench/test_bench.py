"""`local-rerank bench`: its counts and the whole command. No timing is asserted."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from local_rerank import EngineConfig, Reranker, __version__
from local_rerank.bench.flops import DecoderShape, gemm_ceiling, useful_flops
from local_rerank.bench.measure import Agreement, Measurement, TargetResult, WorkloadResult, kendall_tau
from local_rerank.bench.report import all_tables
from local_rerank.bench.shapes import make_checkpoint
from local_rerank.bench.targets import RerankerTarget
from local_rerank.bench.workloads import WORKLOADS, make_requests
from local_rerank.commands.bench import _load, load_reference
from local_rerank.commands.console import INTERRUPTED
from local_rerank.engine.cuda import fp8
from local_rerank.engine.dtypes import DTYPES, QUANTIZED_DTYPES
from local_rerank.errors import ConfigError
from local_rerank.requests.pair import Pair
from local_rerank.types import RerankRequest
from tests.command_line import command


@pytest.mark.parametrize("name", WORKLOADS)
def test_texts_have_the_length_of_the_workload(name: str, nano: Reranker) -> None:
    workload = dataclasses.replace(WORKLOADS[name], num_requests=min(2, WORKLOADS[name].num_requests))
    count = nano.tokenizer.count_tokens
    requests = make_requests(workload, count)
    assert len(requests) == workload.num_requests
    low, high = workload.document_tokens
    for request in requests:
        assert len(request.documents) == workload.num_documents
        assert workload.query_tokens <= count(request.query) < workload.query_tokens + 8  # a word of several tokens
        lengths = sorted(map(count, request.documents))
        assert low <= lengths[0] < low + 8
        assert high <= lengths[-1] < high + 8
    assert requests == make_requests(workload, count)


def test_useful_operations_match_a_hand_count(tiny_reranker: Reranker) -> None:
    request = tiny_reranker.tokenizer.pairs(RerankRequest(query="q", documents=("a", "bcd")))
    shape = DecoderShape(hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2)
    prefix = len(request.pairs[0].prefix_ids)
    a, b = (len(pair.document_ids) for pair in request.pairs)
    kv, rest = 2 * 4 * 2, 2 * 4 * 4 + 3 * 4 * 6
    first = (prefix + a + b) * (kv + rest)
    last = (prefix + a + b) * kv + 2 * rest
    attended = sum(range(1, prefix + 1)) + sum(prefix + i for n in (a, b) for i in range(1, n + 1))
    attention = 2 * 2 * 2 * (attended + (prefix + a) + (prefix + b))
    alone = 2 * (first + last + attention)
    assert useful_flops(shape, request.pairs) == alone
    other = tiny_reranker.tokenizer.pairs(RerankRequest(query="r", documents=("a", "bcd"))).pairs
    assert useful_flops(shape, [*request.pairs, *other]) == 2 * alone  # a prefix each


def test_useful_flops_of_an_encoder_count_both_directions_and_one_token_of_the_last_layer() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    pairs = [Pair.of([], range(3)), Pair.of([], range(5))]
    for kind, mlp in (("Bert", 2), ("ModernBert", 3)):
        shape = DecoderShape.from_config(sizes | {"architectures": [f"{kind}ForSequenceClassification"]})
        attention = 2 * 2 * 4 * (3 * 3 + 5 * 5 + 3 + 5)
        rest = 2 * 8 * 8 + mlp * 8 * 16
        assert useful_flops(shape, pairs) == 2 * (8 * (2 * 8 * 8 + rest) + 8 * 2 * 8 * 8 + 2 * rest + attention)


def test_memory_includes_the_pool_of_a_targets_cuda_graphs(
    tiny_reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = [((0, 0), 2**50), ((0, 1), 2**45), ((0, 2), 2**40)]
    segments = [{"segment_pool_id": pool, "total_size": size} for pool, size in pools]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", Mock(side_effect=[segments[1:2], segments]))
    monkeypatch.setattr("local_rerank.reranker.Reranker", lambda config: nullcontext(tiny_reranker))
    target = _load(ExitStack(), EngineConfig(), "fp32", True)
    round_ = target.run([RerankRequest(query="q", documents=("a", "b"))], concurrent=False)
    assert 2**40 <= (round_.peak_bytes or 0) < 2**41


@pytest.mark.parametrize("arithmetic", [*DTYPES, *QUANTIZED_DTYPES])
def test_the_ceiling_is_measured_in_every_dtype(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = DecoderShape(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
    multiplied = []

    def scaled_matmul(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, *_: object) -> torch.Tensor:
        multiplied.append((a.dtype, tuple(b.shape)))
        return a.float() @ b.float().T

    monkeypatch.setattr(fp8, "scaled_matmul", scaled_matmul)  # torch 2.11 has it on GPUs only
    assert gemm_ceiling(shape, arithmetic=arithmetic, num_tokens=35, device=torch.device("cpu")) > 0
    expected = {(torch.float8_e4m3fn, (rows, columns)) for columns, rows in shape.matrices}
    assert set(multiplied) == (expected if arithmetic == "fp8" else set())


def test_kendall_tau_equals_scipys() -> None:
    from scipy.stats import kendalltau

    first, second = [1, 2, 3, 4, 4, 0.5], [1, 3, 2, 4, 5, 0.5]
    assert kendall_tau(first, second) == pytest.approx(kendalltau(first, second).statistic)
    assert kendall_tau(first, first) == 1.0
    assert kendall_tau([1.0], [2.0]) == 1.0


@pytest.mark.parametrize(("shape", "hidden_size"), [("qwen3-reranker-0.6b", 1024), ("bge-reranker-base", 768)])
def test_random_weights_load_and_are_reused(shape: str, hidden_size: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "shape", shape, num_layers=1)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make_checkpoint(folder, shape, num_layers=1) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with Reranker(str(folder), device="cpu", dtype="bf16") as reranker:
        assert (reranker.info.hidden_size, reranker.info.num_layers) == (hidden_size, 1)
        assert len(reranker.rank("q", ["a", "b"])) == 2


def test_bench_measures_precisions_and_their_agreement_with_fp32() -> None:
    done = command(
        "bench", "--workload", "titles", "--mode", "fp32", "--mode", "int8", "--rounds", "1", "--skip-start", "--json",
        "--device", "cpu", "--threads", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    exact = len(report["engines"][1]["unquantized"])  # the built-in model has some, which makes int8 slower
    assert exact > 0
    versions = [system["version"].removeprefix(f"local-rerank {__version__}") for system in report["systems"]]
    assert versions == ["", f", {exact} linear layers left in fp32"]
    (workload,) = report["workloads"]
    assert workload["num_pairs"] == 64
    rows = {row["system"]: row for row in workload["rows"]}
    assert list(rows) == ["local-rerank fp32", "local-rerank int8"]
    assert rows["local-rerank fp32"]["agreement"]["largest"] < 1e-3
    assert 1e-3 < rows["local-rerank int8"]["agreement"]["largest"] < 3
    assert all(row["useful_share"] > 0 for row in rows.values())


def test_a_reference_that_does_not_fit_into_memory_is_left_out_and_bench_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ConfigError("out of memory while loading it")
    monkeypatch.setattr("local_rerank.reranker.Reranker", Mock(side_effect=[said, ConfigError("another")]))
    assert load_reference(ExitStack(), EngineConfig()) is None
    message = f"log-odds are not compared with fp32, which does not fit into memory beside the model: {said}"
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="another"):
        load_reference(ExitStack(), EngineConfig())


def test_bench_prints_tables(tiny_checkpoint: Path) -> None:
    model = ("--model", str(tiny_checkpoint), "--device", "cpu", "--threads", "1")
    done = command("bench", "--workload", "titles", "--rounds", "1", "--skip-start", *model)
    assert done.returncode == 0, done.stderr
    assert "pairs/s" in done.stdout
    assert "p95" in done.stdout
    assert "Kendall's tau" in done.stdout


def test_ctrl_c_prints_what_was_measured_and_a_bar_shows_the_rounds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--workload", "titles", "--workload", "rag", "--rounds", "1000", "--skip-start", "--json"]
    model = ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32", "--threads", "1"]
    terminal, theirs = pty.openpty()
    output = tmp_path / "report"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "local_rerank", "bench", *options, *model],
            stdout=stream, stderr=theirs, env=os.environ | {"COLUMNS": "200", "TERM": "xterm"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells start jobs that ignore it
        )  # fmt: skip
    os.close(theirs)
    shown, is_sent = b"", False
    with suppress(OSError):  # which ends the reading of a terminal that nobody writes to
        while more := os.read(terminal, 65536):
            shown += more
            if not is_sent and re.search(rb"titles: local-rerank fp32, round ([3-9]|\d\d+) of 1000", shown):
                process.send_signal(signal.SIGINT)
                is_sent = True
    os.close(terminal)
    assert process.wait(60) == INTERRUPTED, shown
    assert re.search(rb"about [\d.]+ (s|min|h) for 2 workloads, 1000 rounds and the reference; Ctrl-C", shown)
    assert b"interrupted; these results are incomplete" in shown
    report = json.loads(output.read_bytes())
    assert report["interrupted"]
    (titles,) = report["workloads"]
    assert len(titles["rows"][0]["seconds"]) >= 2
    assert titles["rows"][0]["agreement"] is None


def test_the_estimate_is_close_to_the_time_taken(tiny_reranker: Reranker) -> None:
    target = RerankerTarget("ours", tiny_reranker, "", None)
    measurement = Measurement(WORKLOADS["passages"], [target], reference=None, rounds=2)
    pace = measurement.pace(target)
    seconds = measurement.estimate({"ours": pace})
    assert measurement.result is None
    start = time.perf_counter()
    measurement.run()
    assert seconds / 10 < time.perf_counter() - start < 10 * seconds  # both are measured beside other work


def test_c18_tables_of_large_figures_fit_in_80_columns() -> None:
    row = TargetResult(
        system="local-rerank fp32", seconds=(12345.6,), pairs_per_second=12345.6, tokens_per_second=9876543.2,
        ratio=123.456, useful_tflops=1234.5, ceiling_tflops=1979.0, useful_share=0.62,
        latency_ms={"p50": 12345.6, "p95": 123456.7, "p99": 123456.7}, num_latencies=12345,
        peak_bytes=123456 * 2**20, tokenize_share=0.123, agreement=Agreement(largest=1e-5, mean=1e-6, kendall_tau=1.0),
    )  # fmt: skip
    result = WorkloadResult(
        workload="longquery", about="a query as long as a passage", num_requests=64, num_pairs=6400,
        num_tokens=12345678, rows=(row, row),
    )  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    for table in all_tables([result]):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    for figure in ("12346", "9876543", "123.46", "62% of 1979", "123457", "123456 MiB", "12.3%", "1e-05", "1.0000"):
        assert figure in printed
    assert "…" not in printed
    assert all(word in " ".join(printed.split()) for word in ("longquery", "local-rerank", "tokenizing"))
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "rounds is 0; it must be at least 1"),
        (["--shape", "qwen3-reranker-1b"], "shape is 'qwen3-reranker-1b'; it must be one of qwen3-reranker-0.6b"),
        (["--model", "./nowhere"], "model './nowhere' is no folder or bundle"),
        (["--weights", "folder"], "weights is a folder for random weights, so it needs --shape"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str) -> None:
    done = command("bench", *options)
    assert done.returncode == 1
    assert message in done.stderr
