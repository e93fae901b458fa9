"""Read the files of an evaluation: documents, queries, relevance judgements (qrels) and a first-stage run.

Texts are .jsonl in BEIR's form (`id` or `_id`, `text`, and an optional `title` that is prepended) or .tsv (id, text).
Queries may also be TREC topics (.trec, .txt, .topics), of which the title is used. Judgements and runs use TREC's
formats. A malformed line raises InvalidRequest with its file and line number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from local_rerank.errors import InvalidRequest

TOPIC_SUFFIXES = (".trec", ".txt", ".topics")
_LINE_FORMS = {".jsonl": "an object with id and text", ".tsv": "an id, a tab and a text"}
_TOPIC = re.compile(r"<top>(.*?)(?=<top>|</top>|\Z)", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"<num>\s*(?:Number:)?\s*([^\s<]+)", re.IGNORECASE)
_TITLE = re.compile(r"<title>\s*(?:Topic:)?([^<]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that the first stage returned, with its score."""

    document_id: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Everything to evaluate: each query has a judgement and each candidate has a text."""

    documents: dict[str, str]  # by id: candidates of all judged queries, including those that max_queries cuts off
    queries: dict[str, str]  # by id, in file order
    qrels: dict[str, dict[str, int]]  # query id -> document id -> grade
    run: dict[str, tuple[Candidate, ...]]  # query id -> candidates, best first; may be empty
    num_unjudged_queries: int  # skipped because no judgement names them


def read_collection(
    *, corpus: Path, queries: Path, qrels: Path, run: Path, max_queries: int | None = None
) -> Collection:
    """Read the four files and keep the first `max_queries` queries; raises InvalidRequest."""
    texts = dict(read_texts(queries, "queries"))
    asked = dict(islice(texts.items(), max_queries))
    judgements, candidates = read_qrels(qrels), read_run(run)
    judged = {query_id: text for query_id, text in asked.items() if query_id in judgements}
    if not judged:
        raise InvalidRequest(f"none of the {len(asked)} queries of {queries} has a judgement in {qrels}", field="qrels")
    found = {query_id: candidates.get(query_id, ()) for query_id in judged}
    if not any(found.values()):
        raise InvalidRequest(f"none of the {len(judged)} judged queries has candidates in {run}", field="run")
    named = _document_ids(candidates.get(query_id, ()) for query_id in texts if query_id in judgements)
    documents = {document_id: text for document_id, text in read_texts(corpus, "corpus") if document_id in named}
    if missing := sorted(_document_ids(found.values()) - documents.keys()):
        raise InvalidRequest(f"{run} names document {missing[0]}, which {corpus} does not contain", field="run")
    return Collection(
        documents=documents,
        queries=judged,
        qrels={query_id: judgements[query_id] for query_id in judged},
        run=found,
        num_unjudged_queries=len(asked) - len(judged),
    )


def _document_ids(runs: Iterable[Iterable[Candidate]]) -> set[str]:
    return {candidate.document_id for run in runs for candidate in run}


def read_texts(file: Path, field: str) -> Iterator[tuple[str, str]]:
    """Yield the ids and texts of a file; raises InvalidRequest for a malformed or repeated line or an empty query."""
    seen: set[str] = set()
    for number, _, _, parsed in parse_texts(file, field, _numbered_lines(file, field)):
        where = f"{file}:{number}"
        if parsed is None:
            raise InvalidRequest(f"{where} is not {expected_form(file)}", field=field)
        name, text = parsed
        if name in seen:
            raise InvalidRequest(f"{where} has the id {name} of an earlier line", field=field)
        if field == "queries" and not text.strip():
            raise InvalidRequest(f"{where} has an empty query", field=field)
        seen.add(name)
        yield name, text


def parse_texts(
    file: Path, field: str, lines: Iterable[tuple[int, int, str]]
) -> Iterator[tuple[int, int, str, tuple[str, str] | None]]:
    """Parse lines given as number, byte offset and text.

    Yields each line's, or topic's, number, offset, content and (id, text), or None if it is malformed. Topics have no
    offset (0).
    """
    if is_topics(file, field):
        content = "\n".join(_with_blank_lines(lines))
        yield from ((number, 0, topic, parsed) for number, topic, parsed in parse_topics(content))
        return
    parse = text_parser(file, field)
    yield from ((number, offset, line, parse(line)) for number, offset, line in lines)


def _with_blank_lines(lines: Iterable[tuple[int, int, str]]) -> Iterator[str]:
    """Put empty lines in place of skipped ones, so that line numbers stay right."""
    last = 0
    for number, _, line in lines:
        yield from [""] * (number - last - 1)
        yield line
        last = number


def is_topics(file: Path, field: str) -> bool:
    return field == "queries" and file.suffix in TOPIC_SUFFIXES


def expected_form(file: Path) -> str:
    """Describe what a line of this kind of file must be, for error messages."""
    return _LINE_FORMS.get(file.suffix, "a topic with <num> and <title>")


def parse_topics(text: str) -> Iterator[tuple[int, str, tuple[str, str] | None]]:
    """Yield each topic's line number, content, and (number, title) if it has both.

    >>> list(parse_topics("<top>\\n<num> Number: 301\\n<title> Organized crime\\n\\n<desc> ...\\n</top>"))[0][2]
    ('301', 'Organized crime')
    """
    for found in _TOPIC.finditer(text):
        number, title = _NUMBER.search(found[1]), _TITLE.search(found[1])
        parsed = (number[1], " ".join(title[1].split())) if number and title else None
        yield text.count("\n", 0, found.start()) + 1, found[0], parsed


def text_parser(file: Path, field: str) -> Callable[[str], tuple[str, str] | None]:
    """Return the function that parses a line into (id, text), or None for a malformed one."""
    parse = {".jsonl": _parse_json, ".tsv": _parse_tsv}.get(file.suffix)
    if parse is None:
        topics = f", or topics ({', '.join(TOPIC_SUFFIXES)})" if field == "queries" else ""
        raise InvalidRequest(f"{file} must be a .jsonl or a .tsv file{topics}", field=field)
    return parse


def read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Read grades by query and document from lines `query 0 document grade`."""
    qrels: dict[str, dict[str, int]] = {}
    for where, line in _located_lines(file, "qrels"):
        try:
            query_id, _, document_id, grade = line.split()
            value = int(grade)
        except ValueError as error:
            raise InvalidRequest(f"{where} is not `query 0 document grade`", field="qrels") from error
        if qrels.setdefault(query_id, {}).setdefault(document_id, value) != value:
            raise InvalidRequest(f"{where} contradicts an earlier grade of the same document", field="qrels")
    return qrels


