"""Render benchmark results as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from local_rerank.bench.measure import WorkloadResult


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
            f"{statistics.median(row.seconds):.3g}",
            f"{row.ratio:.2f}",
            f"{row.pairs_per_second:.4g}",
            f"{row.tokens_per_second:.4g}",
            "" if row.useful_tflops is None else f"{row.useful_tflops:.3g}",
            "" if row.useful_share is None else f"{row.useful_share:.0%} of {row.ceiling_tflops:.3g}",
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
            *(_or_empty(row.latency_ms.get(name), ".4g") for name in ("p50", "p95", "p99")),
            str(row.num_latencies or ""),
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
            _or_empty(row.tokenize_share, ".1%"),
        ]
        for each in results
        for row in each.rows
    ]
    return _table("requests", ["", "", "p50 ms", "p95", "p99", "of", "memory", "tokenization"], rows)


def agreement_table(results: Sequence[WorkloadResult]) -> Any:
    """Differences of log-odds from the fp32 reference."""
    rows = [
        [each.workload, row.system, f"{row.agreement.largest:.2g}", f"{row.agreement.mean:.2g}",
         f"{row.agreement.kendall_tau:.4f}"]
        for each in results for row in each.rows if row.agreement is not None
    ]  # fmt: skip
    title = "log-odds compared with the fp32 reference"
    return _table(title, ["", "", "largest difference", "mean", "Kendall's tau"], rows)


def _or_empty(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in head:
        table.add_column(Text(name), justify="right" if name else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
