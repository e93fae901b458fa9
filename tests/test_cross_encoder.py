"""`CrossEncoder` answers as sentence-transformers does, whose answers are recorded. mypy checks this file too."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from local_rerank import CrossEncoder, EngineConfig
from local_rerank.errors import ConfigError, EmptyQuery, InvalidRequest, ModelUnavailable, WrongType
from tests.cross_encoder_calls import ANSWERS, CALLS, PAIRS, PROMPTS, QUERY, TEXTS, described

SAME = 1e-4  # of log-odds, fp32


@pytest.fixture(scope="module")
def model() -> Iterator[CrossEncoder]:
    model = CrossEncoder(device="cpu", prompts=PROMPTS, num_labels=1, trust_remote_code=True, max_length=512)
    yield model
    model.reranker.close()


def almost(value: Any) -> Any:
    """`value` with its numbers as pytest.approx."""
    if isinstance(value, dict):
        return {key: almost(item) for key, item in value.items()}
    if isinstance(value, list):
        return [almost(item) for item in value]
    return pytest.approx(value, abs=SAME) if isinstance(value, float) else value


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_has_the_type_shape_and_scores_of_sentence_transformers(model: CrossEncoder, name: str) -> None:
    method, args, options = CALLS[name]
    recorded = json.loads(ANSWERS.read_text(encoding="utf-8"))["answers"]
    assert described(getattr(model, method)(*args, **options)) == almost(recorded[name])


def test_scores_differ_between_prompts_and_probabilities_are_those_of_the_reranker(model: CrossEncoder) -> None:
    plain, other = model.predict(PAIRS), model.predict(PAIRS, prompt="Retrieve recipes")
    assert max(abs(plain - other)) > 100 * SAME
    assert model.predict(PAIRS, activation_fn=torch.nn.Sigmoid()) == pytest.approx(
        model.reranker.score(PAIRS), abs=SAME
    )
    assert model.predict([]).shape == (0,)


def test_static_types_are_those_of_the_answers(model: CrossEncoder) -> None:
    assert_type(model.predict(PAIRS), NDArray[np.float32])
    assert_type(model.predict(PAIRS, convert_to_tensor=True), torch.Tensor)
    assert_type(model.predict(PAIRS, convert_to_numpy=False), list[torch.Tensor])


def test_a_bar_is_shown_on_standard_error_when_asked_for(
    model: CrossEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    model.predict(PAIRS)
    assert capsys.readouterr() == ("", "")
    model.predict(PAIRS, show_progress_bar=True)
    out, err = capsys.readouterr()
    assert (out, "100%" in err) == ("", True)


def test_weights_are_freed_after_a_with_block(tiny_checkpoint: Path) -> None:
    with CrossEncoder(tiny_checkpoint, device="cpu") as model:
        model.predict(PAIRS)
        engine = weakref.ref(model.reranker.engine)
    with pytest.raises(ModelUnavailable, match="the engine is closing"):
        model.predict(PAIRS)
    del model
    gc.collect()
    assert engine() is None


def test_constructor_arguments_that_are_not_supported_are_refused_by_name() -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: CrossEncoder(model_kwargs={"dtype": 1}), "model_kwargs=.* is not supported; pass config=EngineConfig"),  # type: ignore[arg-type]
        (lambda: CrossEncoder(cache_folder="x"), "cache_folder='x' is not supported; set the variable HF_HOME"),  # type: ignore[arg-type]
        (lambda: CrossEncoder(backend="onnx"), "backend='onnx' is not supported"),  # type: ignore[arg-type]
        (lambda: CrossEncoder(num_labels=3), "num_labels=3 is not supported; a reranker has one score"),  # type: ignore[arg-type]
        (lambda: CrossEncoder(dtype="int8"), r"unknown argument 'dtype'; .*\(config=EngineConfig"),  # type: ignore[arg-type]
        (lambda: CrossEncoder(default_prompt_name="x"), "default_prompt_name is 'x'; it must be one of query"),
        (lambda: CrossEncoder(prompts=["x"]), r"prompts is \['x'\]; it must be a dict"),  # type: ignore[arg-type]
        (lambda: CrossEncoder(activation_fn="sigmoid"), "activation_fn is 'sigmoid'; it must be a function"),  # type: ignore[arg-type]
        (lambda: CrossEncoder(max_length="512"), "max_length is '512'; it must be an int"),  # type: ignore[arg-type]
        (lambda: CrossEncoder(config=EngineConfig(device="tpu")), "tpu"),
    ]
    for call, message in calls:
        with pytest.raises(ConfigError, match=message):
            call()


def test_call_arguments_that_are_not_supported_are_refused_by_name(model: CrossEncoder) -> None:
    calls: list[tuple[Callable[[], object], type[InvalidRequest], str]] = [
        (lambda: model.predict(PAIRS, pool={"a": 1}), InvalidRequest, "pool=.* is not supported"),  # type: ignore[call-overload]
        (lambda: model.predict(PAIRS, device=["cpu", "cpu"]), InvalidRequest, r"pass it to CrossEncoder\(...\)"),  # type: ignore[call-overload]
        (lambda: model.rank(QUERY, TEXTS, chunk_size=2), InvalidRequest, "chunk_size=2 is not supported; calls share"),  # type: ignore[call-arg]
        (lambda: model.predict(PAIRS, promt="x"), InvalidRequest, "unknown argument 'promt'"),  # type: ignore[call-overload]
        (lambda: model.predict(PAIRS, prompt_name="x"), InvalidRequest, "prompt_name is 'x'; .* query, bread"),
        (lambda: model.predict(PAIRS, prompt_name=[]), InvalidRequest, r"prompt_name is \[\]"),  # type: ignore[call-overload]
        (lambda: model.predict(PAIRS, activation_fn=lambda _: 3), WrongType, "a score for each pair, not int"),  # type: ignore[arg-type,return-value]
        (lambda: model.predict(PAIRS, activation_fn=torch.sum), WrongType, "a score for each pair, not Tensor"),
        (lambda: model.predict(PAIRS, prompt=7), WrongType, "instruction must be a string, not int"),  # type: ignore[call-overload]
        (lambda: model.predict([("q", 7)]), WrongType, r"pairs\[0\]\[1\] must be a string, not int"),  # type: ignore[list-item]
        (lambda: model.predict(("q", 7)), WrongType, r"pairs\[0\]\[1\] must be a string, not int"),  # type: ignore[arg-type]
        (lambda: model.predict("qd"), WrongType, "pairs must be a list of .query, document. pairs"),  # type: ignore[arg-type]
        (lambda: model.predict(None), WrongType, "pairs must be a list of .query, document. pairs"),
        (lambda: model.predict(["q", "d", "e"]), WrongType, r"pairs\[0\] must be a .query, document. pair"),  # type: ignore[list-item]
        (lambda: model.rank(QUERY, TEXTS, top_k=1.5), WrongType, "top_k must be an integer or None, not float"),  # type: ignore[arg-type]
        (lambda: model.rank(QUERY, {"a": 1}), WrongType, "documents must be a list of strings, not dict"),  # type: ignore[arg-type]
        (lambda: model.rank(" ", TEXTS), EmptyQuery, "query is empty"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    assert len(model.predict(PAIRS, device=None, pool=None)) == 3  # type: ignore[call-overload]
