"""The dialects, one row each, and whose words an error gets where no route was found.

A new dialect is one file (parse, render, render_error, router) and one row here.
"""

from __future__ import annotations

from functools import cache

from starlette.requests import Request
from starlette.routing import BaseRoute

from local_rerank_server.dialects import (
    cohere,
    dashscope,
    dashscope_compatible,
    housekeeping,
    llama_cpp,
    local,
    mixedbread,
    openrouter,
    playground,
    rerank_v1,
    tei,
    vllm_score,
    voyage,
    xinference,
)
from local_rerank_server.dialects._route import Dialect, DialectRoute
from local_rerank_server.dialects._shared_paths import SharedRoute

ROWS = (  # where paths are shared, a body is the first one's that takes it
    (dashscope.dialect, dashscope.router),
    (dashscope_compatible.dialect, dashscope_compatible.router),
    (tei.dialect, tei.router),
    (voyage.dialect, voyage.router),
    (mixedbread.dialect, mixedbread.router),
    (rerank_v1.dialect, rerank_v1.router),
    (cohere.dialect, cohere.router),
    (llama_cpp.dialect, llama_cpp.router),
    (openrouter.dialect, openrouter.router),
    (vllm_score.dialect, vllm_score.router),
    (xinference.dialect, xinference.router),
    (local.dialect, local.router),
    (playground.dialect, playground.router),
    (housekeeping.dialect, housekeeping.router),
)

OPEN_PATHS = frozenset(path for dialect, _ in ROWS for path in dialect.open_paths)
"""Answered without a key, and while the server drains."""


@cache
def make_routes() -> tuple[BaseRoute, ...]:
    """Every route of every row; those that share path and method as one. They have no state, so apps share them."""
    by_path: dict[tuple[str, frozenset[str]], list[DialectRoute]] = {}
    for _, router in ROWS:
        for route in router.routes:
            assert isinstance(route, DialectRoute)
            by_path.setdefault((route.path, frozenset(route.methods or ())), []).append(route)
    return tuple(forms[0] if len(forms) == 1 else SharedRoute(path, forms) for (path, _), forms in by_path.items())


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
