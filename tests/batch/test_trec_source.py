"""Reading TREC runs with their queries and documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from local_rerank.batch.rows import Row
from local_rerank.batch.sources import Position, Rejected
from local_rerank.batch.trec_source import INDEX, FileTexts, RunSource
from local_rerank.errors import InvalidRequest
from local_rerank.evaluation.left_out import LeftOut
from local_rerank.evaluation.text_forms import read_texts
from tests.batch.test_files import write


@pytest.fixture
def run_files(tmp_path: Path) -> dict[str, Path]:
    queries = ['{"id": "q1", "text": "one"}', '{"id": "q2", "text": " "}', '{"id": "q3", "text": "three"}', "broken"]
    corpus = ['{"_id": "d1", "text": "first"}', '{"_id": "d2", "title": "T", "text": "second"}', "\xff"]
    run = ["q3 Q0 d2 1 1.5 x", "q1 Q0 d1 2 1 x", "q1 Q0 d2 1 3 x", "q1 Q0 d2 1 3 x", "q1 Q0 d3 1 2 x"]
    run += ["q2 Q0 d1 1 1 x", "q4 Q0 d1 1 1 x", "q1 Q0 d1 9 nan x"]
    return {
        "queries": write(tmp_path / "queries.jsonl", "\n".join(queries)),
        "corpus": write(tmp_path / "corpus.jsonl", "\n".join(corpus).encode("latin-1")),
        "run": write(tmp_path / "in.run", "\n".join(run)),
    }


def run_source(files: dict[str, Path], folder: Path, **options: Any) -> RunSource:
    folder.mkdir(exist_ok=True)
    return RunSource(files["run"], FileTexts(files["queries"], files["corpus"], folder), folder, **options)


def test_a_run_yields_its_queries_in_order_with_candidates_by_score(run_files: dict[str, Path], tmp_path: Path) -> None:
    source = run_source(run_files, tmp_path / "job")
    first, second = [item for item, _ in source.read(Position()) if isinstance(item, Row)]
    assert (first.id, first.documents, first.first_stage_scores) == ("q3", ("T second",), (1.5,))
    assert (second.id, second.query, second.document_ids) == ("q1", "one", ("d2", "d1"))
    source = run_source(run_files, tmp_path / "job", top_k=1)
    _, top = [item for item, _ in source.read(Position()) if isinstance(item, Row)]
    assert (top.document_ids, top.tail_ids) == (("d2",), ("d1",))


def test_malformed_lines_of_a_run_and_its_texts_are_rejected(run_files: dict[str, Path], tmp_path: Path) -> None:
    items = [item for item, _ in run_source(run_files, tmp_path / "job").read(Position())]
    rejected = {
        (Path(item.file).name, item.number, item.error.split(" (")[0]) for item in items if isinstance(item, Rejected)
    }
    assert rejected == {
        ("in.run", 8, "the score is nan; it must be a finite number"),
        ("queries.jsonl", 2, "query q2 has no text"),
        ("queries.jsonl", 4, "the line is not an object with an id"),
        ("corpus.jsonl", 3, "the line is not UTF-8"),
        ("in.run", 4, "document d2 is repeated"),
        ("in.run", 5, "document d3 is not in the corpus"),
        ("in.run", 6, "query q2 is not in the queries"),
        ("in.run", 7, "query q4 is not in the queries"),
    }


def test_queries_may_be_trec_topics(run_files: dict[str, Path], tmp_path: Path) -> None:
    topics = "<top>\n\n<num> Number: q1\n<title> Topic: one\n line\n\n<desc> Description:\nmore\n</top>\n"
    topics += "<top>\n<num>q3</num>\n<title>three</title>\n</top>\n<top>\n<num> q4\n</top>\n\n"
    topics += "<top><num> q2 <title> </top>"
    files = run_files | {"queries": write(tmp_path / "topics.txt", topics)}
    items = [item for item, _ in run_source(files, tmp_path / "job").read(Position())]
    assert {(row.id, row.query) for row in items if isinstance(row, Row)} == {("q1", "one line"), ("q3", "three")}
    rejected = [item for item in items if isinstance(item, Rejected) and item.file == str(files["queries"])]
    assert {(item.number, item.error) for item in rejected} == {
        (14, "the line is not a topic with a number (<num>, <number>, number=) and a <title> or <query>"),
        (18, "query q2 has no text"),
    }
    assert dict(read_texts(write(tmp_path / "good.trec", topics.partition("</top>")[0]), "queries", LeftOut())) == {
        "q1": "one line"
    }
    with pytest.raises(InvalidRequest, match=r"topics.txt:14 is not a topic with a number"):
        list(read_texts(files["queries"], "queries", LeftOut()))


def test_reading_resumes_after_any_item_and_reuses_the_index(run_files: dict[str, Path], tmp_path: Path) -> None:
    items = list(run_source(run_files, tmp_path / "job").read(Position()))
    built = (tmp_path / "job" / INDEX).stat().st_mtime_ns
    for place, (_, end) in enumerate(items, 1):
        assert list(run_source(run_files, tmp_path / "job").read(end)) == items[place:]
    assert (tmp_path / "job" / INDEX).stat().st_mtime_ns == built


def test_a_run_without_known_texts_is_an_error(run_files: dict[str, Path], tmp_path: Path) -> None:
    write(run_files["corpus"], '{"_id": "other", "text": "x"}\n')
    with pytest.raises(InvalidRequest, match=r"corpus.jsonl has none of the documents of .*in.run, not even d2"):
        run_source(run_files, tmp_path / "job")
    write(run_files["queries"].with_suffix(".xml"), "")
    with pytest.raises(InvalidRequest, match=r"queries.xml is empty; queries must be .jsonl"):
        FileTexts(run_files["queries"].with_suffix(".xml"), run_files["corpus"], tmp_path)
    with pytest.raises(InvalidRequest, match=r"none.tsv cannot be read: No such file"):
        FileTexts(run_files["queries"], tmp_path / "none.tsv", tmp_path)
