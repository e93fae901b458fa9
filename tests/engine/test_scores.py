"""The central test: a pair's score in any packed batch equals its score alone, computed with the model card's code."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from local_rerank import Reranker
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.engine.cpu import choices
from local_rerank.engine.cpu.layers import CpuDecoder
from local_rerank.engine.decoder import PackedAttention, TransformersDecoder
from local_rerank.engine.engine import Engine
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.engine.load import entry_device, head_rows, load_model
from local_rerank.engine.packing import pack
from local_rerank.requests.pair import Pair
from local_rerank.types import RerankRequest
from tests.reference import FP32_TOLERANCE, ModelCard, classifier_log_odds, prompt_ids
from tests.tiny_checkpoints import make_checkpoint

BF16_TOLERANCE = 0.06  # log-odds, relative to the range of scores: bf16 has 8 significant bits
INT8_TOLERANCE = 0.15  # likewise; int8 has 7 bits relative to a row's largest value

FAST_BF16 = {"fp32": 2.0, "blocked fp32": 2.0, "bf16": 1.0}  # seconds of a product
SLOW_BF16 = {"fp32": 1.0, "blocked fp32": 2.0, "bf16": math.inf}

SHAPES = {
    "tied": {"tied": True},
    "untied": {"tied": False, "seed": 1},
    "one layer": {"num_hidden_layers": 1, "seed": 2},
    "deep and narrow": {"num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 8, "seed": 3},
    "no shared key heads": {"num_attention_heads": 4, "num_key_value_heads": 4, "seed": 4},
    "one key head": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 32, "seed": 5},
}
CPU_KERNELS = [
    pytest.param(name, marks=pytest.mark.numeric if name == "cpu-tiles" else pytest.mark.slow)
    for name, row in KERNELS.items()
    if "cpu" in row.device_types
]


def texts(seed: int, num: int) -> list[str]:
    """Texts of many lengths, from empty to 300 characters, some of them equally long."""
    generator = random.Random(seed)
    lengths = [0, 1, 1, 7, 7, 7, 40, 300]
    return ["".join(generator.choices("abc de,fg?\n中é", k=generator.choice(lengths))) for _ in range(num)]


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_each_score_equals_that_of_the_pair_alone(shape: dict[str, int], kernel: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", **shape)
    card = ModelCard(folder)
    with Reranker(str(folder), device="cpu", dtype="fp32", attention=kernel, max_batch_tokens=1500) as reranker:
        requests = [
            RerankRequest(query=query or "?", documents=tuple(texts(seed, 12)))
            for seed, query in enumerate(texts(99, 5))
        ]
        for request, future in [(r, reranker.submit(r)) for r in requests]:
            result = future.result()
            alone = [card.pair(request.query, item.document) for item in result]
            # rounding is proportional to the logits, and their size shows in the largest difference
            tolerance = FP32_TOLERANCE * max(1.0, *map(abs, alone))
            assert [item.log_odds for item in result] == pytest.approx(alone, abs=tolerance)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_bf16_scores_are_close_to_those_of_the_pair_alone(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "seconds_of_products", lambda: FAST_BF16)
    folder = make_checkpoint(tmp_path / "model", seed=6)
    exact = ModelCard(folder)
    documents = texts(3, 20)
    with Reranker(str(folder), device="cpu", dtype="bf16", attention=kernel) as reranker:
        assert (reranker.info.dtype, reranker.info.compute_dtype) == ("bf16", "bf16")
        result = reranker.rank("a query", documents)
    alone = torch.tensor([exact.pair("a query", item.document) for item in result])
    ours = torch.tensor([item.log_odds for item in result])
    assert (ours - alone).abs().max() < BF16_TOLERANCE * (alone.max() - alone.min())


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_16_bit_weights_score_as_in_fp32_if_fp32_is_faster(
    shape: dict[str, int], dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "seconds_of_products", lambda: SLOW_BF16)
    stored = torch.float16 if dtype == "fp16" else torch.bfloat16
    folder = make_checkpoint(tmp_path / "model", dtype=stored, **shape)
    card = ModelCard(folder)  # in fp32
    with Reranker(str(folder), device="cpu", dtype=dtype) as reranker:
        expected = "fp16" if dtype == "fp16" else "bf16"
        assert (reranker.info.dtype, reranker.info.compute_dtype) == (expected, "fp32")
        assert reranker.engine.weights_dtype == expected
        result = reranker.rank("a query", texts(3, 20))
    alone = [card.pair("a query", item.document) for item in result]
    # the card's scores and ours differ from fp64 by up to 8e-6 each, in proportion to the logits
    assert [item.log_odds for item in result] == pytest.approx(alone, abs=FP32_TOLERANCE * max(1.0, *map(abs, alone)))


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_int8_scores_are_close_to_those_of_the_pair_alone(
    shape: dict[str, int], kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local_rerank.engine.cpu.prepare.MAX_SEARCHED_PARAMETERS", 0)  # every layer in int8
    folder = make_checkpoint(tmp_path / "model", **shape)
    exact = ModelCard(folder)
    documents = texts(3, 20)
    with Reranker(str(folder), device="cpu", dtype="int8", attention=kernel, max_batch_tokens=500) as reranker:
        assert reranker.info.dtype == reranker.engine.weights_dtype == "int8"
        assert not reranker.info.unquantized
        result = reranker.rank("a query", documents)
    alone = torch.tensor([exact.pair("a query", item.document) for item in result])
    ours = torch.tensor([item.log_odds for item in result])
    assert (ours - alone).abs().max() < INT8_TOLERANCE * (alone.max() - alone.min())


@pytest.mark.parametrize("labels", [1, 2])
def test_sequence_classifiers_score_as_in_plain_transformers(labels: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", num_labels=labels, seed=7)
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        for item in reranker.rank("which one", ["this", "that one", ""]):
            prompt, ids = reranker.explain("which one", item.document)
            alone = classifier_log_odds(folder, ids)
            assert item.log_odds == pytest.approx(alone, abs=FP32_TOLERANCE * max(1.0, abs(alone)))
            assert prompt.startswith("<|im_start|>system\n")


def test_a_classifier_made_from_the_head_rows_scores_as_the_original(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "original", tied=False, seed=8)
    converted = make_checkpoint(tmp_path / "converted", num_labels=1, seed=8)
    from safetensors.torch import load_file, save_file

    weights = load_file(original / "model.safetensors")
    card = ModelCard(original)
    head = weights.pop("lm_head.weight")
    weights["score.weight"] = (head[card.yes] - head[card.no]).unsqueeze(0)
    save_file(weights, converted / "model.safetensors", metadata={"format": "pt"})
    with Reranker(str(converted), device="cpu", dtype="fp32") as reranker:
        for item in reranker.rank("which one", ["this", "that one", ""]):
            alone = card.pair("which one", item.document)
            assert item.log_odds == pytest.approx(alone, abs=FP32_TOLERANCE * max(1.0, abs(alone)))


def test_sharded_weights_score_as_a_single_file(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", seed=9)
    shards = make_checkpoint(tmp_path / "shards", seed=9, max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    scores = []
    for folder in (whole, shards):
        with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
            scores.append(reranker.score([("q", "a"), ("q", "bb"), ("r", "a")], logits=True))
    assert scores[0] == pytest.approx(scores[1], abs=FP32_TOLERANCE)  # timing decides how batches form


def test_a_model_spread_by_accelerate_scores_the_same(tiny_checkpoint: Path, tiny_reranker: Reranker) -> None:
    with Reranker(str(tiny_checkpoint), device_map="auto", dtype="fp32") as spread:
        ours, expected = (reranker.rank("q", ["a", "bb", "ccc"]) for reranker in (spread, tiny_reranker))
    assert [item.log_odds for item in ours] == pytest.approx([i.log_odds for i in expected], abs=FP32_TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_accelerate_offloads_to_disk_score_the_same(tied: bool, tmp_path: Path) -> None:
    """The last layer and the head are on the device only while they run, as if a GPU were too small."""
    from accelerate import dispatch_model

    folder = make_checkpoint(tmp_path / "model", tied=tied, seed=10)
    checkpoint = open_checkpoint(str(folder))
    pairs = [Pair((1, 2, 3), tuple(range(4, 4 + n))) for n in (1, 9, 9, 30)] + [Pair((7, 8), (9, 10, 11))]
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        expected = reranker.engine.score(pairs)
        ids = {"yes_id": reranker.tokenizer.yes_id, "no_id": reranker.tokenizer.no_id}
    model = load_model(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu" if tied else "disk"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "offload", force_hooks=True)
    assert model.model.layers[1].mlp.down_proj.weight.device.type == "meta"
    assert entry_device(model) == torch.device("cpu")
    head = head_rows(model, checkpoint, **ids)
    decoder = TransformersDecoder(model.model)
    engine = Engine(decoder, head, kernel=KERNELS["cpu-tiles"], device=entry_device(model))
    assert engine.score(pairs) == pytest.approx(expected, abs=FP32_TOLERANCE)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("decoder", [TransformersDecoder, CpuDecoder])
def test_each_decoder_scores_as_the_model_without_pruning(decoder: Any, kernel: str, tiny_checkpoint: Path) -> None:
    pairs = [Pair((1, 2, 3), tuple(range(4, 4 + n))) for n in (1, 9, 9, 30)] + [Pair((7, 8), (9, 10, 11))]
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    model = load_model(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    head, row, batch = head_rows(model, checkpoint, yes_id=5, no_id=6), KERNELS[kernel], pack(pairs)
    with torch.inference_mode():
        hidden = model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask={"full_attention": None},
            use_cache=False,
            packed_attention=PackedAttention(row, row.layout(batch, False)),
        ).last_hidden_state
    logits = hidden[0, batch.last_token_index] @ head.T
    unpruned = torch.empty(len(pairs)).scatter_(0, batch.pair_order, logits[:, 1] - logits[:, 0])
    engine = Engine(decoder(model.model), head, kernel=row, device=torch.device("cpu"))
    assert engine.score(pairs) == pytest.approx(unpruned.tolist(), abs=FP32_TOLERANCE)


def test_truncation_removes_only_the_end_of_the_document(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", max_position_embeddings=400)
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        result = reranker.rank("q", ["x" * 1000])
        _, ids = reranker.explain("q", "x" * 1000)
        card = ModelCard(folder)
        suffix = reranker.tokenizer.suffix_ids
        expected = prompt_ids(card.tokenizer, "q", "x" * 1000)[: 400 - len(suffix)] + list(suffix)
    assert ids == expected
    assert result[0].num_truncated_tokens == 1001 - result[0].num_tokens > 0
    assert result[0].log_odds == pytest.approx(float(card.log_odds([expected])[0]), abs=FP32_TOLERANCE)
