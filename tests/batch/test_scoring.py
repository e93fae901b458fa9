"""Scoring blocks: records, deduplication, errors, blending and the score cache."""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from local_rerank import Reranker, RerankRequest
from local_rerank.batch.rows import PAIR_COLUMNS, parse_record
from local_rerank.batch.score_cache import CachedScore, ScoreCache, score_identity
from local_rerank.batch.scoring import MAX_REQUEST_DOCUMENTS, BlockScorer
from local_rerank.errors import ConfigError, EngineFailure, InstructionTooLong, InvalidRequest
from local_rerank.evaluation.blending import Blend, Bm25
from local_rerank.requests.scores import blend
from tests.tiny_checkpoints import calibration_file, make_checkpoint

CLOSE = 1e-4  # log-odds in fp32, in other batches


class Counting:
    """A reranker that counts how often it scores each pair."""

    def __init__(self, reranker: Reranker) -> None:
        self.reranker = reranker
        self.asked: Counter[tuple[str | None, str, str]] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reranker, name)

    def rank_batch(self, requests: Iterable[RerankRequest], **options: Any) -> Iterator[Any]:
        requests = list(requests)
        for request in requests:
            self.asked.update((request.instruction, request.query, document) for document in request.documents)
        return self.reranker.rank_batch(requests, **options)  # type: ignore[no-any-return]


@pytest.fixture
def counting(tiny_reranker: Reranker) -> Any:
    return Counting(tiny_reranker)


def scored(outcomes: list[Any]) -> list[dict[str, Any]]:
    assert not [outcome for outcome in outcomes if isinstance(outcome, InvalidRequest)]
    return outcomes


# Records


def test_a_ranking_keeps_its_fields_and_gets_the_same_scores_as_rank(tiny_reranker: Reranker) -> None:
    documents = [{"text": "one", "id": "a"}, {"text": "two", "id": 2}, {"text": "three", "id": "x"}]
    fields = {"id": 7, "query": "q", "source": ["kept"]}
    (result,) = scored(
        BlockScorer(tiny_reranker).score_records([fields | {"documents": documents}], with_documents=True)
    )
    expected = tiny_reranker.rank("q", ["one", "two", "three"])
    results = result.pop("results")
    assert result == fields
    assert [item["id"] for item in results] == [("a", "2", "x")[item.index] for item in expected]
    for item, wanted in zip(results, expected, strict=True):
        for name in ("log_odds", "relevance_score"):
            assert item[name] == pytest.approx(getattr(wanted, name), abs=CLOSE)
        for name in ("index", "num_tokens", "num_truncated_tokens", "document"):
            assert item[name] == getattr(wanted, name)


def test_a_pair_keeps_its_fields_and_gets_scores(tiny_reranker: Reranker) -> None:
    record = {"query": "q", "document": "one", "label": "3", "instruction": "other"}
    (result,) = scored(BlockScorer(tiny_reranker).score_records([record]))
    assert list(result) == [*record, *PAIR_COLUMNS]
    expected = tiny_reranker.rank("q", ["one"], instruction="other")[0]
    assert result["log_odds"] == pytest.approx(expected.log_odds, abs=CLOSE)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([], "a record must be an object, not list"),
        ({"documents": ["a"]}, "query must be a string, not missing"),
        ({"query": 3, "documents": ["a"]}, "query must be a string, not int"),
        ({"query": " ", "documents": ["a"]}, "query is empty"),
        ({"query": "q"}, "documents must be a list, not missing"),
        ({"query": "q", "documents": None}, "documents must be a list, not null"),
        ({"query": "q", "documents": []}, "0 documents"),
        ({"query": "q", "documents": "a"}, "documents must be a list, not str"),
        ({"query": "q", "documents": ["a", 3]}, r"documents\[1\] must be a string or an object with text"),
        ({"query": "q", "documents": [{"id": "a"}]}, r"documents\[0\] must be a string or an object with text"),
        ({"query": "q", "documents": [{"text": "a", "id": 1.5}]}, r"documents\[0\].id must be a string or a whole"),
        ({"query": "q", "documents": [{"text": "a", "id": 1}, "b"]}, r"documents\[1\] has no id, but others have"),
        ({"query": "q", "documents": [{"text": "a", "score": "1"}]}, r"documents\[0\].score must be a finite number"),
        ({"query": "q", "documents": [{"text": "a", "score": float("nan")}]}, "must be a finite number"),
        ({"query": "q", "document": 3}, "document must be a string, not int"),
        ({"query": "q", "document": "a", "documents": ["a"]}, "document and documents are both given"),
        ({"query": "q", "document": "a", "instruction": 3}, "instruction must be a string, not int"),
        ({"query": "q", "document": "a", "id": True}, "id must be a string or a whole number"),
    ],
)
def test_a_malformed_record_is_rejected_with_the_reason(record: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_record(record)


def test_a_malformed_record_does_not_affect_the_others(tiny_reranker: Reranker) -> None:
    long = "word " * 2000
    records = [
        {"query": "q", "document": "one"},
        {"query": "q", "document": "one", "instruction": long},
        {"query": "q"},
        {"query": "q", "documents": ["two", "one"]},
    ]
    outcomes = BlockScorer(tiny_reranker).score_records(records)
    assert [type(outcome) for outcome in outcomes] == [dict, InstructionTooLong, InvalidRequest, dict]
    alone, *_, ranking = outcomes
    (same,) = [item for item in ranking["results"] if item["index"] == 1]  # type: ignore[index]
    assert alone["log_odds"] == same["log_odds"]  # type: ignore[index]


def test_a_document_with_too_many_chunks_is_cut_off_and_affects_no_other(tiny_checkpoint: Path) -> None:
    records = [{"query": "q", "document": "word " * 2500}, {"query": "q", "document": "short"}]
    options: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "long_documents": "chunk", "chunk_tokens": 16}
    with Reranker(str(tiny_checkpoint), **options) as reranker:
        long, short = scored(BlockScorer(reranker).score_records(records))
    assert (long["num_chunks"], short["num_chunks"]) == (256, 1)
    assert (long["num_truncated_tokens"] > 0, short["num_truncated_tokens"]) == (True, 0)


