"""The dialects, one row each, and whose words an error gets where no route was found.

A new dialect is one file (parse, render, render_error, router) and one row here.
"""

from __future__ import annotations

from starlette.requests import Request

from local_rerank_server.dialects import dashscope, dashscope_compatible, housekeeping, local, playground
from local_rerank_server.dialects._route import Dialect

ROWS = (
    (dashscope.dialect, dashscope.router),
    (dashscope_compatible.dialect, dashscope_compatible.router),
    (local.dialect, local.router),
    (playground.dialect, playground.router),
    (housekeeping.dialect, housekeeping.router),
)

OPEN_PATHS = frozenset(path for dialect, _ in ROWS for path in dialect.open_paths)
"""Answered without a key, and while the server drains."""


def route_path(http: Request) -> str:
    """The path as the routes spell it, without the root path that a reverse proxy stands for."""
    path: str = http.scope["path"]
    root: str = http.scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(root + "/") else path


def dialect_at(path: str) -> Dialect:
    """The dialect with the longest prefix of `path`; housekeeping's generic shape where there is none."""
    prefixes = ((prefix, dialect) for dialect, _ in ROWS for prefix in dialect.prefixes)
    matching = [(len(prefix), dialect) for prefix, dialect in prefixes if (path + "/").startswith(prefix + "/")]
    return max(matching, key=lambda match: match[0], default=(0, housekeeping.dialect))[1]
