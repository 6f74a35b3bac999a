"""The commands that draw: what they compute, draw, print, write and refuse."""

from __future__ import annotations

import io
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
testing = pytest.importorskip("typer.testing")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from tolerance import check, element_bound  # noqa: E402

from visattn_cli import printable  # noqa: E402
from visattn_kernels import backends, reference  # noqa: E402
from visattn_kernels.patterns import Global  # noqa: E402
from visattn_kernels.viz import app as command  # noqa: E402
from visattn_kernels.viz import compute, figures, images, output  # noqa: E402

SMALL = ("--size", "24x16")
HERE = Path(__file__).resolve().parents[1]
AVAILABLE = [backend.name for backend in backends.REGISTRY if not backend.unavailable()]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def photo(tmp_path):
    """A picture beside the working folder."""
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(path)
    return path


def visattn(*arguments):
    """Run the command in this process."""
    return testing.CliRunner().invoke(command.app, [str(argument) for argument in arguments], prog_name="visattn")


def complaints(text):
    """Standard error without the note on a slow backend."""
    return re.sub(r"visattn: falling back to the reference backend.*\n", "", text)


def refused(result, folder, *parts):
    """Whether a run ended in one line on stderr, exit code 2 and an empty folder."""
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("visattn: "), result.stderr
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr, result.stderr
    assert list(folder.iterdir()) == []


def colours(height, width, dtype=torch.float32):
    """Random colours."""
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)


def hold(out, picture, backend, rows=...):
    """Hold the self-attention of a picture (some rows of it) to the tolerance policy; rule 3 is for kernels."""
    keys = picture[None, :, :, None]  # [1, H, W, 1, 3]
    queries = picture.reshape(-1, 3)[rows][None, None, :, None]  # [1, 1, rows, 1, 3]
    doubles = queries.double(), keys.double(), keys.double(), Global()
    check(
        "out",
        out.reshape(-1, 3)[rows][None, None, :, None],
        reference.formula(*doubles, scale=1.0)[0],
        reference.formula(queries, keys, keys, Global(), scale=1.0)[0],
        picture.dtype,
        bound=None if backend == "reference" else element_bound(*doubles, 1.0, picture.dtype),
    )


# What is computed


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize(("height", "width"), [(7, 11), (1, 9), (9, 1), (1, 1), (31, 23)])
def test_self_attention_in_slabs_is_attention(monkeypatch, backend, height, width):
    monkeypatch.setattr(compute, "ENGINE_PAIRS", 1)
    monkeypatch.setattr(compute, "ENGINE_QUERIES", 50)
    monkeypatch.setattr(compute, "REFERENCE_PAIRS", 50 * height * width)
    picture, done = colours(height, width), []
    out = compute.self_attention(picture, backend=backend, advance=done.append)
    assert sum(done) == height * width
    assert len(done) == math.ceil(height * width / 50)
    hold(out, picture, backend)


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the reference takes minutes")
def test_self_attention_of_the_photograph_on_a_sample_of_rows():
    picture = images.load_sample("china", None).colours
    with compute.Meter() as meter:
        out = compute.self_attention(picture, backend="cpu")
    hold(out, picture, "cpu", torch.randint(68_160, (128,), generator=torch.Generator().manual_seed(2)))
    assert meter.peak_bytes is None or meter.peak_bytes < 100e6


@pytest.mark.parametrize("backend", AVAILABLE)
def test_self_attention_in_float64_of_a_transposed_picture(backend):
    picture = colours(13, 8, torch.float64).transpose(0, 1)
    hold(compute.self_attention(picture, backend=backend), picture, backend)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_rows_of_the_map_are_softmaxes_of_centred_colours(backend):
    picture, at, scale = colours(9, 12, torch.float64), [(0, 0), (8, 11), (3, 7), (3, 7)], 5.0
    rows = compute.colour_rows(picture, at, scale=scale, backend=backend)
    flat = (picture - picture.mean((0, 1))).reshape(-1, 3)
    whole = torch.softmax(scale * flat @ flat.T, -1)
    expected = torch.stack([whole[y * 12 + x].reshape(9, 12) for y, x in at])
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-12)


def test_the_default_scale_gives_every_picture_logits_of_one_size():
    picture = colours(20, 20)
    for contrast in (1.0, 0.1):
        centred = compute.centred(contrast * picture)
        logits = compute.natural_scale(contrast * picture, 4.0) * centred.square().sum(-1)
        assert float(logits.mean()) == pytest.approx(4.0, rel=1e-5)
    assert compute.natural_scale(torch.full((4, 4, 3), 0.5), 4.0) == 1.0


