"""Room for models on GPUs, which a stand-in simulates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from local_rerank import EngineConfig
from local_rerank.engine.out_of_memory import free_bytes
from local_rerank.models.loader import EngineLoader
from tests.engine.cuda.test_choices import H200, gpus


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
