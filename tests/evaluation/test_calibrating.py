"""Calibrations: fitted to scores whose probabilities are known, written by `calibrate`, applied by the library."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from local_rerank import Reranker
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.calibrating import Fit, Scored, fit
from local_rerank.evaluation.collection import Collection
from local_rerank.evaluation.labelled import pairs_of, read_pairs
from local_rerank.evaluation.trec_files import Candidate
from local_rerank.requests.scores import Calibration, Curve, read_calibration, sigmoid
from tests.command_line import Done, command
from tests.tiny_checkpoints import calibration_file

SANITY = Path(__file__).parents[1] / "data/sanity40.jsonl"
OF_NOTHING: dict[str, Any] = {"model": "m", "instruction": "i", "recipe": {"dtype": "fp32"}}


def scored(num_queries: int, slope: float, intercept: float, *, step: float = 0.0) -> Scored:
    """Ten documents a query, relevant with probability sigmoid(slope * x + intercept), plus a `step` at 0."""
    random = np.random.default_rng(1)
    x = random.normal(0, 3, num_queries * 10)
    relevant = random.random(len(x)) < 1 / (1 + np.exp(-(slope * x + intercept + step * (x > 0))))
    return Scored(log_odds=x, relevant=relevant, query=np.repeat(np.arange(num_queries), 10))


def fitted(pairs: Scored, precision: float = 0.8) -> Fit:
    return fit(pairs, precisions=[precision], recalls=[0.9], num_resamples=200)


def test_platt_finds_the_curve_that_made_the_labels_and_lowers_the_errors() -> None:
    found = fitted(scored(90, 0.5, -1.0))
    assert found.method == "platt", "900 pairs are too few for isotonic regression"
    assert found.curve.slope == pytest.approx(0.5, abs=0.08)
    assert found.curve.intercept == pytest.approx(-1.0, abs=0.2)
    quality = found.quality
    assert quality["error_after"] < 0.05 < 0.15 < quality["error_before"]
    assert quality["brier_after"] < quality["brier_before"]
    low, high = quality["auc_interval"]
    assert 0.7 < low < quality["auc"] < high < 0.95
    assert found.why_no_separation == ""


def test_isotonic_regression_is_taken_where_pairs_suffice_and_the_curve_is_no_sigmoid() -> None:
    found = fitted(scored(300, 0.0, -2.0, step=4.0))
    assert found.method == "isotonic"
    curve = found.curve
    assert Calibration(**OF_NOTHING, points=curve.points).points, "it never falls"
    assert [curve.probability(x) for x in (-9.0, -2.0, 2.0, 9.0)] == pytest.approx([0.12, 0.12, 0.88, 0.88], abs=0.12)
    assert 0 < curve.probability(-99.0) < curve.probability(99.0) < 1, "no finite sample proves 0 or 1"


def test_a_relevance_score_from_0_6_to_0_8_that_is_right_half_of_the_time_becomes_a_probability_that_holds() -> None:
    pairs = scored(300, 1.0, -0.9)

    def share_relevant(values: Any) -> float:
        return float(pairs.relevant[(values >= 0.6) & (values <= 0.8)].mean())

    assert share_relevant(pairs.probabilities(Curve())) == pytest.approx(0.5, abs=0.05)
    assert 0.6 <= share_relevant(pairs.probabilities(fitted(pairs).curve)) <= 0.8


def test_a_threshold_is_measured_on_queries_it_was_not_chosen_with() -> None:
    pairs = scored(200, 1.0, 0.0)
    by_precision, by_recall = fitted(pairs, 0.9).thresholds
    assert by_precision["log_odds"] is not None
    kept = pairs.log_odds >= by_precision["log_odds"]
    assert pairs.relevant[kept].mean() >= 0.9
    low, high = by_precision["held_out"]["precision"]["interval"]
    assert low < 0.9 < high
    assert high - low < 0.15
    assert by_recall["held_out"]["recall"]["value"] == pytest.approx(0.9, abs=0.03)
    assert by_precision["probability"] == pytest.approx(sigmoid(by_precision["log_odds"]), abs=0.06)


@pytest.mark.parametrize(
    ("slope", "precision", "why"), [(0.0, 0.3, "may be chance"), (0.4, 0.999, "no threshold has precision 0.999")]
)
def test_scores_that_do_not_separate_are_called_so(slope: float, precision: float, why: str) -> None:
    found = fitted(scored(60, slope, -1.0), precision)
    assert why in found.why_no_separation
    assert found.is_usable == (slope > 0)


def test_labels_come_from_json_lines_or_from_a_run_and_have_one_digest(tmp_path: Path) -> None:
    collection = Collection(
        documents={"d1": "one", "d2": "two", "d3": "three"},
        queries={"q": "query"},
        qrels={"q": {"d1": 2, "d2": 0}},
        run={"q": tuple(Candidate(name, 1.0) for name in ("d1", "d2", "d3"))},
        num_unjudged_queries=0,
    )
    of_run = pairs_of(collection, top_k=3)
    assert (of_run.by_query, of_run.num_unjudged) == ({"query": {"one": True, "two": False, "three": False}}, 1)
    file = tmp_path / "pairs.jsonl"
    rows = [("two", 0), ("one", True), ("three", -1), ("one", 2)]
    file.write_text("".join(json.dumps({"query": "query", "document": d, "label": v}) + "\n" for d, v in rows))
    assert read_pairs(file).digest == of_run.digest
    file.write_text('{"query": "query", "document": "one", "label": 1}\n' * 2)
    assert read_pairs(file).digest != of_run.digest


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[]", "is not {"),
        ('{"query": " ", "document": "d", "label": 1}', "query must not be empty"),
        ('{"query": "q", "document": "d"}', "has the label null"),
        ('{"query": "q", "document": "d", "label": 0.5}', "has the label 0.5"),
        ('{"query": "q", "document": "d", "label": NaN}', "has the label NaN"),
        ('{"query": "q", "document": "one", "label": 0}', "contradicts"),
        ("{", "is not JSON"),
    ],
)
def test_a_line_that_is_no_labelled_pair_is_named(line: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(f'{{"query": "q", "document": "one", "label": 1}}\n{line}\n')
    with pytest.raises(InvalidRequest, match=f"pairs.jsonl:2 .*{why}"):
        read_pairs(file)


# The command, and the library with its file


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 queries with three documents each, of which one is right."""
    file = tmp_path_factory.mktemp("calibration") / "pairs.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for row in map(json.loads, SANITY.read_text(encoding="utf-8").splitlines()[:16]):
            others = [index for index in range(len(row["documents"])) if index != row["right"]]
            for index in (row["right"], *others[:2]):
                pair = {"query": row["query"], "document": row["documents"][index], "label": index == row["right"]}
                stream.write(json.dumps(pair) + "\n")
    return file


