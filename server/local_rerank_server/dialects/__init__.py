"""The table of dialects, their routes, and the dialect of a path without a route.

A new dialect is one module (parse, render, render_error, router) and one row here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from local_rerank_server.dialects import (
    bedrock,
    cohere,
    dashscope,
    dashscope_compatible,
    deepinfra,
    docs,
    gateway,
    housekeeping,
    isaacus,
    llama_cpp,
    local,
    mixedbread,
    nvidia,
    openrouter,
    pinecone,
    playground,
    rerank_v1,
    tei,
    vllm_score,
    voyage,
    weaviate,
    xinference,
    zeroentropy,
    zhipu,
)
from local_rerank_server.dialects._route import Dialect, DialectRoute
from local_rerank_server.dialects._shared_paths import SharedRoute

ROWS = (  # on a shared path, and for the error on an unknown one, the first dialect that takes a body answers it
    (dashscope.dialect, dashscope.router),
    (dashscope_compatible.dialect, dashscope_compatible.router),
    (isaacus.dialect, isaacus.router),
    (tei.dialect, tei.router),
    (voyage.dialect, voyage.router),
    (mixedbread.dialect, mixedbread.router),
    (nvidia.dialect, nvidia.router),
    (bedrock.dialect, bedrock.router),
    (pinecone.dialect, pinecone.router),
    (weaviate.dialect, weaviate.router),
    (rerank_v1.dialect, rerank_v1.router),
    (cohere.dialect, cohere.router),
    (llama_cpp.dialect, llama_cpp.router),
    (openrouter.dialect, openrouter.router),
    (vllm_score.dialect, vllm_score.router),
    (xinference.dialect, xinference.router),
    (zeroentropy.dialect, zeroentropy.router),
    (zhipu.dialect, zhipu.router),
    (gateway.dialect, gateway.router),
    (deepinfra.dialect, deepinfra.router),
    (local.dialect, local.router),
    (playground.dialect, playground.router),
    (docs.dialect, docs.router),
    (housekeeping.dialect, housekeeping.router),
)

OPEN_PATHS = frozenset(path for dialect, _ in ROWS for path in dialect.open_paths)
"""Paths that need no API key and answer while the server drains."""


@cache
def make_routes() -> tuple[BaseRoute, ...]:
    """All routes, with one `SharedRoute` per shared path. Routes have no state, so applications share them."""
    by_path: dict[tuple[str, frozenset[str]], list[DialectRoute]] = {}
    for _, router in ROWS:
        for route in router.routes:
            assert isinstance(route, DialectRoute)
            by_path.setdefault((route.path, frozenset(route.methods or ())), []).append(route)
    return tuple(forms[0] if len(forms) == 1 else SharedRoute(path, forms) for (path, _), forms in by_path.items())


def api_of(body: Any, http: Request, *, or_common: bool) -> tuple[Dialect, str] | None:
    """Whose body it is that came to a path without a route, judged by the markers: the dialect, and what to tell.

    `or_common` adds the dialect that needs no marker, the most common one.
    """
    routes = [route for _, router in ROWS for route in router.routes if isinstance(route, DialectRoute)]
    common = next(route for route in rerank_v1.router.routes if isinstance(route, DialectRoute))
    judged = [*(route for route in routes if route.takes is not None), *([common] if or_common else [])]
    found = next((route for route in judged if route.fits(body, http)), None)
    if found is None:
        return None
    whose = f"{found.dialect.name}'s" if found.takes is not None else f"one of {found.dialect.name}"
    main = next(route for route in routes if route.dialect is found.dialect and route.examples)
    return found.dialect, f"this body is {whose}: POST {main.path}"


def route_path(http: Request) -> str:
    """The request's path without the root path of a reverse proxy."""
    path: str = http.scope["path"]
    root: str = http.scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(root + "/") else path


def dialect_at(path: str) -> Dialect:
    """The dialect with the longest prefix of `path`, or housekeeping if there is none.

    DashScope's SDKs append `/services/...` to any base URL.
    """
    if "/services/" in path:
        return dashscope.dialect
    prefixes = ((prefix, dialect) for dialect, _ in ROWS for prefix in dialect.prefixes)
    matching = [(len(prefix), dialect) for prefix, dialect in prefixes if (path + "/").startswith(prefix + "/")]
    return max(matching, key=lambda match: match[0], default=(0, housekeeping.dialect))[1]
