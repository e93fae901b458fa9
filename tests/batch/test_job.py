"""Jobs: blocks, settings, folders, and kills at every step, with a fake scorer."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from local_rerank.batch import job
from local_rerank.batch.formats import open_sink, open_source
from local_rerank.batch.job import JobFolder, JobProgress, blocks, run_job
from local_rerank.batch.rows import AddedColumns, Row, ScoredRow
from local_rerank.batch.sources import Position, Rejected, Source
from local_rerank.batch.trec_source import FileTexts, RunSource
from local_rerank.errors import ConfigError, InvalidRequest
from tests.batch.killed import forks, growth_of_memory, job_killed_at_step, start
from tests.batch.test_files import scored_row

SETTINGS = {"input": "in", "model": "m"}
BLOCK_PAIRS = 5


def fake_scores(rows: list[Row]) -> list[ScoredRow | InvalidRequest]:
    """Use the length of a document as its log-odds; refuse the query "refused"."""
    refused = InvalidRequest("refused", field="query")
    return [
        refused if row.query == "refused" else scored_row(row, [float(len(text)) for text in row.documents])
        for row in rows
    ]


def do_job(
    folder: Path, input_name: str, output_name: str, *, overwrite: bool = False, block_pairs: int = BLOCK_PAIRS
) -> JobProgress:
    """Run a job in blocks of `block_pairs` pairs."""
    patch = pytest.MonkeyPatch()
    patch.setattr(job, "MAX_BLOCK_PAIRS", block_pairs)
    output = folder / output_name
    rejects = folder / f"{output_name}.rejects"
    with patch.context(), closing(JobFolder(output, rejects, SETTINGS, overwrite=overwrite)) as held:
        source = open_input(folder, input_name, held)
        sink = open_sink(output, held.path, source, model_id="m", added=AddedColumns(with_documents=True))
        held.start(SETTINGS)
        run_job(held, source, fake_scores, sink, rejects, report=lambda *_: None)
    patch.undo()
    assert held.progress is not None
    return held.progress


def open_input(folder: Path, name: str, held: JobFolder) -> Source:
    if name.endswith(".run"):
        texts = FileTexts(folder / "queries.tsv", folder / "corpus.tsv", held.path)
        return RunSource(folder / name, texts, held.path)
    return open_source(folder / name, held.path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve rankings of three documents as JSON lines, with two malformed lines and a refused query, and as a run."""
    queries = [f"query {i}" for i in range(12)]
    queries[5] = "refused"
    records = [
        {"id": f"q{i}", "query": query, "documents": ["x" * (i + j) for j in range(1, 4)]}
        for i, query in enumerate(queries)
    ]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:4], "{broken", *lines[4:], '{"query": 1}']) + "\n")
    (tmp_path / "queries.tsv").write_text("".join(f"q{i}\tquery {i}\n" for i in range(12)))
    (tmp_path / "corpus.tsv").write_text("".join(f"d{i}\t{'x' * i}\n" for i in range(15)))
    run = [f"q{i} Q0 d{i + j} {j} {-j} first\n" for i in range(12) for j in range(3)]
    (tmp_path / "in.run").write_text("".join([*run[:7], "broken\n", *run[7:], "q1 Q0 d99 9 9 first\n"]))
    return tmp_path


def content(file: Path) -> object:
    return pq.read_table(file).to_pylist() if file.suffix == ".parquet" else file.read_bytes()


CASES = [("in.jsonl", "out.jsonl"), ("in.jsonl", "out.csv"), ("in.jsonl", "out.parquet"), ("in.run", "out.run")]


@pytest.mark.parametrize(("input_name", "output_name"), CASES)
def test_a_job_killed_at_every_step_writes_the_same_output(folder: Path, input_name: str, output_name: str) -> None:
    """Each process resumes from the disk as the one before left it, and gets a step further."""
    undisturbed = do_job(folder, input_name, "whole-" + output_name)
    assert (undisturbed.num_rows, undisturbed.num_rejected) == ((11, 3) if input_name == "in.jsonl" else (12, 2))
    assert {file.name for file in (folder / f"whole-{output_name}.job").iterdir()} == {"progress.json", "lock"}
    num_kills = 0
    for step in [1, 2, 3, *([4, 5, 7, 9, 11] * 40)]:
        process = start(job_killed_at_step, step, str(folder), input_name, output_name)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        num_kills += 1
    assert process.exitcode == 0
    assert num_kills >= 10
    assert content(folder / output_name) == content(folder / f"whole-{output_name}")
    ours, whole = ((folder / f"{name}.rejects").read_bytes() for name in (output_name, f"whole-{output_name}"))
    assert ours == whole
    again = do_job(folder, input_name, output_name)
    assert replace(again, seconds=0.0) == replace(undisturbed, seconds=0.0)


