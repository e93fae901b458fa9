"""What was measured, for people: tables of text, and one plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from local_rerank.bench.measure import Measured, ScalingStep

# pixels
WIDTH, LEFT, LINE, BAR, PANEL_GAP = 720, 190, 24, 16, 44
COLOURS = ("#2a7f62", "#3d6fb5", "#b5473c", "#8a6d3b", "#6b4fa0", "#777777")


def workload_table(measured: Measured) -> Any:
    """Rates, ratios and shares of each system."""
    title = (
        f"{measured.workload}: {measured.about}; {measured.num_requests} request(s), {measured.num_pairs} pairs, "
        f"{measured.num_tokens} tokens"
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
        for row in measured.rows
    ]
    return _table(title, ["", "seconds", "time x", "pairs/s", "tokens/s", "TFLOP/s", "of ceiling"], rows)


def latency_table(measured: Sequence[Measured]) -> Any:
    """Latencies of the requests, the most memory over the weights, and what tokenizing takes."""
    rows = [
        [
            each.workload,
            row.system,
            *(_or_empty(row.latency_ms.get(name), ".4g") for name in ("p50", "p95", "p99")),
            str(row.num_latencies or ""),
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
            _or_empty(row.tokenize_share, ".1%"),
        ]
        for each in measured
        for row in each.rows
    ]
    return _table("requests", ["", "", "p50 ms", "p95", "p99", "of", "memory", "tokenizing"], rows)


def agreement_table(measured: Sequence[Measured]) -> Any:
    """How far each system's log-odds are from those of the fp32 reference."""
    rows = [
        [each.workload, row.system, f"{row.agreement.largest:.2g}", f"{row.agreement.mean:.2g}",
         f"{row.agreement.kendall_tau:.4f}"]
        for each in measured for row in each.rows if row.agreement is not None
    ]  # fmt: skip
    title = "log-odds against the fp32 reference"
    return _table(title, ["", "", "largest difference", "mean", "Kendall's tau"], rows)


def scaling_table(name: str, steps: Sequence[ScalingStep]) -> Any:
    """Time by number of documents."""
    rows = [
        [str(step.num_documents), str(step.num_tokens), f"{step.seconds:.3g}", f"{step.seconds_per_token * 1e6:.4g}",
         _or_empty(step.growth, ".3f")]
        for step in steps
    ]  # fmt: skip
    head = ["documents", "tokens", "seconds", "µs a token", "time/tokens against the row above"]
    return _table(f"{name}: cost by size", head, rows)


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


def speed_plot(measured: Sequence[Measured]) -> str:
    """An SVG document: pairs per second, a panel for each workload, a bar for each system."""
    lines: list[str] = []
    top = 8
    for each in measured:
        lines += _panel(each, top)
        top += PANEL_GAP + LINE * len(each.rows)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}" '
        f'font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{top}" fill="white"/>', *lines, "</svg>\n"])


def _panel(measured: Measured, top: int) -> list[str]:
    title = f"{measured.workload}: pairs per second ({measured.num_pairs} pairs, {measured.num_tokens} tokens)"
    lines = [f'<text x="8" y="{top + 18}" font-weight="bold">{escape(title)}</text>']
    most = max(row.pairs_per_second for row in measured.rows)
    for i, row in enumerate(measured.rows):
        y = top + 30 + LINE * i
        width = (WIDTH - LEFT - 150) * row.pairs_per_second / most
        value = f"{row.pairs_per_second:.4g}  ({1 / row.ratio:.2f}x)"
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(row.system)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[i % len(COLOURS)]}"/>',
            f'<text x="{LEFT + width + 6:.1f}" y="{y + 13}">{value}</text>',
        ]
    return lines
