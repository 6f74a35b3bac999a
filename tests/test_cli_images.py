"""Pictures read by the command `visattn`: every kind of file, turned upright and into colours."""

from __future__ import annotations

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")

from visattn_kernels.viz import images  # noqa: E402


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
