"""Pictures read by the command `visattn`: every kind of file, turned upright and into colours."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")

from PIL import features  # noqa: E402

from visattn_kernels.viz import compute, images  # noqa: E402
from visattn_kernels.viz.exits import InputError  # noqa: E402


def load(tmp_path, image, name="x.png", **options):
    """Save an image and load it as the command does."""
    path = tmp_path / name
    image.save(path, **options)
    return images.load_file(path, None).colours


def close(picture, pixel, value, tolerance=0.005):
    """Whether a pixel has a colour."""
    y, x = pixel
    return torch.allclose(picture[y, x], torch.tensor(value, dtype=torch.float32), atol=tolerance)


GREY = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)


def test_rgb(tmp_path):
    picture = load(tmp_path, Image.fromarray(np.stack([GREY, 255 - GREY, GREY], -1)))
    assert picture.shape == (2, 3, 3)
    assert picture.dtype == torch.float32
    assert close(picture, (0, 1), (0.2, 0.8, 0.2))


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.png", Image.fromarray(GREY)),
        ("grey.gif", Image.fromarray(GREY)),
        ("palette.png", Image.fromarray(GREY).convert("P")),
        ("alpha.png", Image.fromarray(GREY).convert("LA")),
        ("sixteen.png", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("sixteen.tif", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("sixteen.pgm", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("thirtytwo.tif", Image.fromarray(GREY.astype(np.int32) * 257)),
        ("wide.tif", Image.fromarray(GREY.astype(np.int32) * 8_000_000)),
        ("float.tif", Image.fromarray(GREY.astype(np.float32) / 255)),
        ("float255.tif", Image.fromarray(GREY.astype(np.float32))),
        ("rgba.png", Image.fromarray(GREY).convert("RGBA")),
    ],
)
def test_grey_levels_of_every_kind(tmp_path, name, image):
    picture = load(tmp_path, image, name)
    for y, x in np.ndindex(2, 3):
        assert close(picture, (y, x), (GREY[y, x] / 255,) * 3), (y, x, picture[y, x])


def test_black_and_white(tmp_path):
    picture = load(tmp_path, Image.fromarray(GREY > 100))
    assert close(picture, (0, 0), (0.0, 0.0, 0.0))
    assert close(picture, (1, 1), (1.0, 1.0, 1.0))


def test_cmyk(tmp_path):
    picture = load(tmp_path, Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "x.tif")
    assert close(picture, (2, 2), (0.0, 1.0, 1.0), 0.02)


@pytest.mark.parametrize("kind", ["RGBA", "P", "LA"])
def test_transparency_is_laid_on_white(tmp_path, kind):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    if kind == "P":
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([0, 255, 0, 0, 0, 0])
        palette.paste(0, (0, 0, 2, 4))
        picture = load(tmp_path, palette, transparency=0)
    else:
        picture = load(tmp_path, image.convert(kind))
    assert close(picture, (0, 0), (1.0, 1.0, 1.0))
    assert close(picture, (0, 3), (0.0, 0.0, 0.0))


MODES = {
    "1": (1, (1.0, 1.0, 1.0)),
    "L": (51, (0.2, 0.2, 0.2)),
    "LA": ((51, 102), (0.68, 0.68, 0.68)),  # 0.4 · 0.2 + 0.6
    "La": ((51, 102), (0.8, 0.8, 0.8)),  # 0.2 + 0.6, since the level is multiplied already
    "P": (0, (0.2, 0.4, 0.6)),
    "PA": ((0, 102), (0.68, 0.76, 0.84)),
    "RGB": ((51, 102, 153), (0.2, 0.4, 0.6)),
    "RGBA": ((51, 102, 153, 102), (0.68, 0.76, 0.84)),
    "RGBa": ((0, 51, 102, 102), (0.6, 0.8, 1.0)),
    "RGBX": ((51, 102, 153, 0), (0.2, 0.4, 0.6)),
    "CMYK": ((204, 153, 102, 0), (0.2, 0.4, 0.6)),
    "YCbCr": ((76, 85, 255), (1.0, 0.0, 0.0)),  # 0.299 of white, and all of Cr
    "LAB": ((255, 0, 0), (1.0, 1.0, 1.0)),  # set as file formats have it, where 0 is the middle of a and b
    "HSV": ((85, 255, 204), (0.0, 0.8, 0.0)),
    "I": (13107, (0.2, 0.2, 0.2)),
    "I;16": (13107, (0.2, 0.2, 0.2)),
    "I;16L": (13107, (0.2, 0.2, 0.2)),
    "I;16B": (13107, (0.2, 0.2, 0.2)),
    "I;16N": (13107, (0.2, 0.2, 0.2)),
    "F": (0.2, (0.2, 0.2, 0.2)),
}
"""A colour in each mode, as Pillow has it, and what is to be seen."""


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode):
    level, seen = MODES[mode]
    image = Image.new("P" if mode == "PA" else mode, (3, 2), 0 if mode in ("P", "PA") else level)
    if mode in ("P", "PA"):
        image.putpalette([51, 102, 153])
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(102)
    if mode == "LAB":  # of which Pillow's own constants turn the middle
        image = Image.frombytes("LAB", (3, 2), bytes([255, 0, 0]) * 6, "raw", "LAB")
    assert image.mode == mode
    plain = images._reduced(image, images._levels(image, ""), (1, 1))
    picture = images._picture("", plain, plain.size, plain.size).colours
    for y, x in np.ndindex(2, 3):
        assert close(picture, (y, x), seen), picture[y, x]


def test_no_mode_is_left_out():
    assert set(Image.MODES) <= set(MODES)


def png(bits, kind, row, transparent=None, palette=None, size=(2, 1)):
    """A PNG whose rows are alike, by hand; kinds are 0 grey, 2 colours, 3 palette, 4 grey and alpha, 6 RGBA."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0))]
    chunks += [chunk(b"PLTE", bytes(palette))] if palette else []
    chunks += [chunk(b"tRNS", transparent)] if transparent else []
    chunks += [chunk(b"IDAT", zlib.compress((b"\0" + row) * size[1], 1)), chunk(b"IEND", b"")]
    return b"".join([b"\x89PNG\r\n\x1a\n", *chunks])


