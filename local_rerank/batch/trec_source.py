"""Read a TREC run with its queries and documents as rows, one per query with its candidates.

A run refers to texts in other files, in any order, and may be larger than memory. We therefore index the run, the
queries and the byte offsets of the documents in an SQLite file, which a resumed job finds again. Document texts are
read on demand. Texts come from files (`FileTexts`) or from an ir_datasets collection (`DatasetTexts`).
"""

from __future__ import annotations

import math
import os
import sqlite3
import weakref
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

from local_rerank.batch.durable import sync_folder
from local_rerank.batch.job import FROM_INPUT
from local_rerank.batch.rows import Row
from local_rerank.batch.sources import MAX_CONTENT_CHARS, Item, Position, Rejected, content_of, lines_of
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.collection import no_document, nothing_shared
from local_rerank.evaluation.left_out import (
    EMPTY_QUERY,
    NO_FINITE_SCORE,
    REPEATED_DOCUMENT,
    REPEATED_ID,
    UNKNOWN_DOCUMENT,
    UNKNOWN_QUERY,
)
from local_rerank.evaluation.text_forms import Line, TextForm, TextRecord, text_records
from local_rerank.evaluation.trec_files import RUN_FORM, run_lines
from local_rerank.text_files import not_utf8, open_utf8, plain_file

INDEX = f"{FROM_INPUT}candidates.sqlite"
PLAIN_CORPUS = f"{FROM_INPUT}corpus"
TABLES = """
CREATE TABLE candidates (line INTEGER PRIMARY KEY, query_id TEXT, document_id TEXT, score REAL);
CREATE TABLE queries (line INTEGER, query_id TEXT, text TEXT);
CREATE TABLE documents (line INTEGER, document_id TEXT, offset INTEGER);
CREATE TABLE rejected (number INTEGER, error TEXT, content TEXT, file TEXT);
"""
BY_DOCUMENT = "CREATE INDEX by_document ON candidates (document_id)"
NO_QUERY = "query_id NOT IN (SELECT query_id FROM queries)"
NO_DOCUMENT = "document_id NOT IN (SELECT document_id FROM documents)"
# row n of `topics` is the n-th query of the run that still has candidates
TOPICS = "CREATE TABLE topics AS SELECT query_id, min(line) AS line FROM candidates GROUP BY query_id ORDER BY line"
CACHE_KIB = 64_000  # SQLite page cache
ROWS_AT_ONCE = 10_000


class TextStore(Protocol):
    """The texts of queries and documents."""

    @property
    def names(self) -> tuple[object, object]:
        """What to call the queries and the documents in messages."""

    def index(self, database: sqlite3.Connection) -> None:
        """Fill the tables of queries and of documents, the latter with those of the candidates."""

    def documents(self, database: sqlite3.Connection, ids: Sequence[str]) -> dict[str, str]:
        """Return the texts by id; an unknown id is left out."""