def test_rejected_records_are_written_with_number_and_reason(folder: Path) -> None:
    do_job(folder, "in.jsonl", "out.jsonl")
    rejected = [json.loads(line) for line in (folder / "out.jsonl.rejects").read_text().splitlines()]
    assert Counter((each["number"], each["error"].split(":")[0]) for each in rejected) == Counter(
        [(5, "not JSON"), (14, "query must be a string, not int"), (7, "refused")]
    )
    assert {each["content"] for each in rejected} >= {"{broken", '{"query": 1}'}
    assert {each["file"] for each in rejected} == {str(folder / "in.jsonl")}


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet", "out.run"])
def test_an_empty_input_gives_an_empty_output_and_no_file_of_rejects(folder: Path, name: str) -> None:
    (folder / "empty.jsonl").write_text("\n")
    assert do_job(folder, "empty.jsonl", name).is_done
    assert (folder / name).exists()
    assert not (folder / f"{name}.rejects").exists()
    assert do_job(folder, "empty.jsonl", name).num_rows == 0


def test_a_finished_job_runs_again_only_if_its_output_is_gone(folder: Path) -> None:
    do_job(folder, "in.jsonl", "out.jsonl")
    first = (folder / "out.jsonl").stat().st_mtime_ns
    assert do_job(folder, "in.jsonl", "out.jsonl").is_done
    assert (folder / "out.jsonl").stat().st_mtime_ns == first
    (folder / "out.jsonl").unlink()
    assert do_job(folder, "in.jsonl", "out.jsonl").num_rows == 11
    assert len((folder / "out.jsonl").read_text().splitlines()) == 11


def test_a_job_does_not_resume_with_other_settings(folder: Path) -> None:
    with closing(JobFolder(folder / "out", folder / "rejects", SETTINGS, overwrite=False)) as held:
        held.save(JobProgress(settings=SETTINGS, num_rows=3))
    other = SETTINGS | {"model": "n"}
    with pytest.raises(ConfigError, match="was started with model m, not n; use the same value, or --overwrite"):
        JobFolder(folder / "out", folder / "rejects", other, overwrite=False)
    with pytest.raises(ConfigError, match="was started with blend unset, not bm25=1"):
        JobFolder(folder / "out", folder / "rejects", SETTINGS | {"blend": "bm25=1"}, overwrite=False)
    with closing(JobFolder(folder / "out", folder / "rejects", other, overwrite=True)) as held:
        assert held.start(other) == JobProgress(settings=other)


def test_only_one_process_at_a_time_writes_an_output(folder: Path) -> None:
    with (
        closing(JobFolder(folder / "out", folder / "rejects", SETTINGS, overwrite=False)),
        pytest.raises(ConfigError, match=r"out is being written by another process"),
    ):
        JobFolder(folder / "out", folder / "rejects", SETTINGS, overwrite=False)


@pytest.mark.parametrize("name", ["out", "rejects"])
def test_a_file_without_a_job_is_not_overwritten(folder: Path, name: str) -> None:
    (folder / name).write_text("precious")
    with pytest.raises(ConfigError, match=f"{name} exists and belongs to no unfinished job; --overwrite replaces it"):
        JobFolder(folder / "out", folder / "rejects", SETTINGS, overwrite=False)
    assert (folder / name).read_text() == "precious"


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 9}', '{"version": 1, "settings": {}, "position": 3}'])
def test_unreadable_progress_is_an_error(folder: Path, text: str) -> None:
    (folder / "out.job").mkdir()
    (folder / "out.job" / "progress.json").write_text(text)
    with pytest.raises(ConfigError, match=r"progress.json cannot be read \(.*\); --overwrite starts again"):
        JobFolder(folder / "out", folder / "rejects", SETTINGS, overwrite=False)


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    grown = []
    for name, num_rows in (("small", 1_500), ("large", 15_000)):
        with (tmp_path / f"{name}.jsonl").open("w") as stream:
            for number in range(num_rows):
                record = {"id": number, "query": f"q {number}", "documents": [f"{number} " + "text " * 200]}
                stream.write(json.dumps(record) + "\n")
        receive, send = forks().Pipe(duplex=False)
        process = start(growth_of_memory, str(tmp_path), f"{name}.jsonl", f"{name}.out.jsonl", send)
        assert receive.poll(120)
        grown.append(receive.recv())
        process.join()
    assert (tmp_path / "large.jsonl").stat().st_size > 15_000_000
    assert grown[1] - grown[0] < 8_000_000  # Python 3.13: 5.1 MB, and 5.5 MB for four times as many rows


def test_blocks_have_bounded_pairs_and_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "MAX_BLOCK_PAIRS", 4)
    monkeypatch.setattr(job, "MAX_BLOCK_CHARS", 100)
    counts, long = [1, 2, 3, 1, 9, 1, 1, 1, 1], "x" * 60
    lines = [json.dumps({"query": "q", "documents": ["d"] * count}) for count in counts]
    lines += [json.dumps({"query": "q", "documents": [long]})] * 2
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    found = list(blocks(open_source(tmp_path / "in.jsonl", tmp_path), Position()))
    assert [block.num_pairs for block in found] == [3, 4, 9, 4, 1, 1]
    assert all(not isinstance(item, Rejected) for block in found for item, _ in block.items)
