"""local-rerank: an offline reranker for Qwen3-Reranker checkpoints.

>>> from local_rerank import Reranker
>>> reranker = Reranker()
>>> [item.index for item in reranker.rank("capital of France", ["Rome is in Italy", "Paris is the capital of France"])]
[1, 0]

Importing this package does not import torch; the first use of `Reranker` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from local_rerank.config import EngineConfig
from local_rerank.types import Limits, RankedDocument, RerankRequest, RerankResult

if TYPE_CHECKING:
    from local_rerank.async_reranker import AsyncReranker
    from local_rerank.cross_encoder import CrossEncoder
    from local_rerank.reranker import Reranker

__version__ = "0.1.0"
__all__ = [
    "AsyncReranker",
    "CrossEncoder",
    "EngineConfig",
    "Limits",
    "RankedDocument",
    "RerankRequest",
    "RerankResult",
    "Reranker",
]


def __getattr__(name: str) -> Any:
    """Import the rerankers on first use: torch takes 2 s to import, which `local-rerank --help` must not wait for."""
    if name == "Reranker":
        from local_rerank.reranker import Reranker

        return Reranker
    if name == "AsyncReranker":
        from local_rerank.async_reranker import AsyncReranker

        return AsyncReranker
    if name == "CrossEncoder":
        from local_rerank.cross_encoder import CrossEncoder

        return CrossEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
