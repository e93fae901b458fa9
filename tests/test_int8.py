"""Linear layers in int8 against the same product in fp32, and what refuses them."""

from __future__ import annotations

import pytest
import torch

from local_rerank import Reranker
from local_rerank.errors import ConfigError
from local_rerank.int8 import LARGEST, ZERO, Int8Linear, quantize


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 16, 8), (7, 64, 96), (300, 96, 33)])
def test_a_product_is_that_of_the_rounded_numbers(size: tuple[int, int, int], bias: bool) -> None:
    num_tokens, inputs, outputs = size
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(2, num_tokens, inputs)
    rounded, scales = quantize(x)
    of_channel = linear.weight.abs().amax(dim=1, keepdim=True) / LARGEST
    expected = ((rounded.float() - ZERO) * scales) @ ((linear.weight / of_channel).round() * of_channel).T
    expected = expected if linear.bias is None else expected + linear.bias
    with torch.inference_mode():
        assert torch.allclose(Int8Linear(linear)(x), expected, atol=1e-4)


def test_quantizing_moves_a_value_by_at_most_half_a_step() -> None:
    x = torch.randn(50, 64) * torch.logspace(-6, 6, 50).unsqueeze(1)
    rounded, scales = quantize(x)
    assert ((rounded.float() - ZERO) * scales - x).abs().le(scales * 0.5001).all()


def test_a_token_of_zeros_stays_zero() -> None:
    rounded, _ = quantize(torch.zeros(3, 8))
    assert rounded.eq(ZERO).all()


def test_int8_on_another_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8 runs on a CPU"):
        Reranker(device="cpu", dtype="int8", device_map="auto")
