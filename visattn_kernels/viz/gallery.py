"""A drawing of every pattern: small maps on which one or two queries light the keys that they see.

The cells are the library's own masks, so that the drawing cannot tell another story than the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from visattn_kernels.patterns import Column, CrissCross, Global, Grid, Neighborhood, Pattern, Row, Size, Window

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAP = Size(8, 12)
"""The map of every panel."""

OUTSIDE = 1
"""How many cells around the map are drawn."""

ACROSS = 4
"""Panels a line."""

EMPTY = (0.93, 0.93, 0.93)
NOWHERE = (1.0, 1.0, 1.0)
KEYS = ((0.99, 0.72, 0.42), (0.52, 0.74, 0.93))
"""The colour of the keys of the first and of the second query."""

BOTH = (0.75, 0.68, 0.79)
"""The colour of the keys of both, violet."""

_DOTS = ("#b34700", "#0b4f8a")


@dataclass(frozen=True)
class Panel:
    """One map.

    Attributes:
        pattern: which keys its queries see.
        queries: one or two of them, (y, x).
    """

    pattern: Pattern
    queries: tuple[tuple[int, int], ...]

    def sees(self) -> list[torch.Tensor]:
        """For each query which cells it sees, `bool[H + 2 * OUTSIDE, W + 2 * OUTSIDE]`."""
        mask = self.pattern.mask(MAP, MAP, outside=True)
        (top, _), (left, _) = self.pattern.margin()
        cells = []
        for y, x in self.queries:
            seen = torch.ones(MAP, dtype=torch.bool) if mask is None else mask[y, x]
            cell = torch.zeros(MAP.height + 2 * OUTSIDE, MAP.width + 2 * OUTSIDE, dtype=torch.bool)
            rows, columns = seen.nonzero(as_tuple=True)
            cell[rows - top + OUTSIDE, columns - left + OUTSIDE] = True
            cells.append(cell)
        return cells

    def colours(self) -> torch.Tensor:
        """The colour of each cell, `[H + 2 * OUTSIDE, W + 2 * OUTSIDE, 3]`."""
        seen = self.sees()
        colours = torch.tensor(NOWHERE).expand(*seen[0].shape, 3).clone()
        inside = slice(OUTSIDE, -OUTSIDE)
        colours[inside, inside] = torch.tensor(EMPTY)
        for cells, colour in zip(seen, KEYS, strict=False):
            colours[cells] = torch.tensor(colour)
        if len(seen) > 1:
            colours[seen[0] & seen[1]] = torch.tensor(BOTH)
        return colours


PANELS = (
    Panel(Global(), ((3, 4),)),
    Panel(Window(4), ((1, 2), (5, 9))),
    Panel(Window(4, shift=2), ((0, 1), (4, 7))),
    Panel(Grid(4), ((0, 0), (3, 7))),
    Panel(Neighborhood(3), ((0, 0), (4, 7))),
    Panel(Neighborhood(3, border="mask"), ((0, 0), (4, 7))),
    Panel(Neighborhood(3, border="zero"), ((0, 0), (4, 7))),
    Panel(Neighborhood(3, dilation=2), ((0, 1), (5, 8))),
    Panel(Neighborhood(3, is_causal=True), ((0, 0), (5, 8))),
    Panel(Row(5), ((0, 0), (5, 7))),
    Panel(Column(), ((2, 3), (5, 9))),
    Panel(CrissCross(), ((2, 3), (5, 9))),
)
"""Every kind of pattern, and every option that changes what is seen."""


def call(pattern: Pattern) -> str:
    """The shortest call that makes a pattern, such as `Window(4, shift=2)`."""
    words = []
    for i, field in enumerate(fields(pattern)):  # type: ignore[arg-type]  # every pattern is a dataclass
        value = getattr(pattern, field.name)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value != field.default:
            text = f'"{value}"' if isinstance(value, str) else str(value)
            words.append(text if i == 0 else f"{field.name}={text}")
    return f"{type(pattern).__name__}({', '.join(words)})"


def sheet() -> Figure:
    """All panels in one figure. Places are plain numbers, so that they are known before it is drawn."""
    down = -(-len(PANELS) // ACROSS)
    figure = Figure(figsize=(2.9 * ACROSS, 2.35 * down + 0.4))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.055, wspace=0.04, hspace=0.16)
    places = figure.subplots(down, ACROSS, squeeze=False).flatten()
    for panel, place in zip(PANELS, places, strict=False):
        _draw(panel, place)
    for place in places[len(PANELS) :]:
        place.remove()
    note = (
        "A dot is a query, its colour the keys that it sees; violet keys are seen by both. "
        'Outside the frame, border="zero" has keys of zeros.'
    )
    figure.text(0.5, 0.018, note, ha="center", fontsize=11, color="0.35")
    return figure


def _draw(panel: Panel, place: Axes) -> None:
    """One map; cell (y, x) of it is centred at the data point (x, y)."""
    height, width = MAP
    place.imshow(
        panel.colours().numpy(),
        extent=(-OUTSIDE - 0.5, width + OUTSIDE - 0.5, height + OUTSIDE - 0.5, -OUTSIDE - 0.5),
        interpolation="nearest",
    )
    for y in range(-OUTSIDE, height + OUTSIDE + 1):
        place.axhline(y - 0.5, color="white", linewidth=1.2)
    for x in range(-OUTSIDE, width + OUTSIDE + 1):
        place.axvline(x - 0.5, color="white", linewidth=1.2)
    place.add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor="0.45", linewidth=1.2, zorder=3))
    for (y, x), colour in zip(panel.queries, _DOTS, strict=False):
        place.plot(x, y, "o", markersize=6, color=colour, zorder=4)
    place.set_title(call(panel.pattern), fontsize=10.5, family="monospace", pad=5)
    place.set_axis_off()