def words(*numbers):
    """Numbers of 16 bits, as PNG has them."""
    return struct.pack(f">{len(numbers)}H", *numbers)


WHITE = (1.0, 1.0, 1.0)


PNGS = {
    "1 bit, black": (png(1, 0, b"\x40", words(0)), WHITE, WHITE),
    "1 bit, white": (png(1, 0, b"\x40", words(1)), (0.0, 0.0, 0.0), WHITE),
    "2 bits": (png(2, 0, b"\x60", words(1)), WHITE, (2 / 3,) * 3),
    "4 bits": (png(4, 0, b"\x5a", words(10)), (1 / 3,) * 3, WHITE),
    "8 bits": (png(8, 0, bytes([51, 52]), words(51)), WHITE, (52 / 255,) * 3),
    "16 bits": (png(16, 0, words(1000, 1001), words(1000)), WHITE, (1001 / 65535,) * 3),
    "colours": (png(8, 2, bytes([51, 102, 153, 51, 102, 154]), words(51, 102, 153)), WHITE, (0.2, 0.4, 154 / 255)),
    # The second differs from what is transparent in its lower bits alone.
    "colours of 16 bits": (
        png(16, 2, words(13107, 26214, 39321, 13107, 26214, 39320), words(13107, 26214, 39321)),
        WHITE,
        (0.2, 0.4, 0.6),
    ),
    "palette": (png(8, 3, b"\0\1", bytes([0, 102]), [51, 102, 153] * 2), WHITE, (0.68, 0.76, 0.84)),
    "palette of 1 bit": (png(1, 3, b"\x40", bytes([0]), [0, 0, 0, 51, 102, 153]), WHITE, (0.2, 0.4, 0.6)),
    "grey and alpha": (png(8, 4, bytes([51, 0, 51, 102])), WHITE, (0.68,) * 3),
    "grey and alpha of 16 bits": (png(16, 4, words(13107, 0, 13107, 26214)), WHITE, (0.68,) * 3),
    "alpha": (png(8, 6, bytes([51, 102, 153, 0, 51, 102, 153, 102])), WHITE, (0.68, 0.76, 0.84)),
    "alpha of 16 bits": (
        png(16, 6, words(13107, 26214, 39321, 0, 13107, 26214, 39321, 26214)),
        WHITE,
        (0.68, 0.76, 0.84),
    ),
}
"""By what is transparent: a file, and what is seen of its left and its right pixel."""


