"""A server with a calibration: `probability` on our own route, and with `--scores calibrated` in every dialect."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from local_rerank import EngineConfig, Reranker
from local_rerank.checkpoints.known_scores import STORED
from local_rerank.errors import ConfigError
from local_rerank.requests.scores import sigmoid
from local_rerank.selftest.self_test import log_odds_of
from local_rerank_server.config import HOSTED_INSTRUCTION, ServerConfig
from tests.server.conftest import Serve, message_of
from tests.server.test_golden import CASES, fill, numbers, rank, send
from tests.tiny_checkpoints import calibration_file

pytestmark = pytest.mark.anyio

LOCAL, BODY = "/v1/local/rank", {"query": "capital", "documents": ["Paris", "Rome"]}


@pytest.fixture(scope="module")
def by_scores(tiny_reranker: Reranker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Reranker]]:
    """With DashScope's default instruction for every dialect. probability = sigmoid(0.5 * log-odds - 1)."""
    file = calibration_file(tiny_reranker, tmp_path_factory.mktemp("calibration"), instruction=HOSTED_INSTRUCTION)
    config = replace(tiny_reranker.config, instruction=HOSTED_INSTRUCTION, calibration=str(file))
    with Reranker(config=config) as model, Reranker(config=replace(config, scores="calibrated")) as calibrated:
        yield {"model": model, "calibrated": calibrated}


async def test_calibrated_scores_are_in_every_dialect_and_log_odds_stay(
    serve: Serve, by_scores: dict[str, Reranker]
) -> None:
    calibrated = by_scores["calibrated"]
    dialects = set()  # of which the first example is sent
    async with serve(calibrated) as client:
        for path in CASES:
            case = json.loads(path.read_text(encoding="utf-8"))
            library, name = case.get("library", {"instruction": "none is ranked"}), path.parent.name
            if name in ("local", *dialects) or library.get("instruction") not in (None, HOSTED_INSTRUCTION):
                continue
            response = await send(client, case["request"])
            assert response.status_code == 200, (path, response.text)
            result = rank(calibrated, library)
            assert [item.relevance_score for item in result] == [sigmoid(0.5 * item.log_odds - 1) for item in result]
            scores = [item.relevance_score for item in sorted(result, key=lambda item: item.index)]
            values = {"model": calibrated.model_id, "request_id": response.headers["x-request-id"], "scores": scores}
            expected = list(numbers(fill(case["response"]["body"], values, result)))
            assert list(numbers(response.json())) == pytest.approx(expected, rel=1e-5), path
            dialects.add(name)
        raw = await client.post("/rerank", json={"query": "capital", "texts": ["Paris"], "raw_scores": True})
        assert raw.json()[0]["score"] == pytest.approx(calibrated.score([("capital", "Paris")], logits=True)[0])
        assert (await client.get("/info")).json()["scores"] == "calibrated"
    others = {"local", "housekeeping", "xinference"}  # tested below; without rankings
    assert dialects == {path.parent.name for path in CASES} - others


