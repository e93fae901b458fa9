"""The check of kernels finds products that saturate or round, and a right kernel is used instead."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from local_rerank import Reranker
from local_rerank.engine.cpu import choices, products
from local_rerank.engine.cpu.int8 import Int8Linear
from local_rerank.engine.cpu.linears import BlockedLinear, can_block
from local_rerank.engine.cpu.products import PRODUCTS, Multiply, check, is_right
from local_rerank.errors import ConfigError
from local_rerank.selftest.machine_report import describe
from tests.reference import FP32, ModelCard
from tests.tiny_checkpoints import make_checkpoint

pytestmark = pytest.mark.numeric

HERE = [name for name, product in PRODUCTS.items() if product.runs_here()]
PAIRS = [("q", "a"), ("q", "bb"), ("r", "a")]
Break = Callable[..., None]
Multiplier = Callable[[Tensor], Multiply]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Break]:
    """Makes kernels wrong: applies `spoil` to their results, or replaces them by `multiplier`."""

    def break_kernels(
        *names: str, spoil: Callable[[Tensor], Tensor] = saturated, multiplier: Multiplier | None = None
    ) -> None:
        for name in names:
            product = PRODUCTS[name]
            wrong = dataclasses.replace(product, multiplier=multiplier or spoiled(product, spoil))
            monkeypatch.setitem(PRODUCTS, name, wrong)
        check.cache_clear()

    check.cache_clear()
    yield break_kernels
    monkeypatch.undo()
    check.cache_clear()


def spoiled(product: products.Product, spoil: Callable[[Tensor], Tensor]) -> Multiplier:
    def multiplier(weight: Tensor) -> Multiply:
        multiply = product.multiplier(weight)
        return lambda x: spoil(multiply(x))

    return multiplier


def saturated(out: Tensor) -> Tensor:
    """Saturates at 16 bits."""
    return out.clamp(-(2.0**15), 2.0**15 - 1)


def reordered(out: Tensor) -> Tensor:
    return out.flip(-1)


def undefined(out: Tensor) -> Tensor:
    return out * torch.nan


def failing(out: Tensor) -> Tensor:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize("name", [name for name in HERE if not PRODUCTS[name].is_often_wrong])
def test_every_kernel_of_this_cpu_is_right(name: str) -> None:
    assert is_right(name), check(name)


@pytest.mark.parametrize("spoil", [saturated, reordered, undefined, failing])
@pytest.mark.parametrize("name", HERE)
def test_a_kernel_that_saturates_reorders_or_fails_is_wrong(
    name: str, spoil: Callable[[Tensor], Tensor], broken: Break
) -> None:
    broken(name, spoil=spoil)
    assert not is_right(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_kernel_that_rounds_its_factors_is_wrong(dtype: torch.dtype, broken: Break) -> None:
    broken("fp32", multiplier=lambda weight: lambda x: x.to(dtype).float() @ weight.to(dtype).float().T)
    assert not is_right("fp32")


def test_a_bf16_kernel_that_sums_in_bf16_is_wrong(broken: Break) -> None:
    def summing(weight: Tensor) -> Multiply:
        def multiply(x: Tensor) -> Tensor:
            total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
            for index in range(x.shape[1]):
                total += x[:, index, None] * weight[:, index]
            return total

        return multiply

    broken("bf16", multiplier=summing)
    assert not is_right("bf16")


def test_products_reach_the_full_range(broken: Break) -> None:
    broken("fp32", spoil=lambda out: out.clamp(-1e8, 1e8))  # the largest is 2.8e8
    assert not is_right("fp32")


def test_int8_that_saturates_as_without_vnni_needs_limited_pairs(
    broken: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without VNNI, two adjacent products are added in 16 bits."""

    def multiply(self: Any, quantized: Tensor, scales: Tensor) -> Tensor:
        pairs = quantized.float().unsqueeze(-2) * self.steps  # (tokens, outputs, inputs)
        sums = saturated(pairs.unflatten(-1, (-1, 2)).sum(-1)).sum(-1)
        return (sums - 128 * self.steps.sum(-1)) * self.scales

    init = Int8Linear.__init__

    def keep_steps(self: Any, linear: nn.Linear, *, limit_pairs: bool) -> None:
        init(self, linear, limit_pairs=limit_pairs)
        self.steps = (linear.weight / self.scales.unsqueeze(1)).round()

    monkeypatch.setattr(Int8Linear, "__init__", keep_steps)
    monkeypatch.setattr(Int8Linear, "multiply", multiply)
    assert products.saturates()
    assert is_right("int8, limited pairs")


