"""The HTTP layer of local-rerank: hosted rerank APIs in front of one `local_rerank.Reranker`.

`run` starts the server process. Importing this package loads no web framework and no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from local_rerank.config import EngineConfig
    from local_rerank_server.config import ServerConfig

__all__ = ["run"]


def run(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve until a signal ends it; returns the exit status. ConfigError or CheckpointError: it cannot start."""
    from local_rerank_server.process import serve

    return serve(engine_config, server_config)
