"""Arguments of the wrong type: each works or raises one error that says what is allowed.

mypy checks this file too: an `ignore` fails where the call it stands on would pass.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type, get_type_hints

import numpy as np
import pytest
import torch

from local_rerank import AsyncReranker, EngineConfig, RankedDocument, Reranker, RerankRequest, RerankResult
from local_rerank.arguments import scores_of
from local_rerank.config import EngineOptions
from local_rerank.errors import ConfigError, InvalidRequest, WrongType

PAIRS = [("q", "one"), ("q", "two"), ("r", "one")]
EXAMPLE = r'pairs, as in score\(\[\("a query", "a document"\)\]\)|pair, as in score\(\[\("a query", "a document"\)\]\)'


class Column:
    """Stands for a pandas Series: iteration gives the values."""

    ndim = 1

    def __init__(self, *values: object) -> None:
        self.values = values

    def __iter__(self) -> Any:
        return iter(self.values)


class Table(Column):
    """Stands for a pandas DataFrame: iteration gives the names of the columns."""

    ndim = 2


@pytest.mark.parametrize(
    "pairs",
    [
        ["ab", "cd"], ("ab", "cd"), ("q", "d"), ["q", "d"], "ab", np.array(["ab", "cd"]), Table("ab", "cd"),
        None, 7, b"ab", {"q": "d"}, {("q", "d")}, np.array("ab"),
        [("q",)], [("q", "d", "e")], [()], [None], [b"qd"], [{"q": 1, "d": 2}], [{"q", "d"}], [("q", "d"), "ab"],
    ],
)  # fmt: skip
def test_a9_a14_what_is_no_list_of_pairs_raises_a_type_error_with_an_example(
    tiny_reranker: Reranker, pairs: Any
) -> None:
    with pytest.raises(TypeError, match=EXAMPLE) as caught:
        tiny_reranker.score(pairs)
    assert isinstance(caught.value, InvalidRequest)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("text", [None, 7, float("nan"), b"d", ["d"]])
def test_a9_a_pair_of_other_things_than_texts_raises_with_its_place(tiny_reranker: Reranker, text: Any) -> None:
    with pytest.raises(WrongType, match=r"pairs\[1\]\[1\] must be a string, not"):
        tiny_reranker.score([("q", "d"), ("q", text)])
    with pytest.raises(WrongType, match=r"pairs\[0\]\[0\] must be a string, not"):
        tiny_reranker.score([(text, "d")])


@pytest.mark.parametrize(
    "given",
    [
        tuple(PAIRS), [list(pair) for pair in PAIRS], np.array(PAIRS), np.array(PAIRS, dtype=object), Column(*PAIRS),
        (pair for pair in PAIRS), zip(*zip(*PAIRS, strict=True), strict=True), dict.fromkeys(PAIRS).keys(),
    ],
)  # fmt: skip
def test_a9_lists_tuples_arrays_columns_and_generators_of_pairs_are_scored(tiny_reranker: Reranker, given: Any) -> None:
    expected = [tiny_reranker.rank(*pair)[0].relevance_score for pair in PAIRS]
    assert tiny_reranker.score(given) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (b"abc", "documents must be a list of strings, not bytes"),
        ({"d1": 1}, "documents must be a list of strings, not dict"),
        ({"d1", "d2"}, "documents must be a list of strings, not set"),
        (None, "documents must be a list of strings, not NoneType"),
        (7, "documents must be a list of strings, not int"),
        (Table("title", "text"), "documents must be one column of strings, not Table"),
        (np.array([["d1"], ["d2"]]), "documents must be one column of strings, not ndarray"),
        (["d", {"text": "d"}], r"documents\[1\] must be a string, not dict"),
        (["d", b"d"], r"documents\[1\] must be a string, not bytes"),
        ([["d"]], r"documents\[0\] must be a string, not list"),
        (Column("d", float("nan")), r"documents\[1\] must be a string, not float"),
    ],
)
def test_a9_documents_that_are_no_list_of_texts_raise(tiny_reranker: Reranker, documents: Any, message: str) -> None:
    with pytest.raises(WrongType, match=message):
        tiny_reranker.rank("q", documents)


@pytest.mark.parametrize("given", [("d", "e"), np.array(["d", "e"]), Column("d", "e"), iter(["d", "e"])])
def test_a9_tuples_arrays_columns_and_generators_of_documents_are_ranked(tiny_reranker: Reranker, given: Any) -> None:
    assert {item.document for item in tiny_reranker.rank("q", given)} == {"d", "e"}


def test_a9_each_call_names_the_argument_of_the_wrong_type(tiny_reranker: Reranker) -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: tiny_reranker.rank(["q"], ["d"]), "query must be a string, not list"),  # type: ignore[arg-type]
        (lambda: tiny_reranker.rank(["d", "e"], "q"), "query must be a string, not list"),  # type: ignore[arg-type]
        (lambda: tiny_reranker.rank("q", ["d"], top_n="1"), "top_n must be an integer or None, not str"),  # type: ignore[arg-type]
        (lambda: tiny_reranker.rank("q", ["d"], top_n=1.0), "top_n must be an integer or None, not float"),  # type: ignore[arg-type]
        (lambda: tiny_reranker.rank("q", ["d"], top_n=True), "top_n must be an integer or None, not bool"),
        (lambda: list(tiny_reranker.rank_batch([{"query": "q"}])), "request must be a RerankRequest, as in"),  # type: ignore[list-item]
        (lambda: tiny_reranker.submit(("q", ["d"])), "request must be a RerankRequest, as in"),  # type: ignore[arg-type]
        (lambda: RerankRequest(query="q", documents="abc"), "documents must be a tuple of strings, not str"),  # type: ignore[arg-type]
        (lambda: RerankRequest(query="q", documents=("d",), truncation="left"), "truncation must be one of end, start"),  # type: ignore[arg-type]
        (lambda: RerankRequest(query="q", documents=("d",), limits=None), "limits must be a Limits"),  # type: ignore[arg-type]
        (lambda: tiny_reranker.explain("q", ["d"]), r"documents\[0\] must be a string, not list"),  # type: ignore[arg-type]
    ]
    for call, message in calls:
        with pytest.raises(WrongType, match=message):
            call()
    of_numpy: Any = np.int64(1)
    assert len(tiny_reranker.rank("q", ["d", "e"], top_n=of_numpy)) == 1


def test_b6_a_path_names_the_model_and_options_of_the_wrong_type_raise_at_once(tiny_checkpoint: Path) -> None:
    with Reranker(tiny_checkpoint, device="cpu", dtype="fp32") as reranker:
        assert scores_of(reranker.rank("q", ["d"]), logits=True)
        assert reranker.config.model == str(tiny_checkpoint)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: Reranker(threads="2"), "threads is '2'; it must be an int or None"),  # type: ignore[arg-type]
        (lambda: Reranker(threads=True), "threads is True; it must be an int or None"),
        (lambda: Reranker(max_length=1.5), "max_length is 1.5; it must be an int"),  # type: ignore[arg-type]
        (lambda: Reranker(max_length=None), "max_length is None; it must be an int"),  # type: ignore[arg-type]
        (lambda: Reranker(dtype=torch.bfloat16), "dtype is torch.bfloat16; it must be one of auto, fp32, bf16"),  # type: ignore[arg-type]
        (lambda: Reranker(dtype="float32"), "dtype is 'float32'; it must be one of auto, fp32, bf16"),  # type: ignore[arg-type]
        (lambda: Reranker(device=torch.device("cpu")), r"device is device\(type='cpu'\); it must be a str"),  # type: ignore[arg-type]
        (lambda: Reranker(device_map={"": 0}), r"device_map is \{'': 0\}; it must be a str or None"),  # type: ignore[arg-type]
        (lambda: Reranker(deterministic=1), "deterministic is 1; it must be True or False"),  # type: ignore[arg-type]
        (lambda: Reranker(instruction=None), "instruction is None; it must be a str"),  # type: ignore[arg-type]
        (lambda: Reranker(7), "model is 7; it must be a str or None"),  # type: ignore[arg-type]
        (lambda: Reranker(EngineConfig()), r"model is EngineConfig\(.*; it must be a str or None"),  # type: ignore[arg-type]
        (lambda: Reranker(config={"threads": 2}), r"config is \{'threads': 2\}; it must be an EngineConfig"),  # type: ignore[arg-type]
        (lambda: AsyncReranker(max_batch_tokens="1"), "max_batch_tokens is '1'; it must be an int or None"),  # type: ignore[arg-type]
        (lambda: AsyncReranker(treads=2), "unknown option 'treads'"),  # type: ignore[call-arg]
        (lambda: EngineConfig(threads="2"), "threads is '2'; it must be an int or None"),  # type: ignore[arg-type]
    ]
    for call, message in calls:
        with pytest.raises(ConfigError, match=message):
            call()


def test_static_types_are_those_of_the_values(tiny_reranker: Reranker) -> None:
    result = tiny_reranker.rank("q", ["d", "e"])
    assert isinstance(assert_type(result[0], RankedDocument), RankedDocument)
    assert isinstance(assert_type(result[:1], tuple[RankedDocument, ...]), tuple)
    assert_type([item.log_odds for item in result], list[float])
    request = RerankRequest(query="q", documents=("d",))
    assert_type(list(tiny_reranker.rank_batch([request])), list[RerankResult])
    assert_type(list(tiny_reranker.rank_batch([request], return_errors=True)), list[RerankResult | InvalidRequest])


def test_b6_the_typed_options_are_the_fields_of_the_config() -> None:
    assert get_type_hints(EngineConfig) == get_type_hints(EngineOptions) | {"model": str | None}


def test_a9_async_calls_raise_the_same_errors(tiny_checkpoint: Path) -> None:
    async def main() -> None:
        async with AsyncReranker(tiny_checkpoint, device="cpu", dtype="fp32") as reranker:
            with pytest.raises(TypeError, match=EXAMPLE):
                await reranker.score(["ab", "cd"])  # type: ignore[list-item]
            with pytest.raises(WrongType, match="documents must be a list of strings, not dict"):
                await reranker.rank("q", {"d": 1})
            with pytest.raises(WrongType, match="request must be a RerankRequest"):
                await reranker.submit({"query": "q"})  # type: ignore[arg-type]
            assert len(await reranker.score(np.array(PAIRS))) == len(PAIRS)

    asyncio.run(main())
