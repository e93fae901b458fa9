"""`Reranker` as a user of the library calls it: order, ties, duplicates, errors, a full queue."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from local_rerank import EngineConfig, Reranker, RerankRequest
from local_rerank.arguments import scores_of
from local_rerank.errors import (
    ConfigError,
    EmptyQuery,
    InstructionTooLong,
    InvalidDocumentCount,
    InvalidRequest,
    InvalidTopN,
    Overloaded,
)
from tests.test_async_reranker import Gate


@pytest.fixture
def held(tiny_checkpoint: Path) -> Iterator[tuple[Reranker, Gate]]:
    """A reranker whose engine holds a running request, with room for 2,000 tokens in the queue."""
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32", max_queued_tokens=2000) as reranker:
        gate = Gate(reranker)
        running = reranker.submit(request("running"))
        assert gate.entered.wait(10)
        yield reranker, gate
        gate.open.set()
        assert len(running.result(10)) == 1


def request(query: str, *documents: str) -> RerankRequest:
    return RerankRequest(query=query, documents=documents or ("a document",))


LONG_INSTRUCTION = RerankRequest(query="q", documents=("d",), instruction="word " * 2000)


def test_documents_are_sorted_by_log_odds_and_keep_their_index(tiny_reranker: Reranker) -> None:
    documents = ["one", "two", "three", "four"]
    result = tiny_reranker.rank("q", documents)
    log_odds = [item.log_odds for item in result]
    assert log_odds == sorted(log_odds, reverse=True)
    assert sorted(item.index for item in result) == [0, 1, 2, 3]
    assert [documents[item.index] for item in result] == [item.document for item in result]
    for item in result:
        assert item.relevance_score == pytest.approx(1 / (1 + math.exp(-item.log_odds)), abs=1e-6)


def test_equal_documents_are_scored_once_and_keep_their_order(tiny_reranker: Reranker) -> None:
    result = tiny_reranker.rank("q", ["same", "other", "same", "same"])
    assert len({item.log_odds for item in result if item.document == "same"}) == 1
    assert [item.index for item in result if item.document == "same"] == [0, 2, 3]
    alone = tiny_reranker.rank("q", ["same", "other"])
    assert result.num_computed_tokens == alone.num_computed_tokens
    assert result.total_tokens > alone.total_tokens


@pytest.mark.parametrize(("top_n", "expected"), [(1, 1), (2, 2), (9, 3), (None, 3)])
def test_top_n_keeps_the_best_documents(tiny_reranker: Reranker, top_n: int | None, expected: int) -> None:
    everything = tiny_reranker.rank("q", ["a", "b", "c"])
    best = tiny_reranker.rank("q", ["a", "b", "c"], top_n=top_n)
    assert [item.index for item in best] == [item.index for item in everything][:expected]


def test_scores_are_in_the_order_of_the_pairs(tiny_reranker: Reranker) -> None:
    pairs = [("q", "a"), ("q", "b"), ("r", "a"), ("q", "a"), ("r", "")]
    items = [tiny_reranker.rank(query, [document])[0] for query, document in pairs]
    assert tiny_reranker.score(pairs) == pytest.approx([item.relevance_score for item in items], abs=1e-6)
    assert tiny_reranker.score(pairs, logits=True) == pytest.approx([item.log_odds for item in items], abs=1e-5)
    assert tiny_reranker.score([]) == []


def test_the_default_instruction_is_the_model_cards_and_another_changes_the_scores(tiny_reranker: Reranker) -> None:
    default = "Given a web search query, retrieve relevant passages that answer the query"
    plain, same, other = (
        tiny_reranker.rank("q", ["a"], instruction=text)[0].log_odds for text in (None, default, default + ".")
    )
    assert plain == same != other


def test_rank_batch_keeps_the_order_with_a_small_queue(tiny_checkpoint: Path) -> None:
    requests = [request(f"q{i}", "a" * (i % 7), "b" * 50) for i in range(60)]
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32", max_queued_tokens=500) as reranker:
        results = list(reranker.rank_batch(iter(requests)))
        for one, result in zip(requests, results, strict=True):
            expected = reranker.submit(one).result()
            assert [item.index for item in result] == [item.index for item in expected]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
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
def test_an_invalid_request_raises_when_it_is_created(
    fields: dict[str, object], error: type[InvalidRequest], message: str
) -> None:
    with pytest.raises(error, match=message):
        RerankRequest(**({"query": "q", "documents": ("d",)} | fields))  # type: ignore[arg-type]


def test_a_string_as_documents_is_one_document(tiny_reranker: Reranker) -> None:
    assert [item.document for item in tiny_reranker.rank("q", "one document")] == ["one document"]


def test_a_full_queue_refuses_a_request_before_tokenizing_it(held: tuple[Reranker, Gate]) -> None:
    reranker, gate = held
    queued = reranker.submit(request("queued", *("x" * 1500 + str(i) for i in range(4))))
    with pytest.raises(Overloaded):  # tokenizing it would raise InstructionTooLong
        reranker.submit(LONG_INSTRUCTION)
    gate.open.set()
    assert len(queued.result(10)) == 4


def test_an_error_in_rank_batch_leaves_nothing_in_the_queue(held: tuple[Reranker, Gate]) -> None:
    reranker, gate = held
    with pytest.raises(InstructionTooLong):
        list(reranker.rank_batch([request("good"), request("good"), LONG_INSTRUCTION]))
    gate.open.set()
    assert len(reranker.rank("after", ["d"])) == 1
    assert len(gate.num_pairs) == 2


def test_each_of_many_threads_gets_its_own_result(tiny_reranker: Reranker) -> None:
    def log_odds(i: int) -> list[float]:
        return scores_of(tiny_reranker.rank(f"q{i}", [f"document {i}", "x"]), logits=True)

    numbers = [i % 20 for i in range(100)]
    expected = [log_odds(i) for i in range(20)]
    with ThreadPoolExecutor(len(numbers)) as threads:
        for i, found in zip(numbers, threads.map(log_odds, numbers), strict=True):
            assert found == pytest.approx(expected[i], abs=1e-5)


@pytest.mark.parametrize(
    "name",
    ["threads", "max_length", "max_query_tokens", "max_document_tokens", "max_batch_tokens", "max_queued_tokens"],
)
def test_an_option_below_its_minimum_raises_with_its_name(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(ConfigError, match=f"{name} is {value}; it must be at least 1"):
            EngineConfig(**{name: value})
    with pytest.raises(ConfigError, match="model is empty"):
        EngineConfig(model="")


def test_options_are_fields_of_the_config_and_an_unknown_one_raises(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="'max_lenght'"):
        Reranker(str(tiny_checkpoint), max_lenght=10)
    config = EngineConfig(model=str(tiny_checkpoint), dtype="fp32", device="cpu", max_batch_tokens=777)
    with Reranker(config=config) as reranker:
        assert reranker.info.max_batch_tokens == 777
        assert (reranker.info.device, reranker.info.dtype, reranker.model_id) == ("cpu", "fp32", "tiny-reranker")


def test_deterministic_scores_are_bit_identical_alone_and_in_any_batch_and_order(tiny_checkpoint: Path) -> None:
    documents = ["one", "two words", "three words here", "x" * 300, "", "two wordz"]
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32", deterministic=True) as reranker:
        alone = {one: reranker.rank("q", [one])[0].log_odds for one in documents}
        crowd = [reranker.submit(request(f"other {i}", "y" * 40, "z")) for i in range(20)]
        for order in (documents, documents[::-1], sorted(documents)):
            for item in reranker.submit(request("q", *order)).result():
                assert item.log_odds == alone[item.document]
        assert all(len(future.result()) == 2 for future in crowd)
