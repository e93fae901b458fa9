"""The token budget that fits in a GPU's memory, the error when memory runs out, and memory of a GPU that failed."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3Model

from local_rerank import EngineConfig, Reranker
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.engine.cuda import prepare as cuda
from local_rerank.engine.decoder import ATTENTION_NAME, TransformersDecoder, register_attention
from local_rerank.engine.encoder import Encoder, pack_segments
from local_rerank.engine.engine import Engine, _fetch
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.engine.load import load, load_model
from local_rerank.engine.out_of_memory import (
    MIN_BATCH_TOKENS,
    LayerShape,
    available_ram,
    bytes_per_token,
    fitted_budget,
    is_out_of_memory,
)
from local_rerank.engine.packing import pack
from local_rerank.engine.plan import make_plan
from local_rerank.errors import CheckpointError, ConfigError, EngineFailure, OutOfMemory
from local_rerank.requests.pair import Pair
from tests.encoder_checkpoints import make_encoder

GIB = 2**30
SMALL = LayerShape(hidden=1024, queries=2048, keys=1024, intermediate=3072)  # Qwen3-Reranker-0.6B
LARGE = LayerShape(hidden=4096, queries=4096, keys=1024, intermediate=12288)  # Qwen3-Reranker-8B
BATCH = [Pair.of((1, 2, 3), (4, 5, 6)), Pair.of((1, 2, 3), (7,))]


def test_much_free_memory_gives_the_maximum_budget_and_little_gives_less() -> None:
    for shape in (SMALL, LARGE):
        assert fitted_budget(60 * GIB, bytes_per_token(shape, 2), at_most=16384) == 16384
    small, large = (fitted_budget(GIB // 2, bytes_per_token(shape, 2), at_most=16384) for shape in (SMALL, LARGE))
    assert MIN_BATCH_TOKENS < large < small < 16384


def test_graphs_halve_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen3Config(num_hidden_layers=1)
    model, device = SimpleNamespace(parameters=list, config=config, dtype=torch.bfloat16), torch.device("cuda")
    monkeypatch.setattr(cuda, "free_bytes", lambda devices: 2**30)
    plain, with_graphs = (cuda.token_budget(model, device, at_most=10**6, graphs=graphs) for graphs in (False, True))
    assert abs(plain - 2 * with_graphs) <= 1
    assert cuda.token_budget(model, device, at_most=1000, graphs=True) == 1000


def test_too_little_free_memory_gives_the_minimum_budget_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert fitted_budget(1000, bytes_per_token(SMALL, 2), at_most=16384) == MIN_BATCH_TOKENS
    assert "1000 bytes are free" in caplog.text


@given(free=st.integers(0, 200 * GIB), element_size=st.sampled_from([2, 4]))
def test_the_budget_grows_with_memory_and_stays_within_it(free: int, element_size: int) -> None:
    per_token = bytes_per_token(LARGE, element_size)
    budget = fitted_budget(free, per_token, at_most=16384)
    assert budget <= fitted_budget(free + GIB, per_token, at_most=16384)
    assert budget == MIN_BATCH_TOKENS or budget * per_token <= free


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that `run` allocates at a time."""
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded,
    ):
        run()
    events = recorded.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("widths", [{"intermediate_size": 64, "head_dim": 128}, {"intermediate_size": 2048}])
def test_the_estimate_covers_the_peak_of_a_plain_pass_and_is_not_far_above(
    widths: dict[str, int], dtype: torch.dtype
) -> None:
    """The widest part is attention, then the MLP. The estimate also covers buffers of the GPU's attention kernels."""
    config = Qwen3Config(
        vocab_size=100, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        **{"head_dim": 32} | widths,
    )  # fmt: skip
    model = Qwen3Model(config).to(dtype).eval()
    ids = torch.ones(1, 1000, dtype=torch.int64)
    peak = peak_bytes(lambda: model(ids, use_cache=False, attention_mask={"full_attention": None}))
    assert peak < 1000 * bytes_per_token(LayerShape.of(config), dtype.itemsize) < 2.2 * peak


def test_the_estimate_covers_a_pass_with_sdpa_in_which_many_documents_share_a_long_prefix() -> None:
    """SDPA copies the keys of the prefix for each document, and a key head for each of its eight query heads."""
    config = Qwen3Config(
        vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=1,
        head_dim=64, intermediate_size=64, attn_implementation=ATTENTION_NAME,
    )  # fmt: skip
    register_attention()
    decoder, row = TransformersDecoder(Qwen3Model(config).eval()), KERNELS["sdpa"]
    batch = pack([Pair.of((1,) * 400, (2,) * 4)] * 100)
    peak = peak_bytes(lambda: decoder(batch, row, row.layout(batch, False), lambda: row.layout(batch, True)))
    assert peak < batch.num_tokens * bytes_per_token(LayerShape.of(config), 4) < 2.2 * peak


