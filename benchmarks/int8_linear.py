"""Which int8 linear layer is the fastest here? One projection of the 0.6B model, 2,048 tokens, in turn, on the CPU.

    python benchmarks/int8_linear.py [--tokens 2048] [--rounds 7]

Quantizing the activations counts. torchao takes part where it is installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from local_rerank.engine.cpu.int8 import Int8Linear
from local_rerank.engine.cpu.products import saturates

SHAPES = {"up": (1024, 3072), "down": (3072, 1024)}
Multiply = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    for name, (inputs, outputs) in SHAPES.items():
        linear, x = nn.Linear(inputs, outputs, bias=False), torch.randn(options.tokens, inputs)
        ours = Int8Linear(linear, limit_pairs=saturates())
        ways = {"fp32": linear, "oneDNN (ours)": ours, "torch._int_mm": _int_mm(linear)}
        if (torchao := _torchao(linear)) is not None:
            ways["torchao"] = torchao
        print(f"{name}: {_in_turn(ways, x, options.rounds)}", flush=True)


def _int_mm(linear: nn.Linear) -> Multiply:
    """A module of our own on torch's product, the weight column-major."""
    weight = linear.weight.detach()
    scales = weight.abs().amax(dim=1) / 127
    transposed = (weight / scales.unsqueeze(1)).round().to(torch.int8).T

    def multiply(x: Tensor) -> Tensor:
        of_tokens = x.abs().amax(dim=1, keepdim=True) / 127
        product = torch._int_mm((x / of_tokens).round_().to(torch.int8), transposed)
        return product.float().mul_(of_tokens).mul_(scales)

    return multiply


def _torchao(linear: nn.Linear) -> Multiply | None:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        print("torchao is not installed")
        return None
    copy = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False))
    copy.load_state_dict({"0.weight": linear.weight.detach()})
    quantize_(copy, Int8DynamicActivationInt8WeightConfig())
    return copy


def _in_turn(ways: dict[str, Multiply], x: Tensor, rounds: int) -> str:
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        exact = next(iter(ways.values()))(x)
        errors = {name: float((way(x) - exact).abs().max() / exact.abs().max()) for name, way in ways.items()}
        for _ in range(rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way(x)
                times[name].append(1e3 * (time.perf_counter() - started))
    return "; ".join(
        f"{name} {statistics.median(taken):.1f} ms (off by {errors[name]:.1%})" for name, taken in times.items()
    )


if __name__ == "__main__":
    main()
