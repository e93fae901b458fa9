"""Read the texts of a corpus or of queries, in every form that collections come in.

The suffix decides the form, or else the first line: JSON lines, TSV, CSV with a header, or TREC markup (`<DOC>` for
documents, `<top>` or `<topic>` for queries). Fields are found by the names that collections give them.
"""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any

from local_rerank.errors import InvalidRequest
from local_rerank.evaluation.left_out import EMPTY_QUERY, REPEATED_ID, LeftOut
from local_rerank.text_files import lines as lines_of_file
from local_rerank.text_files import suffix_of

Line = tuple[int, int, str]
"""Number, byte offset and text of a line."""
Text = tuple[str, str]
"""The id and the text of a document or a query."""

ID_NAMES = {
    "corpus": ("id", "_id", "docid", "doc_id", "docno", "document_id", "pid", "passage_id", "corpus-id", "corpus_id"),
    "queries": ("id", "_id", "qid", "query_id", "query-id", "topic_id", "number"),
}
TEXT_NAMES = {
    "corpus": ("text", "contents", "content", "passage", "body", "document"),
    "queries": ("text", "query", "question", "title"),
}
WHOLE_TEXTS = ("contents",)  # Anserini's field, which holds the title already
_DOCUMENT_ID = re.compile(r"<DOCNO>\s*(.*?)\s*</DOCNO>", re.DOTALL | re.IGNORECASE)
_NO_TEXT = re.compile(r"<(DOCNO|DOCHDR|DOCID)>.*?</\1>|<[^<>]*>", re.DOTALL | re.IGNORECASE)
_TOPIC = re.compile(r"<(top|topic)\b([^<>]*)>(.*?)(?=<\1\b|</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_NUMBER_OF_TOPIC = re.compile(r"<(?:num|number)>\s*(?:Number:)?\s*([^\s<]+)", re.IGNORECASE)
_NUMBER_ATTRIBUTE = re.compile(r"""\b(?:number|num|id)\s*=\s*["']\s*([^"']+?)\s*["']""", re.IGNORECASE)
_TITLE_OF_TOPIC = re.compile(r"<(?:title|query)\b[^<>]*>\s*(?:Topic:)?([^<]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TextRecord:
    """One document or query as its file has it."""

    number: int  # of its first line
    offset: int  # of its first line; 0 for topics
    content: str
    parsed: Text | None  # None if it is malformed


@dataclass(frozen=True, slots=True)
class TextForm:
    """How the records of a file are found."""

    wanted: str  # what a record must be, for messages
    records: Callable[[Iterable[Line]], Iterator[TextRecord]]


def read_texts(
    file: Path, field: str, left_out: LeftOut, only: Container[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the ids and texts of a file, or `only` those with these ids; raises InvalidRequest."""
    seen: set[str] = set()
    numbered = ((number, 0, line) for number, line in lines_of_file(file, field))
    form, records = text_records(file, field, numbered)
    for record in records:
        where = f"{file}:{record.number}"
        if record.parsed is None:
            raise InvalidRequest(f"{where} is not {form.wanted}", field=field)
        name, text = record.parsed
        if only is not None and name not in only:
            continue
        if name in seen:
            left_out.add(REPEATED_ID, name, where)
        elif field == "queries" and not text.strip():
            left_out.add(EMPTY_QUERY, name, where)
        else:
            seen.add(name)
            yield name, text


def text_records(file: Path, field: str, lines: Iterable[Line]) -> tuple[TextForm, Iterator[TextRecord]]:
    """Return a file's form and its records; raises InvalidRequest if the file is empty or begins in no known form."""
    rest = dropwhile(lambda line: not line[2].strip(), lines)
    first = next(rest, None)
    if first is None:
        raise InvalidRequest(f"{file} is empty; {field} must be {_ALL_FORMS[field]}", field=field)
    form = _form_of(file, field, first)
    records = form.records(chain([first], rest))
    head = next(records, None)
    if head is None or head.parsed is None:
        number = first[0] if head is None else head.number
        raise InvalidRequest(f"{file}:{number} is not {form.wanted}", field=field)
    return form, chain([head], records)


def _form_of(file: Path, field: str, line: Line) -> TextForm:
    number, _, text = line
    suffix, begin = suffix_of(file), text.lstrip()
    if suffix == ".csv":
        return _csv_form(file, field, line)
    if suffix == ".jsonl" or (suffix != ".tsv" and begin.startswith(("{", "["))):
        parse = _json_parser(field)
        return TextForm(f"{_wanted_fields('an object', field)}, in one line", _each_line(parse))
    if suffix != ".tsv" and begin.startswith("<"):
        return _TOPICS if field == "queries" else _DOCS
    if suffix == ".tsv" or "\t" in text:
        return _tsv_form(field, text)
    raise InvalidRequest(f"{file}:{number} has no known form; {field} must be {_ALL_FORMS[field]}", field=field)


def _wanted_fields(what: str, field: str) -> str:
    ids, texts = ID_NAMES[field], TEXT_NAMES[field]
    return f"{what} with an id ({', '.join(ids)}) and a text ({', '.join(texts)})"


_ALL_FORMS = {
    field: f".jsonl (id, text), .tsv (an id, a tab and a text), .csv (with a header) or {markup}"
    for field, markup in (("corpus", "TREC documents (<DOC>)"), ("queries", "TREC topics (<top> or <topic>)"))
}


def _each_line(
    parse: Callable[[str], Text | None], header: str | None = None
) -> Callable[[Iterable[Line]], Iterator[TextRecord]]:
    """Records of one line; blank lines and the header are skipped."""

    def records(lines: Iterable[Line]) -> Iterator[TextRecord]:
        for number, offset, line in lines:
            if line.strip() and line != header:
                yield TextRecord(number, offset, line, parse(line))

    return records


def _json_parser(field: str) -> Callable[[str], Text | None]:
    def parse(line: str) -> Text | None:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return _text_of(value, field) if isinstance(value, dict) else None

    return parse


def _text_of(record: dict[str, Any], field: str) -> Text | None:
    """Return id and text of a record, with its title before the text."""
    name = next((record[key] for key in ID_NAMES[field] if record.get(key) is not None), None)
    key = next((key for key in TEXT_NAMES[field] if record.get(key) is not None), None)
    text, title = (None, "") if key is None else (record[key], record.get("title") or "")
    if not isinstance(name, str | int) or isinstance(name, bool) or not isinstance(text, str):
        return None
    if str(name).strip() == "" or not isinstance(title, str):
        return None
    return str(name).strip(), text if not title or key in ("title", *WHOLE_TEXTS) else f"{title} {text}"


def _tsv_form(field: str, first: str) -> TextForm:
    columns = [name.strip().lower() for name in first.split("\t")]
    if _are_names(columns, field):
        form = f"a line with the {len(columns)} columns of the header"
        return TextForm(form, _each_line(lambda line: _row(columns, line.split("\t"), field), header=first))
    return TextForm("an id, a tab and a text", _each_line(_parse_tsv))


def _parse_tsv(line: str) -> Text | None:
    name, tab, text = line.partition("\t")
    return (name.strip(), text.replace("\t", " ")) if tab and name.strip() else None


def _are_names(columns: Sequence[str], field: str) -> bool:
    return any(name in columns for name in ID_NAMES[field]) and any(name in columns for name in TEXT_NAMES[field])


def _row(columns: Sequence[str], cells: Sequence[str], field: str) -> Text | None:
    return _text_of(dict(zip(columns, cells, strict=True)), field) if len(cells) == len(columns) else None


def _csv_form(file: Path, field: str, line: Line) -> TextForm:
    header = line[2]
    columns = [name.strip().lower() for name in next(csv.reader([header]), [])]
    if not _are_names(columns, field):
        what = f"{file}:{line[0]} has the columns {', '.join(columns)}; it must be {_wanted_fields('a header', field)}"
        raise InvalidRequest(what, field=field)

    def records(lines: Iterable[Line]) -> Iterator[TextRecord]:
        taken: list[Line] = []  # the lines of the current record: a quoted cell may hold line feeds

        def texts() -> Iterator[str]:
            for each in lines:
                if each[2] != header:
                    taken.append(each)
                    yield each[2] + "\n"

        reader = csv.reader(texts(), strict=True)
        while True:
            taken.clear()
            try:
                cells = next(reader)
                parsed = _row(columns, cells, field)
            except StopIteration:
                return
            except csv.Error:
                cells, parsed = [header], None
            if cells:
                yield TextRecord(taken[0][0], taken[0][1], "\n".join(text for _, _, text in taken), parsed)

    return TextForm(f"CSV with the {len(columns)} columns of the header", records)


def _docs(lines: Iterable[Line]) -> Iterator[TextRecord]:
    """Yield what stands from a line with `<DOC>` to the one with `</DOC>`; anything between two is skipped."""
    taken: list[Line] = []
    for line in lines:
        lowered = line[2].lower()
        if taken or "<doc>" in lowered:
            taken.append(line)
        if taken and "</doc>" in lowered:
            yield _doc(taken)
            taken = []
    if taken:
        yield _doc(taken)


def _doc(lines: Sequence[Line]) -> TextRecord:
    content = "\n".join(text for _, _, text in lines)
    ids = _DOCUMENT_ID.findall(content)
    parsed = (ids[0], _plain(_NO_TEXT.sub(" ", content))) if len(ids) == 1 and ids[0] else None
    return TextRecord(lines[0][0], lines[0][1], content, parsed)


def _plain(markup: str) -> str:
    return " ".join(html.unescape(markup).split())


def _topics(lines: Iterable[Line]) -> Iterator[TextRecord]:
    numbered = list(lines)
    content = "\n".join(text for _, _, text in numbered)
    for found in _TOPIC.finditer(content):
        attribute = _NUMBER_ATTRIBUTE.search(found[2])
        number = _NUMBER_OF_TOPIC.search(found[3]) or attribute
        title = _TITLE_OF_TOPIC.search(found[3])
        text = title[1] if title else None if "<" in found[3] else found[3]  # some topics are nothing but their text
        parsed = None if number is None or text is None else (number[1], _plain(text))
        line = numbered[content.count("\n", 0, found.start())]
        yield TextRecord(line[0], 0, found[0], parsed)


_TOPICS = TextForm("a topic with a number (<num>, <number>, number=) and a <title> or <query>", _topics)
_DOCS = TextForm("a <DOC> with one <DOCNO>", _docs)
