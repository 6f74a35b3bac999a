"""The drawing of the patterns: each cell's colour against the keys that the formula written by hand sees."""

from __future__ import annotations

from pathlib import Path

import by_hand
import pytest

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
testing = pytest.importorskip("typer.testing")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

import visattn_kernels as va  # noqa: E402
from visattn_kernels.patterns import PATTERN_KINDS  # noqa: E402
from visattn_kernels.viz import app as command  # noqa: E402
from visattn_kernels.viz import gallery, output  # noqa: E402


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def visattn(*arguments):
    """Run the command in this process."""
    return testing.CliRunner().invoke(command.app, list(arguments), prog_name="visattn")


def cell_colours(picture):
    """Each panel and the colours of its cells, `[H + 2, W + 2, 3]`, away from the dot that one may hold."""
    figure = gallery.sheet()
    figure.dpi = output.DPI
    height, width = gallery.MAP
    for panel, place in zip(gallery.PANELS, figure.axes, strict=False):
        place.apply_aspect()
        cells = np.empty((height + 2, width + 2, 3))
        for y, x in np.ndindex(*cells.shape[:2]):
            right, up = place.transData.transform((x - 1 + 0.3, y - 1 + 0.3))
            cells[y, x] = picture[picture.shape[0] - 1 - int(up), int(right)] / 255
        yield panel, cells


def colour(seen):
    """The colour of a cell that the first query sees, and the second."""
    return gallery.BOTH if all(seen) else gallery.KEYS[0] if seen[0] else gallery.KEYS[1] if seen[1] else None


def test_each_cell_shows_who_sees_it(folder):
    result = visattn("patterns")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert result.stdout == "wrote      patterns.png\n"
    assert [path.name for path in folder.iterdir()] == ["patterns.png"]
    with Image.open("patterns.png") as image:
        picture = np.asarray(image.convert("RGB"), dtype=float)
    assert gallery.OUTSIDE == 1
    panels = 0
    for panel, cells in cell_colours(picture):
        keys = [{key[:2] for key in by_hand.keys_of(panel.pattern, *gallery.MAP, *query)} for query in panel.queries]
        for y, x in np.ndindex(*cells.shape[:2]):
            place = (y - 1, x - 1)
            inside = 0 <= place[0] < gallery.MAP.height and 0 <= place[1] < gallery.MAP.width
            seen = [place in keys[0], len(keys) > 1 and place in keys[1]]
            want = colour(seen) or (gallery.EMPTY if inside else gallery.NOWHERE)
            assert np.abs(cells[y, x] - want).max() < 0.01, (gallery.call(panel.pattern), place)
        panels += 1
    assert panels == len(gallery.PANELS)


def test_every_pattern_is_drawn_and_nothing_is_cut_off():
    assert {type(panel.pattern).__name__ for panel in gallery.PANELS} == set(PATTERN_KINDS)
    for panel in gallery.PANELS:
        (top, bottom), (left, right) = panel.pattern.margin()
        assert max(top, bottom, left, right) <= gallery.OUTSIDE
        assert eval(gallery.call(panel.pattern), vars(va)) == panel.pattern


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (va.Global(), "Global()"),
        (va.Window((4, 4), (2, 2)), "Window(4, shift=2)"),
        (va.Window((2, 3)), "Window((2, 3))"),
        (va.Neighborhood(3, 1, "mask", (True, False)), 'Neighborhood(3, border="mask", is_causal=(True, False))'),
        (va.Row(), "Row()"),
    ],
)
def test_a_pattern_is_named_by_its_call(pattern, text):
    assert gallery.call(pattern) == text


def test_keys_outside_the_map_keep_clear_of_the_titles():
    figure = gallery.sheet()
    FigureCanvasAgg(figure).draw()
    for panel, place in zip(gallery.PANELS, figure.axes, strict=False):
        _, top = place.transData.transform((0, -0.5 - gallery.OUTSIDE))
        assert place.title.get_window_extent().y0 > top + 1, gallery.call(panel.pattern)
    note = figure.texts[0].get_window_extent()
    assert 0 <= note.x0 < note.x1 <= figure.bbox.width


def test_a_page_and_refusals(folder):
    assert visattn("patterns", "-o", "p.pdf").exit_code == 0
    assert Path("p.pdf").read_bytes().startswith(b"%PDF")
    result = visattn("patterns", "-o", "p.gif")
    assert result.exit_code == 2
    assert result.stderr.startswith("visattn: expected --output to end in .png or .pdf")
    assert visattn("patterns", "-o", "").stderr.endswith("but got --output=''\n")
    assert [path.name for path in folder.iterdir()] == ["p.pdf"]


def test_ctrl_c_leaves_the_file_that_was_there(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    Path("patterns.png").write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", interrupt)
    result = visattn("patterns")
    assert (result.exit_code, result.stderr) == (130, "visattn: interrupted, nothing was written\n")
    assert Path("patterns.png").read_bytes() == b"old"
    assert [path.name for path in Path().iterdir()] == ["patterns.png"]