@pytest.mark.parametrize("kind", PNGS)
def test_every_way_of_transparency_of_a_png(tmp_path, kind):
    content, left, right = PNGS[kind]
    (tmp_path / "x.png").write_bytes(content)
    picture = images.load_file(tmp_path / "x.png", None).colours
    assert close(picture, (0, 0), left), picture
    assert close(picture, (0, 1), right), picture


def tiff(photometric, bits, content, *, extra=(), sample=1, colours=()):
    """A TIFF of one row of two pixels, by hand.

    Args:
        photometric: 0 grey from white to black, 1 from black to white, 2 RGB, 3 a palette, 5 CMYK, 8 Lab.
        bits: of each sample.
        content: the pixels.
        extra: what the samples beyond the colours are: 0 nothing, 1 alpha that colours were multiplied by, 2 alpha.
        sample: 1 unsigned, 3 floating point.
        colours: the palette, of 16 bits.
    """
    values = {256: [2], 257: [1], 258: bits, 259: [1], 262: [photometric], 273: [0], 277: [len(bits)], 278: [1]}
    values |= {279: [len(content)], 339: [sample] * len(bits)}
    values |= {320: list(colours)} if colours else {}
    values |= {338: list(extra)} if extra else {}
    end = 8 + 2 + 12 * len(values) + 4
    entries, beyond = b"", content
    values[273] = [end]
    for tag, numbers in sorted(values.items()):
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        if len(packed) > 4:
            beyond += b"\0" * (len(beyond) % 2)
            packed, beyond = struct.pack("<I", end + len(beyond)), beyond + packed
        entries += struct.pack("<HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + b"\0" * 4 + beyond


_PALETTE = [0, 13107, *[0] * 254, 0, 26214, *[0] * 254, *[0] * 256]
TIFFS = {
    "12 bits": (tiff(1, [12], b"\xff\xf3\x33"), WHITE, (0.2,) * 3),
    "16 bits": (tiff(1, [16], struct.pack("<2H", 65535, 13107)), WHITE, (0.2,) * 3),
    "16 bits, 0 is white": (tiff(0, [16], struct.pack("<2H", 0, 52428)), WHITE, (0.2,) * 3),
    "8 bits, 0 is white": (tiff(0, [8], bytes([0, 204])), WHITE, (0.2,) * 3),
    "float, 0 is white": (tiff(0, [32], struct.pack("<2f", 0, 0.8), sample=3), WHITE, (0.2,) * 3),
    "grey and alpha": (tiff(1, [8, 8], bytes([51, 0, 51, 102]), extra=[2]), WHITE, (0.68,) * 3),
    "alpha": (
        tiff(2, [8] * 4, bytes([51, 102, 153, 0, 51, 102, 153, 102]), extra=[2]),
        WHITE,
        (0.68, 0.76, 0.84),
    ),
    "multiplied alpha": (tiff(2, [8] * 4, bytes([0, 0, 0, 0, 0, 51, 102, 102]), extra=[1]), WHITE, (0.6, 0.8, 1.0)),
    "no alpha": (tiff(2, [8] * 4, bytes([255, 255, 255, 0, 51, 102, 153, 0]), extra=[0]), WHITE, (0.2, 0.4, 0.6)),
    "palette and alpha": (
        tiff(3, [8, 8], bytes([1, 0, 1, 102]), extra=[2], colours=_PALETTE),
        WHITE,
        (0.68, 0.76, 0.6),
    ),
    "CMYK": (tiff(5, [8] * 4, bytes([0, 0, 0, 0, 204, 153, 102, 0])), WHITE, (0.2, 0.4, 0.6)),
    "Lab": (tiff(8, [8] * 3, bytes([255, 0, 0, 137, 0, 0])), WHITE, (0.5, 0.5, 0.5)),
}
"""By its kind: a file, and what is seen of its left and its right pixel."""


@pytest.mark.parametrize("kind", TIFFS)
def test_every_kind_of_tiff(tmp_path, kind):
    content, left, right = TIFFS[kind]
    (tmp_path / "x.tif").write_bytes(content)
    picture = images.load_file(tmp_path / "x.tif", None).colours
    assert close(picture, (0, 0), left), picture
    assert close(picture, (0, 1), right), picture


@pytest.mark.parametrize(
    ("name", "content", "left", "right"),
    [
        ("dark.pgm", b"P5 2 1 65535\n" + words(20, 200), (20 / 65535,) * 3, (200 / 65535,) * 3),
        ("ten.pgm", b"P5 2 1 1023\n" + words(1023, 0), WHITE, (0.0, 0.0, 0.0)),
        ("float.pfm", b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.2, 1.0), (0.2,) * 3, WHITE),
    ],
    ids=["dark", "ten bits", "float"],
)
def test_levels_have_the_range_that_the_file_tells(tmp_path, name, content, left, right):
    (tmp_path / name).write_bytes(content)
    picture = images.load_file(tmp_path / name, None).colours
    assert close(picture, (0, 0), left, 1e-5), picture
    assert close(picture, (0, 1), right, 1e-5), picture


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.tga", "x.webp", "x.jp2", "x.ico", "x.dds", "x.avif"])
def test_alpha_of_every_format(tmp_path, name):
    needed = {"x.webp": "webp", "x.jp2": "jpg_2000", "x.avif": "avif"}.get(name)
    if needed and not features.check(needed):
        pytest.skip(f"this Pillow has no {needed}")
    image = Image.new("RGBA", (16, 16), (51, 102, 153, 102))
    image.paste((51, 102, 153, 0), (0, 0, 8, 16))
    picture = load(tmp_path, image, name, **({} if name in ("x.dds", "x.ico", "x.tga") else {"lossless": True}))
    tolerance = 0.02 if name == "x.avif" else 0.005
    assert close(picture, (4, 2), WHITE, tolerance)
    assert close(picture, (4, 12), (0.68, 0.76, 0.84), tolerance), picture[4, 12]


