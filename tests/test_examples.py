"""The examples that need neither a server nor Ray. tests/clients and tests/batch run the others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import ir_datasets
import pytest

from tests.command_line import run_script

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CASES = [json.loads(line) for line in (ROOT / "tests" / "data" / "sanity40.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[str]:
    """The name of an ir_datasets collection: the English cases with all their documents in one corpus."""
    cases = [case for case in CASES if case["lang"] == "en"]
    lines: dict[str, list[str]] = {"docs.tsv": [], "queries.tsv": [], "qrels.trec": []}
    for number, case in enumerate(cases):
        lines["queries.tsv"].append(f"q{number}\t{case['query']}")
        lines["docs.tsv"] += [f"d{number}-{place}\t{text}" for place, text in enumerate(case["documents"])]
        lines["qrels.trec"].append(f"q{number} 0 d{number}-{case['right']} 1")
    for name, content in lines.items():
        (tmp_path / name).write_text("\n".join(content) + "\n", encoding="utf-8")
    files = (str(tmp_path / name) for name in lines)
    name = f"local-rerank-tests-{tmp_path.name}"
    ir_datasets.registry.register(name, ir_datasets.create_dataset(*files))
    yield name
    del ir_datasets.registry._registered[name]


def test_reranking_bm25_improves_ndcg(dataset: str, tmp_path: Path) -> None:
    printed = run_script(EXAMPLES / "bm25_first_stage.py", dataset, "--folder", str(tmp_path), "--num-queries", "12")
    rows = {line.split()[0]: dict(re.findall(r"(\S+@\d+) ([\d.]+)", line)) for line in printed.splitlines()}
    assert rows.keys() == {"bm25", "reranked"}
    assert float(rows["reranked"]["nDCG@10"]) > float(rows["bm25"]["nDCG@10"]) > 0.3
    assert rows["reranked"]["R@20"] == rows["bm25"]["R@20"]
    runs = {name: (tmp_path / f"{name}.run").read_text().splitlines() for name in rows}
    found = {name: sorted(line.split()[0:3:2] for line in lines) for name, lines in runs.items()}
    assert found["bm25"] == found["reranked"]


def test_every_example_is_in_the_readme_and_run_by_a_test() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(([a-z0-9_]+\.py)\)", readme)) == names
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert {name for name in names if f'"{name}"' not in tests} == set()