@pytest.mark.parametrize(
    ("kind", "dtype"), [("Bert", torch.float32), ("XLMRoberta", torch.bfloat16), ("ModernBert", torch.bfloat16)]
)
def test_the_estimate_covers_the_peak_of_an_encoder_and_is_not_far_above(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """An MLP of four times the width, as in BERT; ModernBERT's first linear layer is twice as wide as that."""
    folder = make_encoder(tmp_path, kind, hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
    checkpoint = open_checkpoint(str(folder))
    model: Any = load_model(checkpoint, dtype=dtype, device=torch.device("cpu"))
    per_token = bytes_per_token(LayerShape.of(model.config), dtype.itemsize)
    encoder, row = Encoder(model, checkpoint.architecture), KERNELS["sdpa"]
    batch = pack_segments([replace(Pair.of((), (4,) * 100), first_typed=100)] * 10)
    peak = peak_bytes(lambda: encoder(batch, row, row.layout(batch, False), lambda: row.layout(batch, True)))
    assert peak < batch.num_tokens * per_token < 2 * peak


@pytest.fixture
def engine(tiny_reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine whose kernel a test may replace."""
    monkeypatch.setattr(tiny_reranker.engine, "kernel", tiny_reranker.engine.kernel)  # restores it
    return tiny_reranker.engine


def test_running_out_of_memory_raises_a_typed_error_and_the_engine_goes_on(engine: Engine) -> None:
    expected, kernel = engine.score(BATCH), engine.kernel

    def too_large(q: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.empty(2**59, dtype=torch.uint8, device=q.device)  # a real failure of the real allocator

    engine.kernel = replace(kernel, attend=too_large)
    with pytest.raises(OutOfMemory, match="out of memory in a batch of 7 tokens") as caught:
        engine.score(BATCH)
    assert caught.value.num_tokens == 7
    assert caught.value.__context__ is None  # a chained error would keep the failed pass's tensors alive
    assert isinstance(caught.value, EngineFailure)
    engine.kernel = kernel
    assert engine.score(BATCH) == expected


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.80 GiB",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
        "[enforce fail at alloc_cpu.cpp:133] DefaultCPUAllocator: can't allocate memory: you tried to allocate",
        "unable to mmap 982725504 bytes from file </models/a/model.safetensors>: Cannot allocate memory (12)",
    ],
)
def test_every_text_of_the_error_becomes_the_typed_one(engine: Engine, text: str) -> None:
    def failing(*_: object) -> torch.Tensor:
        raise RuntimeError(text)

    engine.kernel = replace(engine.kernel, attend=failing)
    with pytest.raises(OutOfMemory):
        engine.score(BATCH)


def test_an_error_behind_the_error_counts_and_a_long_or_circular_chain_ends() -> None:
    def chain(*errors: BaseException) -> BaseException:
        for error, behind in pairwise(errors):
            error.__context__ = behind
        return errors[0]

    capture = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert is_out_of_memory(chain(capture, KeyError(), torch.OutOfMemoryError("CUDA out of memory")))
    caused = ValueError("compilation failed")
    caused.__cause__ = RuntimeError("CUDA driver error: out of memory")
    assert is_out_of_memory(caused)
    assert is_out_of_memory(chain(CheckpointError("cannot be loaded"), MemoryError()))
    assert not is_out_of_memory(chain(*(RuntimeError(str(number)) for number in range(1000))))
    first = RuntimeError("CUDA error: an illegal memory access was encountered")
    first.__context__, first.__cause__ = RuntimeError(), RuntimeError("out of resource: shared memory")
    first.__context__.__context__ = first
    assert not is_out_of_memory(first)


@pytest.mark.parametrize(
    ("limit", "free", "first"),
    [
        (10**9 + 12_345_678, "0.0123 GB", "free memory, raise the limit of this process (ulimit -v)"),
        (10**8, "0 bytes", "free memory, raise the limit of this process (ulimit -v)"),
        (-1, "7 GB", "free memory"),
    ],
)
def test_a_load_on_a_cpu_says_what_is_free_under_the_limit_of_the_process(
    limit: int, free: str, first: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), device="cpu", dtype="fp32")
    plan = make_plan(config, open_checkpoint(config.model))
    monkeypatch.setattr("local_rerank.engine.load.read_qwen3", Mock(side_effect=MemoryError))
    monkeypatch.setattr("local_rerank.engine.out_of_memory.cgroup_folders", lambda *_: [])
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=7 * 10**9))
    monkeypatch.setattr("psutil.Process.rlimit", lambda *_: (limit, -1))
    monkeypatch.setattr("psutil.Process.memory_info", lambda _: SimpleNamespace(vms=10**9))
    advice = f"{first}, use a smaller model, or set dtype to bf16 or fp16"
    with pytest.raises(ConfigError, match=re.escape(f" in fp32, and {free} are free; {advice}") + "$"):
        load(plan, (5, 6), known=list)


def test_a_cgroup_limits_the_memory_that_is_free(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/self/cgroup", "0::/box\n")
    write("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    write("sys/fs/cgroup/box/memory.max", "5000000\n")
    write("sys/fs/cgroup/box/memory.current", "4000000\n")
    write("sys/fs/cgroup/box/memory.stat", "anon 1\ninactive_file 300000\n")
    assert available_ram(tmp_path) == 1_300_000
    write("sys/fs/cgroup/box/memory.max", "max\n")
    assert available_ram(tmp_path) > 10_000_000


def test_any_other_error_passes_through(engine: Engine) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("a kernel failed")

    engine.kernel = replace(engine.kernel, attend=broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.score(BATCH)


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("fails_in", [None, "record", "synchronize"])
def test_pinned_memory_of_a_failed_gpu_is_never_freed(fails_in: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would end the process: it records an event to free it, and cannot handle an error of that."""

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking

        def __getattr__(self, name: str) -> Callable[..., None]:
            return self.fail if name == fails_in else lambda *_: None

        def fail(self, *_: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    on_host: list[weakref.ref[torch.Tensor]] = []
    empty = torch.empty

    def pinned(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        assert pin_memory
        on_host.append(weakref.ref(tensor := empty(*shape, **options)))
        return tensor

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    scores = None
    with suppress(RuntimeError):
        scores = _fetch(torch.ones(2).as_subclass(OnGpu), torch.tensor([1, 0]))()
    assert scores == (None if fails_in else [1.0, 1.0])
    gc.collect()
    assert (on_host[0]() is None) == (fails_in is None)
