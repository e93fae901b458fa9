"""Reading and writing every file format."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_rerank import RankedDocument
from local_rerank.batch import sources
from local_rerank.batch.formats import open_sink, open_source
from local_rerank.batch.rows import AddedColumns, Row, ScoredRow, parse_record
from local_rerank.batch.sinks import Sink
from local_rerank.batch.sources import Position, Rejected, Source
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.types import ScoredSpan

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())


def rows_of(source: Source) -> list[Row]:
    items = [item for item, _ in source.read(Position())]
    assert not [item for item in items if isinstance(item, Rejected)]
    return [item for item in items if isinstance(item, Row)]


def opened(file: Path) -> Source:
    return open_source(file, file.parent)


def rejected_of(source: Source) -> list[tuple[int, str]]:
    return [(item.number, item.error) for item, _ in source.read(Position()) if isinstance(item, Rejected)]


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


# JSON lines


def test_json_lines_with_ids_scores_and_other_fields(tmp_path: Path) -> None:
    lines = '\ufeff{"id": 1, "query": "q", "documents": ["a", "b\u2028c"], "more": [1]}\r\n\n'
    lines += '{"query": "r", "documents": [{"text": "x", "id": 7, "score": 2}]}'
    first, second = rows_of(opened(write(tmp_path / "a.jsonl", lines)))
    assert (first.id, first.query, first.documents) == ("1", "q", ("a", "b\u2028c"))
    assert first.fields == {"id": 1, "query": "q", "more": [1]}
    assert (second.document_ids, second.first_stage_scores, second.number) == (("7",), (2.0,), 3)


def test_malformed_lines_are_rejected_and_the_others_read(tmp_path: Path) -> None:
    lines = [
        b'{"query": "q", "documents": ["a"]}',
        b"{",
        b'{"query": "q\xff", "documents": ["a"]}',
        b'{"query": "q", "documents": ["a"], "x": NaN}',
        b"[" * 5000 + b"]" * 5000,
        b'{"query": "q", "document": "a"}',
        b'{"query": "q", "documents": []}',
        b'{"query": "last", "documents": ["a"]}',
    ]
    source = opened(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert rejected_of(source) == [
        (2, "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (3, "not UTF-8: invalid start byte at byte 12"),
        (4, "not JSON: NaN"),
        (5, "not JSON: nested too deeply"),
        (6, "the record has document, but the first one of the file has documents"),
        (7, "0 documents; at least 1 is needed"),
    ]
    kept = [item for item, _ in source.read(Position()) if isinstance(item, Row)]
    assert [(row.query, row.number) for row in kept] == [("q", 1), ("last", 8)]


def test_a_line_that_is_too_long_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 50)
    lines = '{"query": "%s", "documents": ["a"]}\n{"query": "r", "documents": ["a"]}\n' % ("q" * 300)
    source = opened(write(tmp_path / "a.jsonl", lines))
    assert rejected_of(source) == [(1, "the line has 50 bytes or more; it must be shorter")]
    assert [item.query for item, _ in source.read(Position()) if isinstance(item, Row)] == ["r"]


# CSV and TSV


def test_csv_fields_may_contain_quotes_and_line_feeds(tmp_path: Path) -> None:
    text = '\ufefflabel,document,query,instruction\r\n1,"a ""b""\nc",q,\r\n\r\n2,d,r,judge\r\n'
    first, second = rows_of(opened(write(tmp_path / "a.csv", text)))
    assert (first.query, first.documents, first.instruction, first.is_pair) == ("q", ('a "b"\nc',), None, True)
    assert (second.instruction, second.fields["label"], second.number) == ("judge", "2", 5)


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    (row,) = rows_of(opened(write(tmp_path / "a.tsv", 'query\tdocument\n"q\t5" screen\n')))
    assert (row.query, row.documents) == ('"q', ('5" screen',))


def test_an_unclosed_quote_rejects_one_line(tmp_path: Path) -> None:
    text = 'query,document\nq,a\nq,"b\nq,c\n"q" x,d\nr,e,f\nq,g\n'
    source = opened(write(tmp_path / "a.csv", text))
    errors = rejected_of(source)
    assert [number for number, _ in errors] == [3, 5, 6]
    assert errors[0][1].startswith("not CSV: ")
    assert errors[2][1] == "3 fields; the header has 2"
    assert [item.documents[0] for item, _ in source.read(Position()) if isinstance(item, Row)] == ["a", "c", "g"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "a.csv:1 has no column query"),
        ("a.csv", "query,text\nq,a\n", "a.csv:1 has no column document; it has query, text"),
        ("a.csv", "query,document,query\n", "a.csv:1 repeats a column name"),
        ("a.csv", b"query,\xff\n", "a.csv:1 is not a header"),
        ("a.xml", "", "a.xml; it must end in one of .jsonl, .csv, .tsv, .parquet"),
        ("a.parquet", "text", "a.parquet is not a Parquet file"),
    ],
)
def test_a_file_of_another_kind_is_an_error(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        opened(write(tmp_path / name, content))


# Parquet


def test_parquet_with_pairs_or_rankings(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["q", "r"], "document": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet")
    assert source.is_pairs
    assert rejected_of(source) == [(2, "documents must be a list, not missing")]
    documents = [["a", "b"], ["c"]]
    pq.write_table(pa.table({"query": ["q", "r"], "documents": documents}), tmp_path / "b.parquet")
    assert [row.documents for row in rows_of(opened(tmp_path / "b.parquet"))] == [("a", "b"), ("c",)]
    structs = [[{"text": "a", "id": 3}]]
    pq.write_table(pa.table({"query": ["q"], "documents": structs}), tmp_path / "c.parquet")
    assert rows_of(opened(tmp_path / "c.parquet"))[0].document_ids == ("3",)
    pq.write_table(pa.table({"query": ["q"], "text": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(InvalidRequest, match="must have the columns query and either document or documents; it has qu"):
        opened(tmp_path / "d.parquet")


# Resuming


def pairs_file(folder: Path, kind: str, pairs: list[tuple[str, str]]) -> Path:
    file = folder / f"pairs.{kind}"
    if kind == "jsonl":
        lines = [json.dumps({"query": query, "document": text}, ensure_ascii=False) for query, text in pairs]
        return write(file, "\n".join(lines))
    if kind == "parquet":
        table = pa.table({"query": [q for q, _ in pairs], "document": [d for _, d in pairs]})
        pq.write_table(table, file, row_group_size=3)
        return file
    text = io.StringIO()
    csv.writer(text).writerows([("query", "document"), *pairs])
    return write(file, text.getvalue())


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8))
def test_reading_resumes_after_any_record(
    tmp_path_factory: pytest.TempPathFactory, kind: str, pairs: list[tuple[str, str]]
) -> None:
    source = opened(pairs_file(tmp_path_factory.mktemp("files"), kind, pairs))
    items = list(source.read(Position()))
    assert [(row.query, row.documents[0]) for row in rows_of(source)] == pairs
    for place, (_, end) in enumerate(items, 1):
        assert list(source.read(end)) == items[place:]
    assert items[-1][1].offset == source.size


# Output


def scored_row(row: Row, log_odds: Sequence[float]) -> ScoredRow:
    """Make the scored row of a row with these log-odds."""
    results = [
        RankedDocument(
            index=index, relevance_score=0.5, log_odds=value, document=text, num_tokens=3, num_truncated_tokens=0
        )
        for index, (value, text) in enumerate(zip(log_odds, row.documents, strict=True))
    ]
    return ScoredRow(row=row, results=tuple(sorted(results, key=lambda item: -item.log_odds)))


def scored(record: dict[str, Any], log_odds: list[float]) -> ScoredRow:
    return scored_row(parse_record(record), log_odds)


RANKING = {"id": 7, "query": "q\t1", "documents": [{"text": "a", "id": "x"}, {"text": "b\nc", "id": "y"}]}
PAIR = {"query": "q", "document": 'a "b"', "label": "é"}


def written(tmp_path: Path, name: str, record: dict[str, Any], row: ScoredRow, **options: Any) -> Path:
    """Write a row twice, in two commits, for a source that contains the record."""
    source = opened(write(tmp_path / "source.jsonl", json.dumps(record)))
    sink = sink_for(tmp_path / name, source, **options)
    sink.rewind(0)
    for _ in range(2):
        sink.write([row])
        sink.commit()
    sink.finish()
    return tmp_path / name


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def sink_for(file: Path, source: Source, **options: Any) -> Sink:
    (file.parent / "job").mkdir(exist_ok=True)
    others = {name: options.pop(name) for name in ("stream", "spreadsheet_safe") if name in options}
    added = AddedColumns(**options)
    return open_sink(file, file.parent / "job", source, model_id="Owner/My Model", added=added, **others)


def test_a_ranking_is_written_in_every_format(tmp_path: Path) -> None:
    row = scored_row(dataclasses.replace(parse_record(RANKING), tail_ids=("z",)), [-1.0, 2.5])
    result = {"relevance_score": 0.5, "num_tokens": 3, "num_truncated_tokens": 0}
    results = [{"index": 1, "id": "y", "log_odds": 2.5} | result, {"index": 0, "id": "x", "log_odds": -1.0} | result]
    lines = written(tmp_path, "a.jsonl", RANKING, row).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": 7, "query": "q\t1", "results": results}] * 2
    table = pq.read_table(written(tmp_path, "a.parquet", RANKING, row)).to_pylist()
    assert table == [{"id": "7", "query": "q\t1", "results": results}] * 2
    assert written(tmp_path, "a.run", RANKING, row).read_text().splitlines() == [
        "7 Q0 y 1 2.5 My_Model",
        "7 Q0 x 2 -1.0 My_Model",
        "7 Q0 z 3 -2.0 My_Model",
    ] * 2  # fmt: skip
    rows = read_csv(written(tmp_path, "a.csv", RANKING, row))
    assert [(each["id"], each["rank"], each["document_id"], each["log_odds"]) for each in rows] == [
        ("7", "1", "y", "2.5"),
        ("7", "2", "x", "-1.0"),
    ] * 2  # fmt: skip
    assert rows[0]["query"] == "q\t1"
    tsv = written(tmp_path, "a.tsv", RANKING, row, with_documents=True).read_text().splitlines()
    assert tsv[0].split("\t")[-1] == "document"
    assert tsv[1].split("\t")[1] == "q 1"
    assert tsv[1].split("\t")[-1] == "b c"


def test_blended_scores_are_written_and_are_the_scores_of_a_run(tmp_path: Path) -> None:
    row = scored(RANKING, [-1.0, 2.5])
    items = (
        dataclasses.replace(item, blended_score=score) for item, score in zip(row.results, (5.0, -2.0), strict=True)
    )
    row = dataclasses.replace(row, results=tuple(items))
    assert written(tmp_path, "a.run", RANKING, row).read_text().splitlines()[0] == "7 Q0 y 1 5.0 My_Model"
    (first, _) = pq.read_table(written(tmp_path, "a.parquet", RANKING, row, is_blended=True)).to_pylist()
    assert [each["blended_score"] for each in first["results"]] == [5.0, -2.0]
    rows = read_csv(written(tmp_path, "a.csv", RANKING, row, is_blended=True))
    assert rows[1]["blended_score"] == "-2.0"


def test_probabilities_and_what_is_left_out_are_in_every_format(tmp_path: Path) -> None:
    row = scored_row(dataclasses.replace(parse_record(RANKING), tail_ids=("z",)), [-1.0, 2.5])
    best = dataclasses.replace(row.results[0], probability=0.9)
    one, none = (dataclasses.replace(row, results=r, num_below_min_score=2 - len(r)) for r in ((best,), ()))
    found = json.loads(written(tmp_path, "a.jsonl", RANKING, one).read_text().splitlines()[0])
    assert (found["results"][0]["probability"], found["num_below_min_score"]) == (0.9, 1)
    options = {"is_calibrated": True, "counts_below": True}
    (found, _) = pq.read_table(written(tmp_path, "a.parquet", RANKING, one, **options)).to_pylist()
    assert (found["results"][0]["probability"], found["num_below_min_score"]) == (0.9, 1)
    assert [each["probability"] for each in read_csv(written(tmp_path, "a.csv", RANKING, one, **options))] == [
        "0.9"
    ] * 2
    assert written(tmp_path, "a.run", RANKING, one).read_text() == "7 Q0 y 1 2.5 My_Model\n" * 2, (
        "no unscored candidate"
    )
    assert written(tmp_path, "b.run", RANKING, none).read_text() == ""
    assert len(written(tmp_path, "b.csv", RANKING, none).read_text().splitlines()) == 1, "the head"


def test_all_columns_together_have_one_order_in_every_format(tmp_path: Path) -> None:
    chunk: dict[str, Any] = {"num_chunks": 3, "best_chunk": ScoredSpan(start=0, end=1, score=0.25)}
    row = scored(RANKING, [-1.0, 2.5])
    items = tuple(dataclasses.replace(item, probability=0.9, blended_score=1.5, **chunk) for item in row.results)
    row = dataclasses.replace(row, results=items, num_below_min_score=0)
    names = ("in_chunks", "is_calibrated", "is_blended", "with_documents", "counts_below")
    options = dict.fromkeys(names, True)
    line = json.loads(written(tmp_path, "a.jsonl", RANKING, row, **options).read_text().splitlines()[0])
    (found, _) = pq.read_table(written(tmp_path, "a.parquet", RANKING, row, **options)).to_pylist()
    assert found | {"id": 7} == line
    assert list(found["results"][0]) == list(line["results"][0])
    (first, *_) = read_csv(written(tmp_path, "a.csv", RANKING, row, **options))
    assert list(first)[5:] == list(line["results"][0])[2:]


def test_a_pair_keeps_its_columns_in_every_format(tmp_path: Path) -> None:
    row = scored(PAIR, [1.5])
    expected = PAIR | {"relevance_score": 0.5, "log_odds": 1.5, "num_tokens": 3, "num_truncated_tokens": 0}
    assert json.loads(written(tmp_path, "a.jsonl", PAIR, row).read_text().splitlines()[1]) == expected
    assert pq.read_table(written(tmp_path, "a.parquet", PAIR, row)).to_pylist() == [expected] * 2
    rows = read_csv(written(tmp_path, "a.csv", PAIR, row))
    assert rows == [{name: str(value) for name, value in expected.items()}] * 2
    assert written(tmp_path, "a.tsv", PAIR, row).read_text().splitlines()[2] == 'q\ta "b"\té\t0.5\t1.5\t3\t0'
    with pytest.raises(ConfigError, match="a run, but the input has pairs"):
        written(tmp_path, "a.run", PAIR, row)


def test_parquet_keeps_the_types_of_its_input(tmp_path: Path) -> None:
    table = pa.table({"query": ["q"], "documents": [["a"]], "when": pa.array([1], pa.timestamp("us")), "id": [12]})
    pq.write_table(table, tmp_path / "in.parquet")
    source = opened(tmp_path / "in.parquet")
    sink = sink_for(tmp_path / "out.parquet", source)
    sink.rewind(0)
    sink.write([scored_row(rows_of(source)[0], [1.0])])
    sink.commit()
    sink.finish()
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.names == ["query", "when", "id", "results"]
    assert (schema.field("when").type, schema.field("id").type) == (pa.timestamp("us"), pa.int64())


def test_lone_surrogates_and_ids_with_spaces_are_written(tmp_path: Path) -> None:
    record = {"id": "a b\n", "query": "\ud800", "documents": ["x"]}
    row = scored(record, [1.0])
    assert json.loads(written(tmp_path, "a.jsonl", record, row).read_text().splitlines()[0])["query"] == "\ud800"
    assert written(tmp_path, "a.run", record, row).read_text().splitlines()[0] == "a_b Q0 0 1 1.0 My_Model"


def test_rewind_drops_everything_after_the_mark(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "source.jsonl", json.dumps(RANKING)))
    rows = [scored(RANKING | {"id": number}, [1.0, 0.0]) for number in range(3)]
    for name in ("a.jsonl", "a.parquet"):
        sink = sink_for(tmp_path / name, source)
        sink.rewind(0)
        sink.write(rows[:1])
        mark = sink.commit()
        sink.write(rows[1:2])
        sink.commit()
        sink.finish()
        again = sink_for(tmp_path / name, source)
        again.rewind(mark)
        again.write(rows[2:])
        again.commit()
        again.finish()
    assert [json.loads(line)["id"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [0, 2]
    assert pq.read_table(tmp_path / "a.parquet").column("id").to_pylist() == ["0", "2"]
    lost = sink_for(tmp_path / "lost.jsonl", source)
    with pytest.raises(ConfigError, match=r"lost.jsonl is shorter than the 9 bytes the job wrote"):
        lost.rewind(9)
    with pytest.raises(ConfigError, match=r"part-00000002.parquet is missing, but the job wrote it"):
        sink_for(tmp_path / "lost.parquet", source).rewind(3)
