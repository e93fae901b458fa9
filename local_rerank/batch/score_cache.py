"""Cache scores by pair in an SQLite file, so that no run scores the same pair again.

A key is a digest of everything a score depends on: the bytes of weights and tokenizer, the prompt template, the
settings that change scores, instruction, query and document. No text is stored. Processes may share a file. Scores in
chunks have a table of their own, so that a file of a job without chunks has the form that it always had.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from local_rerank.batch.rows import CHUNK_COLUMNS, PAIR_COLUMNS
from local_rerank.checkpoints.find import Checkpoint
from local_rerank.config import OF_CHUNKS
from local_rerank.errors import ConfigError

if TYPE_CHECKING:
    from local_rerank.config import EngineConfig
    from local_rerank.reranker import Reranker

SCHEMA_VERSION = 1
BUSY_SECONDS = 60.0  # timeout for another process that holds the write lock
_TABLES = {
    name: [column for column in columns if column != "relevance_score"]
    for name, columns in (("scores", PAIR_COLUMNS), ("scores_in_chunks", PAIR_COLUMNS | CHUNK_COLUMNS))
}
_SQL_TYPES = {float: "REAL", int: "INTEGER"}
_MAX_VARIABLES = 500  # keys per query; SQLite accepts at least 999
_SPEED_ONLY = {
    "model", "revision", "recipe", "instruction",  # part of the key by their contents
    "device", "device_map", "attention", "threads", "max_batch_tokens", "max_queued_tokens",
    "no_cuda_graphs", "no_compile", "deterministic", "calibration", "scores",
}  # fmt: skip
"""Settings that change log-odds by rounding at most. Every other setting is part of the key."""

PairKey = tuple[str, str, str]
"""Instruction, query, document."""


@dataclass(frozen=True, slots=True)
class CachedScore:
    """The cached result of one pair."""

    log_odds: float
    num_tokens: int
    num_truncated_tokens: int
    num_chunks: int | None = None  # None, as below: not scored in chunks
    best_chunk_start: int | None = None
    best_chunk_end: int | None = None
    best_chunk_score: float | None = None


class ScoreCache:
    """The scores of one model, in chunks or not; `identity` comes from `score_identity`. Raises ConfigError."""

    def __init__(self, file: Path, identity: str, *, in_chunks: bool = False) -> None:
        if not file.parent.is_dir():
            raise ConfigError(f"cache is {file}; there is no folder {file.parent}")
        self._file = file
        self._identity = identity.encode()
        self._table = "scores_in_chunks" if in_chunks else "scores"
        try:
            self._database = sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._check()
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing, a power cut the last writes
            self._create()
        except sqlite3.Error as error:
            raise ConfigError(f"cache {file} cannot be used: {error}") from error

    def _check(self) -> None:
        """Raise ConfigError, before anything is written, if the file is a database of another program or version."""
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        tables = [table for (table,) in self._database.execute("SELECT name FROM sqlite_schema")]
        columns = "SELECT name FROM pragma_table_info(?)"
        found = {table: [name for (name,) in self._database.execute(columns, [table])] for table in tables}
        if any(names != ["key", *_TABLES.get(table, ())] for table, names in found.items()):
            raise ConfigError(f"cache {self._file} is a database of another program; choose another name")
        if version not in (0, SCHEMA_VERSION):
            raise ConfigError(f"cache {self._file} has version {version}; this program reads version {SCHEMA_VERSION}")

    def _create(self) -> None:
        kinds = PAIR_COLUMNS | CHUNK_COLUMNS
        columns = ", ".join(f"{name} {_SQL_TYPES[kinds[name]]} NOT NULL" for name in _TABLES[self._table])
        definition = f"{self._table} (key BLOB PRIMARY KEY, {columns}) WITHOUT ROWID"
        self._database.execute(f"CREATE TABLE IF NOT EXISTS {definition}")
        self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def get(self, pairs: Iterable[PairKey]) -> dict[PairKey, CachedScore]:
        """Return the cached scores of these pairs; unknown pairs are left out."""
        found: dict[PairKey, CachedScore] = {}
        by_digest = {self._digest(pair): pair for pair in pairs}
        all_digests = list(by_digest)
        for start in range(0, len(all_digests), _MAX_VARIABLES):
            digests = all_digests[start : start + _MAX_VARIABLES]
            marks = ", ".join("?" * len(digests))
            rows = self._database.execute(f"SELECT * FROM {self._table} WHERE key IN ({marks})", digests)
            found.update((by_digest[digest], CachedScore(*values)) for digest, *values in rows)
        return found

    def put(self, scores: Mapping[PairKey, CachedScore]) -> None:
        """Store scores in one transaction."""
        names = _TABLES[self._table]
        rows = [(self._digest(pair), *(getattr(score, name) for name in names)) for pair, score in scores.items()]
        marks = ", ".join("?" * (1 + len(names)))
        self._database.execute("BEGIN IMMEDIATE")
        self._database.executemany(f"INSERT OR REPLACE INTO {self._table} VALUES ({marks})", rows)
        self._database.execute("COMMIT")

    def __len__(self) -> int:
        (count,) = self._database.execute(f"SELECT count(*) FROM {self._table}").fetchone()
        return int(count)

    def close(self) -> None:
        self._database.close()

    def _digest(self, pair: PairKey) -> bytes:
        digest = hashlib.blake2b(self._identity, digest_size=16)
        for text in pair:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8))
            digest.update(data)
        return digest.digest()


def score_identity(reranker: Reranker) -> str:
    """Return a hex digest of weights, tokenizer, template, dtype and limits, on which all scores depend."""
    settings, recipe = score_settings(reranker.config), reranker.checkpoint.recipe
    facts = {
        "files": _file_digests(reranker.checkpoint),
        "recipe": recipe.stored if recipe.template is None else dataclasses.asdict(recipe.template),
        "settings": settings | {"dtype": reranker.info.dtype, "max_length": reranker.info.max_length},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def score_settings(config: EngineConfig) -> dict[str, object]:
    """Return the options on which scores depend, beside model and instruction."""
    unused = _SPEED_ONLY.union(() if config.in_chunks else OF_CHUNKS)
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in unused}


def _file_digests(checkpoint: Checkpoint) -> dict[str, str]:
    names: Sequence[str] = ["config.json", "tokenizer.json", *checkpoint.weights]
    return {name: _file_digest(checkpoint.folder / name) for name in names}


def _file_digest(file: Path) -> str:
    """Return the SHA-256 of a file. The hub's cache names large files by it, which saves reading gigabytes."""
    if re.fullmatch("[0-9a-f]{64}", blob := file.resolve().name):
        return blob
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
