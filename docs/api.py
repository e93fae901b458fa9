"""Print docs/api.md from the docstrings of the library's public names (`make docs`). A test compares the two."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
CLASSES = {
    "reranker": ("Reranker",),
    "async_reranker": ("AsyncReranker",),
    "cross_encoder": ("CrossEncoder", "CallOptions", "RankOptions"),
    "types": ("RerankRequest", "Limits", "RerankResult", "RankedDocument", "ModelInfo"),
    "config": ("EngineConfig",),
    "requests.worker": ("BatchReport",),
}
OWN_PAGE = {"EngineConfig": "The fields are the table [The engine](options.md#the-engine)."}
INTERNAL = {"renew", "submit_if_room"}  # called by other modules of the library
HEAD = """# API of the library

<!-- Written by `make docs` from the docstrings in local_rerank/; edit those. -->

[The library](library.md) explains how to use these classes. `from local_rerank import ...` has the classes and types;
`CallOptions`, `RankOptions`, `ModelInfo` and `BatchReport` are named for type checkers only.
"""
ERRORS = "## Errors\n\n`from local_rerank.errors import ...`. Which error is caught with which:\n"


def render() -> str:
    parts = [HEAD]
    for module, names in CLASSES.items():
        loaded = _load(module)
        parts += [part for name in names for part in _class(loaded[name])]
    errors = _load("errors")
    tree = next(part for part in _paragraphs(errors) if "──" in part)
    parts += [ERRORS, _code("\n".join(line.removeprefix("    ") for line in tree.splitlines()), "text")]
    for error in errors.classes.values():
        parts += [f"**{error.name}**: {_text(error)}"]
    return "\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


def _load(module: str) -> griffe.Module:
    file = ROOT / "local_rerank" / f"{module.replace('.', '/')}.py"
    code = file.read_text(encoding="utf-8")
    lines = griffe.LinesCollection()
    lines[file] = code.splitlines()
    return griffe.visit(f"local_rerank.{module}", filepath=file, code=code, lines_collection=lines)


def _class(found: griffe.Object) -> list[str]:
    parts = [f"## {found.name}", _text(found)]
    fields = [item for name, item in found.attributes.items() if item.annotation and not name.startswith("_")]
    fields = [item for item in fields if "property" not in item.labels]
    if found.name in OWN_PAGE:
        parts.append(OWN_PAGE[found.name])
    elif fields:
        parts.append(_code("\n".join(line.strip() for item in fields for line in item.lines)))
    if "__init__" in found.members and found.members["__init__"].lineno:
        parts.append(_code(_signature(found.members["__init__"], found.name)))
    for name, member in found.members.items():
        if not name.startswith("_") and name not in INTERNAL and member.docstring:
            parts += [f"### {found.name}.{name}", _code(_signature(member)), _text(member)]
    return parts


def _signature(member: griffe.Object, class_name: str | None = None) -> str:
    if member.is_attribute:
        return f"{member.name}: {member.annotation}"
    kind = "" if class_name else "async def " if "async" in member.labels else "def "
    lines = [kind + one.signature(name=class_name) for one in member.overloads or [member]]
    lines = [line.replace("(self, ", "(").replace("(self)", "()") for line in lines]
    lines = [line.removesuffix(" -> None") if class_name else line for line in lines]
    return "\n".join(map(_wrapped, lines))


def _wrapped(line: str) -> str:
    """Lines of at most 100 characters, which end at commas."""
    held = re.sub("(?<!,) ", "\0", line)
    return textwrap.fill(held, 100, subsequent_indent="    ", break_long_words=False).replace("\0", " ")


def _text(found: griffe.Object) -> str:
    """The docstring; its examples as code, its other paragraphs as lines."""
    parts = [_code(part) if part.startswith(">>>") else part for part in _paragraphs(found)]
    return "\n\n".join(part.rstrip("\n") for part in parts)


def _paragraphs(found: griffe.Object) -> list[str]:
    assert found.docstring, f"{found.path} has no docstring"
    return found.docstring.value.split("\n\n")


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```\n"


if __name__ == "__main__":
    print(render(), end="")
