"""Render systems and comparisons as tables and JSON for `eval`, `batch` and `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from local_rerank.text_files import visible

if TYPE_CHECKING:
    from local_rerank.evaluation.measures import Comparison, System

NUM_EXAMPLES = 3  # queries shown for the largest gains, and for the largest losses
TIE_RULE = (
    "equal scores in a run keep the order of its lines (trec_eval sorts them by document id); "
    "values that differ by at most 1e-9 are ties"
)
QUERY_CHARS = 100  # shown of such a query
COMPARISON_FIELDS = (
    "system", "baseline", "measure", "mean_difference", "wins", "losses", "ties", "p_value", "differences",
)  # fmt: skip
"""Of the JSON report."""


def evaluation_json(systems: Sequence[System], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "systems": [
            {
                "name": system.name,
                "mean": {name: system.mean(name) for name in system.values},
                "by_query": system.values,
            }
            for system in systems
        ],
        "comparisons": [{name: getattr(each, name) for name in COMPARISON_FIELDS} for each in comparisons],
    }


def measure_table(systems: Sequence[System]) -> Any:
    names = list(systems[0].values)
    rows = [[system.name, *(f"{system.mean(name):.4f}" for name in names)] for system in systems]
    return table(["", *names], rows)


def comparison_table(comparisons: Sequence[Comparison]) -> Any:
    rows = [[f"{each.system} - {each.baseline}", *_difference_cells(each)] for each in comparisons]
    return table([f"difference of {comparisons[0].measure}", "mean", "wins", "losses", "ties", "p"], rows)


def _difference_cells(comparison: Comparison) -> list[str]:
    counts = (comparison.wins, comparison.losses, comparison.ties)
    return [f"{comparison.mean_difference:+.4f}", *map(str, counts), f"{comparison.p_value:.4f}"]


def difference_table(baseline: System, system: System, comparisons: Sequence[Comparison]) -> Any:
    """Compare two systems by every measure."""
    rows = [
        [each.measure, *(f"{one.mean(each.measure):.4f}" for one in (baseline, system)), *_difference_cells(each)]
        for each in comparisons
    ]
    return table(["", baseline.name, system.name, "difference", "wins", "losses", "ties", "p"], rows)


def examples_table(comparison: Comparison, queries: dict[str, str]) -> Any:
    examples = [*comparison.largest_wins(NUM_EXAMPLES), *reversed(comparison.largest_losses(NUM_EXAMPLES))]
    rows = [
        [" ".join(queries[query_id].split())[:QUERY_CHARS], query_id, f"{difference:+.3f}"]
        for query_id, difference in examples
    ]
    return table([f"most changed: {comparison.system} - {comparison.baseline}", "query", "difference"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """Align the first column left and the others right; fold long texts and heads, but never a number."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, cells in enumerate(zip(head, *rows, strict=True)):
        if i == 0:
            table.add_column(Text(visible(head[0])), overflow="fold")
        else:
            table.add_column(
                Text(visible(head[i])), justify="right", overflow="fold", min_width=max(map(len, cells[1:]), default=0)
            )
    for row in rows:
        table.add_row(
            *(Text(visible(cell)) for cell in row)
        )  # Text, because rich would read brackets in a query as markup
    return table
