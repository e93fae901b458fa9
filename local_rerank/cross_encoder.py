"""`CrossEncoder`, for code that calls the class of this name in sentence-transformers.

`predict` and `rank` have the arguments, return types and shapes of sentence-transformers 6.2. An argument without a
counterpart here is refused by name, unless its value asks for nothing.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Never, Self, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from local_rerank.arguments import documents_of, requests_of, scores_of
from local_rerank.config import EngineConfig, EngineOptions, merged
from local_rerank.errors import ConfigError, InvalidRequest, WrongType
from local_rerank.reranker import Reranker

Activation = Callable[[Tensor], Tensor]
Pairs = Iterable[tuple[str, str] | list[str]]
DEFAULT_PROMPT = "query"
"""Name of the default instruction, as in the model card of Qwen's checkpoints."""


class CallOptions(TypedDict, total=False):
    """The keyword options of `predict` and `rank`, for type checkers."""

    prompt: str | None  # the instruction
    prompt_name: str | None  # a key of `prompts`
    activation_fn: Activation | None  # from log-odds, (num_pairs, 1) fp32
    show_progress_bar: bool | None
    batch_size: int  # no effect: a batch is limited in tokens
    apply_softmax: bool | None  # no effect: there is one label
    activation_fct: Activation | None  # the former name of activation_fn
    num_workers: int  # no effect there either


class RankOptions(CallOptions, total=False):
    """What `rank` takes beside, and ignores as sentence-transformers 6 does: it returns a list."""

    convert_to_numpy: bool
    convert_to_tensor: bool


class CrossEncoder:
    """A drop-in for sentence-transformers' class of the same name, with a Qwen3-Reranker model or an encoder.

    Scores of Qwen3-Reranker are log-odds, as by default in sentence-transformers (model card, "Using Sentence
    Transformers"); for probabilities pass `activation_fn=torch.nn.Sigmoid()`. Those of an encoder are what its
    configuration says.

    `model_name_or_path`, `device`, `revision` and `max_length` are those of `Reranker`, which `config` completes with
    other options of the engine; `reranker` is the Reranker itself. `prompts` are instructions by name; that of the
    name `default_prompt_name` is used when a call has none. `activation_fn` maps log-odds, a float32 tensor of the
    shape (num_pairs, 1), to scores. Raises what `Reranker` raises, and ConfigError for an argument that is not
    supported.

    >>> model = CrossEncoder()
    >>> ranked = model.rank("capital of France", ["Rome is in Italy", "Paris is the capital of France"], top_k=1)
    >>> [item["corpus_id"] for item in ranked]
    [1]
    """

    def __init__(
        self,
        model_name_or_path: str | PathLike[str] | None = None,
        *,
        num_labels: Literal[1] | None = None,
        max_length: int | None = None,
        activation_fn: Activation | None = None,
        device: str | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,  # never needed: code of a checkpoint never runs
        config: EngineConfig | None = None,
        **refused: Never,
    ) -> None:
        for name, value in {"num_labels": num_labels, **refused}.items():
            if problem := _problem(name, value):
                raise ConfigError(problem)
        options: EngineOptions = {}
        if max_length is not None:
            options["max_length"] = max_length
        if device is not None:
            options["device"] = device
        if revision is not None:
            options["revision"] = revision
        given = merged(config, model_name_or_path, options)
        if not isinstance(prompts, Mapping | None):
            raise ConfigError(f"prompts is {reprlib.repr(prompts)}; it must be a dict of instructions by name")
        self.prompts = {DEFAULT_PROMPT: given.instruction, **(prompts or {})}
        self.default_prompt_name = DEFAULT_PROMPT if default_prompt_name is None else default_prompt_name
        if self.default_prompt_name not in self.prompts:
            raise ConfigError(
                f"default_prompt_name is {default_prompt_name!r}; it must be one of {', '.join(self.prompts)}"
            )
        if not (activation_fn is None or callable(activation_fn)):
            raise ConfigError(f"activation_fn is {activation_fn!r}; it must be a function of a tensor of log-odds")
        self.reranker = Reranker(config=given)
        checkpoint = self.reranker.checkpoint
        default = _ACTIVATIONS[checkpoint.activation if checkpoint.recipe.is_encoder else "identity"]
        self.activation_fn = activation_fn or default()

    @overload
    def predict(
        self,
        inputs: Pairs | None = None,
        *,
        sentences: Pairs | None = None,
        convert_to_numpy: Literal[True] = True,
        convert_to_tensor: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> NDArray[np.float32]: ...

    @overload
    def predict(
        self,
        inputs: Pairs | None = None,
        *,
        sentences: Pairs | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: Literal[True],
        **options: Unpack[CallOptions],
    ) -> Tensor: ...

    @overload
    def predict(
        self,
        inputs: Pairs | None = None,
        *,
        sentences: Pairs | None = None,
        convert_to_numpy: Literal[False],
        convert_to_tensor: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> list[Tensor]: ...

    def predict(
        self,
        inputs: Pairs | None = None,
        *,
        sentences: Pairs | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **options: Unpack[CallOptions],
    ) -> NDArray[np.float32] | Tensor | list[Tensor]:
        """The scores of (query, document) pairs, in order: float32 of the shape (num_pairs,), as an array, with
        `convert_to_tensor` a tensor on the CPU, with `convert_to_numpy=False` a list of scalar tensors. One pair
        outside a list gives one scalar of that type.

        `sentences` is the former name of `inputs`. Neighbouring pairs with the same query share its tokens. Raises as
        `Reranker.score`, and InvalidRequest for an argument that is not supported.
        """
        pairs: Any = inputs if sentences is None else sentences
        is_one = _is_pair(pairs)
        scores = self._scores([pairs] if is_one else pairs, options)
        if convert_to_tensor:
            return scores[0] if is_one else scores
        if convert_to_numpy:
            array = scores.float().numpy()
            return array[0] if is_one else array
        return scores[0] if is_one else list(scores)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Unpack[RankOptions],
    ) -> list[dict[Literal["corpus_id", "score", "text"], int | float | str]]:
        """The documents sorted by score, highest first, at most `top_k`: dicts with `corpus_id` (position in
        `documents`), `score` and, with `return_documents`, `text`. Raises as `predict`.
        """
        texts = documents_of(documents)
        limit: object = top_k
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, Integral)):
            raise WrongType(top_k, field="top_k", expected="an integer or None")
        scores = self._scores([(query, text) for text in texts], options).tolist()
        ranked: list[dict[Literal["corpus_id", "score", "text"], int | float | str]] = []
        for index in sorted(range(len(texts)), key=scores.__getitem__, reverse=True)[:top_k]:
            ranked.append({"corpus_id": index, "score": scores[index]})
            if return_documents:
                ranked[-1]["text"] = texts[index]
        return ranked

    def close(self) -> None:
        """Close the Reranker: later calls raise ModelUnavailable, and the weights are freed with this object.

        Without it they stay in memory after the first call. sentence-transformers has no such method.
        """
        self.reranker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _scores(self, pairs: Iterable[tuple[str, str]], options: CallOptions) -> Tensor:
        """(num_pairs,) float32"""
        for name, value in options.items():
            if name not in RankOptions.__annotations__ and (problem := _problem(name, value)):
                raise InvalidRequest(problem, field=name)
        requests = list(requests_of(pairs, self._instruction(options.get("prompt"), options.get("prompt_name"))))
        results = track(
            self.reranker.rank_batch(requests), "Queries", len(requests), console=Console(stderr=True),
            disable=not options.get("show_progress_bar"),
        )  # fmt: skip
        log_odds = [score for result in results for score in scores_of(result, logits=True)]
        activate = options.get("activation_fn") or options.get("activation_fct") or self.activation_fn
        with torch.inference_mode():
            scores: object = activate(torch.tensor(log_odds, dtype=torch.float32).unsqueeze(1))
        if not isinstance(scores, Tensor) or scores.numel() != len(log_odds):
            raise WrongType(scores, field="what activation_fn returns", expected="a tensor with a score for each pair")
        return scores.flatten()

    def _instruction(self, prompt: str | None, prompt_name: str | None) -> str:
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if not isinstance(name, str) or name not in self.prompts:
            raise InvalidRequest(
                f"prompt_name is {name!r}; it must be one of {', '.join(self.prompts)}", field="prompt_name"
            )
        return self.prompts[name]


