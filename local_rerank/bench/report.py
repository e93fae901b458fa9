"""Render benchmark results as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from local_rerank.bench.measure import WorkloadResult
from local_rerank.text_files import visible


def all_tables(results: Sequence[WorkloadResult]) -> list[Any]:
    tables = [*map(workload_table, results), latency_table(results)]
    has_reference = any(row.agreement is not None for each in results for row in each.rows)
    return [*tables, agreement_table(results)] if has_reference else tables


def workload_table(result: WorkloadResult) -> Any:
    """Throughput of each target, its ratio to the first one, and its share of the ceiling."""
    title = (
        f"{result.workload}: {result.about}; {result.num_requests} request(s), {result.num_pairs} pairs, "
        f"{result.num_tokens} tokens"
    )
    rows = [
        [
            row.system,
            _figure(statistics.median(row.seconds), 3),
            f"{row.ratio:.2f}",
            _figure(row.pairs_per_second),
            _figure(row.tokens_per_second),
            _figure(row.useful_tflops, 3),
            "" if row.useful_share is None else f"{row.useful_share:.0%} of {_figure(row.ceiling_tflops, 3)}",
        ]
        for row in result.rows
    ]
    return _table(title, ["", "seconds", "time x", "pairs/s", "tokens/s", "TFLOP/s", "of ceiling"], rows)


def latency_table(results: Sequence[WorkloadResult]) -> Any:
    """Latency percentiles, peak memory beyond the weights, and the share of tokenization."""
    rows = [
        [
            each.workload,
            row.system,
            *(_figure(row.latency_ms.get(name)) for name in ("p50", "p95", "p99")),
            str(row.num_latencies or ""),
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
            "" if row.tokenize_share is None else f"{row.tokenize_share:.1%}",
        ]
        for each in results
        for row in each.rows
    ]
    return _table("requests", ["", "", "p50 ms", "p95", "p99", "of", "memory", "tokenizing"], rows)


def agreement_table(results: Sequence[WorkloadResult]) -> Any:
    """Differences of log-odds from the fp32 reference."""
    rows = [
        [each.workload, row.system, f"{row.agreement.largest:.2g}", f"{row.agreement.mean:.2g}",
         f"{row.agreement.kendall_tau:.4f}"]
        for each in results for row in each.rows if row.agreement is not None
    ]  # fmt: skip
    title = "log-odds compared with the fp32 reference"
    return _table(title, ["", "", "largest difference", "mean", "Kendall's tau"], rows)


def _figure(value: float | None, num_digits: int = 4) -> str:
    """A number with this many significant digits, but no digit before the point is rounded; empty for None."""
    if value is None:
        return ""
    return f"{value:.{num_digits}g}" if abs(value) < 10 ** (num_digits - 1) else f"{value:.0f}"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A table in which a narrow terminal folds names and heads, but cuts nothing. Columns of names have no head."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name, *cells in zip(head, *rows, strict=True):
        width = max(map(len, cells), default=0) if name else None
        table.add_column(Text(visible(name)), justify="right" if name else "left", overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table
