"""Each benchmark can be imported: the type checker does not read them, and they run rarely."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
BY_PATH = {"__init__", "peer_process"}  # the latter runs in the environment of another library


@pytest.mark.parametrize("name", sorted({path.stem for path in FOLDER.glob("*.py")} - BY_PATH))
def test_a_benchmark_can_be_imported(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