def test_the_naive_code_would_need_two_maps():
    assert compute.naive_bytes(320 * 213) == 37_166_284_800


def test_the_meter_sees_memory_that_was_freed_again():
    with compute.Meter() as meter:
        torch.ones(100_000_000 // 4).sum()
    assert meter.seconds > 0
    if meter.peak_bytes is not None and "above its value before" in meter.method:
        assert 60e6 < meter.peak_bytes < 200e6


def test_the_meter_where_the_peak_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(compute, "_reset_peak", lambda: False)
    with compute.Meter() as meter:
        pass
    assert meter.peak_bytes is None or "lower bound" in meter.method


def test_a_large_picture_is_cut_into_short_slabs():
    slabs = list(compute._slabs(320 * 213, "cpu"))
    assert len(slabs) > 5
    assert all(stop - start >= 4096 for start, stop in slabs[:-1])
    assert slabs[-1][1] == 320 * 213
    assert max(stop - start for start, stop in compute._slabs(320 * 213, "reference")) < 100


# What is written and printed


def pages(content):
    """Number of pages of a PDF."""
    return len(re.findall(rb"/Type /Page\b(?!s)", content))


def test_attend_writes_a_png(folder):
    result = visattn("attend", *SMALL)
    assert result.exit_code == 0, result.output
    assert complaints(result.stderr) == ""
    for part in ("china.jpg, 24×16", "640×427", "384 positions", "1.2 MB: 2 maps", "wrote", "time"):
        assert part in result.stdout
    assert [path.name for path in folder.iterdir()] == ["attend.png"]
    with Image.open("attend.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 1000
        # Sixteen panels in colour leave no large part of the sheet empty.
        assert np.asarray(image.convert("L").resize((40, 32))).std() > 30


def test_attend_writes_a_pdf_of_four_pages(folder, photo):
    result = visattn("attend", photo, "-o", "out.PDF", "--power", "2.5")
    assert result.exit_code == 0, result.output
    assert "photo.png, 24×16" in result.stdout
    assert "resized" not in result.stdout
    content = Path("out.PDF").read_bytes()
    assert content.startswith(b"%PDF")
    assert pages(content) == 4
    assert [path.name for path in folder.iterdir()] == ["out.PDF"]


@pytest.mark.fast
def test_map_writes_a_png(folder):
    result = visattn("map", "--sample", "flower", *SMALL, "--at", "0,0", "--at", "15,23")
    assert result.exit_code == 0, result.output
    assert complaints(result.stderr) == ""
    assert "at 0,0" in result.stdout
    assert "at 15,23" in result.stdout
    assert "scale" in result.stdout
    with Image.open("map.png") as image:
        image.load()
        assert image.format == "PNG"
    assert [path.name for path in folder.iterdir()] == ["map.png"]


def test_map_writes_a_pdf_with_a_page_a_point(photo):
    points = [argument for y in range(3) for argument in ("--at", f"{y},5")]
    result = visattn("map", photo, *points, "-o", "out.pdf", "--scale", "7")
    assert result.exit_code == 0, result.output
    assert pages(Path("out.pdf").read_bytes()) == 3


@pytest.mark.parametrize("size", ["1x1", "60x1", "1x60"])
@pytest.mark.parametrize("colour", ["black", "#334455"])
def test_pictures_of_odd_shape_and_one_colour(tmp_path, size, colour):
    Image.new("RGB", (3, 3), colour).save(tmp_path / "x.png")
    result = visattn("attend", tmp_path / "x.png", "--size", size)
    assert result.exit_code == 0, result.output
    result = visattn("map", tmp_path / "x.png", "--size", size, "--at", "0,0")
    assert result.exit_code == 0, result.output


def test_figures_show_the_numbers():
    picture = colours(6, 8)
    parts = figures.quartets(picture, picture**2, 3.0)
    assert [part.title for part in parts] == [
        "Picture",
        "Attention",
        "Attention × picture",
        "Attention³ × picture",
    ]
    for part, values in zip(parts, (picture, picture**2, picture**3, picture**7), strict=True):
        torch.testing.assert_close(part.values, values)
    assert parts[1].channels[0] == (float((picture**2)[..., 0].min()), float((picture**2)[..., 0].max()))
    assert len(figures.attend_pages(parts, "")) == 4


def test_the_heat_map_is_the_row():
    weights = torch.softmax(10 * colours(6, 8)[..., 0].flatten(), 0).reshape(6, 8)
    sheet = figures.map_sheet(colours(6, 8), [figures.HeatMap((2, 3), weights)], "")
    left, right = (panel for cell in sheet.subfigs for panel in cell.axes[:2])
    torch.testing.assert_close(torch.tensor(right.images[0].get_array().data), weights * 48)
    for panel in (left, right):
        assert [line.get_xydata().tolist() for line in panel.lines] == [[[3.0, 2.0]]] * 2


def test_an_existing_file_is_replaced_and_keeps_its_mode(folder, photo):
    Path("real.png").write_bytes(b"old")
    Path("real.png").chmod(0o640)
    Path("link.png").symlink_to("real.png")
    result = visattn("map", photo, "--at", "1,1", "-o", "link.png")
    assert result.exit_code == 0, result.output
    assert Path("link.png").is_symlink()
    assert Path("real.png").read_bytes().startswith(b"\x89PNG")
    assert Path("real.png").stat().st_mode & 0o777 == 0o640


def test_a_bar_on_a_terminal_and_nothing_elsewhere(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("TERM", "xterm")
        picture = colours(5, 5)
        with command._progress(25) as advance:
            compute.self_attention(picture, advance=advance)
        assert ("attention" in stream.getvalue()) == shown
    assert stream.getvalue() == ""


NAMES = {
    "price_$5_and_$6.png": "price_$5_and_$6.png",
    "Ba$$in.png": "Ba$$in.png",
    "run$_1$lr$_2$.png": "run$_1$lr$_2$.png",
    r"\alpha^{2}_%#&~.png": r"\alpha^{2}_%#&~.png",
    "[red]x[bold].png": "[red]x[bold].png",
    "caf\udce9.png": r"caf\xe9.png",
    "日本語.png": r"\u65e5\u672c\u8a9e.png",
    "\udce6\udc97\udca5.png": r"\u65e5.png",
    "a\nb\x1b[31m\t.png": r"a\nb\x1b[31m\t.png",
    "e\u202egnp.png": r"e\u202egnp.png",
    "é ω مرحبا 😀.png": "é ω مرحبا 😀.png",
}
"""Names of files, and how a caption has them in matplotlib's own font."""


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_text_in_figures_and_in_print(tmp_path, photo, name):
    (tmp_path / name).write_bytes(photo.read_bytes())
    result = visattn("map", tmp_path / name, "--at", "3,3")
    assert (result.exit_code, complaints(result.stderr)) == (0, ""), result.output
    assert result.stdout.startswith(f"picture    {printable(name)}, 24×16\n")


def test_a_name_is_text_in_every_figure_of_attend(tmp_path, photo):
    (tmp_path / "Ba$$in_日\udce9.png").write_bytes(photo.read_bytes())
    for target in ("out.png", "out.pdf"):
        result = visattn("attend", tmp_path / "Ba$$in_日\udce9.png", "-o", target)
        assert (result.exit_code, complaints(result.stderr)) == (0, ""), result.output


def captions(name, size=(6, 8)):
    """The figures of a heat map, and of the sheet and a page of `attend`, and their captions."""
    picture, row = colours(*size), torch.full(size, 1 / (size[0] * size[1]))
    caption = f"{printable(name)}, the same as ever: softmax of scale · (colour − mean)·(colour − mean), scale 13.6"
    parts = figures.quartets(picture, picture, 2.5)
    sheets = [figures.map_sheet(picture, [figures.HeatMap((0, 0), row)], caption)]
    sheets += [figures.attend_sheet(parts, caption), figures.attend_pages(parts, caption)[3]]
    return [(sheet, sheet._supxlabel) for sheet in sheets]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_caption_says_the_name_letter_by_letter(name):
    for _, caption in captions(name):
        assert not caption.get_parse_math()
        assert NAMES[name] in caption.get_text()


@pytest.mark.parametrize(("name", "size"), [("W" * 255, (30, 3)), ("日本 " * 40, (6, 8))], ids=["wide", "words"])
def test_a_caption_keeps_inside_the_figure(name, size):
    for sheet, caption in captions(name, size):
        FigureCanvasAgg(sheet).draw()
        extent = caption.get_window_extent()
        assert 0 <= extent.x0 < extent.x1 <= sheet.bbox.width
        assert extent.y0 >= 0
        assert all(extent.y1 < panel.get_window_extent().y0 for panel in sheet.axes)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("attend", "--power", "0"), ("expected --power to be a number above 0, but got --power=0",)),
        (("attend", "--power", "-1"), ("but got --power=-1",)),
        (("attend", "--power", "nan"), ("but got --power=nan",)),
        (("attend", "--power", "inf"), ("but got --power=inf",)),
        (("attend", "--power", "five"), ("but got --power=five",)),
        (("attend", "--size", "320"), ("expected --size to be WxH", "but got --size=320")),
        (("attend", "--size", "0x5"), ("but got --size=0x5",)),
        (("attend", "--size", "-3x5"), ("but got --size=-3x5",)),
        (("attend", "--size", "3.5x5"), ("but got --size=3.5x5",)),
        (("attend", "--size", "99999x99999"), ("pixels, but got --size=99999x99999",)),
        (("attend", "--sample", "mars"), ("expected --sample to be one of china, flower, but got --sample=mars",)),
        (("attend", "x.png", "--sample", "china"), ("expected either IMAGE or --sample",)),
        (("attend", "--backend", "abacus"), ("--backend='abacus'", "auto, cpu, cuda, triton, reference")),
        (("attend", "-o", "out.jpg"), ("expected --output to end in .png or .pdf, but got --output=out.jpg",)),
        (("attend", "-o", "out"), ("but got --output=out",)),
        (("attend", "-o", "nowhere/out.png"), ("a directory that exists, but got --output=nowhere/out.png",)),
        (("attend", "-o", "/proc/visattn.png"), ("but got --output=/proc/visattn.png",)),
        (("attend", "-o", "x" * 300 + ".png"), ("to be a file that can be written",)),
        (("attend", "-o", "a\0.png"), ("to be a file that can be written", r"but got --output=a\x00.png")),
        (("attend", "-o", "\ud800.png"), ("to be a file that can be written", r"but got --output=\ud800.png")),
        (("attend", "-o", "a\nb/c\udce9.png"), (r"a directory that exists, but got --output=a\nb/c\xe9.png",)),
        (("attend", "a\nb\x1b[31m.png"), (r"to be a file that exists, but got IMAGE=a\nb\x1b[31m.png",)),
        (("attend", "x" * 300), ("expected IMAGE to be a file that holds a picture, but got IMAGE=xxx",)),
        (("attend", "--no\nsuch"), ("No such option", "--no\\", "such")),
        (("attend", "missing.png"), ("expected IMAGE to be a file that exists, but got IMAGE=missing.png",)),
        (("attend", "/"), ("not a directory, but got IMAGE=/",)),
        (("attend", __file__), ("expected IMAGE to be a file that holds a picture, but got IMAGE=",)),
        (("attend", "--frames"), ("No such option", "--help")),
        (("attend", "--power"), ("--power", "--help")),
        (("attend", "a.png", "b.png"), ("--help",)),
        (("paint",), ("No such command", "--help")),
        (("map",), ("expected from 1 to 64 points, each as --at Y,X, but got --at=nothing",)),
        (("map", *["--at", "0,0"] * 65), ("but got --at=65 points",)),
        (("map", "--at", "5"), ("expected --at to be Y,X", "but got --at=5")),
        (("map", "--at", "1,2,3"), ("but got --at=1,2,3",)),
        (("map", "--at", "a,b"), ("but got --at=a,b",)),
        (("map", "--at", "1.5,2"), ("but got --at=1.5,2",)),
        (("map", "--at", "213,0"), ("0 <= Y < 213 and 0 <= X < 320", "but got --at=213,0")),
        (("map", "--at", "0,0", "--at", "0,320"), ("but got --at=0,320",)),
        (("map", "--at", "-1,0"), ("but got --at=-1,0",)),
        (("map", "--at", "0,0", "--scale", "0"), ("expected --scale to be a number above 0",)),
        (("map", "--at", "0,0", "-o", "map.svg"), ("but got --output=map.svg",)),
    ],
)
def test_bad_input_is_refused_before_any_work(monkeypatch, folder, arguments, parts):
    for name in ("self_attention", "colour_rows"):
        monkeypatch.setattr(compute, name, lambda *_, **__: pytest.fail("computed for nothing"))
    refused(visattn(*arguments), folder, *parts)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0 broken"])
