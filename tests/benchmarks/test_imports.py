"""What benchmarks and training import exists: the type checker does not read them, and they run rarely."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
BY_PATH = {"__init__", "peer_process"}  # the latter runs in the environment of another library


@pytest.mark.parametrize("name", sorted({path.stem for path in FOLDER.glob("*.py")} - BY_PATH))
def test_a_benchmark_can_be_imported(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("file", sorted((ROOT / "training").glob("*.py")), ids=lambda file: file.name)
def test_what_training_imports_of_ours_exists(file: Path) -> None:
    """The files themselves need packages that tests do not have."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("local_rerank", "benchmarks")):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
