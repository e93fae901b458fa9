"""Comparisons -> one SVG picture: per-query differences as bars, the greatest gain first, a panel for each comparison.

Drawn by hand: the picture is rectangles and a few labels, for which matplotlib and what it needs would be 40 MB more to
install. The text is plain SVG 1.1 that any browser shows; pointing at a bar names its query.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from local_rerank.evaluation.measures import Comparison

# pixels
WIDTH, PANEL_HEIGHT = 720, 220
LEFT, TITLE, BOTTOM = 48, 34, 16
COLOURS = {True: "#2a7f62", False: "#b5473c"}  # gain, loss


def difference_plot(comparisons: Sequence[Comparison]) -> str:
    """An SVG document."""
    height = PANEL_HEIGHT * len(comparisons)
    panels = [_panel(comparison, PANEL_HEIGHT * i) for i, comparison in enumerate(comparisons)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *(line for panel in panels for line in panel),
            "</svg>\n",
        ]
    )


def _panel(comparison: Comparison, top: int) -> list[str]:
    """Title, axis from the greatest loss to the greatest gain around 0, and a bar for each query."""
    values = comparison.differences
    reach = max((abs(value) for value in values.values()), default=0) or 1.0
    half = (PANEL_HEIGHT - TITLE - BOTTOM) / 2
    zero, step = top + TITLE + half, (WIDTH - LEFT - 16) / len(values)
    title = (
        f"{comparison.system} against {comparison.baseline}, {comparison.measure} by query: "
        f"{comparison.mean_difference:+.3f} on average, {comparison.wins} up, {comparison.losses} down"
    )
    lines = [f'<text x="{LEFT}" y="{top + 20}">{escape(title)}</text>']
    for value in (reach, 0.0, -reach):
        y = zero - half * value / reach
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:+.2f}</text>')
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - 16}" y2="{y:.1f}" stroke="#ccc"/>')
    for i, (query_id, value) in enumerate(values.items()):
        size = half * abs(value) / reach
        lines.append(
            f'<rect x="{LEFT + i * step:.2f}" y="{zero - size if value > 0 else zero:.2f}" width="{step * 0.9:.2f}" '
            f'height="{size:.2f}" fill="{COLOURS[value > 0]}"><title>{escape(query_id)} {value:+.3f}</title></rect>'
        )
    return lines
