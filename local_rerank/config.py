"""The engine's options.

Command-line flags, `LOCAL_RERANK_*` variables and `docs/options.md` are generated from these fields; the server's
options are in `local_rerank_server.config`. `engine.plan` resolves `auto`.
"""

from __future__ import annotations

import os
import reprlib
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token

from local_rerank.errors import ConfigError
from local_rerank.text_files import as_utf8
from local_rerank.types import MIN_CHUNK_TOKENS, LongDocuments

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""The model card's default. The hosted service's default ends with a full stop, this one does not."""

# groups of `--help` and docs/options.md, in this order with the server's between them; a command's own come first
MODEL = Group("Model", sort_key=1)
LIMITS = Group("Limits", sort_key=4)
ENGINE = Group("Engine", sort_key=6)

Scores = Literal["model", "calibrated"]
DType = Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8"]


def _in_utf8(_: Any, tokens: Sequence[Token]) -> str:
    """A converter for cyclopts, whose texts are in the locale's encoding."""
    return as_utf8(tokens[0].value)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which model to load, and how to run it. Raises ConfigError for a value out of range."""

    model: Annotated[
        str | None,
        Parameter(group=MODEL,
                  help="Hub id, alias (qwen3-reranker-0.6b|4b|8b), local folder or bundle. "
                       "Default: the built-in local-rerank-nano."),
    ] = None  # fmt: skip
    revision: Annotated[str | None, Parameter(group=ENGINE, help="Branch, tag or commit of a hub model.")] = None
    recipe: Annotated[
        str | None,
        Parameter(group=ENGINE,
                  help="How pairs are written and scored: qwen3-reranker, bert, xlm-roberta or modernbert. Default: by "
                       "config.json. Name it if the files do not say that the model is a reranker."),
    ] = None  # fmt: skip
    device: Annotated[
        str, Parameter(group=MODEL, help="auto, cpu, cuda, cuda:N or mps. auto uses a GPU if there is one.")
    ] = "auto"
    dtype: Annotated[
        DType,
        Parameter(group=MODEL,
                  help="Dtype of the weights. auto: on CUDA bf16, or fp16 or fp32 on GPUs without it (docs/cuda.md); "
                        "bf16 on CPUs that multiply it faster than fp32, else the checkpoint's dtype; fp32 for the "
                        "built-in model. CPUs without fast 16-bit products compute in fp32. int8 needs a CPU, bf16 on "
                        "CUDA compute capability 8.0 or newer, fp8 8.9. Head and softmax are always fp32."),
    ] = "auto"  # fmt: skip
    device_map: Annotated[
        str | None,
        Parameter(group=ENGINE, help="Split the model over several devices with accelerate, for example auto."),
    ] = None
    attention: Annotated[
        str,
        Parameter(
            group=ENGINE, help="Attention kernel: auto, cpu-tiles, cuda-tiles, cuda-merged, cuda-varlen, sdpa or dense."
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        Parameter(group=MODEL,
                  help="CPU threads for the model. Default: one per physical core that affinity and cgroup quotas "
                       "allow, and fewer while other processes use the CPUs. A number set here is never changed."),
    ] = None  # fmt: skip
    instruction: Annotated[
        str,
        Parameter(group=MODEL, help="Default instruction, used when a request has none.", converter=_in_utf8),
    ] = DEFAULT_INSTRUCTION
    calibration: Annotated[
        str | None,
        Parameter(group=ENGINE,
                  help="File of `local-rerank calibrate`: results get the probability that a document is relevant."),
    ] = None  # fmt: skip
    scores: Annotated[
        Scores,
        Parameter(group=ENGINE,
                  help="What relevance_score is: the model's score, or the probability of --calibration. The latter "
                       "needs the calibration's instruction in every request. Log-odds stay the model's."),
    ] = "model"  # fmt: skip
    max_length: Annotated[
        int, Parameter(group=LIMITS, help="Maximum tokens of a whole prompt; capped by the model's own maximum.")
    ] = 8192  # fmt: skip
    max_query_tokens: Annotated[
        int, Parameter(group=LIMITS, help="Maximum query tokens; longer queries are truncated.")
    ] = 4000
    max_document_tokens: Annotated[
        int, Parameter(group=LIMITS, help="Maximum tokens of a document; longer documents are truncated.")
    ] = 4000  # fmt: skip
    long_documents: Annotated[
        LongDocuments | None,
        Parameter(group=LIMITS,
                  help="Long documents: truncate, or chunk to score each by its best chunk (docs/long-documents.md). "
                       "Default, here and for the next three: what the model's config.json says, else truncate."),
    ] = None  # fmt: skip
    chunk_tokens: Annotated[int | None, Parameter(group=LIMITS, help="Maximum tokens of a chunk, else 512.")] = None
    chunk_overlap_tokens: Annotated[
        int | None,
        Parameter(group=LIMITS, help="Tokens that a chunk repeats of the one before, at most half of it; else 64."),
    ] = None
    num_best_chunks: Annotated[
        int | None,
        Parameter(group=LIMITS, help="A document's log-odds: the mean of this many of its best chunks, else 1."),
    ] = None
    max_batch_tokens: Annotated[
        int | None,
        Parameter(group=ENGINE,
                  help="Maximum tokens of a forward pass. Default: 2560 on CPU; on CUDA what fits into free memory, "
                       "at most 16384."),
    ] = None  # fmt: skip
    no_cuda_graphs: Annotated[bool, Parameter(group=ENGINE, help="Disable CUDA graphs.", negative="")] = False
    no_compile: Annotated[
        bool, Parameter(group=ENGINE, help="Do not compile CUDA kernels: faster start, slower batches.", negative="")
    ] = False  # fmt: skip
    max_queued_tokens: Annotated[
        int, Parameter(group=LIMITS, help="Maximum queued tokens; further requests are refused (429 over HTTP).")
    ] = 500_000
    deterministic: Annotated[
        bool,
        Parameter(group=ENGINE,
                  help="Score each pair in its own forward pass, so that a score never depends on what else is scored, "
                       "to the bit. Prefixes are not shared; docs/operations.md has the cost.", negative=""),
    ] = False  # fmt: skip

    @property
    def in_chunks(self) -> bool:
        return self.long_documents == "chunk"

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            if not _is_a(value := getattr(self, name), hint):
                raise ConfigError(f"{name} is {reprlib.repr(value)}; it must be {_name_of(hint)}")
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if self.model is not None and not self.model.strip():
            raise ConfigError("model is empty; leave it out to use the built-in one")
        if self.scores == "calibrated" and self.calibration is None:
            raise ConfigError(
                "scores is calibrated, which needs --calibration FILE; `local-rerank calibrate` makes one"
            )


# here, because cyclopts evaluates inherited annotations with the names of the subclass's module
@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PackEngineConfig(EngineConfig):
    """Engine options of `pack`, whose argument is the model. A hidden --model keeps LOCAL_RERANK_MODEL working."""

    model: Annotated[str | None, Parameter(show=False)] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OtherEngineConfig(EngineConfig):
    """Engine options of `verify`, `eval` and `calibrate`, which name their models themselves and use log-odds."""

    model: Annotated[str | None, Parameter(parse=False)] = None
    calibration: Annotated[str | None, Parameter(parse=False)] = None
    scores: Annotated[Scores, Parameter(parse=False)] = "model"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeEngineConfig(EngineConfig):
    """Engine options of `serve`, where they are for all models; its option `model` is a list."""

    model: Annotated[str | None, Parameter(parse=False)] = None


class EngineOptions(TypedDict, total=False):
    """The keyword options of `Reranker`: the fields of `EngineConfig` without `model`, for type checkers."""

    revision: str | None
    recipe: str | None
    device: str
    dtype: DType
    device_map: str | None
    attention: str
    threads: int | None
    instruction: str
    calibration: str | None
    scores: Scores
    max_length: int
    max_query_tokens: int
    max_document_tokens: int
    long_documents: LongDocuments | None
    chunk_tokens: int | None
    chunk_overlap_tokens: int | None
    num_best_chunks: int | None
    max_batch_tokens: int | None
    no_cuda_graphs: bool
    no_compile: bool
    max_queued_tokens: int
    deterministic: bool


CHUNK_TOKENS, CHUNK_OVERLAP_TOKENS = 512, 64  # where neither an option nor a model's config.json says
OF_CHUNKS = ("long_documents", "chunk_tokens", "chunk_overlap_tokens", "num_best_chunks")
"""Options that only change scores if long documents are scored in chunks."""

_LEAST = {
    "threads": 1, "max_length": 1, "max_query_tokens": 1, "max_document_tokens": 1, "max_batch_tokens": 1,
    "max_queued_tokens": 1, "chunk_tokens": MIN_CHUNK_TOKENS, "chunk_overlap_tokens": 0, "num_best_chunks": 1,
}  # fmt: skip


def merged(config: EngineConfig | None, model: str | os.PathLike[str] | None, options: EngineOptions) -> EngineConfig:
    """`config` with its fields replaced by `options`, and by `model` if not None. Raises ConfigError for an unknown
    option, and for a value of the wrong type.
    """
    if not isinstance(config, EngineConfig | None):
        raise ConfigError(f"config is {reprlib.repr(config)}; it must be an EngineConfig or None")
    names = {field.name for field in fields(EngineConfig)}
    if unknown := sorted(set(options) - names):
        raise ConfigError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(names))}")
    given: dict[str, Any] = {**options}
    if model is not None:
        given["model"] = os.fspath(model) if isinstance(model, os.PathLike) else model
    return replace(config or EngineConfig(), **given)


_UNIONS = (Union, types.UnionType)  # the former with a Literal


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(EngineConfig)


def _is_a(value: object, hint: Any) -> bool:
    if get_origin(hint) in _UNIONS:
        return any(_is_a(value, kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))  # Python's bool is an int


def _name_of(hint: Any) -> str:
    if get_origin(hint) in _UNIONS:
        return " or ".join(map(_name_of, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return {bool: "True or False", int: "an int", str: "a str"}.get(hint, "None")