def test_a_broken_picture_is_refused(tmp_path, folder, content):
    (tmp_path / "x.png").write_bytes(content)
    refused(visattn("attend", tmp_path / "x.png"), folder, "expected IMAGE to be a file that holds a picture")


def test_a_truncated_picture_is_refused(folder, photo):
    photo.write_bytes(photo.read_bytes()[:-200])
    refused(visattn("attend", photo), folder, "Pillow says: ")


def test_the_picture_itself_is_not_overwritten(folder, photo):
    before = photo.read_bytes()
    (photo.parent / "link.png").symlink_to(photo)
    for target in (photo, photo.parent / "link.png", folder / ".." / "photo.png"):
        refused(visattn("attend", photo, "-o", target), folder, "another file than the picture read")
    assert photo.read_bytes() == before


def test_targets_that_are_no_files(tmp_path, folder):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, part in (
        ("folder.png", "regular file"),
        ("pipe.png", "regular file"),
        ("file/out.png", "a directory that exists"),
        ("loop.png", "--output"),
    ):
        refused(visattn("attend", "-o", tmp_path / name), folder, part)


def test_files_whose_place_cannot_be_taken():
    """In a shared folder, such as /tmp, another user's file may be written to and not replaced; nor a mounted one."""

    def status(mode, user, device=1):
        return os.stat_result((mode, 0, device, 0, user, 0, 0, 0, 0, 0))

    me = os.geteuid() if hasattr(os, "geteuid") else 0
    shared, mine = status(0o41777, me + 1), status(0o40755, me)
    assert output._replaceable(status(0o100644, me), shared)
    assert output._replaceable(status(0o100666, me + 1), mine)
    assert output._replaceable(status(0o100666, me + 2), shared) == (me == 0)
    assert not output._replaceable(status(0o100644, me, device=2), mine)


