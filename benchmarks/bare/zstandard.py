"""Stands in for zstandard where it is not installed (benchmarks/gpu_pack.py): nothing that is measured reads zstd."""

from __future__ import annotations


class ZstdError(Exception):
    """Never raised."""
