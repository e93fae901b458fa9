"""The self-test: correct scores pass, and each kind of damage to a real engine is diagnosed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from local_rerank import EngineConfig, Reranker
from local_rerank.checkpoints.find import EMBEDDED_MODEL, open_checkpoint
from local_rerank.checkpoints.known_scores import GOLDEN, ORDERED, PUBLISHED, STORED, known_scores, to_json
from local_rerank.engine.attention import Layout
from local_rerank.engine.cpu.cpu_limits import cpu_limits
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.engine.plan import PLATFORMS
from local_rerank.errors import CheckpointError, ConfigError
from local_rerank.requests.parts import PromptLimits
from local_rerank.requests.prompts import PromptTemplate
from local_rerank.requests.tokenization import PairTokenizer
from local_rerank.selftest.machine_report import MachineProperty, describe
from local_rerank.selftest.self_test import TOLERANCE, SelfTest, require_self_test, self_test
from tests.command_line import command
from tests.engine.cuda.test_choices import H200, V100, gpus
from tests.reference import ModelCard
from tests.serving import WAIT_SECONDS, started
from tests.tiny_checkpoints import make_checkpoint

NANO = Path(__file__).parents[2] / "local_rerank" / "nano"
EXACT = {"device": "cpu", "dtype": "fp32", "threads": 1}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with known scores, computed by the model card's code."""
    folder = make_checkpoint(tmp_path_factory.mktemp("known") / "tiny-reranker", seed=11)
    card = ModelCard(folder)
    log_odds = [card.pair(pair.query, pair.document, pair.instruction) for pair in STORED]
    (folder / GOLDEN).write_text(json.dumps(to_json(STORED, log_odds, "fp32")["scores"]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def other(known: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights beside the scores of `known`."""
    folder = make_checkpoint(tmp_path_factory.mktemp("other") / "other-reranker", seed=12)
    shutil.copy(known / GOLDEN, folder)
    return folder


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without known scores: the first random one that ranks the plain questions correctly by chance."""
    for seed in range(20, 60):  # about one in three does
        folder = make_checkpoint(tmp_path_factory.mktemp("unknown") / "some-reranker", seed=seed)
        card = ModelCard(folder)
        odds = [card.pair(pair.query, pair.document) for pair in ORDERED]
        if sum(relevant > irrelevant for relevant, irrelevant in zip(odds[::2], odds[1::2], strict=True)) >= 3:
            return folder
    raise AssertionError("none of 40 random checkpoints orders three of four questions right")


@pytest.fixture(params=["known", "unknown"])
def reranker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reranker]:
    """A reranker with torch's own linear layers, which can be damaged after loading."""
    monkeypatch.setattr("local_rerank.engine.cpu.choices.blocks_weights", lambda arithmetic: False)
    with Reranker(str(request.getfixturevalue(request.param)), **EXACT) as made:
        yield made


class BrokenTemplate(PromptTemplate):
    """A template whose shared body is `text.format(instruction=..., query=...)`."""

    text: str

    def shared_body(self, instruction: str, query: str) -> str:
        return self.text.format(instruction=instruction, query=query)


def broken(reranker: Reranker, text: str) -> PromptTemplate:
    template = BrokenTemplate(**dataclasses.asdict(reranker.tokenizer.template))
    object.__setattr__(template, "text", text)  # frozen, and this subclass is not a dataclass
    return template


def leave_out_the_template(reranker: Reranker) -> None:
    tokenizer = reranker.tokenizer
    tokenizer.template = broken(reranker, "{query}")
    tokenizer.prefix_ids = tokenizer.suffix_ids = ()


def leave_out_the_chat_around_the_body(reranker: Reranker) -> None:
    reranker.tokenizer.prefix_ids = reranker.tokenizer.suffix_ids = ()


def strip_the_last_newline(reranker: Reranker) -> None:
    use_suffix(reranker, reranker.tokenizer.template.suffix[:-1])


def leave_out_the_think_block(reranker: Reranker) -> None:
    use_suffix(reranker, reranker.tokenizer.template.suffix.partition("<think>")[0])


def cut_the_suffix_off(reranker: Reranker) -> None:
    reranker.tokenizer.suffix_ids = ()


def use_suffix(reranker: Reranker, suffix: str) -> None:
    """Use a tokenizer for a template with another suffix."""
    reranker.tokenizer = PairTokenizer.from_folder(
        reranker.checkpoint.folder,
        dataclasses.replace(reranker.checkpoint.template, suffix=suffix),
        limits=PromptLimits(max_length=8192, max_query_tokens=4000, max_document_tokens=4000),
        default_instruction=EngineConfig.instruction,
    )


def lose_query_and_document(reranker: Reranker) -> None:
    """Do what a chat template does with roles that it does not know."""

    class Losing(PairTokenizer):
        def _encode_in_turn(self, documents: list[str]) -> Iterator[tuple[str, list[int]]]:
            empty = super()._encode_in_turn([""] * len(documents))
            return ((document, ids) for document, (_, ids) in zip(documents, empty, strict=True))

    reranker.tokenizer.template = broken(reranker, "<Instruct>: {instruction}\n<Query>: \n<Document>:")
    reranker.tokenizer.__class__ = Losing


def separate_fields_by_an_empty_line(reranker: Reranker) -> None:
    reranker.tokenizer.template = broken(reranker, "<Instruct>: {instruction}\n\n<Query>: {query}\n\n<Document>:")


def lose_both_head_rows(reranker: Reranker) -> None:
    reranker.engine.head.zero_()


def lose_the_row_of_yes(reranker: Reranker) -> None:
    reranker.engine.head[1].zero_()


def load_one_row_twice(reranker: Reranker) -> None:
    head = reranker.engine.head
    head[0] = head[1]


def run_in_bf16_unasked(reranker: Reranker) -> None:
    decoder: Any = reranker.engine.decoder
    decoder.to(torch.bfloat16)


def overflow_fp16(reranker: Reranker) -> None:
    decoder: Any = reranker.engine.decoder
    decoder.embed_tokens.weight.data.mul_(1e6)
    decoder.half()


def forget_the_causal_mask(reranker: Reranker) -> None:
    """Use a kernel in which tokens attend to later ones."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        return KERNELS["dense"].attend(q, k, v, torch.ones_like(layout), scale)  # type: ignore[call-overload]

    reranker.engine.kernel = dataclasses.replace(KERNELS["dense"], attend=attend)


DAMAGES: list[tuple[Callable[[Reranker], None], str]] = [
    (leave_out_the_template, "no template"),
    (leave_out_the_chat_around_the_body, "no template"),
    (strip_the_last_newline, "wrong last token"),
    (leave_out_the_think_block, "wrong last token"),
    (cut_the_suffix_off, "wrong last token"),
    (lose_query_and_document, "empty query and document"),
    (separate_fields_by_an_empty_line, "other prompt"),
    (lose_both_head_rows, "missing head rows"),
    (lose_the_row_of_yes, "missing head rows"),
    (load_one_row_twice, "missing head rows"),
    (run_in_bf16_unasked, "wrong dtype"),
    (overflow_fp16, "wrong dtype"),
    (forget_the_causal_mask, "wrong attention kernel"),
]


@pytest.mark.parametrize(("damage", "fault"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_each_damage_is_diagnosed_with_and_without_known_scores(
    damage: Callable[[Reranker], None], fault: str, reranker: Reranker
) -> None:
    before = self_test(reranker)
    assert before.passed, before
    damage(reranker)
    after = self_test(reranker)
    assert after.fault == fault, after
    remedy = ".* use --dtype fp32" if damage is overflow_fp16 else ""
    with pytest.raises(CheckpointError, match=f"the self-test failed: {fault}: {remedy}"):
        require_self_test(reranker)


@pytest.mark.parametrize("checkpoint", ["known", "unknown"])
def test_a_16_bit_model_that_is_right_in_fp32_needs_fp32(
    checkpoint: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reranker(str(request.getfixturevalue(checkpoint)), device="cpu", dtype="fp16", threads=1) as reranker:
        reranker.engine.head.neg_()  # finite scores that are wrong, as after an overflow
        outcome = self_test(reranker)
        monkeypatch.setattr("local_rerank.selftest.self_test.MAX_RELOADED_PARAMETERS", 0)
        too_large = self_test(reranker)
    assert (outcome.fault, "in fp16 but correct in fp32" in outcome.detail) == ("wrong dtype", True)
    assert too_large.fault == ("other scores" if checkpoint == "known" else "no reranker")
    assert too_large.detail.endswith("fp16 is too inexact for this model: try --dtype fp32")


def test_the_scores_match_the_model_cards_code(known: Path) -> None:
    with Reranker(str(known), **EXACT) as reranker:
        outcome = self_test(reranker)
    assert (outcome.basis, outcome.fault) == ("stored", None)
    assert [score.document for score in outcome.scores] == [pair.document for pair in STORED]
    assert outcome.max_difference is not None
    assert outcome.tolerance is not None
    assert outcome.max_difference <= outcome.tolerance
    spread = max(score.log_odds for score in outcome.scores) - min(score.log_odds for score in outcome.scores)
    assert outcome.tolerance == pytest.approx(TOLERANCE["fp32"] * spread, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_requested_lower_precision_passes(dtype: Any, known: Path) -> None:
    with Reranker(str(known), device="cpu", dtype=dtype, threads=1) as reranker:
        outcome = self_test(reranker)
    assert outcome.passed, outcome
    assert outcome.max_difference is not None
    assert outcome.max_difference > 1e-3, "otherwise nothing was rounded"


def test_other_weights_are_diagnosed_with_the_worst_pair(other: Path) -> None:
    with Reranker(str(other), **EXACT) as reranker:
        outcome = self_test(reranker)
    worst = max(outcome.scores, key=lambda score: abs(score.log_odds - (score.expected or 0)))
    assert outcome.fault == "other scores"
    assert repr(worst.document) in outcome.detail


def test_weights_rounded_on_disk_are_diagnosed_as_a_wrong_dtype(known: Path, tmp_path: Path) -> None:
    rounded = make_checkpoint(tmp_path / "rounded-reranker", seed=11, dtype=torch.bfloat16)
    shutil.copy(known / GOLDEN, rounded)
    with Reranker(str(rounded), **EXACT) as reranker:
        outcome = self_test(reranker)
    assert outcome.fault == "wrong dtype"
    assert "the size of rounding in a lower precision" in outcome.detail


def test_a_model_that_needs_fp32_is_diagnosed_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    native_bf16 = dataclasses.replace(PLATFORMS["cpu"], preferred_dtype=lambda _: (torch.bfloat16, "for the test"))
    monkeypatch.setitem(PLATFORMS, "cpu", native_bf16)
    monkeypatch.setitem(TOLERANCE, "bf16", 0.01)  # these weights' log-odds move by three to six percent of their spread
    with Reranker(device="cpu", dtype="bf16", threads=1, attention="dense") as reranker:
        outcome = self_test(reranker)
    assert outcome.fault == "wrong dtype"
    assert "this model needs --dtype fp32" in outcome.detail


@pytest.mark.numeric
def test_the_built_in_model_runs_in_fp32_by_default() -> None:
    with Reranker(device="cpu", threads=1) as reranker:
        assert reranker.info.dtype == "fp32"
        assert self_test(reranker).passed


def test_an_untrained_model_is_diagnosed_as_no_reranker(tmp_path: Path) -> None:
    outcomes: list[SelfTest] = []
    for seed in range(4):  # chance puts three of four relevant documents first in 5 of 16 random models
        with Reranker(str(make_checkpoint(tmp_path / f"{seed}-reranker", seed=seed)), **EXACT) as reranker:
            outcomes.append(self_test(reranker))
    assert {outcome.basis for outcome in outcomes} == {"properties"}
    assert "no reranker" in {outcome.fault for outcome in outcomes}


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_classifier_with_one_label_needs_no_row_of_no(num_labels: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "seq-cls-reranker", num_labels=num_labels, tied=False)
    with Reranker(str(folder), **EXACT) as reranker:
        assert self_test(reranker).fault != "missing head rows"
        lose_the_row_of_yes(reranker)
        assert self_test(reranker).fault == "missing head rows"


def test_limits_below_the_known_pairs_are_an_error(known: Path) -> None:
    for options in ({"max_document_tokens": 5}, {"max_length": 330}, {"max_query_tokens": 3}):
        with Reranker(str(known), **EXACT, **options) as reranker, pytest.raises(ConfigError, match="self-test"):
            self_test(reranker)


def test_known_pairs_are_scored_whole_by_a_model_that_wants_small_chunks(known: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(known, tmp_path / known.name)
    config = json.loads((folder / "config.json").read_text()) | {"local_rerank": {"long_documents": "chunk"}}
    (folder / "config.json").write_text(json.dumps(config))
    with Reranker(str(folder), **EXACT, chunk_tokens=16, chunk_overlap_tokens=0) as reranker:
        assert self_test(reranker).fault is None


def test_published_scores_need_the_name_and_the_shape(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 1, "num_key_value_heads": 1}
    folder = make_checkpoint(tmp_path / "Qwen3-Reranker-0.6B", **shape, intermediate_size=8, head_dim=8)
    scores = known_scores(open_checkpoint(str(folder)))
    assert (scores.basis, scores.pairs) == ("published", PUBLISHED[0].pairs)
    assert [round(pair.log_odds or 0, 4) for pair in scores.pairs] == [-3.1093, 7.1204, -0.3788, 3.5416]
    renamed = folder.rename(tmp_path / "Qwen3-Reranker-4B")
    assert known_scores(open_checkpoint(str(renamed))).pairs == ORDERED
    smaller = make_checkpoint(tmp_path / "smaller" / "Qwen3-Reranker-0.6B")
    assert known_scores(open_checkpoint(str(smaller))).basis == "properties"


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.names[0])
def test_each_published_row_is_found_by_name_and_puts_mars_first(row: Any, known: Path) -> None:
    shape = {"hidden_size": row.hidden_size, "num_hidden_layers": row.num_layers}
    for name in row.names:
        checkpoint = dataclasses.replace(
            open_checkpoint(str(known)), folder=known.parent, model_id=f"o/{name.upper()}", config=shape
        )
        scores = known_scores(checkpoint)
        assert (scores.pairs, scores.dtype) == (row.pairs, row.dtype)
    planets = [pair.log_odds or 0 for pair in row.pairs if "planet" in pair.query]
    assert (len(planets), max(planets)) == (4, planets[1])


@pytest.mark.parametrize("text", ["[]", "{}", '[{"query": "q"}]', "no json"])
def test_unreadable_known_scores_are_an_error(text: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "reranker")
    (folder / GOLDEN).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=GOLDEN):
        known_scores(open_checkpoint(str(folder)))


def test_a_server_whose_self_test_fails_exits_and_names_the_fault(other: Path, tmp_path: Path) -> None:
    arguments = ("local_rerank", "serve", "--port", "0", "--model", str(other), "--device", "cpu", "--dtype", "fp32")
    with started(tmp_path / "log", *arguments) as server:
        assert server.process.wait(WAIT_SECONDS) == 1
        assert "local-rerank: the self-test failed: other scores: log-odds are off by up to" in server.output
        assert "ready: " not in server.output


def test_each_part_of_the_machine_says_what_would_be_faster(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = psutil.cpu_count(logical=False)
    with Reranker(str(known), **EXACT, attention="sdpa") as reranker:
        info, checkpoint = reranker.info, reranker.checkpoint
    machine = describe(info, checkpoint)
    assert machine.kernel == MachineProperty(value="sdpa: set by the user", faster="--attention cpu-tiles")
    assert machine.threads.value == f"1 on {cores} physical cores: set by the user"
    usable = cpu_limits().num_threads
    assert machine.threads.faster.startswith("more cores" if usable == 1 else f"--threads {usable}")
    assert "CUDA" in machine.device.faster or "--device cuda" in machine.device.faster
    best = describe(dataclasses.replace(info, kernel="cpu-tiles", threads=cores), checkpoint)
    assert best.kernel.faster == "nothing"
    assert best.threads.faster.startswith("more cores" if usable == cores else "a wider limit: ")
    rounding = describe(dataclasses.replace(info, dtype="bf16", compute_dtype="bf16"), checkpoint).dtype.faster
    native = PLATFORMS["cpu"].preferred_dtype(None)[0] == torch.bfloat16
    assert rounding == ("nothing" if native else "--dtype fp32: this device multiplies it faster")
    assert machine.dtype.faster.startswith("--dtype bf16" if native else "--dtype int8")
    widened = describe(dataclasses.replace(info, dtype="bf16"), checkpoint).dtype
    assert widened.value == "bf16 weights, multiplied in fp32"
    embedded = dataclasses.replace(checkpoint, model_id=EMBEDDED_MODEL)
    assert describe(info, embedded).dtype.faster.startswith("nothing")
    for gpu, faster in ((H200, "--device cuda: .* a GPU, NVIDIA H200"), (V100, "torch .* no kernels for")):
        gpus(monkeypatch, gpu)
        assert re.match(faster, describe(info, checkpoint).device.faster)


def test_doctor_prints_json_and_exits_with_the_outcome(known: Path, other: Path) -> None:
    options = ("--device", "cpu", "--dtype", "fp32", "--threads", "1", "--json")
    good = command("doctor", "--model", str(known), *options)
    report = json.loads(good.stdout)
    assert (good.returncode, report["passed"], report["self_test"]["fault"]) == (0, True, None)
    assert report["model"]["model_id"] == known.name
    assert report["order"]["before"] == sorted(report["order"]["after"]) == [0, 1, 2, 3]
    rows = {"device", "dtype", "decoder", "kernel", "products", "memory", "threads"}
    assert set(report["machine"]) == {*rows, "versions"}
    assert report["machine"]["versions"]["torch"] == metadata.version("torch")
    assert report["machine"]["threads"]["value"].startswith("1 on ")
    bad = command("doctor", "--model", str(other), *options)
    assert (bad.returncode, json.loads(bad.stdout)["self_test"]["fault"]) == (1, "other scores")


def test_doctor_prints_every_pair_and_the_verdict() -> None:
    done = command("doctor", "--device", "cpu", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "pass: the scores are those stored with the model" in done.stdout
    for pair in json.loads((NANO / GOLDEN).read_text(encoding="utf-8")):
        assert f"{pair['log_odds']:+.4f}" in done.stdout
    order = r"order: reranking changed the order of a list from 0 1 2 3 to 1 \d \d \d; document 1"
    assert re.search(order, done.stdout)
    for name in ("device", "dtype", "decoder", "kernel", "products", "in use:", "memory", "threads", "faster with"):
        assert name in done.stdout