@pytest.fixture(scope="module")
def calibrated(labelled: Path) -> tuple[Done, Path]:
    file = labelled.with_name("calibration.json")
    plot = file.with_suffix(".svg")
    return command("calibrate", str(labelled), "--output", str(file), "--plot", str(plot), "--device", "cpu"), file


def test_calibrate_writes_what_it_prints_and_the_plot(calibrated: tuple[Done, Path]) -> None:
    done, file = calibrated
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(file.read_text())
    assert f"AUC {report['quality']['auc']:.3f}" in done.stdout
    assert "16 queries, 48 documents, 16 relevant" in done.stdout
    assert report["separation"] == "clean"
    assert "share of relevant documents" in file.with_suffix(".svg").read_text()


def test_results_have_the_probability_of_the_file(tiny_reranker: Reranker, tmp_path: Path) -> None:
    documents = ["Paris", "Rome"]
    with Reranker(config=tiny_reranker.config, calibration=str(calibration_file(tiny_reranker, tmp_path))) as reranker:
        for item in reranker.rank("capital", documents):
            assert item.probability == sigmoid(0.5 * item.log_odds - 1.0)
            assert item.relevance_score == sigmoid(item.log_odds)
        other = reranker.rank("capital", documents, instruction="Find cities")
    assert other[0].probability is None, "it was fitted with another instruction"
    assert tiny_reranker.rank("capital", documents)[0].probability is None


