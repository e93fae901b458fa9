"""Blending by hand-computed examples and properties, and `rank --blend`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_rerank import Reranker
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Bm25, parse_blend, words
from local_rerank.evaluation.collection import Collection
from local_rerank.evaluation.measures import halves, tune_blend
from local_rerank.evaluation.trec_files import Candidate
from local_rerank.requests.scores import best_first, blend, z_scores
from tests.command_line import command

numbers = st.lists(st.integers(-1000, 1000).map(float), min_size=1, max_size=30)


def test_z_scores_have_mean_zero_and_deviation_one() -> None:
    assert z_scores([1.0, 2.0, 3.0]) == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])
    assert z_scores([1e-6, 3e-6]) == pytest.approx([-1.0, 1.0]), "small differences count"


@pytest.mark.parametrize("values", [[], [4.2], [7.0] * 4, [0.3, 0.1 + 0.2, 0.3], [0.0, 0.0]])
def test_z_scores_of_equal_values_are_zero(values: list[float]) -> None:
    assert z_scores(values) == [0.0] * len(values)


@given(numbers, st.integers(1, 1000), st.integers(-1000, 1000))
def test_scale_and_offset_do_not_change_z_scores(values: list[float], unit: int, offset: int) -> None:
    assert z_scores([unit * value + offset for value in values]) == pytest.approx(z_scores(values), abs=1e-6)


def test_a_blend_is_a_weighted_sum_of_z_scores() -> None:
    assert blend([1.0, 2.0, 3.0], [30.0, 20.0, 10.0], 0.5) == pytest.approx([-math.sqrt(0.375), 0, math.sqrt(0.375)])
    assert blend([1.0, 2.0, 3.0], [30.0, 20.0, 10.0], 1.0) == pytest.approx([0.0, 0.0, 0.0])


def test_constant_scores_of_one_side_leave_the_order_of_the_other() -> None:
    assert best_first(blend([0.1, 0.3, 0.2], [5.0, 5.0, 5.0], 1.0)) == [1, 2, 0]
    assert best_first(blend([0.1, 0.1, 0.1], [5.0, 7.0, 6.0], 1.0)) == [1, 2, 0]


@given(numbers)
def test_weight_zero_keeps_the_models_order(log_odds: list[float]) -> None:
    others = [float(-position) for position in range(len(log_odds))]
    assert best_first(blend(log_odds, others, 0.0)) == best_first(log_odds)


def test_ties_keep_their_order() -> None:
    assert best_first([1.0, 2.0, 1.0, 2.0]) == [1, 3, 0, 2]


def test_both_sides_need_the_same_length() -> None:
    with pytest.raises(ValueError, match="shorter"):
        blend([1.0, 2.0], [1.0], 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cats' 2ND-hand COLLARS", ["cats", "2nd", "hand", "collars"]),
        ("snake_case 3.5", ["snake", "case", "3", "5"]),
        ("Größe café", ["größe", "café"]),
        ("人工智能", ["人工", "工智", "智能"]),
        ("茶 and 咖啡2杯", ["茶", "and", "咖啡", "2", "杯"]),
        ("カメラ", ["カメ", "メラ"]),
        (" \n…!?", []),
    ],
)
def test_words_are_lower_case_runs_and_cjk_bigrams(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_bm25_matches_the_formula() -> None:
    """Two documents of 2 and 4 words, mean 3, so the length terms are 1.2 * (.25 + .75 * 2 / 3) = .9 and 1.5."""
    documents = ["cat dog", "cat cat bird fish"]
    bm25 = Bm25(documents)
    both, one = math.log(1 + 0.5 / 2.5), math.log(1 + 1.5 / 1.5)  # idf of a word in both documents, and in one
    assert bm25.scores("Cat", documents) == pytest.approx([both * 2.2 / 1.9, both * 4.4 / 3.5])
    assert bm25.scores("bird", documents) == pytest.approx([0.0, one * 2.2 / 2.5])
    assert bm25.scores("bird cat bird", documents)[1] == pytest.approx(2 * one * 2.2 / 2.5 + both * 4.4 / 3.5)
    assert bm25.scores("horse", documents) == [0.0, 0.0]


def test_bm25_scores_documents_outside_its_statistics() -> None:
    scores = Bm25(["cat dog", "cat fish"]).scores("cat owl", ["owl", "cat", ""])
    assert scores[0] > scores[1] > scores[2] == 0.0


def test_bm25_says_how_much_of_the_query_its_best_document_has() -> None:
    documents = ["cat dog", "bird fish"]
    bm25 = Bm25(documents)
    scores = bm25.scores("cat", documents)
    assert bm25.matched("cat", scores) == pytest.approx(1 / 2.2), "one occurrence in a document of mean length"
    rare = bm25.matched("cat horse", bm25.scores("cat horse", documents))
    assert 0 < rare < bm25.matched("cat", scores) / 2, "no document has the horse, which weighs more"
    assert bm25.matched("horse", bm25.scores("horse", documents)) == bm25.matched("!", [0.0, 0.0]) == 0.0


@pytest.mark.parametrize("documents", [[], [""], ["", "!"]])
def test_bm25_of_empty_documents_is_zero(documents: list[str]) -> None:
    assert Bm25(documents).scores("cat", documents) == [0.0] * len(documents)


def ranked_by(run: list[float], num_queries: int = 12) -> Collection:
    """Queries q0, q1, ..., whose first document d0 is the relevant one, with this run for each of them."""
    candidates = tuple(Candidate(f"d{i}", score) for i, score in enumerate(run))
    names = [f"q{i}" for i in range(num_queries)]
    return Collection(
        documents={each.document_id: f"text of {each.document_id}" for each in candidates},
        queries=dict.fromkeys(names, "query"),
        qrels={name: {"d0": 1} for name in names},
        run=dict.fromkeys(names, candidates),
        num_unjudged_queries=0,
    )


@pytest.mark.parametrize(
    ("run", "log_odds", "weight"),
    [
        ([9.0, 2.0, 1.0], [0.0, 0.1, -5.0], 0.05),  # the run knows better, and a little of it is enough
        ([1.0, 2.0, 9.0], [5.0, 1.0, 0.0], 0.0),  # the model alone is the best
    ],
)
def test_the_tuned_weight_is_the_smallest_of_the_best(run: list[float], log_odds: list[float], weight: float) -> None:
    collection = ranked_by(run)
    assert tune_blend(dict.fromkeys(collection.queries, log_odds), collection).weight == weight


def test_a_query_is_in_the_same_half_whatever_the_others_are() -> None:
    tuned_on, measured = halves(ranked_by([1.0], 40))
    assert sorted([*tuned_on.queries, *measured.queries]) == sorted(ranked_by([1.0], 40).queries)
    assert 12 < len(tuned_on.queries) < 28
    for half, other in zip((tuned_on, measured), halves(ranked_by([1.0], 20)), strict=True):
        assert half.queries.keys() == half.qrels.keys() == half.run.keys()
        assert other.queries.keys() < half.queries.keys()
    with pytest.raises(InvalidRequest, match="1 queries cannot be split in two halves"):
        halves(ranked_by([1.0], 1))


def test_eval_tunes_on_one_half_and_reports_on_the_other(
    tiny_checkpoint: Path, tiny_reranker: Reranker, tmp_path: Path
) -> None:
    names = [f"q{i}" for i in range(8)]
    last = list(tiny_reranker.rank("bird", DOCUMENTS))[-1].index  # only the first stage knows that it is relevant
    lines = {
        "corpus.jsonl": [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(DOCUMENTS)],
        "queries.jsonl": [json.dumps({"id": name, "text": "bird"}) for name in names],
        "qrels.trec": [f"{name} 0 d{last} 1" for name in names],
        "first.run": [
            f"{name} Q0 d{i} 1 {score} x"
            for name in names
            for i, score in enumerate(9 if j == last else j for j in range(4))
        ],
    }
    for name, each in lines.items():
        (tmp_path / name).write_text("\n".join(each))
    files = [f"--{name.partition('.')[0]}={tmp_path / name}" for name in lines if name != "first.run"]
    model = ("--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32")
    done = command("eval", *files, f"--run={tmp_path / 'first.run'}", *model, "--tune", "blend", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["num_queries"] + report["num_tuning_queries"] == 8
    first, alone, blended = report["systems"]
    assert blended["name"].startswith(f"{alone['name']}, run")
    assert set(blended["by_query"]["nDCG@10"]) == set(first["by_query"]["nDCG@10"]) < set(names)
    assert blended["mean"]["nDCG@10"] == 1 > alone["mean"]["nDCG@10"]
    against_the_model = report["comparisons"][-1]
    assert (against_the_model["baseline"], against_the_model["wins"]) == (alone["name"], report["num_queries"])
    assert against_the_model["p_value"] < 0.3


@pytest.mark.parametrize(
    "text", ["", "bm25", "bm25-rank=1", "bm25=", "bm25=x", "bm25=-1", "run=nan", "run=inf", "tfidf=1", "=1"]
)
def test_a_malformed_blend_option_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match=r"it must be bm25=W or run=W, or bm25-ranks=W or run-ranks=W"):
        parse_blend(text)


DOCUMENTS = ["a cat", "the dog barks", "a bird sings in the tree", "fish swim"]


def ranked(checkpoint: Path, *options: str, query: str = "bird") -> str:
    """Run `rank` on the documents above; returns its output."""
    model = ("--model", str(checkpoint), "--device", "cpu", "--dtype", "fp32")
    done = command("rank", query, *DOCUMENTS, *model, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rank_orders_by_the_blend_and_keeps_every_other_field(tiny_checkpoint: Path) -> None:
    plain = json.loads(ranked(tiny_checkpoint, "--json"))["results"]
    blended = json.loads(ranked(tiny_checkpoint, "--json", "--blend", "bm25=0.5"))["results"]
    by_index: dict[int, dict[str, Any]] = {item["index"]: item for item in plain}
    odds = [by_index[i]["log_odds"] for i in range(4)]
    bm25 = Bm25(DOCUMENTS)
    scores = bm25.scores("bird", DOCUMENTS)
    expected = blend(odds, scores, 0.5 * bm25.matched("bird", scores))
    assert [item["index"] for item in blended] == best_first(expected)
    for item in blended:
        assert item.pop("blended_score") == pytest.approx(expected[item["index"]])
        assert item == by_index[item["index"]]


def test_rank_cuts_to_top_n_after_blending(tiny_checkpoint: Path) -> None:
    def best(*options: str) -> list[int]:
        output = ranked(tiny_checkpoint, "--json", "--top-n", "1", *options, query="fish")
        return [item["index"] for item in json.loads(output)["results"]]

    assert best() != [3], "otherwise blending would change nothing"
    assert best("--blend", "bm25=100") == [3]


def test_the_table_has_a_blend_column_only_on_request(tiny_checkpoint: Path) -> None:
    assert "blended" not in ranked(tiny_checkpoint)
    head, first, *_ = ranked(tiny_checkpoint, "--blend", "bm25=100").splitlines()
    assert head.split() == ["#", "score", "log-odds", "blended", "document"]
    assert first.startswith("2")
    assert first.rstrip().endswith("a bird sings in the tree")


def test_rank_rejects_blending_with_a_run() -> None:
    done = command("rank", "bird", "a cat", "--blend", "run=1")
    assert done.returncode == 1
    assert done.stderr == "local-rerank: blend is 'run=1', but rank has no run to blend with; use bm25=W\n"
