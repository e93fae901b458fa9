"""Chooses the linear layers of a decoder that int8 multiplies, and keeps the choice in the cache folder.

A search scores known pairs once for each group of layers: minutes on a large model. What decides its result (`Facts`)
is hashed to the name of a file with the names of the layers that stay in fp32, so that a second start searches nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from local_rerank import __version__
from local_rerank.checkpoints.free_space import cache_folder
from local_rerank.checkpoints.known_scores import MAX_MISORDERED, num_misordered
from local_rerank.engine.cpu.int8 import TOLERANCE, Int8Linear
from local_rerank.engine.cpu.process_setup import owns_process
from local_rerank.engine.cpu.products import saturates
from local_rerank.requests.tokenization import Pair

logger = logging.getLogger(__name__)

MAX_SEARCHED_PARAMETERS = 1_000_000_000  # a larger model is not kept twice, to be searched for what int8 spoils
SHARE_OF_ALL = 1 / 3  # of the tolerance: by how much int8 in all layers may move a log-odds without a search
SHARE_OF_ONE = 1 / 40  # by how much one group of layers may
READERS = (  # linear layers of a decoder layer, by the input that they read
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
LINEARS_PER_LAYER = sum(len(names) for _, names in READERS)
VARIABLES = (  # those that change what kernels compute
    "ATEN_CPU_CAPABILITY", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip
LANES = 2**15  # int64 numbers folded at a time: they stay in the cache, and torch adds so many in one thread
FORMAT_VERSION = 1  # of the file; a search that chooses otherwise needs another one too

Facts = Mapping[str, Any]
"""Everything that decides the result of a search, as JSON can hold it."""


class _Group:
    """Linear layers of one block that read the same input: all are int8, or none is."""

    def __init__(self, block: Any, layer_index: int, where: str, names: Sequence[str]) -> None:
        self.layer_index = layer_index
        self.names = [f"layers.{layer_index}.{where}.{name}" for name in names]
        self._block = block
        self._exact = {name: getattr(block, name) for name in names}
        self._int8: dict[str, Int8Linear] = {}

    def quantize(self) -> None:
        limit = saturates()
        self._int8 = self._int8 or {name: Int8Linear(x, limit_pairs=limit) for name, x in self._exact.items()}
        self._use(self._int8)

    def restore(self) -> None:
        self._use(self._exact)

    def _use(self, modules: Mapping[str, Any]) -> None:
        for name, module in modules.items():
            setattr(self._block, name, module)


class _ReusedLayer(nn.Module):
    """A decoder layer that can return its first output again while nothing up to it has changed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.is_unchanged = False
        self._output: Tensor | None = None

    def forward(self, hidden: Tensor, *arguments: Any) -> Tensor:
        if self.is_unchanged:
            assert self._output is not None
            return self._output
        output: Tensor = self.layer(hidden, *arguments)
        self._output = output if self._output is None else self._output
        return output


def quantize_layers(
    layers: nn.ModuleList, log_odds: Callable[[], list[float]] | None = None, facts: Facts | None = None
) -> list[str]:
    """Replace the linear layers of the decoder's layers, except those that int8 would spoil; returns these names.

    `log_odds` scores known pairs with the model as it is, (num_pairs,); without it every layer is replaced. With
    `facts`, the result is read from the cache folder, or else searched and written there.
    """
    groups = _groups(layers)
    kept = _fp32_names(layers, groups, log_odds, facts) if log_odds is not None else set[str]()
    names = [name for group in groups for name in group.names]
    if kept and len(kept) == len(names):
        logger.warning(
            "int8 would spoil every linear layer of this model: all stay fp32, and int8 makes nothing faster"
        )
    while groups:
        group = groups.pop()  # frees each replaced weight before the next one is quantized
        if kept.isdisjoint(group.names):
            group.quantize()
    return [name for name in names if name in kept]


def _fp32_names(
    layers: nn.ModuleList, groups: list[_Group], log_odds: Callable[[], list[float]], facts: Facts | None
) -> set[str]:
    """Names of the linear layers that stay in fp32; the model is in fp32 before and after."""
    if facts is not None and (kept := _read(facts, groups)) is not None:
        return kept
    started = time.perf_counter()
    num_linears = sum(len(group.names) for group in groups)
    logger.info(
        "choosing which of %d linear layers int8 multiplies, in at most %d passes; a later start reads the result",
        num_linears, len(groups) + 3,
    )  # fmt: skip
    kept = {name for group in _search(layers, groups, log_odds) for name in group.names}
    seconds = time.perf_counter() - started
    logger.info("int8 multiplies %d of %d linear layers (%.1f s)", num_linears - len(kept), num_linears, seconds)
    if facts is not None:
        _write(facts, kept)
    return kept


