"""The main path as a user of the library meets it: order, ties, duplicates, errors, cancelling, closing."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from local_rerank import EngineConfig, Reranker, RerankRequest
from local_rerank.errors import (
    ConfigError,
    EmptyQuery,
    EngineFailure,
    InstructionTooLong,
    InvalidDocumentCount,
    InvalidRequest,
    InvalidTopN,
    ModelUnavailable,
    Overloaded,
)
from local_rerank.requests.tokenization import Pair


class GatedEngine:
    """A real engine behind a gate, at the seam: it can be held, made to fail, and it counts its batches."""

    def __init__(self, reranker: Reranker) -> None:
        self.inner = reranker.engine
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[Sequence[Pair]] = []
        self.fails_on_token: int | None = None
        self.gives_nan = False
        self.loses_a_score = False
        reranker.engine = self  # type: ignore[assignment]  # the seam

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        self.batches.append(pairs)
        self.entered.set()
        assert self.gate.wait(30)
        if any(self.fails_on_token in (*pair.prefix_ids, *pair.document_ids) for pair in pairs):
            raise RuntimeError("a kernel failed")
        scores = self.inner.score(pairs)
        if self.loses_a_score:
            return scores[:-1]
        return [math.nan] * len(scores) if self.gives_nan else scores


@pytest.fixture
def held(tiny_checkpoint: Path) -> Iterator[tuple[Reranker, GatedEngine]]:
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32", max_queued_tokens=2000) as reranker:
        engine = GatedEngine(reranker)
        yield reranker, engine
        engine.gate.set()


def request(query: str = "q", *documents: str) -> RerankRequest:
    return RerankRequest(query=query, documents=documents or ("a document",))


def test_documents_come_in_order_of_log_odds_with_their_places(tiny_reranker: Reranker) -> None:
    documents = ["one", "two", "three", "four"]
    result = tiny_reranker.rank("q", documents)
    odds = [item.log_odds for item in result]
    assert odds == sorted(odds, reverse=True)
    assert sorted(item.index for item in result) == [0, 1, 2, 3]
    assert [documents[item.index] for item in result] == [item.document for item in result]
    for item in result:
        assert item.relevance_score == pytest.approx(1 / (1 + math.exp(-item.log_odds)), abs=1e-6)


def test_equal_documents_are_scored_once_and_come_in_the_callers_order(tiny_reranker: Reranker) -> None:
    result = tiny_reranker.rank("q", ["same", "other", "same", "same"])
    assert len({item.log_odds for item in result if item.document == "same"}) == 1
    assert [item.index for item in result if item.document == "same"] == [0, 2, 3]
    alone = tiny_reranker.rank("q", ["same", "other"])
    assert result.num_computed_tokens == alone.num_computed_tokens
    assert result.total_tokens > alone.total_tokens


@pytest.mark.parametrize(("top_n", "expected"), [(1, 1), (2, 2), (9, 3), (None, 3)])
def test_top_n_keeps_the_best(tiny_reranker: Reranker, top_n: int | None, expected: int) -> None:
    everything = tiny_reranker.rank("q", ["a", "b", "c"])
    best = tiny_reranker.rank("q", ["a", "b", "c"], top_n=top_n)
    assert [item.index for item in best] == [item.index for item in everything][:expected]


def test_score_gives_pairs_in_input_order(tiny_reranker: Reranker) -> None:
    pairs = [("q", "a"), ("q", "b"), ("r", "a"), ("q", "a"), ("r", "")]
    scores = tiny_reranker.score(pairs)
    odds = tiny_reranker.score(pairs, logits=True)
    for (query, document), score, log_odds in zip(pairs, scores, odds, strict=True):
        item = tiny_reranker.rank(query, [document])[0]
        assert item.relevance_score == pytest.approx(score, abs=1e-6)
        assert item.log_odds == pytest.approx(log_odds, abs=1e-5)
    assert tiny_reranker.score([]) == []


def test_the_instruction_changes_the_scores_and_the_default_is_the_model_cards(tiny_reranker: Reranker) -> None:
    default = "Given a web search query, retrieve relevant passages that answer the query"
    plain, same, other = (
        tiny_reranker.rank("q", ["a"], instruction=text)[0].log_odds for text in (None, default, default + ".")
    )
    assert plain == same != other


def test_rank_batch_keeps_the_order_and_never_overfills_the_queue(tiny_checkpoint: Path) -> None:
    requests = [request(f"q{i}", "a" * (i % 7), "b" * 50) for i in range(60)]
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32", max_queued_tokens=500) as reranker:
        results = list(reranker.rank_batch(iter(requests)))
        for one, result in zip(requests, results, strict=True):
            expected = reranker.submit(one).result()
            assert [item.index for item in result] == [item.index for item in expected]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"query": " \n"}, EmptyQuery, "query is empty"),
        ({"documents": ()}, InvalidDocumentCount, "0 documents; at least 1"),
        ({"top_n": 0}, InvalidTopN, "top_n is 0"),
        ({"max_document_tokens": 0}, InvalidRequest, "max_document_tokens is 0"),
        ({"documents": ("a", 7)}, InvalidRequest, r"documents\[1\] must be a string, not int"),
        ({"query": None}, InvalidRequest, "query must be a string, not NoneType"),
        ({"instruction": 3}, InvalidRequest, "instruction must be a string, not int"),
        ({"instruction": []}, InvalidRequest, "instruction must be a string, not list"),
    ],
)
def test_a_bad_request_is_refused_as_it_is_made(
    fields: dict[str, object], error: type[InvalidRequest], words: str
) -> None:
    with pytest.raises(error, match=words):
        RerankRequest(**({"query": "q", "documents": ("d",)} | fields))  # type: ignore[arg-type]


def test_one_string_as_documents_is_one_document(tiny_reranker: Reranker) -> None:
    assert [item.document for item in tiny_reranker.rank("q", "one document")] == ["one document"]


def test_waiting_requests_share_a_forward_pass(held: tuple[Reranker, GatedEngine]) -> None:
    reranker, engine = held
    engine.gate.clear()
    first = reranker.submit(request("first"))
    assert engine.entered.wait(10)
    others = [reranker.submit(request(f"q{i}")) for i in range(3)]
    engine.gate.set()
    assert len(first.result(10)) == 1
    assert all(len(other.result(10)) == 1 for other in others)
    assert [len(batch) for batch in engine.batches] == [1, 3]


def test_a_failing_batch_is_tried_in_halves_and_only_the_guilty_request_fails(
    held: tuple[Reranker, GatedEngine],
) -> None:
    reranker, engine = held
    guilty = request("guilty", "~")
    engine.gate.clear()
    first = reranker.submit(request("first"))
    assert engine.entered.wait(10)
    innocent = [reranker.submit(request(f"q{i}")) for i in range(5)]
    failing = reranker.submit(guilty)
    engine.fails_on_token = reranker.tokenizer.pairs(guilty).pairs[0].document_ids[1]
    engine.gate.set()
    with pytest.raises(EngineFailure, match="a kernel failed"):
        failing.result(10)
    assert all(len(future.result(10)) == 1 for future in [first, *innocent])
    assert len(reranker.rank("after", ["it works again"])) == 1


def test_a_score_that_is_no_number_is_an_error(held: tuple[Reranker, GatedEngine]) -> None:
    reranker, engine = held
    engine.gives_nan = True
    with pytest.raises(EngineFailure, match="nan as log-odds"):
        reranker.rank("q", ["d"])
    engine.gives_nan = False
    assert len(reranker.rank("q", ["d"])) == 1


def test_a_fault_after_the_forward_pass_is_answered_too(held: tuple[Reranker, GatedEngine]) -> None:
    reranker, engine = held
    engine.loses_a_score = True
    with pytest.raises(EngineFailure, match="scoring failed"):
        reranker.rank("q", ["d"])
    engine.loses_a_score = False
    assert len(reranker.rank("q", ["d"])) == 1


def test_a_cancelled_request_is_dropped_before_the_next_forward_pass(held: tuple[Reranker, GatedEngine]) -> None:
    reranker, engine = held
    engine.gate.clear()
    first = reranker.submit(request("first"))
    assert engine.entered.wait(10)
    gone = reranker.submit(request("gone"))
    stays = reranker.submit(request("stays"))
    assert gone.cancel()
    engine.gate.set()
    assert len(stays.result(10)) == 1
    assert len(first.result(10)) == 1
    assert [len(batch) for batch in engine.batches] == [1, 1]
    with pytest.raises(CancelledError):
        gone.result()


def test_a_full_queue_refuses_at_the_door_with_both_numbers(held: tuple[Reranker, GatedEngine]) -> None:
    reranker, engine = held
    engine.gate.clear()
    running = reranker.submit(request("running"))
    assert engine.entered.wait(10)
    waiting = reranker.submit(request("waiting", "x" * 1500))
    with pytest.raises(Overloaded, match=r"tokens are queued, this request has \d+ or more; at most 2000") as caught:
        reranker.submit(request("too much", "y" * 1500))
    assert caught.value.retry_after > 0
    engine.gate.set()
    assert len(running.result(10)) == len(waiting.result(10)) == 1


def test_a_full_queue_refuses_before_the_work_of_tokenizing(held: tuple[Reranker, GatedEngine]) -> None:
    reranker, engine = held
    engine.gate.clear()
    running = reranker.submit(request("running"))
    assert engine.entered.wait(10)
    waiting = reranker.submit(request("waiting", *("x" * 1500 + str(i) for i in range(4))))
    refused_when_tokenized = RerankRequest(query="q", documents=("d",), instruction="word " * 2000)
    with pytest.raises(Overloaded):
        reranker.submit(refused_when_tokenized)
    engine.gate.set()
    assert len(running.result(10)) == 1
    assert len(waiting.result(10)) == 4


def test_a_batch_of_requests_that_breaks_off_leaves_nothing_waiting(held: tuple[Reranker, GatedEngine]) -> None:
    reranker, engine = held
    engine.gate.clear()
    running = reranker.submit(request("running"))
    assert engine.entered.wait(10)
    good, bad = request("good"), RerankRequest(query="q", documents=("d",), instruction="word " * 2000)
    with pytest.raises(InstructionTooLong):
        list(reranker.rank_batch([good, good, bad]))
    engine.gate.set()
    assert len(running.result(10)) == 1
    assert len(reranker.rank("after", ["d"])) == 1
    assert [len(batch) for batch in engine.batches] == [1, 1]


def test_closing_answers_what_waits(held: tuple[Reranker, GatedEngine]) -> None:
    reranker, engine = held
    engine.gate.clear()
    running = reranker.submit(request("running"))
    assert engine.entered.wait(10)
    waiting = reranker.submit(request("waiting"))
    closer = threading.Thread(target=reranker.close)
    closer.start()
    engine.gate.set()
    closer.join(10)
    assert len(running.result(10)) == 1
    with pytest.raises(ModelUnavailable):
        waiting.result(10)
    with pytest.raises(ModelUnavailable):
        reranker.submit(request())


def test_many_threads_get_their_own_answers(tiny_reranker: Reranker) -> None:
    expected = {i: tiny_reranker.rank(f"q{i}", [f"document {i}", "x"]) for i in range(20)}
    wrong: list[int] = []

    def ask(i: int) -> None:
        result = tiny_reranker.rank(f"q{i}", [f"document {i}", "x"])
        same = all(
            a.index == b.index and abs(a.log_odds - b.log_odds) < 1e-5 for a, b in zip(result, expected[i], strict=True)
        )
        if not same:
            wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i % 20,)) for i in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(
    "name",
    ["threads", "max_length", "max_query_tokens", "max_document_tokens", "max_batch_tokens", "max_queued_tokens"],
)
def test_an_option_below_its_least_value_is_refused_by_name(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(ConfigError, match=f"{name} is {value}; it must be at least 1"):
            EngineConfig(**{name: value})
    with pytest.raises(ConfigError, match="model is empty"):
        EngineConfig(model="")


def test_options_are_those_of_the_config_and_others_are_named(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="'max_lenght'"):
        Reranker(str(tiny_checkpoint), max_lenght=10)
    config = EngineConfig(model=str(tiny_checkpoint), dtype="fp32", device="cpu", max_batch_tokens=777)
    with Reranker(config=config) as reranker:
        assert reranker.info.max_batch_tokens == 777
        assert (reranker.info.device, reranker.info.dtype, reranker.model_id) == ("cpu", "fp32", "tiny-reranker")


def test_deterministic_scores_are_equal_to_the_bit_alone_in_company_and_in_any_order(tiny_checkpoint: Path) -> None:
    documents = ["one", "two words", "three words here", "x" * 300, "", "two wordz"]
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32", deterministic=True) as reranker:
        alone = {one: reranker.rank("q", [one])[0].log_odds for one in documents}
        crowd = [reranker.submit(request(f"other {i}", "y" * 40, "z")) for i in range(20)]
        for order in (documents, documents[::-1], sorted(documents)):
            for item in reranker.submit(request("q", *order)).result():
                assert item.log_odds == alone[item.document]
        assert all(len(future.result()) == 2 for future in crowd)
