"""Fused layers and fp8 weights against the layers that they replace."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from local_rerank import Reranker, cuda_layers, fp8
from local_rerank.attention import KERNELS
from local_rerank.engine import Engine, _head_rows, _packed_attention, _register_attention
from local_rerank.errors import ConfigError
from local_rerank.models import load_model, open_checkpoint
from local_rerank.packing import PackedBatch, pack
from local_rerank.precision import choose_dtype
from local_rerank.tokenization import Pair
from tests.checkpoints import make_checkpoint
from tests.test_scores import FP32_TOLERANCE

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Four of transformers' own layers, of which three are replaced."""
    folder = make_checkpoint(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4, seed=11)
    checkpoint = open_checkpoint(str(folder))
    _register_attention()
    model = load_model(checkpoint, dtype=torch.float32, device=CPU)
    head = _head_rows(model, checkpoint, yes_id=5, no_id=6)
    return Engine(model, head, kernel=KERNELS["cpu-flash"], device=CPU)


def a_batch() -> PackedBatch:
    return pack([Pair((1, 2, 3), tuple(range(4, 4 + n))) for n in (1, 9, 9, 30)] + [Pair((7, 8), (9, 10, 11))])


def fused(engine: Engine, *, compiled: bool = False) -> tuple[Engine, str]:
    """The same weights behind fused layers."""
    other = copy.deepcopy(engine)
    note = cuda_layers.fuse(other._backbone, _packed_attention, compiled=compiled, device=CPU)
    return other, note


@pytest.mark.parametrize("kernel", ["cpu-flash", "sdpa", "dense"])
def test_fused_layers_score_as_transformers_own(deep: Engine, kernel: str) -> None:
    engine, note = fused(deep)
    assert note == "layers are fused, not compiled, as asked for"
    assert [type(layer).__name__ for layer in engine._backbone.layers].count("FusedLayer") == 3
    expected = deep.forward(a_batch())
    ours = engine.with_kernel(KERNELS[kernel]).forward(a_batch())
    assert torch.allclose(ours, expected, atol=FP32_TOLERANCE * max(1.0, float(expected.abs().max())))


def test_biases_of_the_projections_are_joined_too() -> None:
    linears = [nn.Linear(8, n) for n in (4, 2, 6)]
    x = torch.randn(3, 8)
    joined = cuda_layers._joined(*linears)
    assert torch.allclose(joined(x), torch.cat([linear(x) for linear in linears], dim=-1), atol=1e-6)


def test_another_activation_than_silu_keeps_the_layers(deep: Engine) -> None:
    other = copy.deepcopy(deep)
    other._backbone.config.hidden_act = "gelu"
    note = cuda_layers.fuse(other._backbone, _packed_attention, compiled=False, device=CPU)
    assert "gelu" in note
    assert not any(isinstance(layer, cuda_layers.FusedLayer) for layer in other._backbone.layers)


def test_without_a_working_compiler_the_functions_run_as_they_are(
    deep: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(function: object) -> object:
        def run(*_: object) -> None:
            raise RuntimeError("no C compiler was found")

        return run

    cuda_layers.can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", no_compiler)
    engine, note = fused(deep, compiled=True)
    cuda_layers.can_compile.cache_clear()
    assert note == "layers are fused, not compiled: torch.compile does not work here"
    expected = deep.forward(a_batch())
    assert torch.allclose(
        engine.forward(a_batch()), expected, atol=FP32_TOLERANCE * max(1.0, float(expected.abs().max()))
    )


def test_the_pointwise_functions_trace_as_one_graph_each() -> None:
    """What torch.compile needs to fuse them; its back end for GPUs is not asked."""
    x, norm = torch.randn(1, 6, 8), torch.randn(8)
    heads, cos = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 1, 8)
    calls: list[tuple[object, tuple[object, ...]]] = [
        (cuda_layers.add_rms_norm, (x, x, norm, 1e-6)),
        (cuda_layers.norm_rotate, (heads, norm, cos, cos, 1e-6)),
        (cuda_layers.silu_mul, (x,)),
        (fp8.quantize, (x[0],)),
    ]
    for function, arguments in calls:
        traced = torch.compile(function, backend="eager", fullgraph=True)(*arguments)  # type: ignore[call-overload]
        for ours, expected in zip(_flat(traced), _flat(function(*arguments)), strict=True):  # type: ignore[operator]
            assert torch.equal(ours, expected)


