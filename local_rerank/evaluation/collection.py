"""The files of an evaluation -> `Collection`: documents, queries, judgements and a first stage's run.

Texts are .jsonl (`id` or `_id`, `text`, and a `title` that is put before it, as BEIR has them) or .tsv (id, then text),
queries also the topics of TREC's ad hoc tracks (.trec, .txt, .topics), of which the titles are taken; judgements and
runs are TREC's. A malformed line is an InvalidRequest that names file and line. Nothing here knows of models or
measures.
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

WANTED = {".jsonl": "an object with id and text", ".tsv": "an id, a tab and a text"}
"""What each line of a file of texts must be."""
TOPICS = (".trec", ".txt", ".topics")
_TOPIC = re.compile(r"<top>(.*?)(?=<top>|</top>|\Z)", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"<num>\s*(?:Number:)?\s*([^\s<]+)", re.IGNORECASE)
_TITLE = re.compile(r"<title>\s*(?:Topic:)?([^<]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that the first stage found, with that stage's score."""

    document_id: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What can be evaluated: every query here has a judgement, every candidate has its text."""

    documents: dict[str, str]  # by id; those that the run names for any judged query, left out by max_queries or not
    queries: dict[str, str]  # by id, in the order of their file
    qrels: dict[str, dict[str, int]]  # grade by query and document
    run: dict[str, tuple[Candidate, ...]]  # by query, best first; empty where the first stage found nothing
    num_unjudged_queries: int  # queries that were left out


def read_collection(
    *, corpus: Path, queries: Path, qrels: Path, run: Path, max_queries: int | None = None
) -> Collection:
    """Read the four files, `max_queries` of the queries; raises InvalidRequest."""
    texts = dict(read_texts(queries, "queries"))
    asked = dict(islice(texts.items(), max_queries))
    judgements, candidates = read_qrels(qrels), read_run(run)
    judged = {query_id: text for query_id, text in asked.items() if query_id in judgements}
    if not judged:
        raise InvalidRequest(f"none of the {len(asked)} queries of {queries} is judged in {qrels}", field="qrels")
    found = {query_id: candidates.get(query_id, ()) for query_id in judged}
    if not any(found.values()):
        raise InvalidRequest(f"none of the {len(judged)} judged queries has candidates in {run}", field="run")
    wanted = _named(found.values())
    whole = _named(candidates.get(query_id, ()) for query_id in texts if query_id in judgements)
    documents = {document_id: text for document_id, text in read_texts(corpus, "corpus") if document_id in whole}
    if missing := sorted(wanted - documents.keys()):
        raise InvalidRequest(f"{run} names document {missing[0]}, which {corpus} does not hold", field="run")
    return Collection(
        documents=documents,
        queries=judged,
        qrels={query_id: judgements[query_id] for query_id in judged},
        run=found,
        num_unjudged_queries=len(asked) - len(judged),
    )


def _named(runs: Iterable[Iterable[Candidate]]) -> set[str]:
    """The documents that are candidates of some query."""
    return {candidate.document_id for run in runs for candidate in run}


def read_texts(file: Path, field: str) -> Iterator[tuple[str, str]]:
    """Ids and texts of a .jsonl or .tsv file, one after the other; a query must hold some text."""
    seen: set[str] = set()
    for where, parsed in _parsed_texts(file, field):
        if parsed is None:
            raise InvalidRequest(f"{where} is not {wanted(file)}", field=field)
        name, text = parsed
        if name in seen:
            raise InvalidRequest(f"{where} has the id {name} of an earlier line", field=field)
        if field == "queries" and not text.strip():
            raise InvalidRequest(f"{where} has an empty query", field=field)
        seen.add(name)
        yield name, text


def _parsed_texts(file: Path, field: str) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Each with `file:number`; None of a line, or a topic, that is none."""
    if is_topics(file, field):
        text = "\n".join(line for _, line in _lines(file, field, blank=True))
        yield from ((f"{file}:{number}", parsed) for number, _, parsed in parse_topics(text))
        return
    parse = text_parser(file, field)
    yield from ((where, parse(line)) for where, line in _lines(file, field))


