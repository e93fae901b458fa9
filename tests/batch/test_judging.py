"""What `batch` judges before it loads the model, which here does not exist; and what it says about starting anew."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from local_rerank import Reranker
from local_rerank.batch import job as job_module
from local_rerank.batch.job import JobFolder, JobProgress
from local_rerank.errors import ConfigError
from tests.batch.test_command import CLOSE, batch, read_lines, write_lines
from tests.command_line import Done, command

NO_MODEL = ["--model", "no/such/model"]
RANKING = {"id": "q1", "query": "q", "documents": ["d", "e"]}
PAIR = {"query": "q", "document": "d"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with inputs and a small collection."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "rankings.jsonl", [RANKING])
    write_lines(tmp_path / "pairs.jsonl", [PAIR])
    write_lines(tmp_path / "in.run", ["q1 Q0 d1 1 2 x", "q1 Q0 d2 2 1 x"])
    write_lines(tmp_path / "q.tsv", ["q1\tone"])
    write_lines(tmp_path / "c.tsv", ["d1\tfirst", "d2\tsecond"])
    write_lines(tmp_path / "qrels", ["query-id corpus-id score", "q1 d1 1"])
    for name, content in {
        "half.qrels": "q1 0 d1 0.5", "other.qrels": "q9 0 d1 1", "none.c": "no form at all", "other.c": "d9\tx",
        "other.q": "q9\tx", "array.jsonl": '[{"query": "q", "document": "d"}]', "bad.run": "q1 d1",
        "no-id.jsonl": '{"query": "q", "documents": ["d"]}',
    }.items():  # fmt: skip
        write_lines(tmp_path / name, [content])
    (tmp_path / "broken.tsv").write_bytes(gzip.compress(b"d1\tfirst\n" * 99)[:-9])
    (tmp_path / "folder").mkdir()
    return tmp_path


RUN = ["in.run", "--queries", "q.tsv", "--corpus", "c.tsv", "--output", "o.run"]


def replaced(old: str, new: str) -> list[str]:
    return [new if word == old else word for word in RUN]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*RUN, "--qrels", "half.qrels"], "half.qrels:1 has the grade 0.5; a grade must be a whole number"),
        ([*RUN, "--qrels", "missing"], "qrels is missing; there is no such file"),
        ([*RUN, "--qrels", "other.qrels"], "none of the queries of in.run has a judgement in other.qrels"),
        (replaced("in.run", "bad.run"), "bad.run:1 is not `query Q0 document rank score name` (TREC)"),
        (replaced("c.tsv", "none.c"), "none.c:1 has no known form; corpus must be .jsonl"),
        (replaced("c.tsv", "other.c"), "other.c has none of the documents of in.run, not even d1"),
        (replaced("c.tsv", "broken.tsv"), "broken.tsv is compressed and damaged: it ends too early"),
        (replaced("q.tsv", "other.q"), "in.run and other.q have no query in common: in.run has q1, other.q has q9"),
        ([*RUN, "--cache", "no/cache"], "cache is no/cache; there is no folder no"),
        ([*RUN, "--cache", "c.tsv"], "cache c.tsv cannot be used: file is not a database"),
        (replaced("o.run", "folder"), "output is folder; it must end in one of .jsonl"),
        (["pairs.jsonl", "--output", "o.run"], "output is o.run, a run, but the input has pairs"),
        (["pairs.jsonl", "--output", "o.jsonl.gz"], "output is o.jsonl.gz; it must end in one of .jsonl"),
        (["pairs.jsonl", "--output", "o.jsonl", "--blend", "bm25=1"], "blend is bm25=1, but pairs.jsonl has pairs"),
        (["rankings.jsonl", "--output", "o.jsonl", "--blend", "run=1"], "documents of rankings.jsonl have no `score`"),
        (
            ["no-id.jsonl", "--output", "o.run"],
            "output is o.run, a run, which needs an id; no record of no-id.jsonl has one",
        ),
        (
            ["rankings.jsonl", "--output", "o.run", "--qrels", "other.qrels"],
            "none of the queries of rankings.jsonl has",
        ),
        (["array.jsonl", "--output", "o.jsonl"], "array.jsonl has no record that can be ranked; line 1: a record must"),
    ],
)
def test_c2_what_can_be_known_is_said_before_the_model_is_loaded_or_a_byte_written(
    here: Path, arguments: list[str], says: str
) -> None:
    before = sorted(here.iterdir())
    done = command("batch", *arguments, *NO_MODEL)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("package", "arguments", "says"),
    [
        ("ir_measures", [*RUN, "--qrels", "qrels"], "measuring needs ir_measures"),
        ("pyarrow", ["pairs.jsonl", "--output", "o.parquet"], "Parquet needs pyarrow"),
        ("ir_datasets", ["in.run", "--dataset", "vaswani", "--output", "o.run"], "a dataset needs ir_datasets"),
    ],
)
def test_c2_a_missing_package_is_named_before_the_model_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch, package: str, arguments: list[str], says: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "local_rerank.batch.parquet", raising=False)
    assert says in command("batch", *arguments, *NO_MODEL).stderr
    assert not Path("o.run.job").exists()


def test_c15_a_job_that_did_not_start_leaves_no_folder(here: Path) -> None:
    done = command("batch", *RUN, *NO_MODEL)
    assert "no/such/model" in done.stderr
    assert not (here / "o.run.job").exists()
    (here / "o.jsonl").touch()
    with pytest.raises(ConfigError, match="exists and belongs to no unfinished job"):
        JobFolder(here / "o.jsonl", here / "rejects", {}, overwrite=False)
    assert not (here / "o.jsonl.job").exists()


# Jobs


@pytest.fixture
def model(tiny_checkpoint: Path) -> list[str]:
    return ["--model", str(tiny_checkpoint), "--device", "cpu", "--threads", "1"]


def test_c15_a_refusal_names_the_option_and_a_start_says_whether_it_goes_on(
    here: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(here / "in.jsonl", [{"query": "q", "document": "d"}] * 3)
    arguments = ["in.jsonl", "--output", "o.jsonl", *model]

    def starts(*more: str) -> Done:
        return command("batch", *arguments, *more)

    assert "starts" not in starts("--dtype", "fp32").stdout
    for more, says in (
        (["--dtype", "bf16"], "was started with dtype fp32, not bf16; use the same value, or --overwrite"),
        (["--dtype", "fp32", "--max-length", "64"], "was started with max_length 8192, not 64"),
        (["--dtype", "fp32", "--max-document-tokens", "9"], "was started with max_document_tokens 4000, not 9"),
        (["--dtype", "fp32", "--return-documents"], "was started with return_documents false, not true"),
    ):
        assert says in starts(*more).stderr
    assert "o.jsonl: starts anew (--overwrite)\n" in starts("--dtype", "fp32", "--overwrite").stdout
    (here / "o.jsonl").unlink()
    assert "o.jsonl: starts anew: the output of the finished job is gone\n" in starts("--dtype", "fp32").stdout


def test_c15_after_an_error_the_message_says_where_the_same_command_begins(
    here: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "MAX_BLOCK_PAIRS", 2)
    write_lines(here / "in.jsonl", [{"query": "q", "document": f"d{i}"} for i in range(6)])
    full = OSError(28, "No space left on device")
    save, arguments = JobFolder.save, ["in.jsonl", "--output", "o.jsonl", *model]

    def failing_after(num_rows: int) -> Callable[[JobFolder, JobProgress], None]:
        def failing(folder: JobFolder, progress: JobProgress) -> None:
            if progress.num_rows == num_rows:
                raise full
            save(folder, progress)

        return failing

    for num_rows, says in ((2, "nothing was written; the same command starts anew"), (6, "goes on after 4 records")):
        monkeypatch.setattr(JobFolder, "save", failing_after(num_rows))
        assert says in command("batch", *arguments).stderr
    monkeypatch.setattr(JobFolder, "save", save)
    assert "o.jsonl: goes on after 4 records\n" in command("batch", *arguments).stdout
    assert [row["document"] for row in read_lines(here / "o.jsonl")] == [f"d{i}" for i in range(6)]


def test_c3_inputs_of_a_job_may_be_compressed_or_utf_16(here: Path, model: list[str], tiny_reranker: Reranker) -> None:
    text = "query\tdocument\r\nq\tgrün\r\n"
    (here / "in.tsv").write_bytes(text.encode("utf-16"))
    (here / "in.JSONL.gz").write_bytes(gzip.compress(b'{"query": "q", "document": "gr\xc3\xbcn"}\n'))
    (expected,) = tiny_reranker.score([("q", "grün")], logits=True)
    for name in ("in.tsv", "in.JSONL.gz"):
        batch(name, "--output", f"{name}.jsonl", "--dtype", "fp32", *model)
        assert read_lines(here / f"{name}.jsonl")[0]["log_odds"] == pytest.approx(expected, abs=CLOSE)
        assert {file.name for file in (here / f"{name}.jsonl.job").iterdir()} == {"progress.json", "lock"}


def test_c5_batch_leaves_out_what_eval_leaves_out(here: Path, model: list[str]) -> None:
    """The corpus, with a markup of several lines, is compressed; the measures are over what both can rank."""
    run = ["q1 d1 1", "q1 d9 2", "q1 d2 3", "q1 d2 4", "q2 d1 1", "q3 d1 1"]
    write_lines(here / "in.tsv", run)
    write_lines(here / "q.csv", ["qid,query", 'q1,"one', 'more"', "q1,again", "q2,"])
    docs = "<DOC>\n<DOCNO>d1</DOCNO>\nfirst\n</DOC>\n" * 2 + "<DOC>\n<DOCNO>d2</DOCNO>\nsecond</DOC>\n"
    (here / "c.trec.gz").write_bytes(gzip.compress(docs.encode()))
    write_lines(here / "qrels", ["query-id\tcorpus-id\tscore", "q1\td9\t1.0", "q1\td1\t1"])
    texts = ["--queries", "q.csv", "--corpus", "c.trec.gz", "--qrels", "qrels"]
    done = batch("in.tsv", *texts, "--output", "o.run", "--return-documents", "--json", *model)
    assert {
        (reject["file"], reject["number"], reject["error"]) for reject in read_lines(here / "o.run.rejects.jsonl")
    } == {
        ("in.tsv", 2, "document d9 is not in the corpus"),
        ("in.tsv", 4, "document d2 is repeated"),
        ("in.tsv", 5, "query q2 is not in the queries"),
        ("in.tsv", 6, "query q3 is not in the queries"),
        ("q.csv", 4, "the id q1 is that of an earlier text"),
        ("q.csv", 5, "query q2 has no text"),
        ("c.trec.gz", 5, "the id d1 is that of an earlier text"),
    }
    means = json.loads(done.stdout.splitlines()[-1])["measures"]
    assert [mean["R@100"] for mean in means] == [0.5, 0.5]
    assert sorted(line.split()[2] for line in (here / "o.run").read_text().splitlines()) == ["d1", "d2"]
