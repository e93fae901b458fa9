"""Print docs/options.md from EngineConfig and ServerConfig (`make docs`). A test compares the two."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from cyclopts import Group, Parameter

from local_rerank.commands.app import ENV_PREFIX
from local_rerank.config import EngineConfig
from local_rerank_server.config import ServerConfig

HEAD = """# Options

<!-- Written by `make docs` from local_rerank/config.py and server/local_rerank_server/config.py; edit those. -->

A flag wins over its variable, a variable over the default; an empty variable is unset. An unknown or malformed setting
stops the start and is named. `local-rerank serve` takes all options, in its `--help` in the groups below; `local-rerank
rank` and `Reranker(...)` take those of the engine, in Python with underscores: `Reranker(max_length=4096)`. A flag that
"may be repeated" takes several values in its variable, separated by spaces.
"""


def render() -> str:
    engine = _tables("The engine", EngineConfig)
    return "\n".join([HEAD, *engine, "", *_tables("The server", ServerConfig), ""])


def _tables(title: str, config: type[Any]) -> list[str]:
    """A table for each group, in the order of `--help`."""
    hints = get_type_hints(config, include_extras=True)
    rows: dict[Group, list[str]] = {}
    for field in dataclasses.fields(config):
        parameter = next(item for item in hints[field.name].__metadata__ if isinstance(item, Parameter))
        rows.setdefault(parameter.group[0], []).append(_row(field, parameter))
    lines = [f"## {title}"]
    for group in sorted(rows, key=lambda group: group.sort_key):
        head = ["", f"**{group.name}**", "", "| flag | variable | default | what |", "| --- | --- | --- | --- |"]
        lines += [*head, *rows[group]]
    return lines


def _row(field: dataclasses.Field[Any], parameter: Parameter) -> str:
    flag = "--" + field.name.replace("_", "-")
    cells = [f"`{flag}`", f"`{ENV_PREFIX}{field.name.upper()}`", _default(field.default), parameter.help or ""]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _default(value: Any) -> str:
    if value in (None, "", (), False):
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{value}`"


if __name__ == "__main__":
    print(render(), end="")
