"""Evaluation files, rankings, measures and significance by hand-computed examples, and the command `eval`."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_rerank import Reranker
from local_rerank.errors import InvalidRequest
from local_rerank.evaluation.blending import Blend, Bm25
from local_rerank.evaluation.collection import Collection, read_collection
from local_rerank.evaluation.left_out import LeftOut
from local_rerank.evaluation.measures import System, blend_scores, compare, measure, measures, p_value, reorder, score
from local_rerank.evaluation.plot import write_plot
from local_rerank.evaluation.text_forms import read_texts
from local_rerank.evaluation.trec_files import Candidate, read_qrels, read_run
from local_rerank.requests.scores import blend
from tests.command_line import Done, command
from tests.tiny_checkpoints import make_checkpoint

CORPUS = {"d1": "a cat", "d2": "the dog barks", "d3": "a bird sings", "d4": "", "d5": "fish swim"}
QUERIES = {"q1": "cat", "q2": "who barks [loud]?", "q3": "nothing is found", "q4": "nobody judged this"}
QRELS = "q1 0 d1 1\nq1 0 d3 1\nq2 0 d2 2\nq3 0 d5 1\n"
BLENDS = "bm25=W or run=W, or bm25-ranks=W or run-ranks=W, where the weight W is at least 0"
RUN = """\
q1 Q0 d2 1 9.5 test
q1 Q0 d1 2 8.5 test
q1 Q0 d3 3 7.5 test
q2 Q0 d4 1 3 test
q2 Q0 d2 2 2 test
q4 Q0 d1 1 1 test
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Four queries: q3 has no candidates and q4 no judgement."""
    texts = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES}
    contents = {"qrels.trec": QRELS, "first.run": RUN}
    for name, rows in texts.items():
        contents[name] = "".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in rows.items())
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    names = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels.trec", "run": "first.run"}
    return {kind: tmp_path / name for kind, name in names.items()}


@pytest.fixture
def collection(files: dict[str, Path]) -> Collection:
    return read_collection(**files)


def one_query(num_candidates: int) -> Collection:
    """Make a query q with candidates d0, d1, ... whose texts are their ids."""
    ids = [f"d{i}" for i in range(num_candidates)]
    return Collection(
        documents={name: name for name in ids},
        queries={"q": "d0"},
        qrels={"q": {"d0": 1}},
        run={"q": tuple(Candidate(name, float(-i)) for i, name in enumerate(ids))},
        num_unjudged_queries=0,
    )


# Files


def test_a_collection_has_the_judged_queries_and_the_documents_of_their_candidates(collection: Collection) -> None:
    assert list(collection.queries) == ["q1", "q2", "q3"]
    assert collection.num_unjudged_queries == 1
    assert collection.documents == {name: CORPUS[name] for name in ("d1", "d2", "d3", "d4")}
    assert collection.qrels["q1"] == {"d1": 1, "d3": 1}
    assert collection.run["q2"] == (Candidate("d4", 3.0), Candidate("d2", 2.0))
    assert collection.run["q3"] == ()


def test_max_queries_keeps_the_first_queries_and_does_not_change_the_statistics_of_bm25(
    files: dict[str, Path], collection: Collection, tmp_path: Path
) -> None:
    scores = {"q1": [1.0, 2.0, 0.0]}
    first = read_collection(**files, max_queries=1)
    assert list(first.run) == ["q1"]
    assert blend_scores(scores, first, Blend("bm25", 1.0)) == blend_scores(scores, collection, Blend("bm25", 1.0))
    files["corpus"].write_text("\n".join(json.dumps({"id": name, "text": CORPUS[name]}) for name in ("d1", "d2", "d3")))
    assert list(read_collection(**files, max_queries=1).documents) == ["d1", "d2", "d3"], "others may be missing"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"_id": "7", "title": "Cats", "text": "purr", "metadata": {}}', {"7": "Cats purr"}),
        ("a.jsonl", '{"_id": 7, "title": "", "text": "purr"}\n\n{"id": "8", "text": ""}', {"7": "purr", "8": ""}),
        ("a.jsonl", '\ufeff{"id": "7", "text": "one\u2028line"}\r\n', {"7": "one\u2028line"}),
        ("a.tsv", "7\tpurr\n8\tCats\tpurr\n9\t", {"7": "purr", "8": "Cats purr", "9": ""}),
    ],
)
def test_texts_are_read_from_beir_jsonl_and_tsv(
    tmp_path: Path, name: str, content: str, expected: dict[str, str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert dict(read_texts(tmp_path / name, "corpus", LeftOut())) == expected


def test_a_run_is_sorted_by_score_and_ties_keep_file_order(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("q Q0 a 1 1.0 x\nq Q0 z 2 3.5 x\nq Q0 b 3 1e0 x\nq Q0 c 4 -2 x\n")
    assert [candidate.document_id for candidate in read_run(file, LeftOut(), ["q"])["q"]] == ["z", "a", "b", "c"]


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("corpus", '{"id": "d1", "text": "a"}\n{"id": "d2"', r"corpus.jsonl:2 is not an object with an id \(id, _id"),
        ("corpus", '{"id": "d1", "text": 3}', r"corpus.jsonl:1 is not an object with an id"),
        ("corpus", '{"text": "a"}', r"corpus.jsonl:1 is not an object"),
        ("corpus", '{"id": "d1", "text": "a"}\n\udcff', r"corpus.jsonl:2 is not UTF-8"),
        ("corpus", '{"id": "d9", "text": "a"}', r"corpus.jsonl has none of the documents of .*first.run, not even d2"),
        ("queries", "", r"queries.jsonl is empty; queries must be .jsonl"),
        ("queries", "x\ty", r"queries.jsonl:1 is not an object"),
        (
            "queries",
            '{"id": "q7", "text": "y"}',
            r"qrels.trec and .* have no query in common: .*trec has q1, .*l has q7",
        ),
        ("qrels", "q1 0 d1 1\nq1 0 d2", r"qrels.trec:2 is not `query 0 document grade`"),
        ("qrels", "q1 0 d1 1\nq1 0 d1 2", r"qrels.trec:2 contradicts an earlier grade"),
        ("run", "q1 Q0 d1 1 9.5 test\nq1 Q0 d2 2 8.5", r"first.run:2 is not `query Q0 document rank score name`"),
        ("run", "q1 Q0", r"first.run:1 is not `query Q0 document rank score name`"),
        ("run", "other Q0 d1 1 9.5 test", r"none of the 3 judged queries has candidates in .*first.run"),
    ],
)
def test_a_malformed_file_is_rejected_with_file_and_line(
    files: dict[str, Path], kind: str, content: str, words: str
) -> None:
    files[kind].write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidRequest, match=words) as error_info:
        read_collection(**files)
    assert "\n" not in str(error_info.value)


def test_c5_what_cannot_be_used_is_left_out_and_counted(files: dict[str, Path]) -> None:
    files["corpus"].write_text("".join(f'{{"id": "{name}", "text": "a"}}\n' for name in ("d1", "d3", "d1", "d4")))
    with files["run"].open("a") as run:
        run.write("q1 Q0 d1 4 1 test\nq1 Q0 d4 5 nan test\n")
    found = read_collection(**files)
    assert {query: [each.document_id for each in run] for query, run in found.run.items()} == {
        "q1": ["d1", "d3"], "q2": ["d4"], "q3": []
    }  # fmt: skip
    assert [(each["count"], str(each["first"]).rpartition("/")[2]) for each in found.left_out.as_json()] == [
        (1, "first.run:7: document d1 is repeated"),
        (1, "first.run:8: the score is nan; it must be a finite number"),
        (1, "corpus.jsonl:3: the id d1 is that of an earlier text"),
        (2, "first.run, query q1: document d2 is not in the corpus"),
    ]


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"qrels cannot be read: No such file"):
        read_qrels(tmp_path / "qrels")
    with pytest.raises(InvalidRequest, match=r"a.xml cannot be read: No such file"):
        dict(read_texts(tmp_path / "a.xml", "corpus", LeftOut()))


# Orders


def test_without_distinct_scores_the_first_stages_order_stays() -> None:
    assert reorder(one_query(4), {"q": [1.0, 1.0, 1.0]})["q"] == ["d0", "d1", "d2", "d3"]
    assert reorder(one_query(4), {})["q"] == ["d0", "d1", "d2", "d3"]
    assert reorder(one_query(0), {"q": []})["q"] == []


@given(st.lists(st.floats(allow_nan=False), max_size=12), st.integers(0, 12))
def test_reordering_loses_no_candidate_and_never_ranks_a_lower_score_higher(values: list[float], below: int) -> None:
    order = [int(name[1:]) for name in reorder(one_query(len(values) + below), {"q": values})["q"]]
    assert sorted(order) == list(range(len(values) + below))
    assert [values[i] for i in order[: len(values)]] == sorted(values, reverse=True)
    assert order[len(values) :] == list(range(len(values), len(values) + below))


def test_score_returns_the_log_odds_of_the_top_candidates_in_order(
    tiny_reranker: Reranker, collection: Collection
) -> None:
    scores = dict(score(tiny_reranker, collection, top_k=2))
    assert list(scores) == ["q1", "q2"], "q3 has no candidates"
    assert scores["q1"] == pytest.approx(
        tiny_reranker.score([("cat", CORPUS["d2"]), ("cat", CORPUS["d1"])], logits=True), abs=1e-4
    )
    assert [len(values) for values in scores.values()] == [2, 2]


def test_blending_uses_the_runs_scores_or_bm25_over_the_collection(collection: Collection) -> None:
    scores = {"q1": [1.0, 2.0, 0.0], "q2": [0.0, 1.0]}
    run = blend_scores(scores, collection, Blend("run", 0.5))
    assert run["q1"] == blend([1.0, 2.0, 0.0], [9.5, 8.5, 7.5], 0.5)
    bm25 = blend_scores(scores, collection, Blend("bm25", 2.0))
    lexical = Bm25(collection.documents.values()).scores(QUERIES["q1"], ["the dog barks", "a cat", "a bird sings"])
    assert bm25["q1"] == blend([1.0, 2.0, 0.0], lexical, 2.0)
    assert bm25["q2"] == pytest.approx([-3.0, 3.0]), "only the second document barks"


# Measures


def test_measures_match_trec_eval() -> None:
    """Both relevant documents are at ranks 2 and 3 of 3."""
    values = measure({"q": {"a": 1, "b": 1}}, {"q": ["x", "a", "b"]}, ["nDCG@10", "RR", "AP", "R@2"])
    gain = 1 / 1.5849625 + 1 / 2  # 1 / log2(rank + 1) at ranks 2 and 3
    ideal = 1 + 1 / 1.5849625
    assert values["nDCG@10"] == {"q": pytest.approx(gain / ideal)}
    assert values["RR"] == {"q": 0.5}
    assert values["AP"] == {"q": pytest.approx((1 / 2 + 2 / 3) / 2)}
    assert values["R@2"] == {"q": 0.5}


def test_a_query_without_results_counts_as_zero() -> None:
    values = measure({"q": {"a": 1}, "empty": {"a": 1}, "absent": {"a": 1}}, {"q": ["a"], "empty": []}, ["nDCG@10"])
    assert values == {"nDCG@10": {"q": 1.0, "empty": 0.0, "absent": 0.0}}
    assert System(name="s", values=values).mean("nDCG@10") == pytest.approx(1 / 3)


def test_document_ids_do_not_influence_measures() -> None:
    """trec_eval breaks ties by document id, so the scores passed to it must be distinct."""
    for order in (["a", "z"], ["z", "a"]):
        assert measure({"q": {"z": 1}}, {"q": order}, ["RR"])["RR"]["q"] == (1.0 if order[0] == "z" else 0.5)


def test_recall_at_top_k_is_listed_once() -> None:
    assert measures(20) == ("nDCG@10", "RR", "AP", "R@10", "R@20")
    assert measures(10) == ("nDCG@10", "RR", "AP", "R@10")


# Comparisons


def system(name: str, values: Sequence[float]) -> System:
    return System(name=name, values={"nDCG@10": {f"q{i}": value for i, value in enumerate(values)}})


def test_a_comparison_counts_wins_losses_and_ties() -> None:
    comparison = compare(system("a", [0.5, 0.2, 0.3, 0.0, 1.0]), system("b", [0.6, 0.2, 0.7, 0.0, 0.1]))
    assert (comparison.wins, comparison.losses, comparison.ties) == (2, 1, 2)
    assert comparison.mean_difference == pytest.approx(-0.08)
    assert comparison.largest_wins(1) == [("q2", pytest.approx(0.4))]
    assert [query for query, _ in comparison.largest_wins(9)] == ["q2", "q0"]
    assert comparison.largest_losses(9) == [("q4", pytest.approx(-0.9))]


def test_p_is_exact_for_few_queries() -> None:
    """Of the 32 ways to sign five equal gains, two are as far from 0."""
    assert p_value([0.1] * 5) == pytest.approx(2 / 32)
    assert p_value([0.1, -0.1]) == p_value([0.1]) == 1.0


@pytest.mark.parametrize("differences", [[0.0] * 3, [0.0] * 40, [1e-17, -1e-17, 0.0], [0.0]])
def test_equal_systems_have_p_one(differences: list[float]) -> None:
    assert p_value(differences) == 1.0


def test_p_for_many_queries_is_deterministic_and_close_to_the_t_test() -> None:
    from scipy.stats import ttest_1samp

    differences = [((i * 37) % 101 - 40) / 100 for i in range(60)]
    assert p_value(differences) == p_value(differences)
    assert p_value(differences) == pytest.approx(ttest_1samp(differences, 0).pvalue, abs=0.01)
    assert p_value([value + 0.3 for value in differences]) == pytest.approx(2 / 10_000), "the smallest possible value"


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_plot_shows_each_comparison_with_its_title(tmp_path: Path, suffix: str) -> None:
    comparisons = [
        compare(system("first <stage>", [0.5, 0.2, 0.9]), system("a & $b$", [0.6, 0.2, 0.7])),
        compare(system("same", [0.5]), system("same too", [0.5])),
    ]
    file = tmp_path / f"plot{suffix}"
    write_plot(file, comparisons)
    if suffix == ".png":
        assert file.read_bytes().startswith(b"\x89PNG")
        return
    texts = [text.text for text in ET.parse(file).iter("{http://www.w3.org/2000/svg}text")]
    assert "a & $b$ - first <stage> by query: mean -0.033, 1 wins, 1 losses" in texts
    assert "same too - same by query: mean +0.000, 0 wins, 0 losses" in texts


# The command


def evaluated(files: dict[str, Path], *options: str, status: int = 0) -> Done:
    """Run `local-rerank eval`."""
    arguments = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    done = command("eval", *arguments, "--device", "cpu", "--dtype", "fp32", *options)
    assert done.returncode == status, done.stderr
    return done


def test_eval_prints_every_system_and_comparison_as_json(
    files: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", seed=5)
    models = ["--model", str(tiny_checkpoint), "--model", str(other)]
    done = evaluated(files, *models, "--blend", "run=1", "--top-k", "2", "--json")
    result: dict[str, Any] = json.loads(done.stdout)
    assert (result["num_queries"], result["num_unjudged_queries"], result["top_k"]) == (3, 1, 2)
    names = ["first stage", *(f"{model}{how}" for model in (tiny_checkpoint, other) for how in ("", ", run=1"))]
    assert [one["name"] for one in result["systems"]] == names
    first = result["systems"][0]
    assert first["by_query"]["RR"] == {"q1": 0.5, "q2": 0.5, "q3": 0.0}
    assert first["mean"]["RR"] == pytest.approx(1 / 3)
    assert {one["mean"]["R@2"] for one in result["systems"]} == {first["mean"]["R@2"]}, "reranking cannot change it"
    pairs = [(one["baseline"], one["system"]) for one in result["comparisons"]]
    assert pairs == [*((names[0], name) for name in names[1:]), *((names[1], name) for name in names[2:])]
    assert done.stderr == ""


def test_eval_ranks_like_the_reranker(files: dict[str, Path], tiny_checkpoint: Path, tiny_reranker: Reranker) -> None:
    done = evaluated(files, "--model", str(tiny_checkpoint), "--json")
    reranked = json.loads(done.stdout)["systems"][1]["by_query"]["RR"]
    ids = ["d2", "d1", "d3"]
    ranked = [ids[item.index] for item in tiny_reranker.rank("cat", [CORPUS[name] for name in ids])]
    assert reranked["q1"] == 1 / (1 + min(ranked.index("d1"), ranked.index("d3")))


def test_eval_reads_long_documents_in_chunks_if_asked(files: dict[str, Path]) -> None:
    """Truncated, d1 would stay behind d2."""
    filler = 5 * "Bananas are yellow and grow in warm places. "
    texts = {"d1": f"{filler}Paris is the capital of France.", "d2": "Rome is the capital of Italy."}
    files["corpus"].write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items()))
    files["queries"].write_text('{"id": "q1", "text": "capital of France"}')
    files["run"].write_text("q1 Q0 d2 1 2 test\nq1 Q0 d1 2 1 test\n")
    done = evaluated(files, "--max-document-tokens", "24", "--long-documents", "chunk", "--json")
    system = json.loads(done.stdout)["systems"][1]
    assert system["by_query"]["RR"] == {"q1": 1.0}
    assert system["name"] == "local-rerank-nano, in chunks"


def test_eval_prints_tables_and_writes_the_plot(files: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = evaluated(files, "--model", str(tiny_checkpoint), "--plot", str(tmp_path / "plot.svg")).stdout
    lines = [line.split() for line in output.splitlines()]
    assert lines[0] == ["nDCG@10", "RR", "AP", "R@10", "R@20"]
    assert lines[1] == "first stage 0.4415 0.3333 0.3611 0.6667 0.6667".split()
    assert "3 queries, 1 skipped without judgements; top 20 reranked" in output
    assert "difference of nDCG@10" in output
    assert "most changed" not in output, "this model changes no query"
    assert ET.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")


def test_c5_eval_goes_on_without_a_candidate_that_the_corpus_lacks(
    files: dict[str, Path], tiny_checkpoint: Path
) -> None:
    corpus = files["corpus"].read_text().splitlines(keepends=True)
    files["corpus"].write_text("".join(line for line in corpus if '"d2"' not in line))
    done = evaluated(files, "--model", str(tiny_checkpoint), "--json")
    result = json.loads(done.stdout)
    says = f"{files['run']}, query q1: document d2 is not in the corpus"
    assert result["left_out"] == [{"count": 2, "first": says}]
    assert result["systems"][0]["by_query"]["RR"] == {"q1": 1.0, "q2": 0.0, "q3": 0.0}
    assert f"left out: 2, first {says}" in evaluated(files, "--model", str(tiny_checkpoint)).stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-k", "0"], "top_k is 0; it must be at least 1"),
        (["--max-queries", "0"], "max_queries is 0; it must be at least 1"),
        (["--blend", "bm25"], f"blend is 'bm25'; it must be {BLENDS}"),
        (["--blend", "run=1", "--tune", "blend"], "blend is run=1, but tune finds the blend; leave out one of them"),
        (["--plot", "out.gif"], "plot is out.gif; it must end in one of .svg, .png, .pdf"),
        (["--plot", "no/out.svg"], "plot is no/out.svg; there is no folder no"),
        (["--qrels", "absent.trec"], "absent.trec cannot be read: No such file or directory"),
    ],
)
def test_wrong_options_of_eval_are_named_before_a_model_is_loaded(
    files: dict[str, Path], options: list[str], words: str
) -> None:
    if "--qrels" in options:
        del files["qrels"]
    assert evaluated(files, *options, "--model", "no/such/model", status=1).stderr == f"local-rerank: {words}\n"


@pytest.mark.parametrize(
    ("package", "options", "words"),
    [
        ("ir_measures", [], "measuring needs ir_measures"),
        ("matplotlib", ["--plot", "a.svg"], "a plot needs matplotlib"),
        ("scipy", [], "a test of significance needs scipy"),
    ],
)
def test_a_missing_package_is_reported_with_the_extra_that_installs_it(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, package: str, options: list[str], words: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert evaluated(files, *options, status=1).stderr == f'local-rerank: {words}: pip install "local-rerank[eval]"\n'
