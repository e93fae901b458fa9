"""The HTTP server of local-rerank: the rerank APIs of hosted services in front of one `local_rerank.Reranker`.

Importing this package loads neither a web framework nor a model.
"""

from __future__ import annotations

from local_rerank.config import ServeEngineConfig
from local_rerank_server.config import ServerConfig

__all__ = ["serve"]


def serve(server: ServerConfig | None = None, engine: ServeEngineConfig | None = None) -> int:
    """Serve rerank APIs over HTTP."""
    from local_rerank_server import process

    return process.serve(engine or ServeEngineConfig(), server or ServerConfig())