@pytest.mark.skipif(not can_block(), reason="torch does not have the operators on this CPU")
def test_a_wrong_blocked_kernel_is_reported_once_and_its_fallback_scores_right(
    broken: Break, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = {"fp32": 1.0, "blocked fp32": 0.5, "bf16": 2.0}
    monkeypatch.setattr(choices, "seconds_of_products", lambda: seconds)
    forward = BlockedLinear.forward

    def wrong_in_fp32(self: BlockedLinear, x: Tensor) -> Tensor:
        return saturated(forward(self, x)) if x.dtype == torch.float32 else forward(self, x)

    monkeypatch.setattr(BlockedLinear, "forward", wrong_in_fp32)
    folder = make_checkpoint(tmp_path / "model", seed=12)
    for _ in range(2):
        with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
            assert not any(isinstance(module, BlockedLinear) for module in reranker.engine.decoder.modules())
            assert reranker.info.products == ("fp32", "attention fp32")
            scores = reranker.score(PAIRS, logits=True)
    assert scores == pytest.approx([ModelCard(folder).pair(*pair) for pair in PAIRS], **FP32)
    (record,) = [record for record in caplog.records if record.name == products.__name__]
    assert record.levelno == logging.WARNING
    assert "'blocked fp32' gives wrong products" in record.message
    assert "(error 2.8e+08, bound 8.8e+03); 'fp32' is used instead" in record.message
    row = describe(reranker.info, reranker.checkpoint).products
    assert row.value.startswith("in use: fp32, attention fp32; also correct: ")
    assert "wrong, not used: blocked fp32 (error" in row.value
    assert row.faster == "a torch version whose blocked fp32 is correct"


def test_a_wrong_kernel_is_not_timed(broken: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    products.seconds_of_products.cache_clear()
    broken("blocked fp32")
    assert products.seconds_of_products()["blocked fp32"] == float("inf")
    products.seconds_of_products.cache_clear()


@pytest.mark.parametrize("wrong", [("bf16", "blocked bf16"), ("attention bf16",)])
def test_16_bit_weights_are_multiplied_in_fp32_if_bf16_is_wrong(
    wrong: tuple[str, ...], broken: Break, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "seconds_of_products", lambda: {"fp32": 2.0, "blocked fp32": 2.0, "bf16": 1.0})
    folder = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16, seed=3)
    with Reranker(str(folder), device="cpu", dtype="bf16") as reranker:
        assert reranker.info.compute_dtype == "bf16"
    broken(*wrong)
    with Reranker(str(folder), device="cpu", dtype="bf16") as reranker:
        assert (reranker.info.dtype, reranker.info.compute_dtype) == ("bf16", "fp32")
        scores = reranker.score(PAIRS, logits=True)
    assert scores == pytest.approx([ModelCard(folder).pair(*pair) for pair in PAIRS], **FP32)


@pytest.mark.parametrize(
    ("dtype", "wrong", "options"),
    [
        ("fp32", "fp32", {}),
        ("fp32", "attention fp32", {}),
        ("int8", "int8, limited pairs", {}),
        ("bf16", "bf16", {"device_map": "auto"}),  # no fp32 fallback for a model spread over devices
        ("bf16", "attention bf16", {"device_map": "auto"}),
        ("fp16", "fp16", {"device_map": "auto"}),
        ("fp16", "attention fp16", {"device_map": "auto"}),
    ],
)
def test_a_dtype_without_a_right_kernel_is_rejected(
    dtype: Any, wrong: str, options: dict[str, Any], broken: Break, tiny_checkpoint: Path
) -> None:
    broken(wrong, "int8")
    with pytest.raises(ConfigError, match=rf"dtype {dtype} is wrong on this CPU: .*{wrong}: error .*use another dtype"):
        Reranker(str(tiny_checkpoint), device="cpu", dtype=dtype, **options)


def test_only_kernels_in_use_are_checked_and_only_once(broken: Break, tiny_checkpoint: Path) -> None:
    for _ in range(2):
        Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32", deterministic=True).close()
        assert check.cache_info().misses <= 4  # fp32, attention fp32, and those that `auto` measures