def is_topics(file: Path, field: str) -> bool:
    return field == "queries" and file.suffix in TOPICS


def wanted(file: Path) -> str:
    """What a line of a file of texts must be, or a topic."""
    return WANTED.get(file.suffix, "a topic with <num> and <title>")


def parse_topics(text: str) -> Iterator[tuple[int, str, tuple[str, str] | None]]:
    """The topics of a file, each with its line, its content, and its number and title, if it has both.

    >>> list(parse_topics("<top>\\n<num> Number: 301\\n<title> Organized crime\\n\\n<desc> ...\\n</top>"))[0][2]
    ('301', 'Organized crime')
    """
    for found in _TOPIC.finditer(text):
        number, title = _NUMBER.search(found[1]), _TITLE.search(found[1])
        parsed = (number[1], " ".join(title[1].split())) if number and title else None
        yield text.count("\n", 0, found.start()) + 1, found[0], parsed


def text_parser(file: Path, field: str) -> Callable[[str], tuple[str, str] | None]:
    """What makes id and text of one line of a file, or None of a line that is none."""
    parse = {".jsonl": _parse_json, ".tsv": _parse_tsv}.get(file.suffix)
    if parse is None:
        topics = f", or topics ({', '.join(TOPICS)})" if field == "queries" else ""
        raise InvalidRequest(f"{file} must be a .jsonl or a .tsv file{topics}", field=field)
    return parse


def read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Grades by query and document from lines `query 0 document grade`."""
    qrels: dict[str, dict[str, int]] = {}
    for where, line in _lines(file, "qrels"):
        try:
            query_id, _, document_id, grade = line.split()
            value = int(grade)
        except ValueError as error:
            raise InvalidRequest(f"{where} is not `query 0 document grade`", field="qrels") from error
        if qrels.setdefault(query_id, {}).setdefault(document_id, value) != value:
            raise InvalidRequest(f"{where} contradicts an earlier grade of the same document", field="qrels")
    return qrels


def read_orders(file: Path, queries: Container[str]) -> dict[str, list[str]]:
    """Document ids of a run by query, best first, of these queries only."""
    return {
        query_id: [candidate.document_id for candidate in candidates]
        for query_id, candidates in read_run(file, queries).items()
    }


def read_run(file: Path, queries: Container[str] | None = None) -> dict[str, tuple[Candidate, ...]]:
    """Candidates by query from lines `query Q0 document rank score name`, sorted by score; ties as in the file.

    Other queries than `queries`, if that is given, are passed over.
    """
    found: dict[str, dict[str, float]] = {}
    for where, line in _lines(file, "run"):
        query_id, document_id, value = parse_run_line(line, where)
        if queries is not None and query_id not in queries:
            continue
        if document_id in found.setdefault(query_id, {}):
            raise InvalidRequest(f"{where} has document {document_id} a second time", field="run")
        found[query_id][document_id] = value
    return {
        query_id: tuple(Candidate(*item) for item in sorted(scores.items(), key=lambda item: -item[1]))
        for query_id, scores in found.items()
    }


def parse_run_line(line: str, where: str) -> tuple[str, str, float]:
    """Query, document and score; raises InvalidRequest."""
    try:
        query_id, _, document_id, _, score, _ = line.split()
        value = float(score)
    except ValueError as error:
        raise InvalidRequest(f"{where} is not `query Q0 document rank score name`", field="run") from error
    if not math.isfinite(value):
        raise InvalidRequest(f"{where} has the score {score}", field="run")
    return query_id, document_id, value


def _lines(file: Path, field: str, *, blank: bool = False) -> Iterator[tuple[str, str]]:
    """Lines that hold something (all with `blank`), each with `file:number`.

    Only \\n ends one: JSON may hold Unicode's other breaks.
    """
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                where = f"{file}:{number}"
                if blank or line.strip():
                    yield where, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{where} is not UTF-8: {error.reason}", field=field) from error
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