def test_permissions(tmp_path, folder, photo):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("permissions bind no administrator")
    refused(visattn("attend", "-o", locked / "out.png"), folder, "can be written")
    photo.chmod(0)
    refused(visattn("attend", photo), folder, "may be read")


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the engine is not there")
def test_an_instruction_set_that_is_not_there(monkeypatch, folder):
    def isa():
        raise RuntimeError("visattn: expected an instruction set of this CPU, but got VISATTN_CPU_ISA=mmx")

    monkeypatch.setattr(backends.cpu, "isa", isa)
    refused(visattn("attend"), folder, "but got VISATTN_CPU_ISA=mmx")


@pytest.mark.skipif("cpu" in AVAILABLE, reason="the engine is there")
def test_a_backend_that_is_not_there_is_refused(folder):
    refused(visattn("attend", "--backend", "cpu"), folder, "--backend='cpu'", "was not built")


def test_a_slow_backend_is_named(monkeypatch, photo):
    """Without the engine the reference serves, and says so on stderr."""
    engine = backends.Backend("cpu", "", lambda: ["it is not there"], lambda problem: [])
    monkeypatch.setattr(backends, "REGISTRY", (engine, backends.REGISTRY[-1]))
    monkeypatch.setattr(backends, "_warned", set())
    result = visattn("attend", photo)
    assert result.exit_code == 0, result.output
    assert "reference" in result.stdout
    assert result.stderr.startswith("visattn: falling back to the reference backend")
    assert result.stderr.count("\n") == 1


def test_a_full_disk_leaves_nothing(monkeypatch, folder, photo):
    write = Path.write_bytes

    def full(path, content):
        write(path, content[:100])
        if len(content) > 100:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = visattn("map", photo, "--at", "1,1")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert list(folder.iterdir()) == []


# Ctrl-C


def interrupt(*_, **__):
    """What Ctrl-C does."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("holder", "name"),
    [
        (compute, "self_attention"),
        (compute, "attention"),
        (figures, "attend_sheet"),
        (output, "png_bytes"),
        (Path, "replace"),
    ],
)
def test_ctrl_c_leaves_nothing(monkeypatch, folder, photo, holder, name):
    monkeypatch.setattr(holder, name, interrupt)
    result = visattn("attend", photo)
    assert result.exit_code == 130
    assert complaints(result.stderr) == "visattn: interrupted, nothing was written\n"
    assert list(folder.iterdir()) == []


def test_ctrl_c_leaves_the_file_that_was_there(monkeypatch, photo):
    Path("map.png").write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", interrupt)
    assert visattn("map", photo, "--at", "0,0").exit_code == 130
    assert Path("map.png").read_bytes() == b"old"
