"""Every option of the engine, once: name, default, unit, help.

Command-line flags, `LOCAL_RERANK_*` variables and `docs/options.md` all come from these fields (the server's own
options stand in `local_rerank_server.config`). `auto` becomes a value once, when the engine is made.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from local_rerank.errors import ConfigError

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""The model card's default; no full stop (the hosted service's default has one)."""

DType = Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the model is found, loaded and run."""

    model: Annotated[
        str | None,
        Parameter(help="Hub id, alias (qwen3-reranker-0.6b|4b|8b), local folder or bundle; "
                       "without it the built-in local-rerank-nano."),
    ] = None  # fmt: skip
    revision: Annotated[str | None, Parameter(help="Branch, tag or commit of a hub model.")] = None
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:N or mps; auto takes a GPU if there is one.")] = "auto"
    dtype: Annotated[
        DType,
        Parameter(help="Precision of the weights; auto is bf16 on CUDA and on CPUs that multiply it faster than fp32, "
                       "else that of the checkpoint, and fp32 for the built-in model. Other CPUs multiply 16-bit "
                       "weights in fp32. int8 is for CPUs, fp8 for GPUs of compute capability 8.9 or later. Head and "
                       "softmax are always fp32."),
    ] = "auto"  # fmt: skip
    device_map: Annotated[
        str | None, Parameter(help="Spread a model over several devices as accelerate does (for example auto).")
    ] = None
    attention: Annotated[
        str,
        Parameter(help="Attention kernel: auto, cpu-tiles, cuda-tiles, cuda-merged, cuda-varlen, sdpa or dense."),
    ] = "auto"
    threads: Annotated[
        int | None,
        Parameter(help="CPU threads of the model, never changed; default: one per physical core that affinity and "
                       "cgroup quotas allow, and fewer while other processes use the CPUs."),
    ] = None  # fmt: skip
    instruction: Annotated[str, Parameter(help="Instruction of requests that bring none.")] = DEFAULT_INSTRUCTION
    max_length: Annotated[int, Parameter(help="Tokens of a whole prompt; capped by the model's own maximum.")] = 8192
    max_query_tokens: Annotated[int, Parameter(help="Tokens of a query; more are cut.")] = 4000
    max_document_tokens: Annotated[int, Parameter(help="Tokens of a document; more are cut.")] = 4000
    max_batch_tokens: Annotated[
        int | None,
        Parameter(help="Tokens that one forward pass may hold; default: 2560 on CPU, on CUDA what fits into free "
                       "memory, at most 16384."),
    ] = None  # fmt: skip
    no_cuda_graphs: Annotated[
        bool, Parameter(help="Launch the kernels of a batch one by one on CUDA.", negative="")
    ] = False  # fmt: skip
    no_compile: Annotated[
        bool, Parameter(help="Compile no kernels on CUDA: a faster start, slower batches.", negative="")
    ] = False  # fmt: skip
    max_queued_tokens: Annotated[
        int, Parameter(help="Tokens that may wait; a request beyond that is refused as overload.")
    ] = 500_000
    deterministic: Annotated[
        bool,
        Parameter(help="Score every pair in a forward pass of its own: scores are equal to the bit whatever else is "
                       "scored, and nothing is shared (docs/operations.md has the cost).", negative=""),
    ] = False  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if self.model is not None and not self.model.strip():
            raise ConfigError("model is empty; leave it out to take the built-in one")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PackEngineConfig(EngineConfig):
    """Options of `pack`, whose argument is the model. A hidden --model keeps LOCAL_RERANK_MODEL working."""

    model: Annotated[str | None, Parameter(show=False)] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class VerifyEngineConfig(EngineConfig):
    """Options of `verify`, which loads its argument and no other model."""

    model: Annotated[str | None, Parameter(parse=False)] = None


_LEAST = {
    "threads": 1,
    "max_length": 1,
    "max_query_tokens": 1,
    "max_document_tokens": 1,
    "max_batch_tokens": 1,
    "max_queued_tokens": 1,
}


def merged(config: EngineConfig, model: str | None, options: dict[str, Any]) -> EngineConfig:
    """`config` with `model`, if it is given, and `options` by their names; raises ConfigError for an unknown one."""
    names = {field.name for field in fields(EngineConfig)}
    if unknown := sorted(set(options) - names):
        raise ConfigError(f"unknown option {unknown[0]!r}; there are {', '.join(sorted(names))}")
    return replace(config, **options if model is None else options | {"model": model})
