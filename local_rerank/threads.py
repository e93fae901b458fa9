"""The number of threads of torch's CPU operators: what the user set, or what the machine leaves to this process."""

from __future__ import annotations

import logging
from functools import cache

import torch

from local_rerank.cpu_limits import cpu_limits

logger = logging.getLogger(__name__)


def choose_threads(wanted: int | None) -> tuple[int, str]:
    """The number for a model, and what decides it; None follows the machine. Called in the thread that computes."""
    default = _default_threads()
    if wanted is not None:
        return wanted, "set by the user"
    limits = cpu_limits()
    if default < limits.num_threads:
        return default, "torch's default (OMP_NUM_THREADS or set by the program)"
    return limits.num_threads, limits.reason


@cache
def _default_threads() -> int:
    """torch's own, read before we set another."""
    return torch.get_num_threads()