def test_rank_shows_the_probability(calibrated: tuple[Done, Path]) -> None:
    done = command("rank", "capital of France", "Paris is the capital of France", "--calibration", str(calibrated[1]))
    assert done.stdout.split("\n")[0].split() == ["#", "score", "log-odds", "probability", "document"]
    assert math.isclose(float(done.stdout.split("\n")[1].split()[4]), 0.9, abs_tol=0.1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": "other"}, "with model 'other', but this engine has 'tiny-reranker'"),
        ({"instruction": "Find cities"}, "with instruction 'Find cities'"),
        ({"recipe": {"dtype": "int8"}}, "with weights None"),
        ({"version": 2}, "has version 2; this program reads version 1"),
        ({"slope": -1.0}, "the slope above 0"),
        ({"slope": math.nan}, "must be finite numbers"),
        ({"slope": None}, "is not a file of `local-rerank calibrate`"),
        ({"method": "isotonic", "points": []}, r"points is \[\]"),
        ({"method": "isotonic", "points": [[0, 0.5], [1, 0.4]]}, "must not fall"),
        ({"method": "isotonic"}, "without 'points'"),
    ],
)
def test_a_file_that_does_not_fit_the_engine_is_refused(
    change: dict[str, Any], why: str, tiny_reranker: Reranker, tmp_path: Path
) -> None:
    file = calibration_file(tiny_reranker, tmp_path, **change)
    with pytest.raises(ConfigError, match=why):
        Reranker(config=tiny_reranker.config, calibration=str(file))


def test_scores_of_chunks_need_a_calibration_of_their_own(tiny_reranker: Reranker, tmp_path: Path) -> None:
    file = calibration_file(tiny_reranker, tmp_path)
    with pytest.raises(ConfigError, match="with long_documents None, but this engine has 'chunk'"):
        Reranker(config=tiny_reranker.config, calibration=str(file), long_documents="chunk")
    recipe = tiny_reranker.recipe | {"long_documents": "chunk"}
    file = calibration_file(tiny_reranker, tmp_path, recipe=recipe)
    with pytest.raises(ConfigError, match="with long_documents 'chunk', but this engine has None"):
        Reranker(config=tiny_reranker.config, calibration=str(file))


def test_a_file_that_is_not_there_is_a_wrong_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"calibration .*none.json cannot be read: No such file"):
        read_calibration(tmp_path / "none.json")


def test_the_weights_are_told_by_their_contents(tiny_reranker: Reranker, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_reranker.checkpoint.folder, tmp_path / "tiny-reranker")
    with Reranker(str(copy), device="cpu", dtype="fp32") as same:
        assert (same.model_id, same.recipe) == (tiny_reranker.model_id, tiny_reranker.recipe)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with Reranker(str(copy), device="cpu", dtype="fp32") as other:
        assert other.recipe["weights"] != tiny_reranker.recipe["weights"]


def test_calibrate_ends_with_3_where_scores_do_not_separate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"query": f"q{i}", "document": "ab"[side], "label": (i + side) % 2} for i in range(10) for side in (0, 1)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "calibration.json"
    done = command("calibrate", str(pairs), "--model", str(tiny_checkpoint), "--output", str(file))
    assert done.returncode == 3
    assert done.stderr.startswith("no clean separation: the AUC is 0.")
    assert done.stderr.endswith("nothing is written\n")
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "corpus is missing; give a file of labelled pairs, or --run with"),
        (("{pairs}", "--run", "first.run"), "labelled pairs and run are both given"),
        (("{pairs}", "--precision", "90"), "precision is 90; it must be above 0 and at most 1"),
        (("{few}",), "there are 1 queries with 1 relevant and 0 other documents; label at least 5 queries"),
    ],
)
def test_calibrate_says_what_is_wrong_before_it_scores(
    arguments: tuple[str, ...], why: str, labelled: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(labelled.read_text().partition("\n")[0])
    given = [each.format(pairs=labelled, few=few) for each in arguments]
    done = command("calibrate", *given, "--output", str(tmp_path / "calibration.json"), "--model", "no such model")
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr
