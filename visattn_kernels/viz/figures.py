"""The pictures: four figures of a picture's self-attention, and heat maps of rows of the attention map."""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from visattn_kernels.viz.exits import MissingError

try:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.textpath import TextToPath
except ModuleNotFoundError as error:
    raise MissingError(error.name or "matplotlib", "drawing") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase
    from matplotlib.image import AxesImage

CHANNELS = ("red", "green", "blue")
"""The channels of a picture, in order."""

PANEL_AREA = 8.0
"""Area of a panel in square inches; its shape is the picture's, within limits."""

MIN_WIDTH = 5.5
"""Width in inches that the captions below a figure need."""

MARGIN = 0.15
"""Inches around a figure."""

CLIPPED = 0.003
"""Share of the largest numbers that products and heat maps show alike, so that the rest is not dark."""

# From black through the channel's colour to a light tint: blue alone is too dark to tell its levels apart.
_CHANNEL_MAPS = tuple(
    LinearSegmentedColormap.from_list(name, colours)
    for name, colours in zip(
        CHANNELS,
        (
            ("#000000", "#8f0d12", "#e8452c", "#ffe3d6"),
            ("#000000", "#0b5a26", "#3aa83f", "#e6f9dc"),
            ("#000000", "#123a94", "#3d8be0", "#def0ff"),
        ),
        strict=True,
    )
)
_HEAT = "inferno"
_MARK = "#00e5ff"
# A caption holds the name of a file, in which $ and \\ and ^ are letters.
_CAPTION: dict[str, Any] = {"fontsize": 10, "color": "0.35", "parse_math": False, "usetex": False}
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

Range = tuple[float, float]
"""The numbers shown black and full."""


@dataclass(frozen=True)
class Quartet:
    """One figure of 2×2 panels: a picture and its three channels.

    Attributes:
        title: what it is.
        note: how it is shown.
        values (Tensor[H, W, 3]): the numbers themselves.
        whole: the numbers shown black and full in the picture, one pair that keeps hues.
        channels: the same for each channel alone.
    """

    title: str
    note: str
    values: torch.Tensor
    whole: Range
    channels: tuple[Range, ...]


def quartets(colours: torch.Tensor, attended: torch.Tensor, power: float) -> list[Quartet]:
    """The four figures of a picture: itself, its attention, attention × picture, attentionᵖ × picture.

    Attention is a weighted mean of colours and spans a narrow range, so it is stretched; the products are brightened.

    Args:
        colours (Tensor[H, W, 3]): the picture in [0, 1].
        attended (Tensor[H, W, 3]): its attention.
        power: exponent of the third product.
    """
    full = (0.0, 1.0)
    digits = f"{power:g}"
    exponent = digits.translate(_SUPERSCRIPT) if digits.isdecimal() else f"$^{{{digits}}}$"
    stretched = "stretched from minimum to maximum, channels apart"
    return [
        Quartet("Picture", "shown as it is", colours, full, (full,) * 3),
        _quartet("Attention", stretched, attended, _extent),
        _brightened("Attention × picture", attended * colours),
        _brightened(f"Attention{exponent} × picture", attended**power * colours),
    ]


def _quartet(title: str, note: str, values: torch.Tensor, span: Callable[[torch.Tensor], Range]) -> Quartet:
    """A figure that shows the span of all channels, and of each in its own panel."""
    return Quartet(title, note, values, span(values), tuple(span(channel) for channel in values.unbind(-1)))


def _brightened(title: str, values: torch.Tensor) -> Quartet:
    """A figure shown from 0 to (nearly) the largest value."""
    top = _from_zero(values)[1]
    return _quartet(title, f"brightened ×{1 / top:.3g}, channels apart", values, _from_zero)


def _extent(values: torch.Tensor) -> Range:
    """From the least value to the largest."""
    return float(values.min()), float(values.max())


def _from_zero(values: torch.Tensor) -> Range:
    """From 0 to the value that all but the brightest pixels stay below."""
    # numpy's quantile, since torch's refuses more than 2^24 elements.
    top = float(np.quantile(values.numpy(), 1 - CLIPPED))
    return 0.0, top or float(values.max()) or 1.0


def attend_pages(parts: Sequence[Quartet], caption: str) -> list[Figure]:
    """One figure for each part, as the pages of a document."""
    pages = []
    for part in parts:
        width, height = _panel_size(part.values, 2 * PANEL_AREA)
        page = _figure(max(2 * width + 0.6, MIN_WIDTH), 2 * height + 1.6)
        _draw_quartet(page, part, f"{part.note}\n{caption}", page.get_figwidth())
        pages.append(page)
    return pages


def attend_sheet(parts: Sequence[Quartet], caption: str) -> Figure:
    """All parts, two a row, in one figure."""
    width, height = _panel_size(parts[0].values, PANEL_AREA)
    rows = math.ceil(len(parts) / 2)
    sheet = _figure(max(4 * width + 1.2, 2 * MIN_WIDTH), rows * (2 * height + 1.3) + 0.3)
    cells = sheet.subfigures(rows, 2, squeeze=False, wspace=0.04, hspace=0.04).flat
    for cell, part in zip(cells, parts, strict=False):
        _draw_quartet(cell, part, part.note, sheet.get_figwidth() / 2)
    _write_caption(sheet, caption, sheet.get_figwidth() - 2 * MARGIN)
    return sheet


def _write_caption(place: FigureBase, caption: str, width: float) -> None:
    """Write lines below all, broken to a width in inches, in letters that the font has.

    The others are escaped, as Python escapes them: matplotlib would warn of each, and draw a box.
    """
    letters = set[int]()
    for family in FontProperties().get_family():
        with contextlib.suppress(ValueError):
            path = findfont(FontProperties(family=[family]), fallback_to_default=False)
            letters |= set(get_font(path).get_charmap())
    lines = (
        "".join(x if ord(x) in letters else x.encode("unicode_escape").decode() for x in line)
        for line in caption.splitlines()
    )
    place.supxlabel("\n".join(part for line in lines for part in _broken(line, 72 * width)), **_CAPTION)


def _broken(line: str, width: float) -> Iterator[str]:
    """Break a line that is wider than a width in points: at a space, or in a word that takes the half of it."""

    def reach(letters: int, line: str) -> float:
        return TextToPath().get_text_width_height_descent(
            line[:letters], FontProperties(size=_CAPTION["fontsize"]), False
        )[0]

    while line:
        fits = bisect_right(range(1, len(line) + 1), width, key=partial(reach, line=line)) or 1
        space = line.rfind(" ", 0, fits + 1)
        end = fits if fits == len(line) or space < fits / 2 else space
        yield line[:end]
        line = line[end:].lstrip()


def _figure(width: float, height: float) -> Figure:
    """A figure of that size in inches, with a margin."""
    margins = (MARGIN / width, MARGIN / height, 1 - 2 * MARGIN / width, 1 - 2 * MARGIN / height)
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(rect=margins, h_pad=0.07))


def _panel_size(values: torch.Tensor, area: float) -> tuple[float, float]:
    """Width and height of a panel in inches, shaped like the picture."""
    aspect = min(max(values.shape[1] / values.shape[0], 1 / 3), 3.0)
    width = math.sqrt(area * aspect)
    return width, width / aspect


def _draw_quartet(place: FigureBase, part: Quartet, note: str, width: float) -> None:
    """Draw the picture and its channels into a figure or a part of one, of a width in inches."""
    place.suptitle(part.title, fontsize=16, fontweight="bold")
    _write_caption(place, note, width - 2 * MARGIN)
    panels = place.subplots(2, 2).flat
    low, high = part.whole
    colours = ((part.values - low) / max(high - low, 1e-30)).clamp(0, 1)
    _draw(next(panels), colours, "red, green and blue")
    for i, (name, (low, high)) in enumerate(zip(CHANNELS, part.channels, strict=True)):
        values = part.values[:, :, i]
        title = f"{name}:  {_number(float(values.min()))} to {_number(float(values.max()))}"
        # Equal limits would make matplotlib widen them around the value.
        _draw(next(panels), values, title, cmap=_CHANNEL_MAPS[i], vmin=low, vmax=max(high, low + 1e-30))


def _number(value: float) -> str:
    return f"{value:.2f}" if value == 0 or value >= 0.095 else f"{value:.2g}"


def _draw(panel: Axes, values: torch.Tensor, title: str, **options: Any) -> AxesImage:
    """One panel without ticks and frame."""
    panel.set_title(title, fontsize=11)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    return panel.imshow(values.numpy(), **options)


@dataclass(frozen=True)
class HeatMap:
    """One row of the attention map.

    Attributes:
        point: the query (y, x).
        weights (Tensor[H, W]): its weights, which sum to 1.
    """

    point: tuple[int, int]
    weights: torch.Tensor


def map_pages(colours: torch.Tensor, rows: Sequence[HeatMap], caption: str) -> list[Figure]:
    """One figure for each row, as the pages of a document."""
    return [map_sheet(colours, [row], caption, 2 * PANEL_AREA) for row in rows]


def map_sheet(colours: torch.Tensor, rows: Sequence[HeatMap], caption: str, area: float = 1.5 * PANEL_AREA) -> Figure:
    """For each row the picture with the query marked and, beside it, the heat map; several a line where many.

    Args:
        colours (Tensor[H, W, 3]): the picture.
        rows: rows of its attention map.
        caption: a line below all.
        area: area of a panel in square inches.
    """
    width, height = _panel_size(colours, area)
    across = max(1, round(math.sqrt(len(rows) * height / (2 * width))))
    down = math.ceil(len(rows) / across)
    sheet = _figure(max(across * (2 * width + 1.2), MIN_WIDTH), down * (height + 0.5) + 0.6)
    # The panel itself is narrower where the picture's shape is beyond the limits.
    bar_width = min(0.14 / min(width, height * colours.shape[1] / colours.shape[0]), 1.0)
    cells = sheet.subfigures(down, across, squeeze=False, hspace=0.03, wspace=0.03).flat
    for cell, row in zip(cells, rows, strict=False):
        _draw_row(cell, colours, row, bar_width)
    _write_caption(sheet, caption, sheet.get_figwidth() - 2 * MARGIN)
    return sheet


def _draw_row(place: FigureBase, colours: torch.Tensor, row: HeatMap, bar_width: float) -> None:
    """The picture and the heat map with its bar (in widths of a panel), the query marked in both."""
    left, right = place.subplots(1, 2)
    y, x = row.point
    # In units of the weight that attention would give if it looked everywhere alike.
    relative = row.weights * row.weights.numel()
    most, top = float(relative.max()), _from_zero(relative)[1]
    _draw(left, colours, f"query at y {y}, x {x}")
    heat = _draw(right, relative, "its attention", cmap=_HEAT, vmin=0, vmax=top)
    for panel in (left, right):
        for colour, thickness in (("black", 3.5), (_MARK, 1.8)):
            panel.plot(x, y, "o", ms=13, mfc="none", mec=colour, mew=thickness, clip_on=False)
    # Inside the panel's own frame, so that it is as high as the panel.
    frame = right.inset_axes((1 + bar_width, 0, bar_width, 1))
    bar = place.colorbar(heat, cax=frame, extend="max" if most > top else "neither")
    bar.set_label("weight ÷ uniform weight", fontsize=9)
    bar.ax.tick_params(labelsize=8)
