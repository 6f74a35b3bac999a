"""A picture of the ratios: how many times faster than the best peer."""

from __future__ import annotations

import io
from pathlib import Path

from benchmarks.results import Report, write_whole
from benchmarks.table import figures

_COLOURS = {"forward": "#2a78b8", "both": "#e08a2e"}
_LABELS = {"forward": "forward", "both": "forward + backward"}


def draw(report: Report, path: Path) -> None:
    """Write a bar chart of a report's ratios, whole or not at all.

    Args:
        report: what was measured.
        path: the picture; its ending says the format.

    Raises:
        ValueError: the report has no ratio, or the ending is no picture's.
    """
    from matplotlib.figure import Figure

    bars: dict[tuple[str, str], dict[str, float]] = {}
    for cell in report.cells:
        ratio = cell.ratio(cell.ours) if cell.ours else None
        if cell.which in _COLOURS and ratio is not None:
            bars.setdefault((cell.workload, cell.dtype), {})[cell.which] = ratio
    if not bars:
        raise ValueError(f"{report.name} has no cell with both a peer and one of our backends")
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for offset, (which, colour) in zip((-0.2, 0.2), _COLOURS.items(), strict=True):
        rows = [i for i, ratios in enumerate(bars.values()) if which in ratios]
        ratios = [ratios[which] for ratios in bars.values() if which in ratios]
        # From 1 outwards, since the axis is logarithmic: a length has a meaning there, an area from 0 has none.
        lengths = [ratio - 1 for ratio in ratios]
        drawn = axes.barh([row + offset for row in rows], lengths, 0.38, 1, color=colour, label=_LABELS[which])
        axes.bar_label(drawn, [f"{figures(ratio)}×" for ratio in ratios], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    highest = max(max(ratios.values()) for ratios in bars.values())
    lowest = min(min(ratios.values()) for ratios in bars.values())
    axes.set_xlim(min(0.9, lowest / 1.3), 1.3 * max(highest, 2))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.set_yticks(range(len(bars)), [f"{workload}, {dtype}" for workload, dtype in bars])
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the best peer, the same run")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lstrip(".") or "png", dpi=150)
    write_whole(path, picture.getvalue())