@pytest.mark.parametrize("scores", ["model", "calibrated"])
async def test_our_own_route_has_the_probability_beside_the_score(
    scores: str, serve: Serve, by_scores: dict[str, Reranker], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        async with serve(by_scores[scores]) as client:
            results = (await client.post(LOCAL, json=BODY)).json()["results"]
    assert ("relevance_score is the probability of calibration" in caplog.text) == (scores == "calibrated")
    for item in results:
        assert item["probability"] == sigmoid(0.5 * item["log_odds"] - 1)
        assert item["relevance_score"] == (item["probability"] if scores == "calibrated" else sigmoid(item["log_odds"]))


async def test_with_another_instruction_there_is_no_probability(serve: Serve, by_scores: dict[str, Reranker]) -> None:
    other = BODY | {"instruction": "Find cities"}
    async with serve(by_scores["model"]) as client:
        assert "probability" not in (await client.post(LOCAL, json=other)).json()["results"][0]
    async with serve(by_scores["calibrated"]) as client:
        refused = await client.post(LOCAL, json=other)
    assert refused.status_code == 400
    assert message_of(refused.json()).startswith("instruction is not the one that scores are calibrated for")


def test_the_self_test_of_calibrated_scores_has_its_own_instructions(by_scores: dict[str, Reranker]) -> None:
    assert log_odds_of(by_scores["calibrated"], STORED) == pytest.approx(log_odds_of(by_scores["model"], STORED))


def test_settings_under_which_no_request_could_be_answered_stop_the_start(
    tiny_reranker: Reranker, tmp_path: Path
) -> None:
    def options(**changes: Any) -> dict[str, Any]:
        return {"calibration": str(calibration_file(tiny_reranker, tmp_path, **changes)), "scores": "calibrated"}

    why = r"set --dashscope-instruction 'Given a web search query, .*query'$"
    with pytest.raises(ConfigError, match=why):
        ServerConfig().check_scores(EngineConfig(**options()))
    ServerConfig().check_scores(EngineConfig(**options(instruction=HOSTED_INSTRUCTION)))
    ServerConfig().check_scores(EngineConfig(**options(instruction=None)))  # an encoder's
    pytest.importorskip("ray")
    from local_rerank_server.ray_serve.application import build

    with pytest.raises(ConfigError, match=why):  # not only where `serve` checks it
        build(options() | {"insecure": True})


async def test_a_minimum_is_compared_with_what_relevance_score_is(serve: Serve, by_scores: dict[str, Reranker]) -> None:
    bodies = {}
    for name, reranker in by_scores.items():
        async with serve(reranker) as client:
            whole = (await client.post(LOCAL, json=BODY)).json()
            assert "num_below_min_score" not in whole
            scores = [item["relevance_score"] for item in whole["results"]]
            asked = BODY | {"min_score": sum(scores) / 2, "top_n": 2}
            bodies[name] = (await client.post(LOCAL, json=asked)).json()
            assert [item["index"] for item in bodies[name]["results"]] == [whole["results"][0]["index"]], name
            assert bodies[name]["num_below_min_score"] == 1


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"first_stage_scores": [1]}, "first_stage_scores has length 1; it must have one number for each of the 2"),
    ({"first_stage_scores": [2, 2]}, "first_stage_scores are all 2, which orders nothing"),
    ({"first_stage_scores": [1, "2"]}, "first_stage_scores.1: Input should be a valid number"),
    ({"first_stage_scores": [1, None]}, "first_stage_scores.1: Input should be a valid number, not null"),
    ({"first_stage_scores": [1, math.inf]}, "first_stage_scores.1: Input should be a finite number, not Infinity"),
    ({"min_score": math.inf}, "min_score: Input should be a finite number, not Infinity"),
    ({"min_score": True}, "min_score: Input should be a valid number"),
    ({"first_stage_weight": -1}, "first_stage_weight is -1; it must be a finite number of at least 0"),
    ({"first_stage_scores": None}, "first_stage_weight: this has no effect without first_stage_scores; send those"),
    ({"first_stage_scores": None, "first_stage_weight": None}, "first_stage_method: this has no effect without"),
    ({"first_stage_method": "min-max"}, "first_stage_method: Input should be 'z-scores' or 'reciprocal-ranks'"),
]


async def test_our_route_blends_first_stage_scores_or_says_what_is_wrong_with_them(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    good = {"first_stage_scores": [1, 2.5], "first_stage_weight": 9, "first_stage_method": "reciprocal-ranks"}
    async with serve(tiny_reranker) as client:
        for scores, first in (([1, 2.5], 1), ([2.5, 1], 0)):
            answer = (await client.post(LOCAL, json=BODY | good | {"first_stage_scores": scores})).json()
            assert [item["index"] for item in answer["results"]] == [first, 1 - first]
            assert answer["results"][0]["blended_score"] > answer["results"][1]["blended_score"]
        for sent, says in WRONG:
            body = json.dumps(BODY | good | sent).replace("Infinity", "1e999")  # Infinity is not JSON
            refused = await client.post(LOCAL, content=body, headers={"content-type": "application/json"})
            assert refused.status_code == 400
            assert message_of(refused.json()).startswith(says)
