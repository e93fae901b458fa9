"""Print docs/options.md from EngineConfig and ServerConfig (`make docs`). A test compares the two."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from cyclopts import Parameter

from local_rerank.commands.app import ENV_PREFIX
from local_rerank.config import EngineConfig
from local_rerank_server.config import ServerConfig

HEAD = """# Options

<!-- Written by `make docs` from local_rerank/config.py and server/local_rerank_server/config.py; edit those. -->

A flag wins over its variable, a variable over the default; an empty variable is unset. An unknown or malformed setting
stops the start and is named. `local-rerank serve` takes both tables, `local-rerank rank` and `Reranker(...)` the first;
in Python a name has underscores: `Reranker(max_length=4096)`. A flag that "may be repeated" takes several values in its
variable, separated by spaces.
"""


def render() -> str:
    engine = _table("The engine", EngineConfig)
    return "\n".join([HEAD, *engine, "", *_table("The server", ServerConfig), ""])


def _table(title: str, config: type[Any]) -> list[str]:
    hints = get_type_hints(config, include_extras=True)
    rows = [_row(field, hints[field.name]) for field in dataclasses.fields(config)]
    return [f"## {title}", "", "| flag | variable | default | what |", "| --- | --- | --- | --- |", *rows]


def _row(field: dataclasses.Field[Any], hint: Any) -> str:
    parameter = next(item for item in hint.__metadata__ if isinstance(item, Parameter))
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
