"""The command `batch`: options, output, exit status and kills."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pty
import re
import select
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ir_datasets
import ir_measures
import pyarrow.parquet as pq
import pytest
from ir_measures import RR, R, nDCG

from local_rerank import Reranker
from local_rerank.batch import job
from local_rerank.commands.console import PIPE_CLOSED
from local_rerank.engine.engine import Engine
from local_rerank.requests.pair import Pair
from tests.batch.conftest import WORDS, write_lines
from tests.batch.killed import command_line, command_line_at_terminal, command_line_in_pipes, start
from tests.command_line import Done, command

NUM_PAIRS, BLOCK_PAIRS, BROKEN = 240, 40, 230  # of the job that is killed
CLOSE = 1e-4  # log-odds in fp32, in other batches


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> list[str]:
    return ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32", "--threads", "1"]


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def rankings(tmp_path: Path) -> Path:
    """Six rankings of three documents and two malformed lines."""
    records: list[Any] = [
        {"id": i, "query": f"the {WORDS[i]}", "documents": [f"{WORDS[i + j]} {j}" for j in range(3)]} for i in range(6)
    ]
    return write_lines(tmp_path / "in.jsonl", [*records[:2], "{broken", *records[2:], {"query": " ", "documents": []}])


def batch(*arguments: str | Path) -> Done:
    done = command("batch", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done


# Output


def test_json_lists_rejected_records_and_the_summary(rankings: Path, tmp_path: Path, model: list[str]) -> None:
    done = batch(rankings, "--output", tmp_path / "out.jsonl", "--json", *model)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    rejected = [(event["line"], event["error"].split(":")[0]) for event in events if event["event"] == "rejected"]
    assert rejected == [(3, "not JSON"), (8, "query is empty; it must hold some text")]
    (last,) = [event for event in events if event["event"] == "done"]
    assert last == events[-1]
    assert {name: last[name] for name in ("rows", "pairs", "rejected", "model_pairs")} == {
        "rows": 6, "pairs": 18, "rejected": 2, "model_pairs": 18
    }  # fmt: skip
    assert last["tokens"] > 18
    assert last["pairs_per_second"] > 0
    assert (last["output"], last["rejects"]) == (str(tmp_path / "out.jsonl"), str(tmp_path / "out.jsonl.rejects.jsonl"))
    assert [reject["number"] for reject in read_lines(tmp_path / "out.jsonl.rejects.jsonl")] == [3, 8]
    assert done.stderr == ""


def test_a_terminal_shows_a_bar_with_rates_and_time_left(rankings: Path, tmp_path: Path, model: list[str]) -> None:
    terminal, theirs = pty.openpty()
    arguments = ["batch", str(rankings), "--output", str(tmp_path / "out.csv"), *model]
    process = start(command_line_at_terminal, arguments, os.ttyname(theirs), str(tmp_path / "said"))
    shown = b""
    while process.is_alive() or select.select([terminal], [], [], 0)[0]:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 65536)
    os.close(theirs)
    os.close(terminal)
    assert process.exitcode == 0, shown
    text = shown.decode()
    assert "in.jsonl:3: not JSON" in text
    for part in ("in.jsonl ", "100%", " pairs/s, ", " tokens/s", "0:00:0"):
        assert part in text, part
    lines = (tmp_path / "said").read_text().splitlines()
    assert lines[0] == f"{tmp_path / 'out.csv'}: 6 rows, 18 pairs"
    assert lines[1].endswith("rejects.jsonl: 2 rejected records")
    assert "18 pairs scored by the model" in lines[2]
    with (tmp_path / "out.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 18


def test_quiet_prints_nothing_and_a_finished_job_is_reported_as_complete(
    rankings: Path, tmp_path: Path, model: list[str]
) -> None:
    first = batch(rankings, "--output", tmp_path / "out.jsonl", "--quiet", *model)
    second = batch(rankings, "--output", tmp_path / "out.jsonl", *model)
    assert (first.stdout, first.stderr) == ("", "")
    assert second.stdout.splitlines()[0].endswith("6 rows, 18 pairs (was complete)")


# Scores


def test_a_records_instruction_overrides_the_command_line(
    tmp_path: Path, model: list[str], tiny_reranker: Reranker
) -> None:
    records = [{"query": "q", "document": "one"}, {"query": "q", "document": "one", "instruction": "its own"}]
    input = write_lines(tmp_path / "in.jsonl", records)
    batch(input, "--output", tmp_path / "out.jsonl", "--instruction", "theirs", *model)
    expected = [tiny_reranker.rank("q", ["one"], instruction=text)[0].log_odds for text in ("theirs", "its own")]
    assert [row["log_odds"] for row in read_lines(tmp_path / "out.jsonl")] == pytest.approx(expected, abs=CLOSE)
    other = command("batch", str(input), "--output", str(tmp_path / "out.jsonl"), "--instruction", "x", *model)
    assert (other.returncode, other.stdout) == (1, "")
    assert "was started with instruction theirs, not x; use the same value" in other.stderr


def test_a_cache_is_shared_between_jobs(rankings: Path, tmp_path: Path, model: list[str]) -> None:
    done = []
    for name in ("a.jsonl", "b.jsonl"):
        arguments = ("--output", tmp_path / name, "--cache", tmp_path / "scores.sqlite", "--json")
        done.append(json.loads(batch(rankings, *arguments, *model).stdout.splitlines()[-1]))
    assert [event["model_pairs"] for event in done] == [18, 0]
    assert [event["pairs"] for event in done] == [18, 18]
    assert read_lines(tmp_path / "a.jsonl") == read_lines(tmp_path / "b.jsonl")


def test_long_documents_are_scored_in_chunks_by_the_same_cache_as_whole_ones(
    rankings: Path, tmp_path: Path, model: list[str], tiny_checkpoint: Path
) -> None:
    long = " ".join(f"Sentence {i} has some words 🦙 in it." for i in range(40))
    record = {"id": "q", "query": "which?", "documents": ["short", long]}
    input = write_lines(tmp_path / "in.jsonl", [record])
    in_chunks = ("--long-documents", "chunk", "--chunk-tokens", "100")
    done = {}
    for name, options in (
        ("whole.jsonl", ()),
        ("chunks.jsonl", in_chunks),
        ("again.parquet", in_chunks),
        ("again.csv", in_chunks),
        ("whole-again.jsonl", ()),
    ):
        arguments = ("--output", tmp_path / name, "--cache", tmp_path / "scores.sqlite", "--json", *options)
        done[name] = json.loads(batch(input, *arguments, *model).stdout.splitlines()[-1])["model_pairs"]
    assert list(done.values()) == [2, 2, 0, 0, 0], "no score is taken for one of the other kind"
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32", chunk_tokens=100) as reranker:
        items = reranker.rank("which?", record["documents"], long_documents="chunk")
    (found,) = read_lines(tmp_path / "chunks.jsonl")
    (table,) = pq.read_table(tmp_path / "again.parquet").to_pylist()
    assert table == found | {"results": [{"id": None} | result for result in found["results"]]}
    with (tmp_path / "again.csv").open(encoding="utf-8", newline="") as stream:
        cells = list(csv.DictReader(stream))
    for result, row, item in zip(found["results"], cells, items, strict=True):
        assert item.best_chunk is not None
        chunk = (item.num_chunks, item.best_chunk.start, item.best_chunk.end)
        assert (result["num_chunks"], result["best_chunk_start"], result["best_chunk_end"]) == chunk
        assert (row["num_chunks"], row["best_chunk_end"]) == (str(chunk[0]), str(chunk[2]))
        assert result["best_chunk_score"] == pytest.approx(item.best_chunk.score, abs=CLOSE)
        assert result["log_odds"] == pytest.approx(item.log_odds, abs=CLOSE)
        assert result["num_truncated_tokens"] == 0
    assert max(item.num_chunks or 0 for item in items) > 10
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert whole == (tmp_path / "whole-again.jsonl").read_bytes()
    assert b"chunk" not in whole, "nobody asked for them"


# Runs and measures


def orders(file: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        query, _, document, *_ = line.split()
        found.setdefault(query, []).append(document)
    return found


def test_a_run_is_reranked_to_its_depth_and_measured(
    collection: dict[str, Path], tmp_path: Path, model: list[str], tiny_reranker: Reranker
) -> None:
    texts = ["--queries", str(collection["queries"]), "--corpus", str(collection["corpus"])]
    output = tmp_path / "out.run"
    arguments = [*texts, "--output", str(output), "--top-k", "3", "--qrels", str(collection["qrels"]), *model]
    done = batch(collection["first"], *arguments, "--json")
    found = orders(output)
    corpus = dict(line.split("\t") for line in collection["corpus"].read_text().splitlines())
    for i in range(10):
        top = [f"d{i}-{j}" for j in range(3)]
        ranked = tiny_reranker.rank(WORDS[i], [corpus[name] for name in top])
        assert found[f"q{i}"] == [*(top[item.index] for item in ranked), f"d{i}-3", f"d{i}-4"]
    means = json.loads(done.stdout.splitlines()[-1])["measures"]
    qrels = list(ir_measures.read_trec_qrels(str(collection["qrels"])))
    for file, told in zip((collection["first"], output), means, strict=True):
        expected = ir_measures.calc_aggregate([nDCG @ 10, RR, R @ 3], qrels, ir_measures.read_trec_run(str(file)))
        assert {name: told[name] for name in ("nDCG@10", "RR", "R@3")} == pytest.approx(
            {str(name): value for name, value in expected.items()}
        )
    table = batch(collection["first"], *arguments).stdout
    assert f"{means[1]['nDCG@10']:.4f}" in table
    assert "first stage" in table


def test_texts_may_come_from_ir_datasets(collection: dict[str, Path], tmp_path: Path, model: list[str]) -> None:
    name = f"local-rerank-tests-{tmp_path.name}"
    made = ir_datasets.create_dataset(str(collection["corpus"]), str(collection["queries"]), str(collection["qrels"]))
    ir_datasets.registry.register(name, made)
    try:
        batch(collection["first"], "--dataset", name, "--output", tmp_path / "a.run", "--deterministic", *model)
    finally:
        del ir_datasets.registry._registered[name]
    texts = ["--queries", str(collection["queries"]), "--corpus", str(collection["corpus"])]
    batch(collection["first"], *texts, "--output", tmp_path / "b.run", "--deterministic", *model)
    assert (tmp_path / "a.run").read_text() == (tmp_path / "b.run").read_text()
    unknown = command("batch", str(collection["first"]), "--dataset", "no/such", "--output", str(tmp_path / "c.run"))
    assert unknown.returncode == 1
    assert "dataset is 'no/such', which ir_datasets does not know" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.jsonl", "--output", "o.jsonl"], "input is nowhere.jsonl; there is no such file"),
        (["in.jsonl", "--output", "in.jsonl"], "output is in.jsonl, which is the input"),
        (["in.jsonl", "--output", "no/o.jsonl"], "there is no folder no"),
        (["in.jsonl", "--output", "o.jsonl", "--top-k", "3"], "top_k needs a run (.run) as input"),
        (["in.jsonl", "--output", "o.jsonl", "--qrels", "q"], "qrels needs a run as output, but output is o.jsonl"),
        (["in.jsonl", "--output", "o.jsonl", "--blend", "x=1"], "blend is 'x=1'"),
        (
            ["in.run", "--output", "o.run", "--qrels", "q", "--min-score", "1"],
            "qrels measures whole rankings, but min_",
        ),
        (["in.jsonl", "--output", "o.jsonl", "--min-score", "nan"], "min_score is nan; it must be a finite number"),
        (["in.jsonl", "--output", "o.jsonl", "--scores", "calibrated"], "scores is calibrated, which needs --calib"),
        (["pairs.jsonl", "--output", "o.jsonl", "--min-score", "1"], "pairs.jsonl has pairs, which have no ranking"),
        (["in.jsonl", "--output", "o.xml"], "output is o.xml; it must end in one of .jsonl"),
        (["in.run", "--output", "o.run"], "which needs either --queries and --corpus or --dataset"),
        (["in.run", "--output", "o.run", "--top-k", "0"], "top_k is 0; it must be at least 1"),
        (["-", "--output", "o.run", "--top-k", "3"], "top_k needs a run, and a run needs a file as input"),
        (["in.jsonl", "--output", "-", "--qrels", "q"], "qrels measures a file, but output is -"),
        (["in.jsonl", "--output", "-", "--overwrite"], "overwrite needs a file as output, but output is -"),
        (["-", "--output", "o.jsonl", "--ray"], "input is -, but workers of --ray need files"),
        (["in.jsonl", "--output", "o.jsonl", "--output-format", "csv"], "output_format is for standard output (-)"),
    ],
)
def test_wrong_options_are_reported_in_one_line_before_any_work(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", [{"query": "q", "documents": ["d"]}])
    write_lines(tmp_path / "in.run", ["q Q0 d 1 1 x"])
    write_lines(tmp_path / "pairs.jsonl", [{"query": "q", "document": "d"}])
    done = command("batch", *arguments, *model)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("o.*"))


# Standard streams

PIPES = ("input", "output", "error")


def piped(arguments: list[str], data: bytes, folder: Path, *, closed: bool = False) -> tuple[int | None, bytes, str]:
    """Exit status, output and errors of a job between two pipes, of which a closed one is not read."""
    for name in PIPES[:2]:
        os.mkfifo(folder / name)
    process = start(command_line_in_pipes, ["batch", *arguments], *(str(folder / name) for name in PIPES))
    (folder / "input").write_bytes(data)  # opened by both ends in this order
    with (folder / "output").open("rb") as stream:
        output = b"" if closed else stream.read()
    process.join()
    errors = (folder / "error").read_text()
    for name in PIPES:
        (folder / name).unlink()
    return process.exitcode, output, errors


def test_pipes_carry_what_files_have_and_nothing_else(rankings: Path, tmp_path: Path, model: list[str]) -> None:
    batch(rankings, "--output", tmp_path / "out.jsonl", "--deterministic", *model)
    arguments = ["-", "--output", "-", "--deterministic", *model]
    status, output, errors = piped(arguments, gzip.compress(rankings.read_bytes()), tmp_path)
    assert (status, output) == (0, (tmp_path / "out.jsonl").read_bytes())
    for said in ("standard input:3: not JSON", "standard input:8: ", "standard output: 6 rows, 18 pairs"):
        assert said in errors
    pairs = b"document\tquery\n" + b"d\tq\n" * 3000
    status, output, errors = piped([*arguments, "--output-format", "csv", "--quiet"], pairs, tmp_path)
    assert (status, errors, output.count(b"\n")) == (0, "", 3001)
    assert piped(arguments, pairs, tmp_path, closed=True)[0] == PIPE_CLOSED


def test_a_job_resumes_from_standard_input_only_if_it_gets_the_same(
    tmp_path: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for text in (b"query,document\nq,a\n", b"query,document\nq,a\n", b"query,document\nq,b\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        said.append(command("batch", "-", "--output", str(tmp_path / "out.csv"), *model))
    assert [done.returncode for done in said] == [0, 0, 1]
    assert "1 rows, 1 pairs (was complete)" in said[1].stdout
    assert "was started with input standard input (19 bytes, SHA-256 " in said[2].stderr


# Kills


def test_a_job_killed_twice_scores_every_pair_once(tmp_path: Path, model: list[str]) -> None:
    """Kill the process soon after a block was saved. --deterministic makes the bits comparable."""
    records: list[Any] = [
        {"id": str(i), "query": WORDS[i % 12], "document": f"{WORDS[i % 7]} {i}"} for i in range(NUM_PAIRS)
    ]
    records[BROKEN] = "{broken"
    input, output = write_lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    arguments = ["batch", str(input), "--quiet", "--deterministic", *model]
    for num_blocks in (1, 2):
        process = start(command_line, [*arguments, "--output", str(output)], BLOCK_PAIRS)
        while process.is_alive() and num_lines(output) < num_blocks * BLOCK_PAIRS:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert num_lines(output) < NUM_PAIRS - 1
    process = start(command_line, [*arguments, "--output", str(output)], BLOCK_PAIRS)
    process.join()
    assert process.exitcode == 0
    batch(input, "--quiet", "--deterministic", "--output", tmp_path / "whole.jsonl", *model)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert Counter(row["id"] for row in read_lines(output)) == Counter(str(i) for i in range(NUM_PAIRS) if i != BROKEN)
    (reject,) = read_lines(tmp_path / "out.jsonl.rejects.jsonl")
    assert (reject["number"], reject["content"]) == (BROKEN + 1, "{broken")


def test_a_gpu_that_fails_stops_the_job_in_one_line_and_the_same_command_goes_on(
    rankings: Path, tmp_path: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "MAX_BLOCK_PAIRS", 6)
    output, scored = tmp_path / "out.jsonl", Engine.score
    passes: list[int] = []
    failures: list[int] = []

    def failing(engine: Engine, pairs: Sequence[Pair]) -> list[float]:
        passes.append(len(pairs))
        if sum(passes) > 12:  # two blocks or more
            failures.append(len(pairs))
            raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")
        return scored(engine, pairs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "score", failing)
        patch.setattr(Engine, "is_alive", lambda engine: False)
        stopped = command("batch", str(rankings), "--output", str(output), "--quiet", *model)
    assert stopped.returncode == 1
    says = (
        "the job stopped: cpu failed: RuntimeError: CUDA error: device-side assert triggered; this process cannot use"
    )
    assert says in stopped.stderr
    assert re.search(r"the same command goes on after [2-5] records$", stopped.stderr)
    assert len(failures) == 1, "nothing is tried after that"
    batch(rankings, "--output", output, "--quiet", *model)
    assert [row["id"] for row in read_lines(output)] == list(range(6))


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0
