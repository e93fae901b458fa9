"""Choose which linear layers of a decoder are quantized to int8, and cache the choice.

The search scores known pairs once per group of layers, which takes minutes on a large model. The cache file's name is a
hash of everything that affects the result (`Facts`); the file lists the layers that stay in fp32.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from local_rerank import __version__
from local_rerank.checkpoints.free_space import cache_folder, write_atomically
from local_rerank.checkpoints.known_scores import MAX_MISORDERED, num_misordered
from local_rerank.engine.cpu.int8 import TOLERANCE, Int8Linear
from local_rerank.engine.cpu.process_setup import KERNEL_VARIABLES, owns_process
from local_rerank.engine.cpu.products import saturates
from local_rerank.errors import CheckpointError
from local_rerank.requests.pair import Pair

logger = logging.getLogger(__name__)

MAX_SEARCHED_PARAMETERS = 1_000_000_000  # larger models are not searched, because a search holds the weights twice
SHARE_OF_ALL = 1 / 3  # no search if int8 in all layers moves log-odds by at most tolerance / 3
SHARE_OF_ONE = 1 / 40  # a group stays in fp32 if quantizing it alone moves log-odds by more than tolerance / 40
GROUPS = (  # linear layers of a decoder layer that read the same input
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
LINEARS_PER_LAYER = sum(len(names) for _, names in GROUPS)
GROUPS_OF_ENCODERS = tuple(("", (name,)) for name in ("qkv", "out", "up", "down"))
LANES = 2**15  # int64 values per checksum step: they fit in the CPU's cache, and torch adds them in one thread
FORMAT_VERSION = 1  # of the cache file; also increase it when the search changes

Facts = Mapping[str, Any]
"""Everything that affects the result of a search, as JSON values."""


class LinearGroup:
    """Linear layers of one block that read the same input: all of them are int8, or none."""

    def __init__(self, block: Any, layer_index: int, where: str, names: Sequence[str]) -> None:
        self.layer_index = layer_index
        self.names = [".".join(filter(None, ("layers", str(layer_index), where, name))) for name in names]
        self._block = block
        self._fp32 = {name: getattr(block, name) for name in names}
        self._int8: dict[str, Int8Linear] = {}

    def quantize(self) -> None:
        limit = saturates()
        self._int8 = self._int8 or {name: Int8Linear(x, limit_pairs=limit) for name, x in self._fp32.items()}
        self._use(self._int8)

    def restore(self) -> None:
        self._use(self._fp32)

    def _use(self, modules: Mapping[str, Any]) -> None:
        for name, module in modules.items():
            setattr(self._block, name, module)


class ReusedLayer(nn.Module):
    """A decoder layer that returns its first output again while `is_unchanged`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.is_unchanged = False
        self._output: Tensor | None = None

    def forward(self, hidden: Tensor, *arguments: Any) -> Tensor:
        """(num_tokens, hidden) to (num_tokens, hidden); see `CpuLayer`."""
        if self.is_unchanged:
            assert self._output is not None
            return self._output
        output: Tensor = self.layer(hidden, *arguments)
        self._output = output if self._output is None else self._output
        return output


def quantize_layers(
    layers: nn.ModuleList, log_odds: Callable[[], list[float]] | None = None, facts: Facts | None = None
) -> list[str]:
    """Quantize the linear layers of `layers`, except those that int8 would damage; returns the names of the latter.

    `log_odds` scores the known pairs with the model as it is; without it every layer is quantized. With `facts`, the
    choice is read from the cache folder, or searched and written there.
    """
    groups = groups_of(layers)
    fp32 = _fp32_names(layers, groups, log_odds, facts) if log_odds is not None else set[str]()
    names = [name for group in groups for name in group.names]
    if fp32 and len(fp32) == len(names):
        logger.warning("int8 would damage every linear layer of this model; all stay in fp32, so int8 is no faster")
    while groups:
        group = groups.pop()  # frees each replaced weight before the next one is quantized
        if fp32.isdisjoint(group.names):
            group.quantize()
    return [name for name in names if name in fp32]


def _fp32_names(
    layers: nn.ModuleList, groups: list[LinearGroup], log_odds: Callable[[], list[float]], facts: Facts | None
) -> set[str]:
    """Names of the linear layers that stay in fp32. The model is in fp32 before and after."""
    if facts is not None and (fp32 := read_choice(facts, groups)) is not None:
        return fp32
    started = time.perf_counter()
    num_linears = sum(len(group.names) for group in groups)
    message = "choosing which of %d linear layers become int8, in at most %d passes; later starts read the result"
    logger.info(message, num_linears, len(groups) + 3)
    fp32 = {name for group in _search(layers, groups, log_odds) for name in group.names}
    seconds = time.perf_counter() - started
    logger.info("%d of %d linear layers are int8 (%.1f s)", num_linears - len(fp32), num_linears, seconds)
    if facts is not None:
        write_choice(facts, fp32)
    return fp32