_ACTIVATIONS: dict[str, Callable[[], Activation]] = {"sigmoid": torch.nn.Sigmoid, "identity": torch.nn.Identity}
_CONFIG = "pass config=EngineConfig(...), which has dtype, attention, device_map and more"
_TOKENIZER = "the checkpoint's tokenizer and prompt are used as they are; max_length limits a prompt"
_ONE_PROCESS = "calls share the batches of one model; local-rerank batch --ray uses several"
_INSTEAD = {
    "num_labels": "a reranker has one score",
    "modules": "name a checkpoint",
    "cache_folder": "set the variable HF_HOME",
    "local_files_only": "set the variable HF_HUB_OFFLINE=1, or pass a folder",
    "token": "set the variable HF_TOKEN",
    "model_kwargs": _CONFIG,
    "automodel_args": _CONFIG,
    "processor_kwargs": _TOKENIZER,
    "tokenizer_kwargs": _TOKENIZER,
    "tokenizer_args": _TOKENIZER,
    "config_kwargs": "config.json is used as it is",
    "config_args": "config.json is used as it is",
    "model_card_data": "nothing is trained here",
    "backend": _CONFIG,
    "keep_in_fp32_modules": "head and softmax are always fp32",
    "device": "pass it to CrossEncoder(...)",
    "pool": _ONE_PROCESS,
    "chunk_size": _ONE_PROCESS,
}
"""What to do instead of an argument of sentence-transformers that has no counterpart here."""
_HARMLESS = {"backend": "torch", "num_labels": 1}


def _problem(name: str, value: object) -> str | None:
    """What is wrong with an argument; None if its value asks for nothing."""
    if name not in _INSTEAD:
        return f"unknown argument {name!r}; options of the engine go into CrossEncoder(config=EngineConfig(...))"
    if value is None or value is False or (name in _HARMLESS and value == _HARMLESS[name]):
        return None
    return f"{name}={value!r} is not supported; {_INSTEAD[name]}"


def _is_pair(pairs: object) -> bool:
    """Whether this is one pair of texts and not a collection of pairs."""
    if isinstance(pairs, np.ndarray):
        return pairs.ndim == 1 and pairs.size > 0 and isinstance(pairs[0], str)
    return isinstance(pairs, list | tuple) and len(pairs) > 0 and isinstance(pairs[0], str)
