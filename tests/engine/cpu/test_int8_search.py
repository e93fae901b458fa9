"""The search for layers that stay in fp32 with int8, and its cache file."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from local_rerank import Reranker
from local_rerank.checkpoints.free_space import cache_folder
from local_rerank.engine.cpu import int8_search
from local_rerank.engine.cpu.int8 import Int8Linear
from local_rerank.engine.cpu.int8_search import (
    LANES,
    LINEARS_PER_LAYER,
    ReusedLayer,
    checksum,
    facts_of,
    quantize_layers,
)
from local_rerank.engine.cpu.layers import CpuLayer
from local_rerank.engine.engine import Engine
from local_rerank.requests.pair import Pair
from local_rerank.selftest.machine_report import describe
from tests.tiny_checkpoints import make_checkpoint

FACTS = {"weights": "some"}
DAMAGED = ["layers.0.self_attn.o_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)
    return cache_folder() / "int8"


class Model:
    """A small decoder with fake log-odds, which change while one of `damaged` is int8; counts the passes."""

    def __init__(self, folder: Path, damaged: Iterable[str] = DAMAGED) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.damaged = list(damaged)
        self.num_passes = 0

    def log_odds(self) -> list[float]:
        self.num_passes += 1
        is_damaged = any(name in self.damaged for name in self.int8_names())
        return [value + 10.0 * is_damaged for value in [1.0, 0.0] * 4]

    def int8_names(self) -> list[str]:
        names = [name for name, module in self.model.model.named_modules() if isinstance(module, Int8Linear)]
        return [name.replace(".layer.", ".") for name in names]  # a search wraps layers

    def choose(self, facts: dict[str, Any] | None = FACTS) -> list[str]:
        return quantize_layers(self.model.model.layers, self.log_odds, facts)


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_a_second_start_reads_the_choice_without_a_search(tiny_checkpoint: Path, cache: Path) -> None:
    first, second = Model(tiny_checkpoint), Model(tiny_checkpoint)
    assert first.choose() == second.choose() == DAMAGED
    assert (first.num_passes > 8, second.num_passes) == (True, 0)
    assert len(first.int8_names()) == 2 * LINEARS_PER_LAYER - len(DAMAGED)
    assert first.int8_names() == second.int8_names()
    assert json.loads(only_file(cache).read_text(encoding="utf-8"))["fp32_layers"] == DAMAGED


def test_an_empty_choice_is_cached_too(tiny_checkpoint: Path) -> None:
    first, second = Model(tiny_checkpoint, []), Model(tiny_checkpoint, [])
    assert first.choose() == second.choose() == []
    assert (first.num_passes, second.num_passes) == (2, 0)
    assert len(second.int8_names()) == 2 * LINEARS_PER_LAYER


def test_options_that_affect_the_result_need_a_new_search(tmp_path: Path, tiny_checkpoint: Path, cache: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    for folder, options, num_files in (
        (tiny_checkpoint, {}, 1),
        (tiny_checkpoint, {}, 1),
        (tiny_checkpoint, {"threads": 1, "max_query_tokens": 2}, 1),
        (tiny_checkpoint, {"deterministic": True}, 2),
        (tiny_checkpoint, {"attention": "dense"}, 3),
        (other, {}, 4),
    ):
        with Reranker(str(folder), device="cpu", dtype="int8", **options):
            assert len(list(cache.iterdir())) == num_files, options


def some_facts(*, last_weight: float = 7.0, token: int = 2, values: str = "None") -> dict[str, Any]:
    weights = torch.tensor([0, 1, 2, last_weight])
    return dict(facts_of({"w": weights}, [Pair.of((1,), (token,))], values=values))


@pytest.mark.parametrize("change", [{"last_weight": 7.0 + 1e-6}, {"token": 3}, {"values": "torch.bfloat16"}])
def test_facts_differ_with_weights_prompts_and_options(change: dict[str, Any]) -> None:
    assert some_facts(**change) != some_facts() == some_facts()


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(int8_search, "saturates", lambda: "another CPU"),
        lambda patch: patch.setattr(int8_search, "__version__", "0.0.0"),
        lambda patch: patch.setattr(int8_search, "TOLERANCE", 0.2),
        lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"),
        lambda patch: patch.setenv("ATEN_CPU_CAPABILITY", "avx2"),
    ],
)
def test_facts_differ_with_what_kernels_and_search_depend_on(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = some_facts()
    change(monkeypatch)
    assert some_facts() != before


def test_facts_have_the_features_of_the_cpu_without_its_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(capabilities: dict[str, Any]) -> dict[str, Any]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        return some_facts()

    assert facts({"avx2": True}) == facts({"avx2": True, "num_physical_cores": 64}) != facts({"avx2": False})


def numbers() -> Tensor:
    """(3 * 2 * LANES + 5,) distinct values: three folded rows and a remainder."""
    return torch.arange(3 * LANES * 2 + 5, dtype=torch.float32)


@pytest.mark.parametrize("index", [0, 1, 2 * LANES, -1])
def test_a_checksum_depends_on_every_value(index: int) -> None:
    other = numbers()
    other[index] += 1
    assert checksum({"w": other}) != checksum({"w": numbers()}) == checksum({"w": numbers()})


@pytest.mark.parametrize(
    "change",
    [
        lambda w: torch.cat([w[LANES * 2 : LANES * 4], w[: LANES * 2], w[LANES * 4 :]]),  # swaps two rows
        lambda w: torch.cat([w[2:4], w[:2], w[4:]]),  # swaps two numbers of a row
        lambda w: w.view(1, -1),
        lambda w: w.view(torch.int32),
    ],
)
def test_a_checksum_depends_on_order_shape_dtype_and_name(change: Callable[[Tensor], Tensor]) -> None:
    assert checksum({"w": change(numbers())}) != checksum({"w": numbers()})
    assert checksum({"v": numbers()}) != checksum({"w": numbers()})


def test_a_checksum_does_not_depend_on_alignment_and_strides() -> None:
    shifted = torch.cat([torch.zeros(1), numbers()])[1:]  # at an odd multiple of four bytes
    assert checksum({"w": shifted}) == checksum({"w": numbers()})
    assert checksum({"w": numbers()[:6].view(2, 3).T.contiguous().T}) == checksum({"w": numbers()[:6].view(2, 3)})


def stored(**changes: Any) -> str:
    return json.dumps({"fp32_layers": DAMAGED, "facts": FACTS} | changes)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "[" * 100_000, stored()[:-9], stored(fp32_layers=3), stored(fp32_layers=[[]]),
        stored(facts={}), stored(fp32_layers=["layers.9.mlp.down_proj"]), stored(fp32_layers=DAMAGED[:2]), "\udcff",
    ],
)  # fmt: skip
def test_a_corrupt_or_foreign_file_is_replaced(
    text: str, tiny_checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Model(tiny_checkpoint).choose()
    good = only_file(cache).read_bytes()
    only_file(cache).write_bytes(text.encode("utf-8", "surrogateescape"))
    caplog.clear()
    model = Model(tiny_checkpoint)
    assert model.choose() == DAMAGED
    assert model.num_passes > 8
    assert "cannot use the cached choice" in caplog.text
    assert only_file(cache).read_bytes() == good


def test_a_cache_folder_that_cannot_be_written_is_not_an_error(
    tiny_checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def is_full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", is_full)
        assert Model(tiny_checkpoint).choose() == DAMAGED
    assert list(cache.iterdir()) == []
    assert "cannot cache the choice" in caplog.text
    caplog.clear()

    def no_home() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert Model(tiny_checkpoint).choose() == DAMAGED
    assert "cannot cache the choice" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_concurrent_writers_leave_one_complete_file(cache: Path, tiny_checkpoint: Path) -> None:
    groups = int8_search.groups_of(Model(tiny_checkpoint).model.model.layers)

    def write_and_read(_: int) -> set[str] | None:
        int8_search.write_choice(FACTS, DAMAGED)
        return int8_search.read_choice(FACTS, groups)

    with ThreadPoolExecutor(8) as pool:
        assert all(names == set(DAMAGED) for names in pool.map(write_and_read, range(80)))
    assert only_file(cache).suffix == ".json"


def test_without_facts_nothing_is_written(tiny_checkpoint: Path, cache: Path) -> None:
    assert Model(tiny_checkpoint).choose(None) == DAMAGED
    assert not cache.exists()


def test_every_start_warns_if_all_layers_stay_in_fp32(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    every = [name for name, _ in Model(tiny_checkpoint).model.model.named_modules() if name.endswith("_proj")]
    for _ in range(2):
        caplog.clear()
        assert sorted(Model(tiny_checkpoint, every).choose()) == sorted(every)
        (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
        assert "every linear layer" in warning.message


@pytest.mark.parametrize("owns", [True, False])
def test_only_a_command_in_a_terminal_shows_a_progress_bar(
    owns: bool, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(int8_search, "owns_process", lambda: owns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = Model(tiny_checkpoint)
    capfd.readouterr()  # transformers' own bar
    model.choose()
    out, err = capfd.readouterr()
    assert out == ""
    assert ("choosing layers for int8" in err) == owns
    assert ("8/8" in err) == owns
    assert owns or err == ""


def test_a_search_skips_layers_before_the_changed_one_without_changing_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_search, "MAX_MISORDERED", 4)
    monkeypatch.setattr(int8_search, "SHARE_OF_ALL", 0.0)  # try every group
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=4)
    scores: list[list[float]] = []
    layers: list[Any] = []
    score, layer_forward = Engine.score, CpuLayer.forward

    def scored(engine: Engine, pairs: Sequence[Pair]) -> list[float]:
        scores.append(score(engine, pairs))
        return scores[-1]

    def counted(layer: CpuLayer, hidden: Tensor, rotation: Any, attend: Any, layout: Any, *last: Tensor) -> Tensor:
        if not last:
            layers.append(layer)
        return layer_forward(layer, hidden, rotation, attend, layout, *last)

    monkeypatch.setattr(Engine, "score", scored)
    monkeypatch.setattr(CpuLayer, "forward", counted)
    with Reranker(str(folder), device="cpu", dtype="int8") as reranker:
        chosen = reranker.info.unquantized
        assert all(type(layer) is CpuLayer for layer in list(reranker.engine.decoder.layers)[:-1])
    # all layers but the last: three full passes, then for each group of a layer a pass from that layer on
    assert len(layers) == 3 * 3 + 4 * (3 + 2 + 1)
    reused = scores.copy()
    scores.clear()
    monkeypatch.setattr(ReusedLayer, "forward", lambda self, x, *arguments: self.layer(x, *arguments))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    with Reranker(str(folder), device="cpu", dtype="int8") as reranker:
        assert reranker.info.unquantized == chosen
    assert scores == reused
    assert len({tuple(log_odds) for log_odds in scores}) == 1 + 1 + 16  # fp32, all in int8, each group


def test_doctor_counts_the_int8_layers(tiny_checkpoint: Path) -> None:
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="int8") as reranker:
        row = describe(reranker.info, reranker.checkpoint).dtype
    num_int8 = 14 - len(reranker.info.unquantized)
    assert row.value.startswith(f"int8 weights and activations in {num_int8} of 14 linear layers, the rest fp32")
