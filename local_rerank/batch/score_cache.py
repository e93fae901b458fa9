"""Cache scores by pair in an SQLite file, so that no run scores the same pair again.

A key is a digest of everything a score depends on: the bytes of weights and tokenizer, the prompt template, the
settings that change scores, instruction, query and document. No text is stored. Processes may share a file.
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

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.errors import ConfigError

if TYPE_CHECKING:
    from local_rerank.config import EngineConfig
    from local_rerank.reranker import Reranker

SCHEMA_VERSION = 1
BUSY_SECONDS = 60.0  # timeout for another process that holds the write lock
_COLUMNS = ["key", "log_odds", "num_tokens", "num_truncated_tokens"]
_MAX_VARIABLES = 500  # keys per query; SQLite accepts at least 999
_SPEED_ONLY = {
    "model", "revision", "recipe", "instruction",  # part of the key by their contents
    "device", "device_map", "attention", "threads", "max_batch_tokens", "max_queued_tokens",
    "no_cuda_graphs", "no_compile", "deterministic", "calibration", "scores",
}  # fmt: skip
"""Settings that change log-odds by rounding at most. Every other setting is part of the key."""

_OF_CHUNKS = {"long_documents", "chunk_tokens", "chunk_overlap_tokens", "num_best_chunks"}

PairKey = tuple[str, str, str]
"""Instruction, query, document."""


@dataclass(frozen=True, slots=True)
class CachedScore:
    """The cached result of one pair."""

    log_odds: float
    num_tokens: int
    num_truncated_tokens: int


class ScoreCache:
    """The scores of one model; `identity` comes from `score_identity`. Raises ConfigError."""

    def __init__(self, file: Path, identity: str) -> None:
        if not file.parent.is_dir():
            raise ConfigError(f"cache is {file}; there is no folder {file.parent}")
        self._file = file
        self._identity = identity.encode()
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
        columns = [name for _, name, *_ in self._database.execute("PRAGMA table_info(scores)")]
        (num_objects,) = self._database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if num_objects and (num_objects > 1 or columns != _COLUMNS):
            raise ConfigError(f"cache {self._file} is a database of another program; choose another name")
        if version not in (0, SCHEMA_VERSION):
            raise ConfigError(f"cache {self._file} has version {version}; this program reads version {SCHEMA_VERSION}")

    def _create(self) -> None:
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, log_odds REAL NOT NULL,"
            " num_tokens INTEGER NOT NULL, num_truncated_tokens INTEGER NOT NULL) WITHOUT ROWID"
        )
        self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def get(self, pairs: Iterable[PairKey]) -> dict[PairKey, CachedScore]:
        """Return the cached scores of these pairs; unknown pairs are left out."""
        found: dict[PairKey, CachedScore] = {}
        by_digest = {self._digest(pair): pair for pair in pairs}
        all_digests = list(by_digest)
        for start in range(0, len(all_digests), _MAX_VARIABLES):
            digests = all_digests[start : start + _MAX_VARIABLES]
            marks = ", ".join("?" * len(digests))
            rows = self._database.execute(f"SELECT * FROM scores WHERE key IN ({marks})", digests)
            found.update((by_digest[digest], CachedScore(*values)) for digest, *values in rows)
        return found

    def put(self, scores: Mapping[PairKey, CachedScore]) -> None:
        """Store scores in one transaction."""
        rows = [(self._digest(pair), *dataclasses.astuple(score)) for pair, score in scores.items()]
        self._database.execute("BEGIN IMMEDIATE")
        self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)
        self._database.execute("COMMIT")

    def __len__(self) -> int:
        (count,) = self._database.execute("SELECT count(*) FROM scores").fetchone()
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
        "settings": settings | {"dtype": reranker.info.dtype},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def score_settings(config: EngineConfig) -> dict[str, object]:
    """Return the options on which scores depend, beside model and instruction."""
    unused = _SPEED_ONLY | (set() if config.long_documents == "chunk" else _OF_CHUNKS)
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
