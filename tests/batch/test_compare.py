"""The command `compare`."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import ir_measures
import pytest
from ir_measures import RR, nDCG

from tests.batch.conftest import WORDS, write_lines
from tests.command_line import command


def better_run(collection: dict[str, Path], folder: Path) -> Path:
    """Write a run with the relevant document first, except for q1, where it is last."""
    lines = []
    for i in range(10):
        right = f"d{i}-{i % 5}"
        others = [f"d{i}-{j}" for j in range(5) if j != i % 5]
        order = [*others, right] if i == 1 else [right, *others]
        lines += [f"q{i} Q0 {name} {rank} {-rank} better" for rank, name in enumerate(order, 1)]
    return write_lines(folder / "better.run", lines)  # type: ignore[arg-type]


def test_compare_counts_wins_and_tests_significance(collection: dict[str, Path], tmp_path: Path) -> None:
    better = better_run(collection, tmp_path)
    runs = [str(collection["first"]), str(better)]
    done = command("compare", *runs, "--qrels", str(collection["qrels"]), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    qrels = list(ir_measures.read_trec_qrels(str(collection["qrels"])))
    for system, file in zip(told["systems"], runs, strict=True):
        expected = ir_measures.calc_aggregate([nDCG @ 10, RR], qrels, ir_measures.read_trec_run(file))
        assert {name: system["mean"][name] for name in ("nDCG@10", "RR")} == pytest.approx(
            {str(name): value for name, value in expected.items()}
        )
    by_measure = {comparison["measure"]: comparison for comparison in told["comparisons"]}
    assert {"nDCG@10", "RR", "AP", "R@10", "R@100"} <= by_measure.keys()
    comparison = by_measure["nDCG@10"]
    assert (comparison["wins"], comparison["losses"], comparison["ties"]) == (7, 1, 2)
    assert comparison["p_value"] < 0.05
    assert by_measure["R@100"]["p_value"] == 1.0  # both have every document
    assert set(comparison["differences"]) == {f"q{i}" for i in range(10)}
    assert (told["left_out"], told["tie_rule"][:12]) == ([], "equal scores")
    same = json.loads(command("compare", runs[0], runs[0], "--qrels", str(collection["qrels"]), "--json").stdout)
    assert {each["p_value"] for each in same["comparisons"]} == {1.0}
    assert "most changed" not in command("compare", runs[0], runs[0], "--qrels", str(collection["qrels"])).stdout


def test_c15_compare_prints_a_table_with_its_rule_for_ties_and_draws_a_plot(
    collection: dict[str, Path], tmp_path: Path
) -> None:
    far = tmp_path / ("a-long-name" * 9)  # two such paths are wider than the terminal
    far.mkdir()
    better, plot, first = better_run(collection, far), tmp_path / "plot.svg", collection["first"].rename(far / "a.run")
    done = command(
        "compare", str(first), str(better), "--qrels", str(collection["qrels"]), "--queries",
        str(collection["queries"]), "--plot", str(plot), "--measure", "RR",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("RR ")]
    assert row[4:7] == ["7", "1", "2"]
    assert 0 < float(row[7]) < 1
    said = " ".join(done.stdout.split())
    assert "10 judged queries; equal scores in a run keep the order of its lines" in said
    assert WORDS[1] in done.stdout  # the query that lost, by its text
    texts = [text.text or "" for text in ET.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.endswith("7 wins, 1 losses") for text in texts)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--plot", "a.gif"], "it must end in one of .svg, .png, .pdf"),
        (["--measure", "nonsense"], "measure is 'nonsense', which ir-measures cannot compute; try nDCG@10 or RR"),
        (["--measure", "alpha_nDCG@10"], "measure is 'alpha_nDCG@10', which ir-measures cannot compute"),
        (["--plot", "no/a.svg"], "plot is no/a.svg; there is no folder no"),
    ],
)
def test_wrong_options_of_compare_are_named(collection: dict[str, Path], more: list[str], says: str) -> None:
    run = str(collection["first"])
    done = command("compare", run, run, "--qrels", str(collection["qrels"]), *more)
    assert done.returncode in (1, 2)
    assert says in done.stderr
