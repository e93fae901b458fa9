"""The forms in which collections come: qrels, runs, documents and queries."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from local_rerank.errors import InvalidRequest
from local_rerank.evaluation.left_out import LeftOut
from local_rerank.evaluation.text_forms import read_texts
from local_rerank.evaluation.trec_files import Candidate, read_qrels, read_run

PACKED: dict[str, Callable[[str], bytes]] = {
    "": str.encode,
    ".gz": lambda text: gzip.compress(text.encode()),
    ".ZST": lambda text: zstandard.ZstdCompressor().compress(text.encode("utf-8-sig")),
    ".utf16": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
}


def write(folder: Path, name: str, content: str) -> Path:
    file = folder / name
    file.write_text(content, encoding="utf-8")
    return file


def run_of(file: Path, left_out: LeftOut | None = None) -> list[Candidate]:
    return list(read_run(file, left_out or LeftOut(), {"q1"}).get("q1", ()))


def texts_of(file: Path, field: str, left_out: LeftOut | None = None) -> dict[str, str]:
    return dict(read_texts(file, field, left_out or LeftOut()))


# Judgements


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t2\n"),
        ("a.txt", "qid cid score\nq1 d1 2"),
        ("a.tsv", "corpus-id\tquery-id\trelevance\nd1\tq1\t2\n"),
        ("a.csv", "query_id,iteration,doc_id,label\nq1,0,d1,2\n"),
        ("a.jsonl", '{"query-id": "q1", "corpus-id": "d1", "score": 2}\n'),
        ("three", "q1 d1 2\n"),
        ("tabs", "q1\t0\td1\t2\n"),
        ("spaces", "\n q1  Q0 d1   2 \n"),
    ],
)
def test_c1_qrels_of_three_or_four_columns_are_read_with_and_without_a_header(
    tmp_path: Path, name: str, content: str
) -> None:
    assert read_qrels(write(tmp_path, name, content)) == {"q1": {"d1": 2}}


def test_c4_a_grade_may_be_written_with_a_point_but_must_be_whole(tmp_path: Path) -> None:
    assert read_qrels(write(tmp_path, "a", "q1 0 d1 1.0\nq1 0 d2 -1\n")) == {"q1": {"d1": 1, "d2": -1}}
    for grade in ("0.5", "high", "nan"):
        with pytest.raises(
            InvalidRequest, match=rf"a:1 has the grade {grade}; a grade must be a whole number, in `quer"
        ):
            read_qrels(write(tmp_path, "a", f"q1 0 d1 {grade}\n"))


# Runs


@pytest.mark.parametrize(
    "lines",
    [
        ("q1 Q0 d1 1 9.5 tag", "q1 Q0 d2 2 8 tag with text behind it"),
        ("q1 Q0 d1 1 9.5", "q1 Q0 d2 2 8"),
        ("q1 0 d1 1 9.5", "q1 0 d2 2 8"),
        ("q1 d1 1 9.5 tag", "q1 d2 2 8 tag"),
        ("q1\td1\t1\t9.5", "q1\td2\t2\t8"),
        ("q1 Q0 d1 9.5 tag", "q1 Q0 d2 8 tag"),
        ("q1 Q0 d1 9.5", "q1 Q0 d2 8"),
        ("q1 d1 9.5", "q1 d2 8"),
        ("qid,docid,score", "q1,d2,8", "q1,d1,9.5"),
        ("query-id\tcorpus-id\tscore", "q1\td2\t8", "q1\td1\t9.5"),
        ('{"qid": "q1", "docid": "d1", "score": 9.5}', '{"qid": "q1", "docid": "d2", "score": 8}'),
    ],
)
def test_c3_a_run_may_have_three_to_six_columns_and_text_behind_the_name(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    name = "run.csv" if "," in lines[0] and "{" not in lines[0] else "run"
    assert run_of(write(tmp_path, name, "\n".join(lines))) == [Candidate("d1", 9.5), Candidate("d2", 8.0)]


def test_c3_three_columns_may_be_ranks_as_ms_marco_has_them(tmp_path: Path) -> None:
    file = write(tmp_path, "run.tsv", "q1\td7\t1\nq1\td3\t2\nq2\td9\t1\n")
    assert [candidate.document_id for candidate in run_of(file)] == ["d7", "d3"]
    named = write(tmp_path, "named.tsv", "qid pid rank\nq1 d3 20\nq1 d7 10\n")
    assert [candidate.document_id for candidate in run_of(named)] == ["d7", "d3"]


@pytest.mark.parametrize("values", [(0, 1), (1, 0), (1, 3), (3, 5), (2, 3)])
def test_c3_whole_numbers_that_may_be_ranks_or_scores_are_refused(tmp_path: Path, values: tuple[int, int]) -> None:
    file = write(tmp_path, "run", "".join(f"q1 d{value} {value}\n" for value in values))
    with pytest.raises(
        InvalidRequest, match=r"run:2 has \d where ranks, from 1 on, cannot be told from .*; write `quer"
    ):
        run_of(file)


@pytest.mark.parametrize("line", ["q1 d1", "q1 d1 first", "q1 0 1 9.5 tag", "q1 Q0 d1 1 best tag", "", "<xml>"])
def test_c3_a_run_in_no_known_form_is_refused_with_the_form_that_is_wanted(tmp_path: Path, line: str) -> None:
    with pytest.raises(InvalidRequest, match=r"run.* (is not|must be) `query Q0 document rank score name` \(TREC\)"):
        run_of(write(tmp_path, "run", line))


def test_c5_repeated_documents_and_scores_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    left_out = LeftOut()
    file = write(
        tmp_path, "run", "q1 Q0 d1 1 2 x\nq1 Q0 d1 2 9 x\nq1 Q0 d2 3 nan x\nq1 Q0 d3 4 -inf x\nq9 Q0 d1 1 nan x"
    )
    assert run_of(file, left_out) == [Candidate("d1", 2.0)]
    assert str(left_out).splitlines() == [
        f"left out: 1, first {file}:2: document d1 is repeated",
        f"left out: 2, first {file}:3: the score is nan; it must be a finite number",
    ]


# Texts


@pytest.mark.parametrize(
    ("field", "name", "content"),
    [
        ("corpus", "a.jsonl", '{"id": "7", "contents": "Cats purr", "title": "Cats"}'),
        ("corpus", "a.JSONL", '{"docid": 7, "title": "Cats", "text": "purr"}'),
        ("corpus", "a.txt", '{"_id": "7", "title": "Cats", "text": "purr"}'),
        ("corpus", "a", '{"doc_id": "7", "text": "Cats purr"}'),
        ("corpus", "a.json", '{"pid": "7", "passage": "Cats purr"}'),
        ("corpus", "a.txt", "7\tCats purr\n"),
        ("corpus", "a.tsv", "id\ttext\ttitle\n7\tpurr\tCats\n"),
        ("corpus", "a.csv", 'docid,title,text\n7,"Cats",purr\n'),
        ("corpus", "a.trec", "<DOC>\n<DOCNO> 7 </DOCNO>\n<TITLE>Cats</TITLE>\n\n<TEXT>\npurr\n</TEXT>\n</DOC>\n"),
        ("queries", "a.jsonl", '{"query_id": "7", "query": "Cats purr"}'),
        ("queries", "a.jsonl", '{"qid": 7, "query": "Cats purr"}'),
        ("queries", "a", '{"_id": "7", "text": "Cats purr", "metadata": {}}'),
        ("queries", "a.txt", "7\tCats purr\n"),
        ("queries", "a.csv", "qid,query\n7,Cats purr\n"),
        (
            "queries",
            "a.xml",
            '<topics><topic number="7" type="x"><query>Cats purr</query><desc>no</desc></topic></topics>',
        ),
        ("queries", "a.xml", "<topics>\n<topic>\n<number>7</number>\n<title>Cats\npurr</title></topic></topics>"),
        ("queries", "a.trec", "<top>\n<num> Number: 7\n<title> Topic: Cats purr\n<desc> no\n</top>"),
        ("queries", "a.xml", '<topic number="7">\n Cats purr </topic>'),
    ],
)
def test_c3_documents_and_queries_are_read_in_every_form(tmp_path: Path, field: str, name: str, content: str) -> None:
    for packed, encode in PACKED.items():
        suffix = "" if packed == ".utf16" else packed
        (tmp_path / f"{name}{suffix}").write_bytes(encode(content))
        assert texts_of(tmp_path / f"{name}{suffix}", field) == {"7": "Cats purr"}, packed


def test_c3_csv_fields_may_hold_line_feeds_and_markup_two_documents_in_a_row(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path, "a.csv", 'id,text\n1,"a\n\nb"\n2,"c ""d"""\n'), "corpus") == {
        "1": "a\n\nb",
        "2": 'c "d"',
    }
    docs = "<DOC><DOCNO>1</DOCNO>a &lt; b</DOC>\n\n<DOC>\n<DOCNO>2</DOCNO>\n<DOCHDR>no</DOCHDR>\nAT&T\n</DOC>"
    assert texts_of(write(tmp_path, "a.trec", docs), "corpus") == {"1": "a < b", "2": "AT&T"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "a.jsonl is empty; corpus must be .jsonl"),
        (
            "a.jsonl",
            '[{"id": "1", "text": "a"}]',
            r"a.jsonl:1 is not an object with an id \(id, _id.* a text \(text, con",
        ),
        ("a.jsonl", '{"id": "1", "text": "a"}\n{"id": true, "text": "a"}', "a.jsonl:2 is not an object with an id"),
        ("a.tsv", "7 purr", "a.tsv:1 is not an id, a tab and a text"),
        ("a.csv", "7,purr\n", "a.csv:1 has the columns 7, purr; it must be a header with an id"),
        ("a.csv", 'id,text\n1,"a\n', "a.csv:2 is not CSV with the 2 columns of the header"),
        ("a.txt", "7 purr", "a.txt:1 has no known form; corpus must be .jsonl"),
        ("a.xml", "<root>\n</root>", "a.xml:1 is not a <DOC> with one <DOCNO>"),
    ],
)
def test_c3_texts_in_no_known_form_are_refused_with_the_form_that_is_wanted(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        texts_of(write(tmp_path, name, content), "corpus")


def test_c5_an_id_twice_and_a_query_without_text_are_counted(tmp_path: Path) -> None:
    left_out = LeftOut()
    file = write(tmp_path, "a.tsv", "1\tone\n2\t \n1\ttwo\n")
    assert texts_of(file, "queries", left_out) == {"1": "one"}
    assert [each["first"] for each in left_out.as_json()] == [
        f"{file}:2: query 2 has no text",
        f"{file}:3: the id 1 is that of an earlier text",
    ]
