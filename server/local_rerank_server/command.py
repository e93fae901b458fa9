"""The command `local-rerank serve`: options in, exit status out. Reading its help loads no web framework."""

from __future__ import annotations

from local_rerank.config import EngineConfig
from local_rerank_server import run
from local_rerank_server.config import ServerConfig


def serve(engine: EngineConfig | None = None, server: ServerConfig | None = None) -> int:
    """Answer the HTTP APIs of hosted rerankers."""
    return run(engine or EngineConfig(), server or ServerConfig())
