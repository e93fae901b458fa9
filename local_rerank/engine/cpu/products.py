"""The kernels that multiply matrices on a CPU: a table, whether each one is right on this CPU, and how fast some are.

A kernel is checked once per process, before its first use, by comparing products with fp64. The factors are at full
range, with equal and with alternating signs: sums of random numbers are far smaller and would not reveal saturation.
The error bound follows from the dtype: fp32 sums in any order and with any rounding, bf16 and fp16 also round the
result, and int8 changes each factor by at most half a step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local_rerank.engine.cpu.int8 import LARGEST, Int8Linear, pair_sums
from local_rerank.engine.cpu.linears import BlockedLinear, can_block
from local_rerank.errors import ConfigError

logger = logging.getLogger(__name__)

NUM_ROUNDS = 8
NUM_TOKENS, NUM_INPUTS, NUM_OUTPUTS = 64, 266, 50  # not multiples of the vector width, so that remainders are checked

Multiply = Callable[[Tensor], Tensor]  # (tokens, inputs) to (tokens, outputs), or to several such results


@dataclass(frozen=True, slots=True)
class Product:
    """A kernel for products of tokens and weights."""

    dtype: torch.dtype
    multiplier: Callable[[Tensor], Multiply]  # takes weights, (outputs, inputs)
    error_bound: Callable[[Tensor, Tensor], Tensor]  # takes tokens and weights in fp64; (tokens, outputs)
    runs_here: Callable[[], bool] = lambda: True
    fallback: str | None = None  # the row to use if this kernel is wrong
    is_often_wrong: bool = False  # known and harmless, so no warning


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check: the error that is largest relative to its bound, and that bound."""

    error: float
    bound: float
    reason: str = ""  # the exception that the kernel raised, if any

    @property
    def is_right(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return self.reason or f"error {self.error:.2g}, bound {self.bound:.2g}"


def _linear(weight: Tensor) -> Multiply:
    return lambda x: F.linear(x, weight)


def _in_module(make: Callable[[nn.Linear], Multiply], weight: Tensor) -> Multiply:
    """A replacement of nn.Linear with these weights, (outputs, inputs)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return make(linear)


def _attention(weight: Tensor) -> Multiply:
    """Two heads, with the products of attention: by transposed keys, as for logits, and by values."""
    keys = weight.repeat(2, 1, 1)
    values = keys.transpose(1, 2).contiguous()

    def multiply(x: Tensor) -> Tensor:
        rows = x.repeat(2, 1, 1)
        return torch.cat([torch.bmm(rows, keys.transpose(1, 2)), torch.bmm(rows, values)])

    return multiply


def _routed(weight: Tensor) -> Multiply:
    """Attention and linear layers while oneDNN multiplies fp32 matrices (`set_fp32_precision`)."""
    attention, linear = _attention(weight), _linear(weight)

    def multiply(x: Tensor) -> Tensor:
        before = set_fp32_precision("bf16")
        try:
            return torch.cat([attention(x), linear(x).unsqueeze(0)])
        finally:
            set_fp32_precision(before)

    return multiply


def fp32_precision() -> str:
    """torch's setting for oneDNN's products of fp32 matrices; "bf16" makes torch use oneDNN instead of MKL."""
    onednn: Any = torch.backends.mkldnn
    return str(onednn.matmul.fp32_precision)


def set_fp32_precision(value: str) -> str:
    """Set it for the whole process; returns the previous value."""
    before = fp32_precision()
    onednn: Any = torch.backends.mkldnn
    onednn.matmul.fp32_precision = value
    return before


def _bound_of_sums(x: Tensor, weight: Tensor) -> Tensor:
    """For n products summed in fp32: n * eps times the sum of magnitudes. x: (tokens, n); weight: (outputs, n)."""
    return x.shape[1] * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T)


def _bound_of_rounded_sums(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Likewise, plus eps times the result, which is rounded to 16 bits."""
    return lambda x, weight: _bound_of_sums(x, weight) + torch.finfo(dtype).eps * (x @ weight.T).abs()


def _bound_of_steps(largest: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Half a step of each factor. `largest`: the weight that corresponds to 127 steps, (outputs,)."""

    def bound(x: Tensor, weight: Tensor) -> Tensor:
        x_error = x.abs().amax(dim=1, keepdim=True) / (2 * LARGEST)  # (tokens, 1)
        weight_error = largest(weight) / (2 * LARGEST)  # (outputs,)
        linear = x.abs().sum(dim=1, keepdim=True) * weight_error + x_error * weight.abs().sum(dim=1)
        return _bound_of_sums(x, weight) + linear + x.shape[1] * x_error * weight_error

    return bound


def _can_block_bf16() -> bool:
    return can_block() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _can_route() -> bool:
    """The setting "bf16" allows AMX to round to bf16; without AMX, oneDNN multiplies in fp32."""
    return can_block() and not torch.cpu._is_amx_tile_supported()


def has_int8() -> bool:
    """Whether torch has the int8 operators."""
    return torch._C._has_mkldnn and hasattr(torch.ops.onednn, "qlinear_pointwise")


_blocked = partial(_in_module, BlockedLinear)
_int8, _limited_int8 = (
    partial(_in_module, partial(Int8Linear, limit_pairs=limit_pairs)) for limit_pairs in (False, True)
)
_bound_of_bf16, _bound_of_fp16 = _bound_of_rounded_sums(torch.bfloat16), _bound_of_rounded_sums(torch.float16)
_bound_of_int8 = _bound_of_steps(lambda weight: weight.abs().amax(dim=1))
_bound_of_limited_int8 = _bound_of_steps(pair_sums)

PRODUCTS: Mapping[str, Product] = {
    "blocked fp32": Product(torch.float32, _blocked, _bound_of_sums, can_block, "fp32"),
    "fp32": Product(torch.float32, _linear, _bound_of_sums),
    "routed fp32": Product(torch.float32, _routed, _bound_of_sums, _can_route, "attention fp32"),
    "attention fp32": Product(torch.float32, _attention, _bound_of_sums),
    "blocked bf16": Product(torch.bfloat16, _blocked, _bound_of_bf16, _can_block_bf16, "bf16"),
    "bf16": Product(torch.bfloat16, _linear, _bound_of_bf16, fallback="fp32"),
    "attention bf16": Product(torch.bfloat16, _attention, _bound_of_bf16, fallback="fp32"),
    "fp16": Product(torch.float16, _linear, _bound_of_fp16),
    "attention fp16": Product(torch.float16, _attention, _bound_of_fp16),
    "int8": Product(torch.int8, _int8, _bound_of_int8, has_int8, "int8, limited pairs", is_often_wrong=True),
    "int8, limited pairs": Product(torch.int8, _limited_int8, _bound_of_limited_int8, has_int8),
}


def is_right(name: str) -> bool:
    """Whether the kernel runs on this CPU and passes the check."""
    return PRODUCTS[name].runs_here() and check(name).is_right


def require(dtype: str, *names: str) -> None:
    """Raise ConfigError unless one of these kernels, which multiply `dtype`, is right."""
    if not any(is_right(name) for name in names):
        found = ", ".join(f"{name}: {check(name)}" for name in names if PRODUCTS[name].runs_here())
        raise ConfigError(
            f"dtype {dtype} is wrong on this CPU: products at full range differ from fp64 ({found}); use another dtype "
            f"or another version of torch (torch.backends.mkldnn.matmul.fp32_precision is {fp32_precision()!r})"
        )


def saturates() -> bool:
    """Whether full-range int8 products saturate on this CPU, so that weights need limited pairs."""
    return not is_right("int8")


@cache
def check(name: str) -> CheckResult:
    """Compare a kernel with fp64, once; logs it if the kernel is wrong.

    Uses one thread: on busy cores, two threads wait for each other in every operator, which takes up to ten times as
    long.
    """
    product, num_threads = PRODUCTS[name], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            result = _compare(product)
    except RuntimeError as error:  # an operator that does not run on this CPU
        result = CheckResult(math.inf, 0.0, str(error).partition("\n")[0])
    finally:
        torch.set_num_threads(num_threads)
    if not result.is_right:
        level = logging.INFO if product.is_often_wrong else logging.WARNING
        fallback = "there is no fallback" if product.fallback is None else f"{product.fallback!r} is used instead"
        logger.log(level, "kernel %r gives wrong products on this CPU (%s); %s", name, result, fallback)
    return result


def _compare(product: Product) -> CheckResult:
    floats = torch.float32 if product.dtype == torch.int8 else product.dtype
    # fp16 must hold the result; otherwise results exceed 16 bits, and factors that bf16 or TF32 would round
    size = 15.0 if floats == torch.float16 else 1024 * (1 + 2.0**-12)
    weight, tokens = ((full_range_rows(num_rows) * size).to(floats) for num_rows in (NUM_OUTPUTS, NUM_TOKENS))
    multiply = product.multiplier(weight)
    # vectors of one sign and of both, a few rows, many rows: each may have its own kernel
    parts = [tokens[:1], tokens[1:2], tokens[2:3], tokens[:5], tokens]
    result = torch.cat([multiply(x).double() for x in parts], dim=-2)  # (..., all tokens, outputs)
    x = torch.cat(parts).double()
    exact, bound = x @ weight.double().T, product.error_bound(x, weight.double())
    error = (result - exact).abs_().nan_to_num_(nan=math.inf).view(-1, bound.numel()).amax(dim=0)
    worst = int((error / bound.flatten()).argmax())
    return CheckResult(float(error[worst]), float(bound.flatten()[worst]))


def full_range_rows(num_rows: int) -> Tensor:
    """Rows between -1 and 1, (num_rows, NUM_INPUTS), each smaller than the one before, so that swapped rows show.

    In turn: all positive, all negative, alternating signs, alternating sizes, all different.
    """
    pairs = torch.tensor([(1.0, 1.0), (-1.0, -1.0), (1.0, -1.0), (1.0, 0.5)], dtype=torch.float32)
    rows = torch.cat([pairs.repeat(1, NUM_INPUTS // 2), torch.linspace(-1, 1, NUM_INPUTS).unsqueeze(0)])
    sizes = torch.linspace(1, 0.5, num_rows, dtype=torch.float32).unsqueeze(1)
    return rows.repeat(-(-num_rows // len(rows)), 1)[:num_rows] * sizes


@cache
def seconds_of_products() -> dict[str, float]:
    """Seconds of a product of 256 tokens in fp32, blocked fp32 and bf16; measuring takes about 40 ms.

    Infinite if a kernel is missing or wrong, or if this CPU has no bf16 instructions.
    """
    candidates = {"fp32": "fp32", "blocked fp32": "blocked fp32"}
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        candidates["bf16"] = "blocked bf16" if is_right("blocked bf16") else "bf16"
    ones = torch.ones(1024, 1024, dtype=torch.float32)
    calls: dict[str, Callable[[], Tensor]] = {}
    for key, name in candidates.items():
        if is_right(name):
            weight = ones.to(PRODUCTS[name].dtype)
            calls[key] = partial(PRODUCTS[name].multiplier(weight), weight[:256])
    best = dict.fromkeys(("fp32", "blocked fp32", "bf16"), math.inf)
    if len(calls) > 1:
        with torch.inference_mode():
            for _ in range(NUM_ROUNDS):  # in alternation, best of each, to exclude interference by other processes
                for key, call in calls.items():
                    start = time.perf_counter()
                    call()
                    best[key] = min(best[key], time.perf_counter() - start)
    return best