def read_orders(file: Path, queries: Container[str]) -> dict[str, list[str]]:
    """Read a run's document ids by query, best first, for these queries only."""
    return {
        query_id: [candidate.document_id for candidate in candidates]
        for query_id, candidates in read_run(file, queries).items()
    }


def read_run(file: Path, queries: Container[str] | None = None) -> dict[str, tuple[Candidate, ...]]:
    """Read candidates by query from lines `query Q0 document rank score name`, sorted by score; ties keep file order.

    `queries`, if given, limits which queries are read.
    """
    found: dict[str, dict[str, float]] = {}
    for where, line in _located_lines(file, "run"):
        query_id, document_id, value = parse_run_line(line, where)
        if queries is not None and query_id not in queries:
            continue
        if document_id in found.setdefault(query_id, {}):
            raise InvalidRequest(f"{where} repeats document {document_id}", field="run")
        found[query_id][document_id] = value
    return {
        query_id: tuple(Candidate(*item) for item in sorted(scores.items(), key=lambda item: -item[1]))
        for query_id, scores in found.items()
    }


def parse_run_line(line: str, where: str) -> tuple[str, str, float]:
    """Return query, document and score; raises InvalidRequest that begins with `where`."""
    try:
        query_id, _, document_id, _, score, _ = line.split()
        value = float(score)
    except ValueError as error:
        raise InvalidRequest(f"{where} is not `query Q0 document rank score name`", field="run") from error
    if not math.isfinite(value):
        raise InvalidRequest(f"{where} has the score {score}; it must be a finite number", field="run")
    return query_id, document_id, value


def _located_lines(file: Path, field: str) -> Iterator[tuple[str, str]]:
    return ((f"{file}:{number}", line) for number, _, line in _numbered_lines(file, field))


def _numbered_lines(file: Path, field: str) -> Iterator[tuple[int, int, str]]:
    """Yield number, byte offset and text of each line that is not blank.

    Only \\n ends a line, because JSON strings may contain Unicode's other line breaks.
    """
    offset = 0
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, offset, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                offset += len(line)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file}:{number} is not UTF-8: {error.reason}", field=field) from error
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}", field=field) from error


def _parse_json(line: str) -> tuple[str, str] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    name, text, title = value.get("id", value.get("_id")), value.get("text"), value.get("title") or ""
    if not isinstance(name, str | int) or not isinstance(text, str) or not isinstance(title, str):
        return None
    return str(name), f"{title} {text}" if title else text


def _parse_tsv(line: str) -> tuple[str, str] | None:
    name, tab, text = line.partition("\t")
    return (name, text.replace("\t", " ")) if tab and name else None