def test_broken_tags_leave_a_picture_as_it_is(tmp_path):
    picture = load(tmp_path, Image.new("RGB", (5, 3), "red"), exif=b"Exif\0\0neither of both")
    assert picture.shape == (3, 5, 3)
    assert close(picture, (1, 1), (1.0, 0.0, 0.0))


def test_a_picture_of_220_megapixels(tmp_path):
    """Black and white, 20000×11000, white where x < 10000. Pillow refuses so many pixels unless it is told."""
    (tmp_path / "x.png").write_bytes(png(1, 0, b"\xff" * 1250 + b"\0" * 1250, size=(20000, 11000)))
    limit = Image.MAX_IMAGE_PIXELS
    picture = images.load_file(tmp_path / "x.png", (64, 32))
    assert limit == Image.MAX_IMAGE_PIXELS
    assert (picture.stored, picture.size) == ((20000, 11000), (64, 32))
    assert close(picture.colours, (16, 30), WHITE)
    assert close(picture.colours, (16, 33), (0.0, 0.0, 0.0))


@pytest.mark.parametrize("orientation", [1, 6])
def test_of_a_large_jpeg_as_much_is_read_as_is_needed(tmp_path, monkeypatch, orientation):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(images, "MAX_STORED", 4000 * 2000 // 64)
    image, exif = Image.new("L", (4000, 2000), 0), Image.Exif()
    image.paste(255, (0, 0, 1000, 2000))
    exif[0x0112] = orientation
    image.save(tmp_path / "x.jpg", exif=exif)
    picture = images.load_file(tmp_path / "x.jpg", (80, 40) if orientation == 1 else (40, 80))
    assert picture.stored == ((4000, 2000) if orientation == 1 else (2000, 4000))
    for along in (5, 15, 25, 75):  # the left quarter, which is the upper one where the picture was turned
        place = (20, along) if orientation == 1 else (along, 20)
        assert close(picture.colours, place, WHITE if along < 20 else (0.0, 0.0, 0.0), 0.02)
    with pytest.raises(InputError, match=r"expected IMAGE of at most 125,000 pixels.* but got IMAGE=.* of 4000×2000"):
        images.load_file(tmp_path / "x.jpg", (800, 400))


def test_a_picture_that_takes_too_much_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(png(1, 0, b"\0", size=(65536, 65536)))
    with pytest.raises(InputError, match=r"at most 1,073,741,824 pixels, which take 4 GiB, but got IMAGE=.* of 65536×"):
        images.load_file(tmp_path / "x.png", (64, 32))

    def crop(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "crop", crop)
    Image.new("L", (4, 4)).save(tmp_path / "y.png")
    with pytest.raises(InputError, match="expected IMAGE to fit into the memory that there is, but got IMAGE="):
        images.load_file(tmp_path / "y.png", None)


@pytest.mark.parametrize("size", [(64, 32), (301, 203), None])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "P", "1"])
def test_bands_show_what_the_whole_shows(tmp_path, monkeypatch, mode, size):
    """A picture of slopes, reduced in bands, against Pillow's own resize of the whole."""
    slopes = np.add.outer(np.arange(703) * 100 / 703, np.arange(997) * 100 / 997).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(slopes.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(slopes).convert("1" if mode == "1" else "RGB").convert(mode)
    image.save(tmp_path / "x.png")
    monkeypatch.setattr(images, "BAND", 997 * 50)
    picture = images.load_file(tmp_path / "x.png", size)
    whole = Image.fromarray(slopes).convert("RGB") if mode == "I;16" else image.convert("RGB")
    expected = np.asarray(whole.resize(picture.size, Image.Resampling.LANCZOS, reducing_gap=3.0)) / 255
    assert np.abs(picture.colours.numpy() - expected).max() < 0.009


def test_memory_is_that_of_the_file_and_little_more(tmp_path):
    """Colours with alpha, 5000×4000: Pillow holds 80 MB, and each copy of the whole would be as many."""
    (tmp_path / "x.png").write_bytes(png(8, 6, bytes([51, 102, 153, 102]) * 5000, size=(5000, 4000)))
    with compute.Meter() as meter:
        picture = images.load_file(tmp_path / "x.png", (64, 32))
    assert close(picture.colours, (16, 32), (0.68, 0.76, 0.84))
    if meter.peak_bytes is not None and "above its value before" in meter.method:
        assert meter.peak_bytes < 200e6


def test_a_rotated_photograph_stands_upright(tmp_path):
    image, exif = Image.new("RGB", (40, 20), "black"), Image.Exif()
    image.paste("white", (0, 0, 10, 20))
    exif[0x0112] = 6  # turn clockwise by a quarter
    picture = load(tmp_path, image, "x.jpg", exif=exif, quality=95)
    assert picture.shape == (40, 20, 3)
    assert close(picture, (2, 10), (1.0, 1.0, 1.0), 0.05)
    assert close(picture, (35, 10), (0.0, 0.0, 0.0), 0.05)


def test_the_first_frame_of_a_film(tmp_path):
    frames = [Image.new("L", (3, 3), level) for level in (255, 0)]
    picture = load(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    assert close(picture, (1, 1), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(("width", "height"), [(4000, 3000), (3000, 4000), (500_000, 3), (1, 400_000)])
def test_a_large_picture_is_shrunk_to_the_default(width, height):
    small = images._default_size(width, height)
    assert min(small) >= 1
    assert small[0] * small[1] <= images.DEFAULT_POSITIONS
    if min(small) > 30:
        assert small[0] * small[1] >= 0.98 * images.DEFAULT_POSITIONS
        assert small[0] / small[1] == pytest.approx(width / height, rel=0.02)


def test_a_small_picture_keeps_its_size():
    assert images._default_size(316, 316) == (316, 316)


@pytest.mark.parametrize("name", images.SAMPLES)
def test_samples_are_halved(name):
    picture = images.load_sample(name, None)
    assert picture.size == (320, 213)
    assert picture.positions == 68_160
    assert picture.stored == (640, 427)
    assert 0 <= float(picture.colours.min()) < float(picture.colours.max()) <= 1
