"""Room for models on GPUs, which a stand-in simulates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from local_rerank import EngineConfig
from local_rerank.engine.out_of_memory import free_bytes
from local_rerank.errors import ConfigError
from local_rerank.models.loader import EngineLoader
from local_rerank.models.model_set import ModelSet
from local_rerank.models.options import ModelOptions
from tests.engine.cuda.test_choices import H200, gpus
from tests.models.test_model_set import HeldLoader, loaded, use


@pytest.mark.parametrize(
    ("device", "name"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu:0", "cpu")],
)
def test_models_on_the_same_device_have_the_same_name_for_it_and_make_room_for_each_other(
    device: str, name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, H200, H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config = EngineConfig(model=str(tiny_checkpoint), device=device, dtype="fp32")
    assert EngineLoader(self_test=False).inspect(config)[1] == name


@pytest.mark.parametrize(("backend", "free"), [("native", [106, 107, 106]), ("cudaMallocAsync", [130, 130, 130])])
def test_cached_blocks_are_free_but_not_those_in_a_pool_of_graphs(
    backend: str, free: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def segment(device: int, pool: tuple[int, int], total: int, allocated: int) -> dict[str, object]:
        return {"device": device, "segment_pool_id": pool, "total_size": total, "allocated_size": allocated}

    segments = [
        segment(0, (0, 0), 10, 8),
        segment(0, (0, 1), 90, 1),
        segment(0, (0, 0), 4, 0),
        segment(1, (0, 0), 9, 2),
    ]
    simulated = {
        "mem_get_info": lambda device: (100, 1000),
        "get_allocator_backend": lambda: backend,
        "memory_snapshot": lambda include_traces: segments,
        "memory_reserved": lambda device: 40,
        "memory_allocated": lambda device: 10,
        "current_device": lambda: 0,
    }
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**simulated))
    found = [free_bytes({torch.device(name)}) for name in ("cuda", "cuda:1")]
    both = free_bytes({torch.device("cuda", 0), torch.device("cuda", 1)})
    assert [*found, both] == free


class SmallGpus(HeldLoader):
    """Two GPUs of 10 bytes; each model needs 8 bytes, that named "large" 16, and a loaded one has as many."""

    def __init__(self) -> None:
        super().__init__()
        self.free = {"cuda:0": 10, "cuda:1": 10}

    def inspect(self, config: EngineConfig) -> tuple[str, str, int]:
        return str(config.model), config.device, 16 if config.model == "large" else 8

    def load(self, config: EngineConfig) -> tuple[Any, int]:
        ranker, _ = super().load(config)
        size, close = 16 if config.model == "large" else 8, ranker.close
        parts = dict.fromkeys(self.free, size // 2) if config.device_map else {config.device: size}

        def free(sign: int) -> None:
            self.free = {name: left + sign * parts.get(name, 0) for name, left in self.free.items()}

        ranker.close = lambda: (free(1), close())
        free(-1)
        if min(self.free.values()) < 0:
            free(1)
            raise MemoryError
        return ranker, size

    def available_bytes(self, device: str) -> int:
        return self.free[device]


def test_a_model_that_is_spread_over_gpus_is_not_refused_for_the_room_on_one() -> None:
    def options(name: str, device: str, device_map: str | None = None) -> ModelOptions:
        return ModelOptions(engine=EngineConfig(model=name, device=device, device_map=device_map))

    small = options("small", "cuda:1")
    with pytest.raises(ConfigError, match="model large needs 16 bytes on cuda:0, but 10 bytes are free"):
        ModelSet([small, options("large", "cuda:0")], SmallGpus()).start()
    models = ModelSet([small, options("large", "cuda:0", "auto")], loader := SmallGpus())
    models.start()
    use(models, "large")
    use(models, "small")
    assert loader.log == ["load small", "load large", "close small", "load large", "close large", "load small"]
    assert loaded(models) == "small"
    models.close()
    with pytest.raises(ConfigError, match="model large needs 16 bytes on cuda:0, but 12 bytes are free"):
        ModelSet([small, options("large", "cuda:0", "auto")], SmallGpus(), max_bytes=12).start()
