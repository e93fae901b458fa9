"""Plot per-query differences and the reliability of probabilities.

This needs matplotlib, which the extra `local-rerank[eval]` installs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from local_rerank.errors import ConfigError
from local_rerank.evaluation.measures import Comparison, import_extra
from local_rerank.text_files import check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")
GAIN, LOSS = "#2a7f62", "#b5473c"
WIDTH, PANEL_HEIGHT = 8.0, 2.6  # inches


def check_plot(file: Path | None) -> None:
    """Fail before the work rather than after it; raises ConfigError."""
    if file is None:
        return
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot is {file}; it must end in one of {', '.join(SUFFIXES)}")
    check_writable(file, "plot")
    import_extra("matplotlib", "a plot")


def write_plot(file: Path, comparisons: Sequence[Comparison]) -> None:
    """Draw a panel for each comparison with one bar per query, largest gain first; raises ConfigError."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # the first import warns that it builds a font cache
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend and may open a display

    figure = Figure(figsize=(WIDTH, PANEL_HEIGHT * len(comparisons)), layout="constrained")
    panels = figure.subplots(len(comparisons), squeeze=False)[:, 0]
    for axes, comparison in zip(panels, comparisons, strict=True):
        values = list(comparison.differences.values())
        axes.bar(range(len(values)), values, color=[GAIN if value > 0 else LOSS for value in values])
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_title(_title(comparison), fontsize="small", parse_math=False)
        axes.set_ylabel(comparison.measure)
        axes.set_xticks([])
    _save(figure, file)


def write_reliability(file: Path, bins: Mapping[str, Sequence[tuple[float, float, int]]], title: str) -> None:
    """Draw a line for each entry of `bins`: mean probability, share of relevant documents and their number."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * 0.7, WIDTH * 0.7), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.5)
    for (name, each), color in zip(bins.items(), (LOSS, GAIN), strict=True):
        probabilities, shares, counts = zip(*each, strict=True)
        axes.plot(probabilities, shares, marker="o", color=color, label=name)
        for place in zip(probabilities, shares, counts, strict=True):
            axes.annotate(f" {place[2]}", place[:2], fontsize="x-small", color=color, va="top")
    axes.set_xlabel("mean probability; numbers count documents")
    axes.set_ylabel("share of relevant documents")
    axes.set_title(title, fontsize="small", parse_math=False)
    axes.legend()
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    from matplotlib import rc_context

    try:
        with rc_context({"svg.fonttype": "none"}):  # keep text as text
            figure.savefig(file)
    except OSError as error:
        raise ConfigError(f"plot {file} cannot be written: {error.strerror}") from error


def _title(comparison: Comparison) -> str:
    return (
        f"{comparison.system} - {comparison.baseline} by query: mean {comparison.mean_difference:+.3f}, "
        f"{comparison.wins} wins, {comparison.losses} losses"
    )
