"""What a result's scores mean: `min_score`, first-stage scores, and relevance scores that are probabilities."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from local_rerank import Reranker, RerankRequest
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.requests.scores import blend, reciprocal_ranks
from tests.command_line import command
from tests.tiny_checkpoints import calibration_file

QUERY, DOCUMENTS = "capital", ("Paris", "Rome is in Italy", "bread", "a long document on rivers and mountains")


def test_a_score_does_not_depend_on_the_other_documents_and_a_threshold_may_leave_none(
    tiny_reranker: Reranker,
) -> None:
    """Scores scaled to the list (min-max) make its best document 1.0, however bad it is."""
    whole = tiny_reranker.rank(QUERY, DOCUMENTS)
    for item in whole:
        alone = tiny_reranker.rank(QUERY, [item.document])[0]
        assert alone.relevance_score == pytest.approx(item.relevance_score, abs=1e-5)
    none = tiny_reranker.rank(QUERY, DOCUMENTS, min_score=whole[0].relevance_score + 1e-4)
    assert (len(none), none.num_below_min_score) == (0, len(DOCUMENTS))


def test_min_score_leaves_out_what_is_below_before_top_n_cuts(tiny_reranker: Reranker) -> None:
    whole = tiny_reranker.rank(QUERY, DOCUMENTS)
    assert whole.num_below_min_score is None, "unless asked for"
    least = (whole[2].relevance_score + whole[3].relevance_score) / 2
    for top_n, kept in ((None, 3), (2, 2)):
        result = tiny_reranker.rank(QUERY, DOCUMENTS, min_score=least, top_n=top_n)
        assert [item.index for item in result] == [item.index for item in whole][:kept]
        assert result.num_below_min_score == 1, "of all documents, not of the first n"
    with_spans = RerankRequest(query=QUERY, documents=("One. Two.", "Three. Four."), spans=True, min_score=2.0)
    nothing, all_of_it = tiny_reranker.rank_batch([with_spans, replace(with_spans, min_score=None)])
    assert nothing.num_computed_tokens < all_of_it.num_computed_tokens, "no sentence of what is left out is scored"


def test_spans_are_those_of_the_first_documents_of_the_blended_order(tiny_reranker: Reranker) -> None:
    (first,) = tiny_reranker.rank(
        QUERY, DOCUMENTS, spans=True, top_n=1, first_stage_scores=(0, 0, 9, 0), first_stage_weight=99
    )
    assert (first.index, first.spans is not None, first.num_chunks) == (2, True, 1)


@pytest.mark.parametrize("method", ["z-scores", "reciprocal-ranks"])
def test_first_stage_scores_change_the_order_and_no_score(tiny_reranker: Reranker, method: Any) -> None:
    whole = {item.index: item for item in tiny_reranker.rank(QUERY, DOCUMENTS)}
    scores = tuple(np.array([3, 1, 2, 9], dtype=np.float32))
    request = RerankRequest(
        query=QUERY, documents=DOCUMENTS, first_stage_scores=scores, first_stage_weight=2, first_stage_method=method
    )
    expected = blend([whole[i].log_odds for i in range(4)], [3, 1, 2, 9], 2, method)
    (result,) = tiny_reranker.rank_batch([request])
    assert [item.index for item in result] == sorted(range(4), key=lambda i: -expected[i]) != list(whole)
    for item in result:
        assert item.blended_score == pytest.approx(expected[item.index], abs=1e-4)
        assert type(item.blended_score) is float
        assert item.relevance_score == pytest.approx(whole[item.index].relevance_score, abs=1e-5)
    (cut,) = tiny_reranker.rank_batch([replace(request, top_n=1, min_score=0.0)])
    assert [item.index for item in cut] == [result[0].index], "top_n counts in the blended order"
    *_, second, worst = sorted(result, key=lambda item: -item.relevance_score)
    least = (second.relevance_score + worst.relevance_score) / 2
    (one,) = tiny_reranker.rank_batch([replace(request, min_score=least)])
    assert [item.index for item in one] == [item.index for item in result if item is not worst]


def test_equal_values_share_a_reciprocal_rank() -> None:
    assert reciprocal_ranks([5.0, 9.0, 5.0, 1.0]) == [1 / 62, 1 / 61, 1 / 62, 1 / 64]


FIRST = "first_stage_scores"


@pytest.mark.parametrize(
    ("given", "says", "field", "limit", "value"),
    [
        ({FIRST: (1.0,)}, f"{FIRST} has length 1; it must have one number for each of the 2 documents", FIRST, 2, 1),
        ({FIRST: (1.0, math.nan)}, rf"{FIRST}\[1\] is nan; it must be a finite number", f"{FIRST}[1]", None, math.nan),
        ({FIRST: (math.inf, 1)}, rf"{FIRST}\[0\] is inf; it must be a finite", f"{FIRST}[0]", None, math.inf),
        ({FIRST: (1, 10**400)}, rf"{FIRST}\[1\] is inf; it must be a finite", f"{FIRST}[1]", None, math.inf),
        ({FIRST: (3, 3.0)}, f"{FIRST} are all 3, which orders nothing", FIRST, None, 3),
        ({FIRST: ("1", "2")}, rf"{FIRST}\[0\] must be a number, not str", None, None, None),
        ({FIRST: "12"}, f"{FIRST} must be a tuple of numbers or None, not str", None, None, None),
        ({FIRST: (True, 2)}, rf"{FIRST}\[0\] must be a number, not bool", None, None, None),
        ({"first_stage_weight": -1}, "it must be a finite number of at least 0", "first_stage_weight", 0, -1),
        ({"first_stage_method": "min-max"}, "must be one of z-scores, reciprocal-ranks", None, None, None),
        ({"min_score": math.nan}, "min_score is nan; it must be a finite number", "min_score", None, math.nan),
        ({"min_score": "0.5"}, "min_score must be a number, not str", None, None, None),
    ],
)
def test_a_value_that_means_nothing_is_refused_with_field_limit_and_value(
    given: dict[str, Any], says: str, field: str | None, limit: float | None, value: float | None
) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        RerankRequest(query=QUERY, documents=("a", "b"), **given)
    if field is not None:  # not a wrong type
        assert (caught.value.field, caught.value.limit) == (field, limit)
        assert caught.value.value == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("scores", [{0: 9.0, 1: 1.0}, "12", 3])
def test_first_stage_scores_are_a_list(scores: Any, tiny_reranker: Reranker) -> None:
    with pytest.raises(InvalidRequest, match="first_stage_scores must be a list of numbers, not"):
        tiny_reranker.rank(QUERY, ["a", "b"], first_stage_scores=scores)


def test_one_document_has_nothing_to_order(tiny_reranker: Reranker) -> None:
    (item,) = tiny_reranker.rank(QUERY, ["Paris"], first_stage_scores=[3.0])
    assert item.blended_score == 0.0


def test_calibrated_scores_are_probabilities_which_min_score_compares(tiny_reranker: Reranker, tmp_path: Path) -> None:
    file = calibration_file(tiny_reranker, tmp_path, slope=0.01, intercept=-1.0)  # probabilities around 0.27
    with Reranker(config=tiny_reranker.config, calibration=str(file), scores="calibrated") as reranker:
        result = reranker.rank(QUERY, DOCUMENTS, min_score=0.2)
        assert [item.relevance_score for item in result] == [item.probability for item in result]
        assert (len(result), result.num_below_min_score) == (4, 0)
        assert len(reranker.rank(QUERY, DOCUMENTS, min_score=0.4)) == 0
        scores = [item.relevance_score for item in tiny_reranker.rank(QUERY, DOCUMENTS)]
        assert scores != [item.relevance_score for item in result], "so the model's differ"
        with pytest.raises(InvalidRequest, match="instruction is not the one that scores are calibrated for"):
            reranker.rank(QUERY, DOCUMENTS, instruction="Find cities")
    with pytest.raises(ConfigError, match="scores is calibrated, which needs --calibration FILE"):
        Reranker(config=tiny_reranker.config, scores="calibrated")


def test_rank_says_how_many_documents_are_left_out(tiny_reranker: Reranker) -> None:
    model = ("--model", str(tiny_reranker.checkpoint.folder), "--device", "cpu", "--dtype", "fp32")
    scores = [item.relevance_score for item in tiny_reranker.rank(QUERY, DOCUMENTS)]
    done = command("rank", QUERY, *DOCUMENTS, *model, "--min-score", str((scores[1] + scores[2]) / 2))
    assert done.stdout.splitlines()[-1].endswith("; documents below the minimum score: 2"), done
    assert len(done.stdout.splitlines()) == 4, "a head, two documents and the cost"
    none = command("rank", QUERY, *DOCUMENTS, *model, "--min-score", "1.5", "--json")
    assert (none.returncode, json.loads(none.stdout)["results"]) == (0, [])
    assert json.loads(none.stdout)["num_below_min_score"] == 4
    assert command("rank", QUERY, *DOCUMENTS, *model, "--min-score", "1.5").returncode == 0
    same = command("rank", "zebra", *DOCUMENTS, *model, "--blend", "bm25=1", "--json")
    assert same.stderr.startswith("note: BM25 scores all documents 0, so that they are ranked by log-odds alone")
    assert "blended_score" not in same.stdout
