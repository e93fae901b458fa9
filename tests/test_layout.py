"""What the package promises of itself: its public names, and which part may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import local_rerank

ROOT = Path(__file__).parent.parent
WEB = {"fastapi", "starlette", "uvicorn", "local_rerank_server"}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_the_public_names_are_these() -> None:
    assert local_rerank.__all__ == [
        "AsyncReranker",
        "EngineConfig",
        "Limits",
        "RankedDocument",
        "RerankRequest",
        "RerankResult",
        "Reranker",
    ]
    assert all(hasattr(local_rerank, name) for name in local_rerank.__all__)


def test_the_library_imports_no_web_framework() -> None:
    for path in (ROOT / "local_rerank").rglob("*.py"):
        found = imports_of(path) & WEB
        assert not found or (path.name, found) == ("cli.py", {"local_rerank_server"}), path


def test_types_errors_prompts_and_scheduling_need_no_torch() -> None:
    for name in ("types", "errors", "config", "prompts", "tokenization", "scheduler", "async_reranker"):
        assert not imports_of(ROOT / "local_rerank" / f"{name}.py") & {"torch", "transformers"}, name
