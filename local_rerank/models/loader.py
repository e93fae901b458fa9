"""Loads models into this process, for a ModelSet. Importing it imports torch."""

from __future__ import annotations

import torch

from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.config import EngineConfig
from local_rerank.engine.out_of_memory import available_bytes, is_out_of_memory
from local_rerank.engine.plan import make_plan
from local_rerank.models import room
from local_rerank.reranker import Reranker
from local_rerank.selftest.self_test import require_self_test


class EngineLoader:
    """Loads Rerankers. A model whose weights passed the self-test is not tested again when it is loaded again."""

    def __init__(self, *, self_test: bool) -> None:
        self._self_test = self_test
        self._passed: set[tuple[EngineConfig, str]] = set()

    def inspect(self, config: EngineConfig) -> tuple[str, str, int]:
        """The checkpoint's name, the device (a GPU with its index) and the bytes of a load, without reading weights.

        Raises CheckpointError or ConfigError.
        """
        checkpoint = open_checkpoint(config.model, config.revision, config.recipe)
        plan = make_plan(config, checkpoint)
        return checkpoint.model_id, room.device_name(plan.device), room.needed_bytes(plan)

    def load(self, config: EngineConfig) -> tuple[Reranker, int]:
        """A loaded model and the bytes of its weights. Raises CheckpointError or ConfigError."""
        reranker = Reranker(config=config)
        try:
            if self._self_test and (tested := (config, reranker.checkpoint.digest)) not in self._passed:
                require_self_test(reranker)
                self._passed.add(tested)
            return reranker, room.held_bytes(reranker)
        except BaseException:
            reranker.close()  # the self-test started its thread, which refers to the weights
            raise

    def available_bytes(self, device: str) -> int:
        return available_bytes(torch.device(device))

    def is_out_of_memory(self, error: Exception) -> bool:
        return is_out_of_memory(error)

    def release_memory(self) -> None:
        room.release_memory()