def _search(layers: nn.ModuleList, groups: list[_Group], log_odds: Callable[[], list[float]]) -> list[_Group]:
    """The groups that int8 would spoil.

    Where int8 in all layers moves the known pairs by more than a third of what the self-test allows, each group is
    tried alone, and what moves them by a fortieth by itself is spoiled: int8 has no room for numbers far apart, which
    few layers have. Where known pairs, relevant and irrelevant ones in turn, are misordered, nothing can be spoiled.
    """
    if num_misordered(scores := log_odds()) > MAX_MISORDERED:
        return []
    exact = torch.tensor(scores)
    allowed = TOLERANCE * max(1.0, float(exact.max() - exact.min()))

    def is_moved_by(limit: float) -> bool:
        return not float((torch.tensor(log_odds()) - exact).abs().max()) <= limit  # what is no number is moved

    for group in groups:
        group.quantize()
    is_searched = is_moved_by(allowed * SHARE_OF_ALL)
    for group in groups:
        group.restore()
    if not is_searched:
        return []
    spoiled = []
    with _reused_layers(layers) as reused, _progress(len(groups)) as advance:
        log_odds()  # whose outputs are reused
        for group in groups:
            if group.layer_index > 0:
                reused[group.layer_index - 1].is_unchanged = True
            group.quantize()
            spoiled += [group] if is_moved_by(allowed * SHARE_OF_ONE) else []
            group.restore()
            advance()
    return spoiled


@contextlib.contextmanager
def _reused_layers(layers: nn.ModuleList) -> Iterator[list[_ReusedLayer]]:
    """All layers but the last, wrapped while the block runs: passes before a changed layer are not computed again."""
    originals = list(layers)[:-1]
    reused = [_ReusedLayer(layer) for layer in originals]
    try:
        for index, wrapped in enumerate(reused):
            layers[index] = wrapped
        yield reused
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


@contextlib.contextmanager
def _progress(num_groups: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error where a command runs in a terminal; yields what advances it by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_shown = owns_process() and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bar:
        task = bar.add_task("choosing layers for int8", total=num_groups)
        yield lambda: bar.advance(task)


def _groups(layers: nn.ModuleList) -> list[_Group]:
    return [
        _Group(getattr(layer, where), index, where, names)
        for index, layer in enumerate(list[Any](layers))
        for where, names in READERS
    ]


def facts_of(weights: Mapping[str, Tensor], pairs: Sequence[Pair], **more: Any) -> Facts:
    """What decides the result of a search; `more`: what else the caller decided, named, as JSON can hold it.

    The number of threads is left out: it moves log-odds by rounding alone. Whoever changes a constant or the package's
    version gets a new search.
    """
    cpu = {name: value for name, value in getattr(torch.cpu, "get_capabilities", dict)().items() if value is not False}
    facts = {
        "format_version": FORMAT_VERSION,
        "versions": {"local-rerank": __version__}
        | {name: metadata.version(name) for name in ("torch", "transformers")},
        "machine": platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cpu": {name: value for name, value in cpu.items() if not name.startswith("num_")},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "limits_pairs": saturates(),
        "tolerance": [TOLERANCE, SHARE_OF_ALL, SHARE_OF_ONE, MAX_MISORDERED],
        "prompts": hashlib.sha256(repr([(pair.prefix_ids, pair.document_ids) for pair in pairs]).encode()).hexdigest(),
        "weights": checksum(weights),
        **more,
    }
    plain: Facts = json.loads(json.dumps(facts))  # as it comes back from the file
    return plain


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Tells tensors on the CPU from others by names, dtypes, shapes and values; no protection against forgery.

    Rows of `LANES` numbers are folded into one, total = 3 * total + row modulo 2^64, which every change of one number
    alters and nearly every exchange of rows; sha256 takes that and the rest. Five times as fast as sha256 of all bytes:
    .6 and 3.2 s for .88 GB on two busy Zen 3 cores.
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


def _read(facts: Facts, groups: Iterable[_Group]) -> set[str] | None:
    """The names that `_write` was given for the same facts and groups; None where there is no such file."""
    try:
        path = _path(facts)
        stored = json.loads(path.read_text(encoding="utf-8"))
        names = set(map(str, stored["fp32_layers"]))
        if stored["facts"] != facts:
            raise ValueError("it holds other facts")
        if names != {name for group in groups if not names.isdisjoint(group.names) for name in group.names}:
            raise ValueError("it names other layers than this model's")
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:  # RuntimeError: there is no home folder
        logger.info("the stored choice of int8 layers cannot be used, so it is searched anew: %r", error)
        return None
    logger.info("the choice of int8 layers was read from %s: %d linear layers stay in fp32", path, len(names))
    return names


def _write(facts: Facts, names: Iterable[str]) -> None:
    """Store the result of a search; a folder that cannot be written only costs the next start its time."""
    text = json.dumps({"fp32_layers": sorted(names), "facts": facts}, ensure_ascii=False, indent=2) + "\n"
    try:
        path = _path(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            partial = Path(folder) / path.name
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)  # at once, so that another process reads a whole file or none
    except (OSError, RuntimeError) as error:
        logger.info("the choice of int8 layers cannot be kept, so the next start searches it again: %r", error)
    else:
        logger.info("the choice of int8 layers is kept in %s", path)
