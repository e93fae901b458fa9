"""The layout's rules: which folder may import which, no circles, and folders that can be surveyed."""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import local_rerank

ROOT = Path(__file__).parents[1]
VOCABULARY = {"arguments", "errors", "config", "types", "forks", "text_files"}
PUBLIC = {"reranker", "async_reranker", "cross_encoder"}
MAY_IMPORT = {  # by area: the areas below it that it may use
    "vocabulary": set(),
    "requests": {"vocabulary"},
    "planning": {"vocabulary", "requests"},
    "checkpoints": {"vocabulary", "requests"},
    "engine": {"vocabulary", "requests", "checkpoints"},
    "public": {"vocabulary", "requests", "checkpoints", "engine"},
    "evaluation": {"vocabulary", "requests", "public"},
    "bench": {"vocabulary", "requests", "checkpoints", "engine", "public"},
    "batch": {"vocabulary", "requests", "checkpoints", "engine", "public", "evaluation"},
    "selftest": {"vocabulary", "requests", "checkpoints", "engine", "public"},
    "models": {"vocabulary", "requests", "checkpoints", "engine", "public", "selftest"},
}
MAY_IMPORT["commands"] = set(MAY_IMPORT)
TORCH = {"torch", "transformers"}
WEB = {"fastapi", "starlette", "uvicorn", "local_rerank_server"}
MAX_MODULES = 13  # in a folder of the library
MAX_SERVER_MODULES = 16  # in the server's top folder; `dialects` is a table and has no limit
MAX_LINES = 350
MAX_TEST_LINES = 400

LIBRARY = ROOT / "local_rerank"
SERVER = ROOT / "server/local_rerank_server"


def modules_in(package: Path) -> dict[str, Path]:
    names = {path: path.relative_to(package.parent).with_suffix("").parts for path in package.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


MODULES = modules_in(LIBRARY)
ALL_MODULES = MODULES | modules_in(SERVER)


def imports_of(path: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (members & ALL_MODULES.keys()) or {node.module}
    return names


def packages_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


def area_of(module: str) -> str:
    first = module.split(".")[1] if "." in module else "public"
    if first in VOCABULARY:
        return "vocabulary"
    return "public" if first in PUBLIC else "commands" if first == "__main__" else first


def test_the_public_names_are_these() -> None:
    names = {"AsyncReranker", "CrossEncoder", "EngineConfig", "Limits", "RankedDocument", "RerankRequest", "Reranker"}
    names |= {"RerankResult"}
    assert set(local_rerank.__all__) == {name for name in names if hasattr(local_rerank, name)}


def test_a_folder_imports_only_those_below_it() -> None:
    upward = [
        (module, name)
        for module, path in MODULES.items()
        for name in imports_of(path)
        if name.startswith("local_rerank.") and area_of(name) not in MAY_IMPORT[area_of(module)] | {area_of(module)}
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    tops = {"local_rerank", "local_rerank_server"}  # of which modules import the version alone
    graph = {module: imports_of(path) & ALL_MODULES.keys() - tops for module, path in ALL_MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_code_for_cpus_and_code_for_gpus_do_not_know_each_other() -> None:
    crossing = [
        (module, name)
        for own, other in (("cpu", "cuda"), ("cuda", "cpu"))
        for module, path in MODULES.items()
        if module.startswith(f"local_rerank.engine.{own}.")
        for name in imports_of(path)
        if name.startswith(f"local_rerank.engine.{other}.")
    ]
    assert crossing == []


def test_requests_and_the_vocabulary_need_no_torch() -> None:
    areas = {"vocabulary", "requests", "planning"}
    assert [name for name, path in MODULES.items() if area_of(name) in areas and packages_of(path) & TORCH] == []


def test_only_the_command_line_knows_of_the_server() -> None:
    found = {module: packages_of(path) & WEB for module, path in MODULES.items() if packages_of(path) & WEB}
    assert found == {"local_rerank.commands.app": {"local_rerank_server"}}


def test_folders_and_files_can_be_surveyed() -> None:
    sizes = Counter(path.parent for path in ALL_MODULES.values() if path.name != "__init__.py")
    limits = {SERVER: MAX_SERVER_MODULES, SERVER / "dialects": len(ALL_MODULES)}
    assert [folder for folder, size in sizes.items() if size > limits.get(folder, MAX_MODULES)] == []
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ALL_MODULES.values()}
    tests = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert [path for path, number in lines.items() if number > MAX_LINES] == []
    assert [path for path, number in tests.items() if number > MAX_TEST_LINES] == []


def test_a_class_name_means_one_thing() -> None:
    names = Counter(
        node.name
        for path in ALL_MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, number in names.items() if number > 1] == []
