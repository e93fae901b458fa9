"""local-rerank: an offline reranker for Qwen3-Reranker checkpoints.

>>> from local_rerank import Reranker
>>> reranker = Reranker()
>>> [item.index for item in reranker.rank("capital of France", ["Rome is in Italy", "Paris is the capital of France"])]
[1, 0]

Importing this package loads neither torch nor a model; the first `Reranker` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from local_rerank.config import EngineConfig
from local_rerank.types import Limits, RankedDocument, RerankRequest, RerankResult

if TYPE_CHECKING:
    from local_rerank.async_reranker import AsyncReranker
    from local_rerank.reranker import Reranker

__version__ = "0.1.0"
__all__ = [
    "AsyncReranker",
    "EngineConfig",
    "Limits",
    "RankedDocument",
    "RerankRequest",
    "RerankResult",
    "Reranker",
]


def __getattr__(name: str) -> Any:
    """Import the rerankers, and torch with `Reranker`, on first use: `local-rerank --help` must not wait (2 s)."""
    if name == "Reranker":
        from local_rerank.reranker import Reranker

        return Reranker
    if name == "AsyncReranker":
        from local_rerank.async_reranker import AsyncReranker

        return AsyncReranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
