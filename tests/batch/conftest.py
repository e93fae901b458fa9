"""A small collection with a first run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORDS = "river mountain engine protein market treaty violin harbour glacier senate enzyme orchard".split()


def write_lines(file: Path, records: list[Any]) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture
def collection(tmp_path: Path) -> dict[str, Path]:
    """Ten queries with five candidates each, one of them relevant."""
    queries = [f"q{i}\t{WORDS[i]}" for i in range(10)]
    corpus = [f"d{i}-{j}\t{WORDS[(i + j) % 12]} {i} {j}" for i in range(10) for j in range(5)]
    run = [f"q{i} Q0 d{i}-{j} {j + 1} {10 - j} first" for i in range(10) for j in range(5)]
    qrels = [f"q{i} 0 d{i}-{i % 5} 1" for i in range(10)]
    content = {"queries.tsv": queries, "corpus.tsv": corpus, "first.run": run, "qrels.trec": qrels}
    return {name.partition(".")[0]: write_lines(tmp_path / name, lines) for name, lines in content.items()}  # type: ignore[arg-type]
