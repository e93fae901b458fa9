"""int8 linear layers compared with fp32, and the choice of layers on real models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from local_rerank import Reranker
from local_rerank.bench.measure import kendall_tau
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.engine.cpu.int8 import LARGEST, ZERO, Int8Linear, pair_sums, quantize
from local_rerank.engine.cpu.int8_search import quantize_layers
from local_rerank.engine.cpu.products import saturates
from local_rerank.engine.load import load_model
from local_rerank.selftest.self_test import require_self_test
from tests.reference import ModelCard
from tests.tiny_checkpoints import make_checkpoint

needs_full_range = pytest.mark.skipif(saturates(), reason="this CPU has no VNNI: full-range products saturate")


@pytest.mark.numeric
@pytest.mark.parametrize("limit_pairs", [True, pytest.param(False, marks=needs_full_range)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 16, 8), (7, 64, 96), (300, 96, 33), (5, 33, 7)])
def test_a_product_of_quantized_factors_is_exact(size: tuple[int, int, int], bias: bool, limit_pairs: bool) -> None:
    num_tokens, inputs, outputs = size
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(2, num_tokens, inputs)
    quantized, scales = quantize(x)
    largest = pair_sums(linear.weight) if limit_pairs else linear.weight.abs().amax(dim=1)
    weight_scales = largest.unsqueeze(1) / LARGEST
    expected = ((quantized.float() - ZERO) * scales) @ ((linear.weight / weight_scales).round() * weight_scales).T
    expected = expected if linear.bias is None else expected + linear.bias
    with torch.inference_mode():
        assert torch.allclose(Int8Linear(linear, limit_pairs=limit_pairs)(x), expected, atol=1e-4)


@pytest.mark.numeric
@pytest.mark.parametrize("pattern", [(1, 1), (-1, -1), (1, 0.7), (1, -1), (1, -1, -1), (0, 1, 1)])
@pytest.mark.parametrize("num_tokens", [1, 3, 200])
def test_full_range_values_of_one_sign_do_not_saturate(pattern: tuple[float, ...], num_tokens: int) -> None:
    linear = torch.nn.Linear(1002, 40, bias=False)
    with torch.inference_mode():
        linear.weight.copy_(torch.tensor(pattern).repeat(40, 1002 // len(pattern)))
        for x in (torch.ones(num_tokens, 1002), -torch.ones(num_tokens, 1002)):
            actual = Int8Linear(linear, limit_pairs=saturates())(x)
            assert (actual - linear(x)).abs().max() < 0.01 * 1002


@pytest.mark.numeric
@pytest.mark.parametrize("shape", [{"seed": 0}, {"num_attention_heads": 6, "num_key_value_heads": 1, "seed": 5}])
def test_the_error_is_at_most_twice_that_of_exact_8_bit_quantization(
    shape: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local_rerank.engine.cpu.prepare.MAX_SEARCHED_PARAMETERS", 0)  # every layer in int8
    folder = make_checkpoint(tmp_path / "model", **shape)
    documents = [f"document {number} " + "word " * number for number in range(20)]
    card, rounded = ModelCard(folder), ModelCard(folder)
    for layer in rounded.model.model.layers:
        for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
            linear.weight.data = rounded_to_8_bits(linear.weight.data)
            linear.register_forward_pre_hook(lambda _, inputs: (rounded_to_8_bits(inputs[0]),))
    with Reranker(str(folder), device="cpu", dtype="int8") as reranker:
        ours = {item.document: item.log_odds for item in reranker.rank("a query", documents)}
    exact = [card.pair("a query", document) for document in documents]
    largest = max(abs(rounded.pair("a query", d) - value) for d, value in zip(documents, exact, strict=True))
    assert max(abs(ours[d] - value) for d, value in zip(documents, exact, strict=True)) <= 2 * largest


def rounded_to_8_bits(x: torch.Tensor) -> torch.Tensor:
    """(..., width), each row rounded to 127 steps on both sides of zero, as floats."""
    step = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / step).round() * step


@pytest.mark.numeric
def test_quantizing_changes_a_value_by_at_most_half_a_step() -> None:
    x = torch.randn(50, 64) * torch.logspace(-6, 6, 50).unsqueeze(1)
    quantized, scales = quantize(x)
    assert ((quantized.float() - ZERO) * scales - x).abs().le(scales * 0.5001).all()


def layers_of(reranker: Reranker) -> dict[str, Any]:
    modules = reranker.engine.decoder.named_modules()
    return {name: module for name, module in modules if name.endswith("_proj")}


def test_layers_that_int8_would_damage_stay_in_fp32_and_preserve_the_ranking() -> None:
    documents = ["Paris is the capital of France.", "Rome is in Italy.", "Lyon lies in France.", "A cat sleeps.", ""]
    with Reranker(device="cpu", dtype="fp32") as exact, Reranker(device="cpu", dtype="int8") as ours:
        layers = layers_of(ours)
        assert set(ours.info.unquantized) == {n for n, module in layers.items() if not isinstance(module, Int8Linear)}
        assert "layers.2.self_attn.o_proj" in ours.info.unquantized  # has outliers
        assert 0 < len(ours.info.unquantized) < len(layers) * 3 / 4
        assert ours.engine.weights_dtype == "int8"
        require_self_test(ours)
        for query in ("capital of France", "sleeping animals", "Italian cities"):
            scores = [[item.log_odds for item in sorted(reranker.rank(query, documents), key=lambda item: item.index)]
                      for reranker in (exact, ours)]  # fmt: skip
            assert kendall_tau(*scores) > 0.9
            assert max(abs(a - b) for a, b in zip(*scores, strict=True)) > 0  # int8 is in use


@pytest.mark.numeric
def test_every_layer_of_a_model_without_outliers_is_quantized(tiny_checkpoint: Path) -> None:
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="int8") as reranker:
        assert reranker.info.unquantized == ()
        assert all(isinstance(module, Int8Linear) for module in layers_of(reranker).values())


@pytest.mark.parametrize(("wins", "is_searched"), [([1, 1, 1, 0], True), ([1, 1, 0, 0], False)])
def test_a_model_that_misorders_known_pairs_is_not_searched(
    wins: list[int], is_searched: bool, tiny_checkpoint: Path
) -> None:
    """`wins`: by how much each relevant document scores higher. Any int8 layer would damage the model."""
    model: Any = load_model(open_checkpoint(str(tiny_checkpoint)), dtype=torch.float32, device=torch.device("cpu"))
    log_odds = iter([[float(x) for win in wins for x in (win, 0)], *[[math.nan] * 8] * 100])
    before = {name: module for name, module in model.model.named_modules() if name.endswith("_proj")}
    assert set(quantize_layers(model.model.layers, lambda: next(log_odds))) == (set(before) if is_searched else set())
    after = {name: module for name, module in model.model.named_modules() if name.endswith("_proj")}
    assert (after == before) == is_searched


def test_a_large_model_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("local_rerank.engine.cpu.prepare.MAX_SEARCHED_PARAMETERS", 10)
    with Reranker(device="cpu", dtype="int8") as reranker:
        assert reranker.info.unquantized == ()
        assert all(isinstance(module, Int8Linear) for module in layers_of(reranker).values())
