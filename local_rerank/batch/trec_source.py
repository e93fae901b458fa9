"""Read a TREC run with its queries and documents as rows, one per query with its candidates.

A run refers to texts in other files, in any order, and may be larger than memory. We therefore index the run, the
queries and the byte offsets of the documents in an SQLite file, which a resumed job finds again. Document texts are
read on demand. Texts come from files (`FileTexts`) or from an ir_datasets collection (`DatasetTexts`).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from local_rerank.batch.durable import sync_folder
from local_rerank.batch.rows import Row
from local_rerank.batch.sources import MAX_CONTENT_CHARS, Item, Position, Rejected, content_of, lines_of
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.collection import expected_form, is_topics, parse_run_line, parse_texts, text_parser

TABLES = """
CREATE TABLE candidates (line INTEGER PRIMARY KEY, query_id TEXT, document_id TEXT, score REAL);
CREATE TABLE queries (query_id TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID;
CREATE TABLE documents (document_id TEXT PRIMARY KEY, offset INTEGER) WITHOUT ROWID;
CREATE TABLE rejected (number INTEGER, error TEXT, content TEXT, file TEXT);
"""
INDEXES = """
CREATE INDEX by_query ON candidates (query_id, document_id);
CREATE INDEX by_document ON candidates (document_id);
"""
REPEATED = """EXISTS (SELECT 1 FROM candidates AS earlier WHERE earlier.query_id = candidates.query_id
AND earlier.document_id = candidates.document_id AND earlier.line < candidates.line)"""
NO_QUERY = "query_id NOT IN (SELECT query_id FROM queries)"
NO_DOCUMENT = "document_id NOT IN (SELECT document_id FROM documents)"
# row n of `topics` is the n-th query of the run that still has candidates
TOPICS = "CREATE TABLE topics AS SELECT query_id, min(line) AS line FROM candidates GROUP BY query_id ORDER BY line"
CACHE_KIB = 64_000  # SQLite page cache
ROWS_AT_ONCE = 10_000


class TextStore(Protocol):
    """The texts of queries and documents."""

    @property
    def lists_documents(self) -> bool:
        """Whether `index` also fills the table of documents."""

    def index(self, database: sqlite3.Connection) -> None:
        """Fill the table of queries."""

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
        file = folder / "candidates.sqlite"
        if not file.exists():
            _build(file, run, texts)
        self._database = sqlite3.connect(file, check_same_thread=False)
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
            what = f"document {missing[0]} of query {query_id} is not in the corpus"
            return Rejected(file=str(self.file), number=line, error=what, content=query_id)
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
    """Texts in .jsonl or .tsv files, as `local-rerank eval` reads them. The first text of an id counts."""

    lists_documents = True

    def __init__(self, queries: Path, corpus: Path) -> None:
        self._queries = queries
        self._corpus = corpus
        self._parse = text_parser(corpus, "corpus")
        for file, field in ((queries, "queries"), (corpus, "corpus")):
            if not is_topics(file, field):
                text_parser(file, field)
            if not file.is_file():
                raise InvalidRequest(f"{field} is {file}; there is no such file", field=field)

    def index(self, database: sqlite3.Connection) -> None:
        queries = ((name, text) for name, text, _ in _texts(database, self._queries, "queries"))
        _fill(database, "INSERT OR IGNORE INTO queries VALUES (?, ?)", queries)
        places = ((name, offset) for name, _, offset in _texts(database, self._corpus, "corpus"))
        wanted = "EXISTS (SELECT 1 FROM candidates WHERE document_id = ?1)"
        _fill(database, f"INSERT OR IGNORE INTO documents SELECT ?1, ?2 WHERE {wanted}", places)

    def documents(self, database: sqlite3.Connection, ids: Sequence[str]) -> dict[str, str]:
        texts = {}
        with self._corpus.open("rb") as stream:
            for document_id in ids:
                (offset,) = database.execute(
                    "SELECT offset FROM documents WHERE document_id = ?", (document_id,)
                ).fetchone()
                stream.seek(offset)
                parsed = self._parse(_decode(stream.readline()))
                if parsed is not None and parsed[0] == document_id:  # otherwise the file has changed
                    texts[document_id] = parsed[1]
        return texts


class DatasetTexts:
    """Texts of an ir_datasets collection, as its `default_text` joins their fields. Raises ConfigError."""

    lists_documents = False

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

    def index(self, database: sqlite3.Connection) -> None:
        queries = ((query.query_id, query.default_text()) for query in self._dataset.queries_iter())
        _fill(database, "INSERT OR IGNORE INTO queries VALUES (?, ?)", queries)

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
    _fill(database, "INSERT INTO candidates VALUES (?, ?, ?, ?)", _candidates(database, run))
    database.executescript(INDEXES)
    texts.index(database)
    _reject_where(database, run, REPEATED, "'document ' || document_id || ' is repeated'")
    _reject_where(database, run, NO_QUERY, "'query ' || query_id || ' is not in the queries'")
    if texts.lists_documents:
        _reject_where(database, run, NO_DOCUMENT, "'document ' || document_id || ' is not in the corpus'")
    database.execute(TOPICS)
    (num_topics,) = database.execute("SELECT count(*) FROM topics").fetchone()
    database.close()
    if num_topics == 0:
        raise InvalidRequest(f"no line of {run} names a query and a document whose texts are known", field="input")
    with new.open("rb+") as stream:
        os.fsync(stream.fileno())
    new.replace(file)
    sync_folder(file.parent)


def _candidates(database: sqlite3.Connection, run: Path) -> Iterator[tuple[int, str, str, float]]:
    for number, _, line in _text_lines(database, run, "input"):
        try:
            yield number, *parse_run_line(line, "the line")
        except InvalidRequest as error:
            _reject(database, run, number, str(error), line)


def _texts(database: sqlite3.Connection, file: Path, field: str) -> Iterator[tuple[str, str, int]]:
    """Yield id, text and offset of each line or topic; reject malformed ones and empty queries."""
    for number, offset, line, parsed in parse_texts(file, field, _text_lines(database, file, field)):
        if parsed is None:
            _reject(database, file, number, f"the line is not {expected_form(file)}", line)
        elif field == "queries" and not parsed[1].strip():
            _reject(database, file, number, "the query is empty", line)
        else:
            yield *parsed, offset


def _text_lines(database: sqlite3.Connection, file: Path, field: str) -> Iterator[tuple[int, int, str]]:
    """Yield number, offset and text of each line that is not blank; reject lines that are not UTF-8."""
    try:
        with file.open("rb") as stream:
            for line, start, _ in lines_of(stream, Position()):
                if line.strip():
                    try:
                        yield start.number, start.offset, _decode(line)
                    except UnicodeDecodeError as error:
                        _reject(database, file, start.number, f"not UTF-8: {error.reason}", content_of(line))
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}", field=field) from error


def _decode(line: bytes) -> str:
    return line.decode("utf-8-sig").rstrip("\r\n")


def _reject(database: sqlite3.Connection, file: Path, number: int, error: str, line: str) -> None:
    database.execute("INSERT INTO rejected VALUES (?, ?, ?, ?)", (number, error, line[:MAX_CONTENT_CHARS], str(file)))


def _reject_where(database: sqlite3.Connection, run: Path, condition: str, error: str) -> None:
    """Move the candidates that satisfy a condition to `rejected`; `error` is an SQL expression."""
    content = "query_id || ' ' || document_id"
    database.execute(
        f"INSERT INTO rejected SELECT line, {error}, {content}, ? FROM candidates WHERE {condition}", (str(run),)
    )
    database.execute(f"DELETE FROM candidates WHERE {condition}")


def _fill(database: sqlite3.Connection, statement: str, rows: Iterator[tuple[object, ...]]) -> None:
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        database.execute("BEGIN")
        database.executemany(statement, chunk)
        database.execute("COMMIT")