def _search(layers: nn.ModuleList, groups: list[LinearGroup], log_odds: Callable[[], list[float]]) -> list[LinearGroup]:
    """The groups that int8 would damage.

    If int8 in all layers moves the log-odds of the known pairs by more than tolerance / 3, each group is tried alone.
    A group that moves them by more than tolerance / 40 stays in fp32. Few do: those whose weights or inputs have
    outliers, which leave too few int8 steps for the rest. If the model misorders known pairs in fp32, there is nothing
    to compare with and every layer is quantized.
    """
    if num_misordered(scores := log_odds()) > MAX_MISORDERED:
        return []
    exact = torch.tensor(scores)
    allowed = TOLERANCE * max(1.0, float(exact.max() - exact.min()))

    def is_moved_by(limit: float) -> bool:
        return not float((torch.tensor(log_odds()) - exact).abs().max()) <= limit  # NaN counts as moved

    for group in groups:
        group.quantize()
    is_searched = is_moved_by(allowed * SHARE_OF_ALL)
    for group in groups:
        group.restore()
    if not is_searched:
        return []
    damaged = []
    with _reused_layers(layers) as reused, _progress(len(groups)) as advance:
        log_odds()  # records the outputs to reuse
        for group in groups:
            if group.layer_index > 0:
                reused[group.layer_index - 1].is_unchanged = True
            group.quantize()
            damaged += [group] if is_moved_by(allowed * SHARE_OF_ONE) else []
            group.restore()
            advance()
    return damaged


@contextlib.contextmanager
def _reused_layers(layers: nn.ModuleList) -> Iterator[list[ReusedLayer]]:
    """Wrap all layers but the last while the block runs, so that layers before a changed one are not run again."""
    originals = list(layers)[:-1]
    reused = [ReusedLayer(layer) for layer in originals]
    try:
        for index, wrapped in enumerate(reused):
            layers[index] = wrapped
        yield reused
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


@contextlib.contextmanager
def _progress(num_groups: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr if one of our commands runs in a terminal; yields a function that advances it by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_shown = owns_process() and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bar:
        task = bar.add_task("choosing layers for int8", total=num_groups)
        yield lambda: bar.advance(task)


def groups_of(layers: nn.ModuleList) -> list[LinearGroup]:
    return [
        LinearGroup(layer.get_submodule(where), index, where, names)
        for index, layer in enumerate(layers)
        for where, names in (GROUPS if hasattr(layer, "self_attn") else GROUPS_OF_ENCODERS)
    ]


def facts_of(weights: Mapping[str, Tensor], pairs: Sequence[Pair], **more: Any) -> Facts:
    """Everything that affects the result of a search; `more`: the caller's choices, as JSON values.

    The number of threads is left out, because it changes log-odds by rounding only. A new package version or another
    value of a constant leads to a new search.
    """
    cpu = {name: value for name, value in getattr(torch.cpu, "get_capabilities", dict)().items() if value is not False}
    facts = {
        "format_version": FORMAT_VERSION,
        "versions": {"local-rerank": __version__}
        | {name: metadata.version(name) for name in ("torch", "transformers")},
        "machine": platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cpu": {name: value for name, value in cpu.items() if not name.startswith("num_")},
        "variables": {name: os.environ[name] for name in KERNEL_VARIABLES if name in os.environ},
        "limits_pairs": saturates(),
        "tolerance": [TOLERANCE, SHARE_OF_ALL, SHARE_OF_ONE, MAX_MISORDERED],
        "prompts": hashlib.sha256(repr([(pair.prefix_ids, pair.document_ids) for pair in pairs]).encode()).hexdigest(),
        "weights": checksum(weights),
        **more,
    }
    as_read: Facts = json.loads(json.dumps(facts))  # comparable with the file's
    return as_read


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of CPU tensors: names, dtypes, shapes and values. It does not protect against forgery.

    Rows of `LANES` numbers are folded into one: total = 3 * total + row modulo 2^64. Any changed number changes the
    total, and so does nearly any swap of rows. sha256 hashes the total and the remainder. This takes 0.6 s for 0.88 GB
    on two busy Zen 3 cores; sha256 of all bytes takes 3.2 s.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        values = tensor.detach().contiguous().flatten().view(torch.uint8)
        values = values.clone() if values.storage_offset() % 8 else values
        num_folded = values.numel() // (8 * LANES) * 8 * LANES
        total = torch.zeros(LANES, dtype=torch.int64)
        for row in values[:num_folded].view(torch.int64).view(-1, LANES):
            torch.add(row, total, alpha=3, out=total)
        for part in (total, values[num_folded:]):
            digest.update(part.numpy().data)
    return digest.hexdigest()


def _path(facts: Facts) -> Path:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "int8" / f"{key}.json"


def read_choice(facts: Facts, groups: Iterable[LinearGroup]) -> set[str] | None:
    """The layers that stay in fp32, as written by `write_choice` for the same facts; None without a valid file."""
    try:
        path = _path(facts)
        stored = json.loads(path.read_text(encoding="utf-8"))
        names = set(map(str, stored["fp32_layers"]))
        if stored["facts"] != facts:
            raise ValueError("its facts differ")
        if names != {name for group in groups if not names.isdisjoint(group.names) for name in group.names}:
            raise ValueError("its layers are not this model's")
    except FileNotFoundError:
        return None
    except (OSError, CheckpointError, RecursionError, ValueError, TypeError, KeyError) as error:
        logger.info("cannot use the cached choice of int8 layers, so it is searched again: %r", error)
        return None
    logger.info("read the choice of int8 layers from %s: %d linear layers stay in fp32", path, len(names))
    return names


def write_choice(facts: Facts, names: Iterable[str]) -> None:
    """Cache the layers that stay in fp32. If the folder cannot be written, the next start searches again."""
    text = json.dumps({"fp32_layers": sorted(names), "facts": facts}, ensure_ascii=False, indent=2) + "\n"
    try:
        path = _path(facts)
        write_atomically(path, text)
    except (OSError, CheckpointError) as error:
        logger.info("cannot cache the choice of int8 layers, so the next start searches again: %r", error)
    else:
        logger.info("cached the choice of int8 layers in %s", path)
