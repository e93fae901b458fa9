"""What a job may delete and replace, and cells that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from local_rerank.batch.durable import AppendFile, replace
from local_rerank.batch.job import JobFolder
from local_rerank.batch.pieces import Piece
from local_rerank.batch.ray_data import RayJob, _left
from local_rerank.batch.score_cache import ScoreCache
from local_rerank.batch.sinks import csv_line, tsv_line
from local_rerank.errors import ConfigError
from tests.command_line import command

ENDING = "remove it or choose another name"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", "progress.json.bak", "input.txt", "part-1.parquet", "scores.sqlite.old", "lock/x"]
)
def test_a_job_folder_with_files_of_others_is_refused_and_kept(name: str, overwrite: bool, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl.job" / name
    file.parent.mkdir(parents=True)
    file.write_text("keep", encoding="utf-8")
    first = name.partition("/")[0]
    with pytest.raises(ConfigError, match=rf"out\.jsonl\.job has files of others \({first}\); {ENDING}"):
        JobFolder(tmp_path / "out.jsonl", tmp_path / "rejects", {}, overwrite=overwrite)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["folder", "nowhere"])
def test_a_link_in_place_of_a_job_folder_is_refused(target: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "progress.json").write_text("keep", encoding="utf-8")
    (tmp_path / "out.jsonl.job").symlink_to(target)
    with pytest.raises(ConfigError, match=rf"out\.jsonl\.job is a link; {ENDING}"):
        JobFolder(tmp_path / "out.jsonl", tmp_path / "rejects", {}, overwrite=overwrite)
    assert (tmp_path / "folder" / "progress.json").read_text(encoding="utf-8") == "keep"
    assert not (tmp_path / "nowhere").exists()


def test_a_link_in_a_job_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.job").mkdir()
    (tmp_path / "out.jsonl.job" / "scores.sqlite").symlink_to(tmp_path / "mine.sqlite")
    with pytest.raises(ConfigError, match=r"has files of others \(scores\.sqlite\)"):
        JobFolder(tmp_path / "out.jsonl", tmp_path / "rejects", {}, overwrite=True)


def test_batch_says_in_one_line_that_a_job_folder_has_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"query": "q", "documents": ["d"]}\n', encoding="utf-8")
    (tmp_path / "out.jsonl.job").mkdir()
    (tmp_path / "out.jsonl.job" / "notes.txt").write_text("keep", encoding="utf-8")
    done = command("batch", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--overwrite")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"out.jsonl.job has files of others (notes.txt); {ENDING}" in done.stderr
    assert (tmp_path / "out.jsonl.job" / "notes.txt").read_text(encoding="utf-8") == "keep"


def test_nothing_is_written_through_a_link_in_place_of_an_output(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("keep", encoding="utf-8")
    for name in ("appended", "replaced", "replaced.new", "resumed"):
        (tmp_path / name).symlink_to(mine)
    (tmp_path / "nothing").symlink_to("nowhere")
    for name in ("appended", "nothing"):
        with pytest.raises(ConfigError, match=f"{name} exists and belongs to no unfinished job"):
            JobFolder(tmp_path / name, tmp_path / "rejects", {}, overwrite=False)
    with closing(AppendFile(tmp_path / "appended")) as appended:
        appended.rewind(0)
        appended.append(b"new")
    with replace(tmp_path / "replaced") as stream:
        stream.write(b"new")
    with pytest.raises(ConfigError, match="resumed is a link, but the job wrote a file"):
        AppendFile(tmp_path / "resumed").rewind(2)
    assert mine.read_text(encoding="utf-8") == "keep"
    assert not (tmp_path / "appended").is_symlink()
    assert (tmp_path / "replaced").read_bytes() == b"new"


def test_a_file_that_appears_while_the_job_runs_is_not_replaced(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "rejects.jsonl")
    file.rewind(0)
    (tmp_path / "rejects.jsonl").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError):
        file.append(b"new")
    assert (tmp_path / "rejects.jsonl").read_text(encoding="utf-8") == "keep"


@pytest.mark.parametrize("table", ["CREATE TABLE scores (name TEXT)", "CREATE TABLE notes (text TEXT)"])
def test_a_cache_that_is_the_database_of_another_program_is_refused_and_unchanged(table: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.sqlite"
    with closing(sqlite3.connect(file)) as database:
        database.execute(table)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"mine\.sqlite is a database of another program; choose another name"):
        ScoreCache(file, "x")
    assert file.read_bytes() == before
    for _ in range(2):
        ScoreCache(tmp_path / "ours.sqlite", "x").close()


def left(output: Path, input: Path, *, overwrite: bool) -> list[Piece]:
    pieces = [Piece(number=number, path=str(input), begin=number, end=number + 1) for number in range(3)]
    return _left(RayJob(input=str(input), output=str(output)), pieces, overwrite)


def test_a_ray_job_deletes_only_its_own_parts(tmp_path: Path) -> None:
    input, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    input.write_text("{}\n", encoding="utf-8")
    output.mkdir()
    notes = output / "notes.txt"
    notes.write_text("keep", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"out\.jsonl, which has files of others \(notes\.txt\); remove them"):
            left(output, input, overwrite=overwrite)
    notes.rename(tmp_path / "notes.txt")
    assert len(left(output, input, overwrite=False)) == 3
    (output / "part-00001.jsonl").write_text("", encoding="utf-8")
    assert len(left(output, input, overwrite=False)) == 2
    notes.mkdir()
    assert len(left(output, input, overwrite=False)) == 2, "a job that goes on deletes nothing"
    with pytest.raises(ConfigError, match=r"files of others \(notes\.txt\)"):
        left(output, input, overwrite=True)
    notes.rmdir()
    assert len(left(output, input, overwrite=True)) == 3
    assert [path.name for path in output.iterdir()] == ["job.json"]
    (tmp_path / "link.jsonl").symlink_to(output)
    with pytest.raises(ConfigError, match=r"link\.jsonl, which is a link"):
        left(tmp_path / "link.jsonl", input, overwrite=True)


RUN_BY_SPREADSHEETS = (
    "=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", " =1", "＝1", "-cmd", "=1;=2",
)  # fmt: skip


@pytest.mark.parametrize("text", RUN_BY_SPREADSHEETS)
def test_spreadsheet_safe_cells_are_text(text: str) -> None:
    line = csv_line([text, f"a;{text}", -0.5, None], spreadsheet_safe=True)
    (row,) = csv.reader(io.StringIO(line, newline=""))
    assert row == [f"'{text}", f"a;{text}", "-0.5", ""]
    assert f'"a;{text}"' in line, "quotes keep a spreadsheet that splits at semicolons from making a cell of the rest"
    cell, number = tsv_line([text, -0.5], spreadsheet_safe=True).split("\t")
    assert (cell[0], number) == ("'", "-0.5\n")


@pytest.mark.parametrize("text", ["-5", "+1.5", "-1e-3", "a=b", "plain", "'quoted", ""])
def test_spreadsheet_safe_leaves_numbers_and_other_texts(text: str) -> None:
    assert csv_line([text], spreadsheet_safe=True) == f'"{text}"\n'
    assert tsv_line([text], spreadsheet_safe=True) == f"{text}\n"


def test_batch_writes_spreadsheet_safe_files(tmp_path: Path, tiny_checkpoint: Path) -> None:
    input = tmp_path / "in.csv"
    input.write_text("=head,query,document\n=1+1,@q,+d\n", encoding="utf-8")
    options = ["--model", str(tiny_checkpoint), "--device", "cpu", "--threads", "1", "--quiet"]

    def batch(name: str, *more: str) -> str:
        done = command("batch", str(input), "--output", str(tmp_path / name), *more, *options)
        return done.stderr or (tmp_path / name).read_text(encoding="utf-8")

    head, row = batch("plain.csv").splitlines()
    assert (head[:21], row[:11]) == ("=head,query,document,", "=1+1,@q,+d,")
    head, row = batch("safe.csv", "--spreadsheet-safe").splitlines()
    assert head.startswith('"\'=head","query","document",')
    assert row.startswith('"\'=1+1","\'@q","\'+d",')
    assert "was started with spreadsheet_safe true, not unset" in batch("safe.csv")
    assert "spreadsheet_safe needs .csv or .tsv as output" in batch("x.jsonl", "--spreadsheet-safe")