def test_an_engine_failure_ends_the_block(tiny_reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny_reranker.engine, "score", fail)
    with pytest.raises(EngineFailure, match="out of memory"):
        BlockScorer(tiny_reranker).score_records([{"query": "q", "document": "one"}])


# Deduplication and cache


def test_identical_pairs_in_a_block_are_scored_once(counting: Any) -> None:
    records = [
        {"query": "q", "document": "one"},
        {"query": "q", "documents": ["one", "two", "one"]},
        {"query": "other", "document": "one"},
        {"query": "q", "document": "one", "instruction": "other"},
        {"query": "q", "document": "one", "instruction": counting.config.instruction},
    ]
    told: list[tuple[int, int, int]] = []
    scorer = BlockScorer(counting, advance=lambda *numbers: told.append(numbers))
    outcomes = scored(scorer.score_records(records))
    assert sorted(counting.asked.values()) == [1] * 4
    assert outcomes[0]["log_odds"] == outcomes[4]["log_odds"] != outcomes[3]["log_odds"]
    assert sum(num_pairs for num_pairs, *_ in told) == 4
    assert sum(num_tokens for _, num_tokens, _ in told) > 4


def test_a_query_with_many_documents_is_split_into_requests(counting: Any) -> None:
    documents = [f"document {i}" for i in range(2 * MAX_REQUEST_DOCUMENTS + 1)]
    (result,) = scored(BlockScorer(counting).score_records([{"query": "q", "documents": documents}]))
    assert sorted(item["index"] for item in result["results"]) == list(range(len(documents)))
    odds = [item["log_odds"] for item in result["results"]]
    assert odds == sorted(odds, reverse=True)


def test_cached_pairs_are_not_scored_again(counting: Any, tmp_path: Path) -> None:
    records = [{"query": "q", "documents": ["one", "two"]}, {"query": "q", "document": "three"}]
    answers = []
    for _ in range(2):
        cache = ScoreCache(tmp_path / "scores.sqlite", score_identity(counting.reranker))
        answers.append(BlockScorer(counting, cache=cache).score_records(records))
        assert len(cache) == 3
        cache.close()
    assert answers[0] == answers[1]
    assert sorted(counting.asked.values()) == [1] * 3