class RunSource:
    """The queries of a run with their `top_k` candidates, best first. `folder` holds the index. Offsets count items."""

    is_pairs = False
    columns = ("id", "query")

    def __init__(self, run: Path, texts: TextStore, folder: Path, top_k: int | None = None) -> None:
        self.file = run
        self._texts = texts
        self._top_k = top_k
        file = folder / INDEX
        if not file.exists():
            _build(file, run, texts)
        self._database = sqlite3.connect(file, check_same_thread=False)
        weakref.finalize(self, self._database.close)  # Windows removes no open file
        self._num_rejected = self._count("rejected")
        self.size = self._num_rejected + self._count("topics")

    def read(self, position: Position) -> Iterator[Item]:
        for offset in range(position.offset, self.size):
            end = Position(offset + 1, offset + 2)
            if offset < self._num_rejected:
                yield self._rejected(offset), end
            else:
                yield self._row(offset - self._num_rejected), end

    def _rejected(self, place: int) -> Rejected:
        number, error, content, file = self._one("SELECT * FROM rejected WHERE rowid = ?", place + 1)
        return Rejected(number=number, error=error, content=content, file=file)

    def _row(self, place: int) -> Row | Rejected:
        query_id, line = self._one("SELECT query_id, line FROM topics WHERE rowid = ?", place + 1)
        (query,) = self._one("SELECT text FROM queries WHERE query_id = ?", query_id)
        candidates = self._database.execute(
            "SELECT document_id, score FROM candidates WHERE query_id = ? ORDER BY score DESC, line", (query_id,)
        ).fetchall()
        top, tail = candidates[: self._top_k], candidates[self._top_k :] if self._top_k is not None else []
        texts = self._texts.documents(self._database, [document_id for document_id, _ in top])
        if missing := [document_id for document_id, _ in top if document_id not in texts]:
            return Rejected(
                file=str(self.file), number=line, error=UNKNOWN_DOCUMENT.format(missing[0]), content=query_id
            )
        return Row(
            query=query,
            documents=tuple(texts[document_id] for document_id, _ in top),
            id=query_id,
            document_ids=tuple(document_id for document_id, _ in top),
            first_stage_scores=tuple(score for _, score in top),
            tail_ids=tuple(document_id for document_id, _ in tail),
            fields={"id": query_id, "query": query},
            number=line,
        )

    def _count(self, table: str) -> int:
        return int(self._database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def _one(self, statement: str, value: object) -> Any:
        return self._database.execute(statement, (value,)).fetchone()


class FileTexts:
    """Texts in files, as `local-rerank eval` reads them. `folder` takes a plain copy of a compressed corpus."""

    def __init__(self, queries: Path, corpus: Path, folder: Path) -> None:
        self.names = (queries, corpus)
        _judge(queries, "queries")
        self._form = _judge(corpus, "corpus")
        self._plain = plain_file(corpus, folder / PLAIN_CORPUS, "corpus")

    def index(self, database: sqlite3.Connection) -> None:
        queries, corpus = self.names
        with open_utf8(queries, "queries") as stream:
            texts = _texts(database, queries, "queries", stream)
            _fill(database, "INSERT INTO queries VALUES (?, ?, ?)", ((each.number, *found) for each, found in texts))
        _reject_repeated(database, "queries", queries, ("query_id",), REPEATED_ID)
        new = "(SELECT ? AS line, ? AS id, ? AS offset) AS new"
        wanted = "EXISTS (SELECT 1 FROM candidates WHERE document_id = new.id)"
        with self._plain.open("rb") as stream:
            places = _texts(database, corpus, "corpus", stream)
            rows = ((each.number, name, each.offset) for each, (name, _) in places)
            _fill(database, f"INSERT INTO documents SELECT * FROM {new} WHERE {wanted}", rows)
        _reject_repeated(database, "documents", corpus, ("document_id",), REPEATED_ID)

    def documents(self, database: sqlite3.Connection, ids: Sequence[str]) -> dict[str, str]:
        texts = {}
        with self._plain.open("rb") as stream:
            for document_id in ids:
                (offset,) = database.execute(
                    "SELECT offset FROM documents WHERE document_id = ?", (document_id,)
                ).fetchone()
                stream.seek(offset)
                record = next(self._form.records(_lines(stream, self.names[1], "corpus")), None)
                if record is not None and record.parsed is not None and record.parsed[0] == document_id:
                    texts[document_id] = record.parsed[1]  # otherwise the file has changed
        return texts


class DatasetTexts:
    """Texts of an ir_datasets collection, as its `default_text` joins their fields. Raises ConfigError."""

    def __init__(self, name: str) -> None:
        try:
            import ir_datasets
        except ModuleNotFoundError as error:
            raise ConfigError("a dataset needs ir_datasets: pip install ir-datasets") from error
        try:
            self._dataset = ir_datasets.load(name)
        except KeyError as error:
            raise ConfigError(f"dataset is {name!r}, which ir_datasets does not know") from error
        if not (self._dataset.has_docs() and self._dataset.has_queries()):
            raise ConfigError(
                f"dataset is {name}, which has no {'queries' if self._dataset.has_docs() else 'documents'}"
            )
        self._store: Any = None
        self.names = (f"dataset {name}", f"dataset {name}")

    def index(self, database: sqlite3.Connection) -> None:
        queries = ((None, query.query_id, query.default_text()) for query in self._dataset.queries_iter())
        _fill(database, "INSERT INTO queries VALUES (?, ?, ?)", queries)
        named = (row[0] for row in database.execute("SELECT DISTINCT document_id FROM candidates").fetchall())
        while chunk := list(islice(named, ROWS_AT_ONCE)):
            rows = ((None, document_id, 0) for document_id in self.documents(database, chunk))
            _fill(database, "INSERT INTO documents VALUES (?, ?, ?)", rows)

    def documents(self, database: sqlite3.Connection, ids: Sequence[str]) -> dict[str, str]:
        self._store = self._store or self._dataset.docs_store()
        return {name: document.default_text() for name, document in self._store.get_many(ids).items()}


def _build(file: Path, run: Path, texts: TextStore) -> None:
    """Write the index; the file gets its name once it is complete."""
    new = file.with_name(file.name + ".new")
    new.unlink(missing_ok=True)
    database = sqlite3.connect(new, isolation_level=None)
    # no journal, because a file that a kill leaves behind is thrown away
    database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA cache_size = -{CACHE_KIB}; {TABLES}")
    with open_utf8(run, "input") as stream:
        _fill(database, "INSERT INTO candidates VALUES (?, ?, ?, ?)", _candidates(database, run, stream))
    database.execute(BY_DOCUMENT)
    texts.index(database)
    _reject_repeated(database, "candidates", run, ("query_id", "document_id"), REPEATED_DOCUMENT)
    error = _reject_unknown(database, run, texts)
    database.close()
    if error is not None:
        raise error
    with new.open("rb+") as stream:
        os.fsync(stream.fileno())
    new.replace(file)
    sync_folder(file.parent)


def _reject_unknown(database: sqlite3.Connection, run: Path, texts: TextStore) -> InvalidRequest | None:
    """Reject the candidates without texts and list the topics; returns an error if no candidate is left."""

    def first(table: str, column: str) -> str | None:
        row = database.execute(f"SELECT {column} FROM {table} ORDER BY rowid LIMIT 1").fetchone()
        return None if row is None else str(row[0])

    queries, corpus = texts.names
    query_id, document_id = first("candidates", "query_id"), first("candidates", "document_id")
    if query_id is None or document_id is None:
        return InvalidRequest(f"no line of {run} has a finite score", field="input")
    _reject_where(database, "candidates", run, NO_QUERY, "query_id", UNKNOWN_QUERY)
    if (document_id := first("candidates", "document_id")) is None:
        return InvalidRequest(
            nothing_shared("query", run, query_id, queries, first("queries", "query_id")), field="queries"
        )
    _reject_where(database, "candidates", run, NO_DOCUMENT, "document_id", UNKNOWN_DOCUMENT)
    if first("candidates", "line") is None:
        return InvalidRequest(no_document(corpus, run, document_id), field="corpus")
    database.execute(TOPICS)
    return None


def _candidates(database: sqlite3.Connection, run: Path, stream: IO[bytes]) -> Iterator[tuple[int, str, str, float]]:
    numbered = ((number, line) for number, _, line in _lines(stream, run, "input", database))
    for number, line, parsed in run_lines(run, numbered, "input"):
        if parsed is None:
            _reject(database, run, number, f"the line is not {RUN_FORM}, as the first line is", line)
        elif not math.isfinite(parsed[2]):
            _reject(database, run, number, NO_FINITE_SCORE.format(parsed[2]), line)
        else:
            yield number, *parsed


def _judge(file: Path, field: str) -> TextForm:
    """Return the form of a file of texts; raises InvalidRequest."""
    with open_utf8(file, field) as stream:
        return text_records(file, field, _lines(stream, file, field))[0]


def _texts(
    database: sqlite3.Connection, file: Path, field: str, stream: IO[bytes]
) -> Iterator[tuple[TextRecord, tuple[str, str]]]:
    """Yield each record with its id and text; reject malformed ones and empty queries."""
    form, records = text_records(file, field, _lines(stream, file, field, database))
    for record in records:
        if record.parsed is None:
            _reject(database, file, record.number, f"the line is not {form.wanted}", record.content)
        elif field == "queries" and not record.parsed[1].strip():
            _reject(database, file, record.number, EMPTY_QUERY.format(record.parsed[0]), record.content)
        else:
            yield record, record.parsed


def _lines(stream: IO[bytes], file: object, field: str, database: sqlite3.Connection | None = None) -> Iterator[Line]:
    """Yield the lines of a stream. One that is not UTF-8 is rejected and left blank, or an error without a database."""
    for line, start, _ in lines_of(stream, Position()):
        try:
            text = line.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            if database is None:
                raise InvalidRequest(not_utf8(f"{file}:{start.number}", error), field=field) from error
            _reject(database, file, start.number, not_utf8("the line", error), content_of(line))
            text = ""
        yield start.number, start.offset, text


def _reject(database: sqlite3.Connection, file: object, number: int, error: str, line: str) -> None:
    database.execute("INSERT INTO rejected VALUES (?, ?, ?, ?)", (number, error, line[:MAX_CONTENT_CHARS], str(file)))


def _reject_repeated(database: sqlite3.Connection, table: str, file: Path, columns: Sequence[str], reason: str) -> None:
    """Reject all but the first of the rows with the same columns."""
    database.execute(f"CREATE INDEX {table}_by_id ON {table} ({', '.join(columns)})")
    same = " AND ".join(f"earlier.{column} = {table}.{column}" for column in columns)
    where = f"EXISTS (SELECT 1 FROM {table} AS earlier WHERE {same} AND earlier.rowid < {table}.rowid)"
    _reject_where(database, table, file, where, columns[-1], reason)


def _reject_where(
    database: sqlite3.Connection, table: str, file: Path, condition: str, column: str, reason: str
) -> None:
    """Move the rows that satisfy a condition to `rejected`; the reason names the value of a column."""
    content = "query_id || ' ' || document_id" if table == "candidates" else column
    database.execute(
        f"INSERT INTO rejected SELECT line, replace(?, '{{}}', {column}), {content}, ? FROM {table} WHERE {condition}",
        (reason, str(file)),
    )
    database.execute(f"DELETE FROM {table} WHERE {condition}")


def _fill(database: sqlite3.Connection, statement: str, rows: Iterator[tuple[object, ...]]) -> None:
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        database.execute("BEGIN")
        database.executemany(statement, chunk)
        database.execute("COMMIT")
