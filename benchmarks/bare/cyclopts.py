"""Stands in for cyclopts where it is not installed (benchmarks/gpu.sh): options keep their names and defaults."""

from __future__ import annotations

from typing import Any, TypeVar

Decorated = TypeVar("Decorated")
Token = str  # what a converter is given; nothing parses a command line here


class Parameter:
    """Takes what an option's definition says and forgets it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, decorated: Decorated) -> Decorated:
        return decorated
