"""A server with a calibration: `probability` on our own route, and with `--scores calibrated` in every dialect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from local_rerank import EngineConfig, Reranker, RerankResult
from local_rerank.errors import ConfigError
from local_rerank.requests.calibration import sigmoid
from local_rerank_server.config import HOSTED_INSTRUCTION, ServerConfig
from tests.server.conftest import Serve, message_of
from tests.server.test_golden import CASES, fill, numbers, rank, send
from tests.tiny_checkpoints import calibration_file

pytestmark = pytest.mark.anyio

CALIBRATED: dict[str, Any] = {"scores": "calibrated"}
LOCAL, BODY = "/v1/local/rank", {"query": "capital", "documents": ["Paris", "Rome"]}


@pytest.fixture(scope="module")
def calibrated(tiny_reranker: Reranker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reranker]:
    """With DashScope's default instruction for every dialect. probability = sigmoid(0.5 * log-odds - 1)."""
    file = calibration_file(tiny_reranker, tmp_path_factory.mktemp("calibration"), instruction=HOSTED_INSTRUCTION)
    config = replace(tiny_reranker.config, instruction=HOSTED_INSTRUCTION, calibration=str(file))
    with Reranker(config=config) as reranker:
        yield reranker


def with_probabilities(result: RerankResult) -> RerankResult:
    items = tuple(replace(item, relevance_score=sigmoid(0.5 * item.log_odds - 1)) for item in result)
    return replace(result, results=items)


async def test_calibrated_scores_are_in_every_dialect_and_log_odds_stay(serve: Serve, calibrated: Reranker) -> None:
    dialects = set()  # of which the first example is sent
    async with serve(calibrated, **CALIBRATED) as client:
        for path in CASES:
            case = json.loads(path.read_text(encoding="utf-8"))
            library, name = case.get("library", {"instruction": "none is ranked"}), path.parent.name
            if name in ("local", *dialects) or library.get("instruction") not in (None, HOSTED_INSTRUCTION):
                continue
            response = await send(client, case["request"])
            assert response.status_code == 200, (path, response.text)
            result = with_probabilities(rank(calibrated, library))
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
    scores: str, serve: Serve, calibrated: Reranker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        async with serve(calibrated, scores=scores) as client:
            results = (await client.post(LOCAL, json=BODY)).json()["results"]
    assert ("relevance_score is the probability of calibration" in caplog.text) == (scores == "calibrated")
    for item in results:
        assert item["probability"] == sigmoid(0.5 * item["log_odds"] - 1)
        assert item["relevance_score"] == (item["probability"] if scores == "calibrated" else sigmoid(item["log_odds"]))


async def test_with_another_instruction_there_is_no_probability(serve: Serve, calibrated: Reranker) -> None:
    other = BODY | {"instruction": "Find cities"}
    async with serve(calibrated) as client:
        assert "probability" not in (await client.post(LOCAL, json=other)).json()["results"][0]
    async with serve(calibrated, **CALIBRATED) as client:
        refused = await client.post(LOCAL, json=other)
    assert refused.status_code == 400
    assert message_of(refused.json()).startswith("instruction: the scores of this server are calibrated")


def test_settings_under_which_no_request_could_be_answered_stop_the_start(
    tiny_reranker: Reranker, tmp_path: Path
) -> None:
    config = ServerConfig(**CALIBRATED)

    def engine(**changes: Any) -> EngineConfig:
        return EngineConfig(calibration=str(calibration_file(tiny_reranker, tmp_path, **changes)))

    with pytest.raises(ConfigError, match=r"needs --calibration FILE"):
        config.check_scores(EngineConfig())
    with pytest.raises(ConfigError, match=r"set --dashscope-instruction 'Given a web search query, .*query'$"):
        config.check_scores(engine())
    config.check_scores(engine(instruction=HOSTED_INSTRUCTION))
    config.check_scores(engine(instruction=None))  # an encoder's