def test_the_cache_distinguishes_models_settings_and_texts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{}, {"max_document_tokens": 9}, {"max_length": 500}, {"dtype": "bf16"}]
    options += [{"long_documents": "chunk"}, {"long_documents": "chunk", "chunk_tokens": 99}]
    same: list[dict[str, Any]] = [
        {"chunk_tokens": 99},
        {"threads": 1},
        {"instruction": "other"},
        {"max_batch_tokens": 99},
    ]
    identities = []
    for more in [*options, *same]:
        with Reranker(str(tiny_checkpoint), device="cpu", **({"dtype": "fp32"} | more)) as reranker:
            identities.append(score_identity(reranker))
    with Reranker(str(make_checkpoint(tmp_path / "other", seed=5)), device="cpu", dtype="fp32") as reranker:
        identities.append(score_identity(reranker))
    assert len(set(identities)) == len(options) + 1
    assert set(identities[len(options) : -1]) == {identities[0]}
    cache = ScoreCache(tmp_path / "scores.sqlite", identities[0])
    cache.put({("i", "q", "ab"): CachedScore(1.5, 2, 0), ("iq", "", "ab"): CachedScore(2.5, 3, 1)})
    for identity in identities[1 : len(options)]:
        assert ScoreCache(tmp_path / "scores.sqlite", identity).get([("i", "q", "ab")]) == {}
    assert cache.get([("i", "q", "ab"), ("i", "qa", "b")]) == {("i", "q", "ab"): CachedScore(1.5, 2, 0)}


def test_a_cache_takes_any_text_and_any_number_of_pairs(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.sqlite", "identity")
    scores = {("", "\ud800", f"{i}\0"): CachedScore(i / 3, i, 0) for i in range(1201)}
    cache.put(scores)
    assert cache.get(scores) == scores


def test_a_file_that_is_not_a_cache_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(ConfigError, match="text cannot be used: file is not a database"):
        ScoreCache(tmp_path / "text", "identity")
    with sqlite3.connect(tmp_path / "newer") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="has version 99; this program reads version 1"):
        ScoreCache(tmp_path / "newer", "identity")


# Blending


def test_blending_uses_the_rows_scores_or_bm25_over_its_documents(tiny_reranker: Reranker) -> None:
    texts, scores = ["a cat", "the dog barks", "a bird"], [1.0, 5.0, 2.0]
    record = {"query": "cat", "documents": [{"text": t, "score": s} for t, s in zip(texts, scores, strict=True)]}
    log_odds = tiny_reranker.score([("cat", text) for text in texts], logits=True)
    lexical = Bm25(texts).scores("cat", texts)
    for how, others, share in (("run", scores, 1.0), ("bm25", lexical, Bm25(texts).matched("cat", lexical))):
        (result,) = scored(BlockScorer(tiny_reranker, blend=Blend(how, 2.0)).score_records([record]))  # type: ignore[arg-type]
        expected = blend(log_odds, others, 2.0 * share)
        by_index = {item["index"]: item for item in result["results"]}
        assert [by_index[i]["blended_score"] for i in range(3)] == pytest.approx(expected, abs=1e-3)
        assert [by_index[i]["log_odds"] for i in range(3)] == pytest.approx(log_odds, abs=CLOSE)
        blended = [item["blended_score"] for item in result["results"]]
        assert blended == sorted(blended, reverse=True)


def test_blending_needs_scores_in_the_row(tiny_reranker: Reranker) -> None:
    with pytest.raises(ConfigError, match="blend is run=1, but the documents of query 'q' have no scores"):
        BlockScorer(tiny_reranker, blend=Blend("run", 1.0)).score_records([{"query": "q", "documents": ["a"]}])


# Thresholds and probabilities


def test_a_block_has_probabilities_and_leaves_out_what_is_below_the_minimum(
    tiny_reranker: Reranker, tmp_path: Path
) -> None:
    record = {"query": "cat", "documents": ["a cat", "the dog barks", "a bird"]}
    file = str(calibration_file(tiny_reranker, tmp_path))
    options: dict[str, Any] = {"calibration": file, "scores": "calibrated"}
    expected = tiny_reranker.rank("cat", record["documents"])
    with Reranker(config=tiny_reranker.config, **options) as reranker:
        cache = ScoreCache(tmp_path / "scores.sqlite", score_identity(tiny_reranker))
        plain = BlockScorer(tiny_reranker, cache=cache).score_records([record, record | {"instruction": "other"}])
        assert "probability" not in str(plain)
        kept, left_out = (reranker.scale.of(expected[i].log_odds, has_default_instruction=True)[0] for i in (1, 2))
        scorer = BlockScorer(reranker, cache=cache, min_score=(kept + left_out) / 2)
        outcome, other = scorer.score_records([record, record | {"instruction": "other"}])
    assert isinstance(other, InvalidRequest), "its pairs are in the cache, but have no probability"
    assert isinstance(outcome, dict)
    assert [item["index"] for item in outcome["results"]] == [item.index for item in expected[:2]]
    assert outcome["num_below_min_score"] == 1
    for item in outcome["results"]:
        assert (
            item["relevance_score"]
            == item["probability"]
            == pytest.approx(1 / (1 + math.exp(1 - item["log_odds"] / 2)))
        )