def _flat(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_each_row_uses_the_whole_range_of_fp8() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64, dtype=torch.bfloat16) * torch.tensor([1e-6, 1e-2, 1.0, 1e3, 1e6]).unsqueeze(1).bfloat16()
    values, scale = fp8.quantize(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.shape == (5, 1)
    assert values.float().abs().amax(dim=1).tolist() == [448.0] * 5
    error = (values.float() * scale - x.float()).abs()
    # three bits after the leading one: half a unit of them is 1/16; the smallest numbers lose up to 2^-10 of the scale
    assert bool((error <= x.float().abs() / 16 + scale * 2**-10 * 1.01).all())


def test_a_row_of_zeros_stays_zero() -> None:
    values, scale = fp8.quantize(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert torch.equal(values.float(), torch.zeros(2, 16))
    assert bool(scale.isfinite().all())


def dequantized_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    """What the fp8 units compute, and the shapes and dtypes that torch's operator insists on."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert a_scale.dtype == b_scale.dtype == torch.float32
    assert (a_scale.shape, b_scale.shape) == ((a.shape[0], 1), (b.shape[0], 1))
    assert a.is_contiguous()
    assert b.is_contiguous()
    out = (a.float() * a_scale) @ (b.float() * b_scale).T
    return (out if bias is None else out + bias).bfloat16()


def test_an_fp8_layer_is_near_the_layer_it_was_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "scaled_matmul", dequantized_matmul)
    torch.manual_seed(0)
    linear = nn.Linear(256, 64, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, 7, 256, dtype=torch.bfloat16)
    ours, exact = fp8.Fp8Linear(linear, fp8.quantize)(x), linear.float()(x.float())
    assert ours.shape == (1, 7, 64)
    assert float((ours.float() - exact).norm() / exact.norm()) < 0.05


def test_a_model_in_fp8_scores_nearly_as_in_fp32(deep: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "scaled_matmul", dequantized_matmul)
    engine = copy.deepcopy(deep)
    engine._backbone.bfloat16()
    engine._final_norm.bfloat16()
    cuda_layers.fuse(engine._backbone, _packed_attention, compiled=False, device=CPU)
    fp8.quantize_model(engine._backbone)
    assert engine.weights_dtype == "fp8"
    assert not any(isinstance(module, nn.Linear) for module in engine._backbone.layers.modules())
    pairs = [Pair((1, 2, 3), tuple(range(n, n + 20))) for n in range(4, 60)]
    ours, exact = engine.forward(pack(pairs)), deep.forward(pack(pairs))
    correlation = float(torch.corrcoef(torch.stack([ours, exact]))[0, 1])
    assert correlation > 0.9  # .960 with these random weights, in layers of width 64; a scale misplaced gives noise
    assert engine._head.dtype == torch.float32


def test_fp8_is_refused_where_it_cannot_be_with_the_reason(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype is 'fp8', which needs a GPU of compute capability 8.9; .* is cpu"):
        Reranker(str(tiny_checkpoint), device="cpu", dtype="fp8")
    with pytest.raises(ConfigError, match="device_map is set; fp8 takes a model on one GPU"):
        Reranker(str(tiny_checkpoint), device="cpu", dtype="fp8", device_map="auto")
    with pytest.raises(ConfigError, match="it must be auto, fp32, bf16, fp16, fp8"):
        choose_dtype("fp4", CPU)


def test_sizes_that_fp8_cannot_multiply_are_named() -> None:
    backbone = nn.Module()
    backbone.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 20))])
    with pytest.raises(ConfigError, match=r"0 is 20 x 32; fp8 needs multiples of 16"):
        fp8.quantize_model(backbone)


@pytest.mark.parametrize("capability", [(7, 5), (8, 6)])
def test_an_older_gpu_is_named_with_its_capability(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older GPU")
    with pytest.raises(ConfigError, match=rf"an older GPU has {capability[0]}\.{capability[1]}"):
        fp8.require_fp8(torch.device("cuda"))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("no_compile", [False, True])
def test_scores_on_a_gpu_stay_near_fp32(dtype: str, no_compile: bool, tmp_path: Path) -> None:
    if dtype == "fp8":
        try:
            fp8.require_fp8(torch.device("cuda"))
        except ConfigError as error:
            pytest.skip(str(error))
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=4, head_dim=64, hidden_size=128, seed=12)
    pairs = [("a query", "word " * n) for n in range(1, 40)]
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        exact = torch.tensor(reranker.score(pairs, logits=True))
    with Reranker(str(folder), device="cuda", dtype=dtype, no_compile=no_compile) as reranker:
        for _ in range(3):  # the third pass replays a graph
            ours = torch.tensor(reranker.score(pairs, logits=True))
    spread = exact.max() - exact.min()
    assert float((ours - exact).abs().max() / spread) < {"bf16": 0.06, "fp8": 0.25}[dtype]
