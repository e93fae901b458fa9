"""Weights in oneDNN's layout: products compared with torch's linear layer, and when the layout is used."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from local_rerank import Reranker
from local_rerank.engine.cpu import choices
from local_rerank.engine.cpu.linears import BlockedLinear, can_block
from local_rerank.engine.cpu.products import PRODUCTS
from tests.reference import FP32, ModelCard
from tests.tiny_checkpoints import make_checkpoint

needs_operators = pytest.mark.skipif(not can_block(), reason="torch does not have the operators on this CPU")


@pytest.mark.numeric
@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 40), (3, 40), (257, 40), (1, 33, 40)])
def test_a_blocked_layer_agrees_with_torchs(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not PRODUCTS["blocked bf16"].runs_here():
        pytest.skip("this CPU does not multiply bf16")
    torch.manual_seed(0)
    linear = nn.Linear(40, 56, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        expected, actual = linear(x), BlockedLinear(linear)(x)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.numeric
@needs_operators
@pytest.mark.parametrize("blocked_seconds", [0.5, 2.0])
def test_fp32_weights_are_blocked_if_that_is_faster_and_score_the_same(
    blocked_seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"fp32": 1.0, "blocked fp32": blocked_seconds, "bf16": math.inf}
    monkeypatch.setattr(choices, "seconds_of_products", lambda: seconds)
    folder = make_checkpoint(tmp_path / "model", seed=12)
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        linears = [type(m) for m in reranker.engine.decoder.modules() if isinstance(m, nn.Linear | BlockedLinear)]
        assert set(linears) == {BlockedLinear if blocked_seconds < 1 else nn.Linear}
        assert reranker.engine.weights_dtype == "fp32"
        scores = reranker.score([("q", "a"), ("q", "bb"), ("r", "a")], logits=True)
    card = ModelCard(folder)
    assert scores == pytest.approx([card.pair(*pair) for pair in (("q", "a"), ("q", "bb"), ("r", "a"))], **FP32)


def test_measurements_do_not_matter_with_deterministic(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "seconds_of_products", lambda: {"fp32": 1.0, "blocked fp32": 0.5, "bf16": math.inf})
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32", deterministic=True) as reranker:
        assert not any(isinstance(module, BlockedLinear) for module in reranker.engine.decoder.modules())


@pytest.mark.parametrize(
    ("plain", "blocked", "bf16", "is_faster"), [(2.0, 2.0, 1.0, True), (2.0, 1.1, 1.0, True), (1.1, 2.0, 1.0, False)]
)
def test_bf16_is_preferred_if_it_is_clearly_faster_than_fp32(
    plain: float, blocked: float, bf16: float, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"fp32": plain, "blocked fp32": blocked, "bf16": bf16}
    monkeypatch.setattr(choices, "seconds_of_products", lambda: seconds)
    assert (choices.preferred_dtype()[0] == torch.bfloat16) == is_faster


ROUTED = """
import json, os, sys
import torch
from local_rerank import Reranker
from local_rerank.engine.cpu import choices, process_setup, products

def load_both(owned, fp32, rounds, has_amx):
    seconds = {"fp32": fp32, "blocked fp32": 1.0, "bf16": 0.5}
    choices.seconds_of_products = lambda: seconds
    torch.cpu._is_amx_tile_supported = lambda: bool(has_amx)
    if rounds:  # as a oneDNN without AMX might
        bmm = torch.bmm
        torch.bmm = lambda a, b: bmm(a.bfloat16().float() if products.fp32_precision() == "bf16" else a, b)
    if owned:
        process_setup.configure_process()
    for dtype in ("fp32", "bf16"):
        Reranker(sys.argv[1], device="cpu", dtype=dtype, threads=1).close()
        print(torch.backends.mkldnn.matmul.fp32_precision, end=" ")

for case in json.loads(sys.argv[2]):
    child = os.fork()  # cheap: torch is imported once, and no operator has run
    if not child:
        load_both(*case)
        print(flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_onednn_multiplies_fp32_if_that_is_faster_and_exact_and_we_own_the_process(tiny_checkpoint: Path) -> None:
    expected = {  # by: whether we own the process, seconds of fp32, whether oneDNN rounds, whether there is AMX
        (1, 2, 0, 0): "none bf16",  # not for an fp32 model
        (0, 2, 0, 0): "none none",  # another program's process
        (1, 1, 0, 0): "none none",  # MKL is as fast
        (1, 2, 1, 0): "none none",  # oneDNN rounds
        (1, 2, 0, 1): "none none",  # AMX rounds
    }
    program = [sys.executable, "-c", ROUTED, str(tiny_checkpoint), json.dumps(list(expected))]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    printed = [line.strip() for line in done.stdout.splitlines()]
    assert dict(zip(expected, printed, strict=True)) == expected, done.stderr
