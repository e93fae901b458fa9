"""list[Pair] -> PackedBatch: one sequence without padding, every prefix once.

A batch is a list of groups. A group is one prefix segment followed by the document segments of its pairs, ordered by
length so that attention can take equal lengths in one call. Knows nothing of models or attention kernels.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from local_rerank.requests.tokenization import Pair


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring document segments of one group that have the same length."""

    start: int  # first token of the first segment
    first_document: int  # number of the first segment among the batch's documents, in packed order
    count: int
    length: int  # tokens of each segment


@dataclass(frozen=True, slots=True)
class Group:
    """One prefix segment and the documents that share it."""

    start: int  # first token of the prefix
    prefix_length: int
    end: int  # one past the last token of the last document
    first_document: int
    num_documents: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """What one forward pass takes. `num_pairs` documents in packed order; `pair_order` leads back to the caller's."""

    input_ids: Tensor  # (1, num_tokens) int64
    position_ids: Tensor  # (1, num_tokens) int64: a document's positions begin at its prefix's length
    last_token_index: Tensor  # (num_pairs,) int64: where each document's last token stands
    pair_order: Tensor  # (num_pairs,) int64: packed document i is the caller's pair pair_order[i]
    groups: tuple[Group, ...]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_pairs(self) -> int:
        return self.last_token_index.shape[0]

    def to(self, device: torch.device) -> PackedBatch:
        """A copy whose tensors are on `device`, except the order, which stays; to a GPU without waiting."""
        if device.type == "cpu":
            return self
        return PackedBatch(
            input_ids=copy_to(self.input_ids, device),
            position_ids=copy_to(self.position_ids, device),
            last_token_index=copy_to(self.last_token_index, device),
            pair_order=self.pair_order,
            groups=self.groups,
        )


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host to a GPU by way of pinned memory, so that the copy waits for nothing and nothing waits for it."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pack(pairs: Sequence[Pair]) -> PackedBatch:
    """Lay out pairs, grouped by prefix in order of appearance, documents by length within a group."""
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_prefix.setdefault(pair.prefix_ids, []).append(index)
    ids = array("q")
    first_positions: list[int] = []  # by segment
    lengths: list[int] = []
    last: list[int] = []
    order: list[int] = []
    groups: list[Group] = []
    for prefix_ids, members in by_prefix.items():
        members.sort(key=lambda index: len(pairs[index].document_ids))
        start, first_document, prefix_length = len(ids), len(order), len(prefix_ids)
        ids.extend(prefix_ids)
        first_positions.append(0)
        lengths.append(prefix_length)
        runs: list[Run] = []
        for index in members:
            document_ids = pairs[index].document_ids
            length = len(document_ids)
            runs[-1:] = _extend(runs[-1] if runs else None, start=len(ids), document=len(order), length=length)
            ids.extend(document_ids)
            first_positions.append(prefix_length)
            lengths.append(length)
            last.append(len(ids) - 1)
            order.append(index)
        groups.append(Group(start, prefix_length, len(ids), first_document, len(members), tuple(runs)))
    return PackedBatch(
        input_ids=torch.frombuffer(ids, dtype=torch.int64).unsqueeze(0),
        position_ids=ranges(first_positions, lengths).unsqueeze(0),
        last_token_index=torch.tensor(last, dtype=torch.int64),
        pair_order=torch.tensor(order, dtype=torch.int64),
        groups=tuple(groups),
    )


def ranges(starts: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray) -> Tensor:
    """start, start + 1, ... of each range, one range behind the other: (sum of lengths,) int64.

    As lists these numbers took 15 ms of a batch of 16,000 tokens, in which a GPU has nothing to do. numpy's operators
    need no threads; torch's would start a pool of them for the caller (see `openmp.py`).
    """
    counts = np.asarray(lengths, dtype=np.int64)
    ends = counts.cumsum()
    numbers = np.repeat(np.asarray(starts, dtype=np.int64) - (ends - counts), counts)
    numbers += np.arange(len(numbers))
    return torch.from_numpy(numbers)


def _extend(run: Run | None, *, start: int, document: int, length: int) -> list[Run]:
    """The run with one more segment of its length, or the run followed by a new one."""
    if run is not None and run.length == length:
        return [Run(run.start, run.first_document, run.count + 1, length)]
    new = Run(start, document, 1, length)
    return [new] if run is None else [run, new]
