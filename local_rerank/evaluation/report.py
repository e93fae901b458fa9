"""Systems and comparisons -> tables, JSON and a picture: what `eval`, `batch` and `compare` show of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from local_rerank.errors import ConfigError

if TYPE_CHECKING:
    from local_rerank.evaluation.measures import Comparison, System

NUM_EXAMPLES = 3  # queries that gained or lost most, of each comparison
QUERY_CHARS = 100  # of such a query that are shown


def check_plot(plot: Path | None) -> None:
    """Before the work, not after it; raises ConfigError."""
    if plot is not None and plot.suffix != ".svg":
        raise ConfigError(f"plot is {plot}; only .svg can be written")


def write_plot(file: Path, comparisons: Sequence[Comparison]) -> None:
    from local_rerank.evaluation.plot import difference_plot

    try:
        file.write_text(difference_plot(comparisons), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"plot {file} cannot be written: {error.strerror}") from error


def comparison_record(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON has it."""
    return {
        "system": comparison.system,
        "baseline": comparison.baseline,
        "measure": comparison.measure,
        "mean_difference": comparison.mean_difference,
        "wins": comparison.wins,
        "losses": comparison.losses,
        "ties": comparison.ties,
        "p_value": comparison.p_value,
        "differences": comparison.differences,
    }


def measure_table(systems: Sequence[System]) -> Any:
    names = list(systems[0].values)
    rows = [[system.name, *(f"{system.mean(name):.4f}" for name in names)] for system in systems]
    return _table(["", *names], rows)


def comparison_table(comparisons: Sequence[Comparison]) -> Any:
    rows = [
        [
            f"{comparison.system} - {comparison.baseline}",
            f"{comparison.mean_difference:+.4f}",
            *(str(count) for count in (comparison.wins, comparison.losses, comparison.ties)),
            f"{comparison.p_value:.4f}",
        ]
        for comparison in comparisons
    ]
    return _table([f"difference of {comparisons[0].measure}", "mean", "wins", "losses", "ties", "p"], rows)


def difference_table(baseline: System, system: System, comparisons: Sequence[Comparison]) -> Any:
    """Two systems by every measure."""
    rows = [
        [
            comparison.measure,
            *(f"{each.mean(comparison.measure):.4f}" for each in (baseline, system)),
            f"{comparison.mean_difference:+.4f}",
            *(str(count) for count in (comparison.wins, comparison.losses, comparison.ties)),
            f"{comparison.p_value:.4f}",
        ]
        for comparison in comparisons
    ]
    return _table(["", baseline.name, system.name, "difference", "wins", "losses", "ties", "p"], rows)


def examples_table(comparison: Comparison, queries: dict[str, str]) -> Any:
    examples = [*comparison.largest_wins(NUM_EXAMPLES), *reversed(comparison.largest_losses(NUM_EXAMPLES))]
    rows = [
        [" ".join(queries[query_id].split())[:QUERY_CHARS], query_id, f"{difference:+.3f}"]
        for query_id, difference in examples
    ]
    return _table([f"most changed: {comparison.system} - {comparison.baseline}", "query", "difference"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """First column left, the others right; it is folded where it must be, and so are long heads, but no number."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, cells in enumerate(zip(head, *rows, strict=True)):
        if i == 0:
            table.add_column(Text(head[0]), overflow="fold")
        else:
            table.add_column(
                Text(head[i]), justify="right", overflow="fold", min_width=max(map(len, cells[1:]), default=0)
            )
    for row in rows:
        table.add_row(*map(Text, row))  # Text: brackets in a query are no markup
    return table
