"""A pass has no step that waits for a GPU: none reads a value back, none takes tensors of the host; shown on "meta"."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.engine import attention
from local_rerank.engine.cuda import attention as cuda_attention
from local_rerank.engine.cuda import fp8, triton_kernels
from local_rerank.engine.cuda.layers import FusedDecoder
from local_rerank.engine.decoder import TransformersDecoder
from local_rerank.engine.encoder import Encoder, pack_segments
from local_rerank.engine.engine import Engine
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.engine.load import load_model
from local_rerank.engine.packing import pack
from local_rerank.requests.pair import Pair
from tests.encoder_checkpoints import OF, make_encoder
from tests.tiny_checkpoints import make_checkpoint
from tests.triton_reference import in_torch

DEVICE = torch.device("meta")  # computes shapes only, and raises if a value is asked for
PAIRS = [Pair.of((1, 2, 3), range(4, 4 + length)) for length in (1, 6, 6, 9)] + [Pair.of((7, 8), (9, 10, 11))]
SEGMENTS = [replace(Pair.of((), range(4, 4 + length)), first_typed=2) for length in (3, 6, 6, 30)]


class OneDevice(TorchDispatchMode):
    """Fails at an operator that takes or returns tensors of the host beside those of the device."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        devices = {each.device.type for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)}
        assert len(devices) < 2, f"{operator} has tensors on {sorted(devices)}"
        return result


def attends(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> Tensor:
    """Checks what the kernels for GPUs need of their arguments."""
    tensors = [each for each in tree_leaves(rest) if isinstance(each, Tensor)]
    assert q.dtype == k.dtype == v.dtype
    assert {each.device.type for each in (q, k, v, *tensors)} == {DEVICE.type}
    assert {each.dtype for each in tensors} == {torch.int32}
    return torch.empty_like(q)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    in_torch(monkeypatch)
    monkeypatch.setattr(triton_kernels, "attend_tiles", attends)
    monkeypatch.setattr(cuda_attention, "torch_varlen", lambda *args, **_: (attends(*args), args[0][..., 0].T.float()))
    copy = attention.copy_to

    def copy_layout(tensors: Any, device: torch.device) -> list[Tensor]:
        with _disable_current_modes():  # to a GPU it goes through pinned memory
            return copy(tensors, device)

    monkeypatch.setattr(attention, "copy_to", copy_layout)


CASES = [(name, kernel) for name in ("fused", "fp8") for kernel in ("cuda-tiles", "sdpa")]
CASES += [("transformers", kernel) for kernel in ("cuda-merged", "cuda-varlen", "sdpa")]
CASES += [(kind, kernel) for kind in (*OF, "ModernBert, mean") for kernel in ("cuda-varlen", "sdpa")]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("decoder", "kernel"), CASES)
def test_a_pass_stays_on_the_device(decoder: str, kernel: str, tmp_path: Path) -> None:
    kind, _, pooling = decoder.partition(", ")
    is_encoder = kind in OF
    changes = {"classifier_pooling": pooling} if pooling else {}
    folder = make_encoder(tmp_path, kind, **changes) if is_encoder else make_checkpoint(tmp_path)
    checkpoint = open_checkpoint(str(folder))
    model: Any = load_model(checkpoint, dtype=torch.bfloat16, device=DEVICE)
    made: Any
    if is_encoder:
        made = Encoder(model, checkpoint.architecture)
    else:
        made = TransformersDecoder(model.model) if kind == "transformers" else FusedDecoder(model.model)
    if kind == "fp8":
        fp8.quantize_model(made)
    packer, pairs = (pack_segments, SEGMENTS) if is_encoder else (pack, PAIRS)
    head = torch.empty(2, 64 + is_encoder, device=DEVICE)
    row = KERNELS[kernel]
    engine = Engine(made, head, kernel=row, device=DEVICE, pack=packer)
    on_host = packer(pairs)
    layouts = [row.layout(on_host, last_tokens_only) for last_tokens_only in (False, True)]
    batch = on_host.to(DEVICE)
    with torch.inference_mode(), OneDevice():
        log_odds = engine.run_decoder(batch, layouts[0], lambda: layouts[1])
    assert (log_odds.device, log_odds.dtype, log_odds.shape) == (DEVICE, torch.float32, (len(pairs),))
