"""Encoders: a pair's score in any packed batch equals its score in a padded batch of plain transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from local_rerank import CrossEncoder, EngineConfig, Reranker, RerankRequest
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.checkpoints.known_scores import known_pairs
from local_rerank.commands.rank import BAR_WIDTH, SHOWN_SPANS, _print_table
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.requests.parts import PromptLimits
from local_rerank.requests.scores import sigmoid
from local_rerank.selftest.machine_report import NOTHING, describe
from local_rerank.selftest.self_test import self_test
from local_rerank_server.config import HOSTED_INSTRUCTION
from tests.encoder_checkpoints import LETTERS, OF, DenseEncoder, make_encoder
from tests.reference import FP32_TOLERANCE

QUERY = "what is the answer?"
RUNS_ENCODERS = [name for name, row in KERNELS.items() if row.runs_encoders and "cpu" in row.device_types]


def documents() -> list[str]:
    """Texts of many lengths, from empty to 400 characters, two of them equally long."""
    generator = random.Random(1)
    return ["".join(generator.choices(LETTERS + "   ", k=length)) for length in (0, 1, 5, 5, 30, 31, 90, 170, 400)]


@pytest.mark.parametrize("kernel", RUNS_ENCODERS)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [*((kind, {}) for kind in OF), ("ModernBert", {"classifier_pooling": "mean", "norm_bias": True, "mlp_bias": True})],
)
def test_each_score_equals_that_of_a_padded_batch(
    kind: str, changes: dict[str, Any], kernel: str, tmp_path: Path
) -> None:
    folder = make_encoder(tmp_path / "model", kind, **changes)
    texts = documents()
    expected = DenseEncoder(folder).logits(QUERY, texts)[:, 0].tolist()
    assert max(expected) - min(expected) > 0.1
    tolerance = FP32_TOLERANCE * max(1.0, *map(abs, expected))
    with Reranker(str(folder), device="cpu", dtype="fp32", attention=kernel) as reranker:
        assert reranker.info.decoder == "encoder"
        together = {item.index: item.log_odds for item in reranker.rank(QUERY, texts)}
        alone = [reranker.rank(QUERY, [text])[0].log_odds for text in texts]
    assert [together[i] for i in range(len(texts))] == pytest.approx(expected, abs=tolerance)
    assert alone == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("kind", OF)
@pytest.mark.parametrize(
    ("dtype", "bf16_is_fast", "products"),
    [("auto", True, "blocked bf16"), ("bf16", False, "fp32"), ("fp16", False, "fp32"), ("int8", False, "int8")],
)
def test_lower_precision_keeps_scores_close(
    kind: str, dtype: str, bf16_is_fast: bool, products: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preferred = torch.bfloat16 if bf16_is_fast else torch.float32, "as the test says"
    monkeypatch.setattr("local_rerank.engine.cpu.choices.preferred_dtype", lambda: preferred)
    folder = make_encoder(tmp_path / "model", kind)
    expected = DenseEncoder(folder).logits(QUERY, documents())[:, 0].tolist()
    with Reranker(str(folder), device="cpu", dtype=dtype) as reranker:
        assert reranker.info.products[0].startswith(products)
        machine = describe(reranker.info, reranker.checkpoint)
        assert machine.kernel.faster == NOTHING
        assert dtype != "int8" or "12 of 12 linear layers" in machine.dtype.value
        found = {item.index: item.log_odds for item in reranker.rank(QUERY, documents())}
    tolerance = (0.2 if dtype == "int8" else 0.05) * max(map(abs, expected))  # 64 weights a row, and not trained
    assert [found[i] for i in range(len(expected))] == pytest.approx(expected, abs=tolerance)


def test_int8_is_searched_with_the_pairs_that_requests_have(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_encoder(tmp_path / "model", "Bert")))
    for pair in known_pairs(checkpoint):
        assert 0 < pair.first_typed < pair.num_tokens


def test_an_instruction_is_ignored_with_a_warning_unless_it_is_a_route_s_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(str(make_encoder(tmp_path / "model", "Bert")))
    limits = PromptLimits(max_length=100, max_query_tokens=100, max_document_tokens=100)
    tokenizer = checkpoint.tokenizer(limits=limits, default_instruction="Find cats")
    asked = [
        tokenizer.pairs(RerankRequest(query="q", documents=("a",), instruction=instruction)).pairs[0].document
        for instruction in (None, "Find cats", HOSTED_INSTRUCTION, "Find dogs")
        if instruction != "Find dogs" or not caplog.messages
    ]
    assert len(caplog.messages) == 1
    assert asked == asked[:1] * 4


def test_two_labels_count_by_their_names(tmp_path: Path) -> None:
    labels = {0: "relevant", 1: "irrelevant"}
    folder = make_encoder(
        tmp_path / "model", "Bert", num_labels=2, id2label=labels, label2id={"relevant": 0, "irrelevant": 1}
    )
    logits = DenseEncoder(folder).logits(QUERY, ["the cat", "a"])
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        result = reranker.rank(QUERY, ["the cat", "a"])
    for item in result:
        assert item.log_odds == pytest.approx(float(logits[item.index, 0] - logits[item.index, 1]), abs=1e-4)
        assert item.relevance_score == pytest.approx(float(logits[item.index].softmax(0)[0]), abs=1e-5)


@pytest.mark.parametrize("kind", OF)
@pytest.mark.parametrize("name", ["activation.Sigmoid", "linear.Identity"])
def test_pairs_are_written_as_the_tokenizer_joins_them_and_scored_as_the_config_says(
    kind: str, name: str, tmp_path: Path
) -> None:
    folder = make_encoder(tmp_path / "model", kind, activation=f"torch.nn.modules.{name}")
    joined = Tokenizer.from_file(str(folder / "tokenizer.json"))
    drop_in = CrossEncoder(str(folder), device="cpu", config=EngineConfig(dtype="fp32"))
    with drop_in.reranker as reranker:
        for text in ("the cat", "", "[SEP] </s> <s> [CLS]"):
            _, ids = reranker.explain(QUERY, text)
            if not set("[<") & set(text):
                assert ids == joined.encode(QUERY, text).ids
            assert [ids.count(token) for token in (2, 3)] == ([3, ids.count(3)] if kind == "XLMRoberta" else [1, 2])
        item = reranker.rank(QUERY, ["the cat"])[0]
        assert item.relevance_score == (item.log_odds if name == "linear.Identity" else sigmoid(item.log_odds))
        assert item.num_tokens == len(joined.encode("the cat", add_special_tokens=False).ids)
        assert drop_in.predict((QUERY, "the cat")) == pytest.approx(item.relevance_score, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "limit", "cut_to"), [("XLMRoberta", 1e30, 512), ("Bert", 64, 64), ("ModernBert", 80, 80)]
)
def test_a_long_document_is_cut_where_transformers_cuts_it(
    kind: str, limit: float, cut_to: int, tmp_path: Path
) -> None:
    folder = make_encoder(tmp_path / "model", kind)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}), encoding="utf-8")
    text = " ".join(["a"] * 600)
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        result = reranker.rank(QUERY, [text])
        assert reranker.info.max_length == cut_to
        assert result[0].num_tokens + result[0].num_truncated_tokens == 600
        _, ids = reranker.explain(QUERY, text)
    dense = DenseEncoder(folder)
    assert ids == dense.tokenizer(QUERY, text, truncation="longest_first", max_length=cut_to)["input_ids"]
    cut = " ".join(["a"] * result[0].num_tokens)
    assert result[0].log_odds == pytest.approx(float(dense.logits(QUERY, [cut])[0]), abs=1e-4)


@pytest.mark.parametrize("kind", OF)
def test_chunks_and_sentences_are_scored_as_documents_of_their_texts(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    is_bare = kind == "Bert"
    folder = make_encoder(tmp_path / "model", kind, activation="torch.nn.modules.linear.Identity" if is_bare else None)
    text = " ".join(f"the {letter} cat, sat {letter}?" for letter in LETTERS[:20])
    with Reranker(str(folder), device="cpu", dtype="fp32", chunk_tokens=40, chunk_overlap_tokens=8) as reranker:
        result = reranker.rank(QUERY, [text, "the cat"], long_documents="chunk", spans=True)
        item, short = sorted(result, key=lambda item: item.index)
        assert short.log_odds == pytest.approx(reranker.rank(QUERY, ["the cat"])[0].log_odds, abs=1e-4)
        pairs = reranker.tokenizer.pairs(RerankRequest(query=QUERY, documents=(text,), long_documents="chunk"))
    assert item.best_chunk is not None
    assert item.spans
    assert item.num_chunks == len(pairs.bounds or ()) > 4
    dense = DenseEncoder(folder)
    chunks = dense.logits(QUERY, [text[start:end] for start, end in pairs.bounds or ()])
    best = (chunks if is_bare else chunks.sigmoid()).max()
    assert item.relevance_score == item.best_chunk.score == pytest.approx(float(best), abs=1e-4)
    spans = dense.logits(QUERY, [text[span.start : span.end] for span in item.spans])[:, 0]
    shown = (spans if is_bare else spans.sigmoid()).tolist()
    assert [span.score for span in item.spans] == pytest.approx(shown, abs=1e-4)
    _print_table(result, is_remote=False)
    lines = capsys.readouterr().out.splitlines()
    for span, logit in zip(item.spans[:SHOWN_SPANS], spans.tolist(), strict=False):
        line = next(line for line in lines if line.endswith(f"    {text[span.start : span.end]}"))
        assert line.count("█") == round(sigmoid(logit) * BAR_WIDTH)  # of a bare logit, too


@pytest.mark.parametrize("kind", OF)
def test_the_self_test_certifies_known_scores_and_tells_a_wrong_pair(kind: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", kind)
    card = DenseEncoder(folder)
    pairs = [(QUERY, "the cat"), (QUERY, ""), ("a", "b")]
    known = [{"query": q, "document": d, "log_odds": float(card.logits(q, [d])[0])} for q, d in pairs]
    (folder / "golden.json").write_text(json.dumps(known), encoding="utf-8")
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        assert self_test(reranker).detail == "the scores are those stored with the model"
        assert reranker.info.reasons["recipe"].endswith(f"architecture {kind}ForSequenceClassification")
        reranker.tokenizer.suffix_ids = ()
        assert self_test(reranker).fault == "other prompt"
