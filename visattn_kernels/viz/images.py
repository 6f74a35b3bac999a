"""Reading pictures of any kind as colours in [0, 1]."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from visattn_cli import printable
from visattn_kernels.errors import expected
from visattn_kernels.viz.exits import InputError, MissingError

if TYPE_CHECKING:
    from PIL import Image, ImageFile

Array = npt.NDArray[Any]

SAMPLES = ("china", "flower")
"""Photographs that ship with scikit-learn, 640×427."""

DEFAULT_POSITIONS = 100_000
"""A user's picture with more pixels is shrunk to as many, unless `--size` says otherwise."""

MAX_POSITIONS = 1 << 24
"""The largest picture that is used: the time grows with the square, and here it is hours."""

MAX_STORED = 1 << 30
"""The largest picture that is read: Pillow holds up to four bytes a pixel."""

SPARE = 3
"""How many pixels a side keeps for each that is wanted, before the filter that makes it as many as wanted."""

BAND = 1 << 22
"""How many pixels are converted at once."""

# In the file, a transparent grey level has as many bits as the levels, which Pillow spreads over eight.
_SPREAD = {"L;2": 85, "L;4": 17}

# TIFF's tag that says what 0 means, and its value where that is white; Pillow inverts levels of up to eight bits.
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""

Levels = Callable[["Image.Image", Box], "Image.Image"]
"""A function of a band of a picture, and of its place in it."""


@dataclass(frozen=True)
class Picture:
    """A picture and where it came from.

    Attributes:
        name: the file's name as one line of letters, for a person.
        colours (Tensor[H, W, 3]): float32 in [0, 1].
        stored: width and height of the file, upright.
    """

    name: str
    colours: torch.Tensor
    stored: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as used."""
        return self.colours.shape[1], self.colours.shape[0]

    @property
    def positions(self) -> int:
        """Number of pixels as used, N."""
        return self.colours.shape[0] * self.colours.shape[1]


def load_sample(name: str, size: tuple[int, int] | None) -> Picture:
    """A photograph of scikit-learn, at half its size unless `size` (width, height) is given."""
    if name not in SAMPLES:
        raise expected(f"--sample to be one of {', '.join(SAMPLES)}", "--sample", name, InputError)
    try:
        from PIL import Image
        from sklearn.datasets import load_sample_image
    except ModuleNotFoundError as error:
        raise MissingError(error.name or "scikit-learn", "a sample picture") from error
    image = Image.fromarray(load_sample_image(f"{name}.jpg"))
    return _picture(f"{name}.jpg", image, image.size, size or (image.width // 2, image.height // 2))


def load_file(path: Path, size: tuple[int, int] | None) -> Picture:
    """A picture of the user's, upright, transparency on white, the first frame.

    Args:
        path: the file.
        size: width and height; None means its own, or as much of it as `DEFAULT_POSITIONS` allows.

    Memory:
        The file's pixels, of one to four bytes each, and the picture at three times its size at most. Of a JPEG that is
        larger than that, fewer pixels are read: an eighth of each side at least.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingError(error.name or "pillow", "reading a picture") from error
    try:
        if path.is_dir():
            raise expected("IMAGE to be a file that holds a picture, not a directory", "IMAGE", path, InputError)
        with warnings.catch_warnings(), _any_size():
            warnings.simplefilter("ignore")  # of tags that are not understood, and the like
            with Image.open(path) as opened:
                return _upright(opened, path, size)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise expected("IMAGE to be a file that exists", "IMAGE", path, InputError) from error
    except PermissionError as error:
        raise expected("IMAGE to be a file that may be read", "IMAGE", path, InputError) from error
    except MemoryError as error:
        raise expected("IMAGE to fit into the memory that there is", "IMAGE", path, InputError) from error
    # Decoders raise nearly anything on a broken file.
    except Exception as error:
        reason = f"Pillow says: {' '.join(str(error).split()) or type(error).__name__}"
        raise expected("IMAGE to be a file that holds a picture", "IMAGE", path, InputError, reason) from error


@contextmanager
def _any_size() -> Iterator[None]:
    """Lift Pillow's limit of pixels: a large picture is no attack where the user named it, and `MAX_STORED` stands."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _upright(opened: ImageFile.ImageFile, path: Path, size: tuple[int, int] | None) -> Picture:
    """The picture of an open file, as `load_file` has it."""
    from PIL import ExifTags, ImageOps

    whole = opened.size
    # Which side is up is not known yet, so the longer one stands for both.
    needed = SPARE * max(size or _default_size(*whole))
    opened.draft(None, (needed, needed))
    if opened.width * opened.height > MAX_STORED:
        got = f"{path} of {whole[0]}×{whole[1]}"
        raise expected(f"IMAGE of at most {MAX_STORED:,} pixels, which take 4 GiB", "IMAGE", got, InputError)
    rawmode = _rawmode(opened)
    opened.load()
    orientation = _orientation(opened)
    turned = orientation >= 5  # width and height change places
    stored = (whole[1], whole[0]) if turned else whole
    wanted = size or _default_size(*stored)
    across, down = wanted[::-1] if turned else wanted
    factors = (max(1, opened.width // (SPARE * across)), max(1, opened.height // (SPARE * down)))
    image = _reduced(opened, _levels(opened, rawmode), factors)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return _picture(path.name, ImageOps.exif_transpose(image), stored, wanted)


def _orientation(opened: Image.Image) -> int:
    """Which side of a loaded picture is up, as EXIF counts it; tags that are broken leave a picture as it is."""
    from PIL import ExifTags

    try:
        return int(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError):
        return 1


def _default_size(width: int, height: int) -> tuple[int, int]:
    """The size itself, or the largest of the same shape with `DEFAULT_POSITIONS` pixels."""
    factor = math.sqrt(DEFAULT_POSITIONS / (width * height))
    if factor >= 1:
        return width, height
    short = max(1, int(min(width, height) * factor))
    long = max(1, min(int(max(width, height) * factor), DEFAULT_POSITIONS // short))
    return (long, short) if width >= height else (short, long)


def _reduced(image: Image.Image, levels: Levels, factors: tuple[int, int]) -> Image.Image:
    """The means of blocks of a picture's pixels, made plain in bands, so that no whole copy of the picture is made.

    Args:
        image: the picture, loaded.
        levels: makes a band plain.
        factors: width and height of a block.
    """
    from PIL import Image

    whole = None
    for box in _bands(image, factors[1]):
        band = levels(image.crop(box), box).reduce(factors)
        if whole is None:
            whole = Image.new(band.mode, (band.width, -(-image.height // factors[1])))
        whole.paste(band, (0, box[1] // factors[1]))
    assert whole is not None  # no picture has no rows
    return whole


def _bands(image: Image.Image, rows: int) -> Iterator[Box]:
    """Cut a picture into bands of about `BAND` pixels, each a multiple of some rows high but the last."""
    step = rows * max(1, BAND // (image.width * rows))
    for top in range(0, image.height, step):
        yield 0, top, image.width, min(top + step, image.height)


def _levels(opened: ImageFile.ImageFile, rawmode: str) -> Levels:
    """What makes a band of a picture plain: "RGB", or "F" in [0, 1] where grey levels have more than eight bits.

    Where a level or a colour is transparent, it becomes white.
    """
    key = opened.info.get("transparency")
    if opened.mode.startswith("I") or opened.mode == "F":
        return _grey(opened, rawmode, key)
    if rawmode == "RGB;16B" and isinstance(key, tuple):
        return _colours_of_16_bits(opened, key)
    if rawmode in _SPREAD and isinstance(key, int):
        opened.info["transparency"] = key * _SPREAD[rawmode]
    return lambda band, box: _colours(band)


def _rawmode(opened: ImageFile.ImageFile) -> str:
    """How a file lays out its pixels, in Pillow's words, which are there until they are loaded; empty if none."""
    arguments = opened.tile[0].args if opened.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _colours(band: Image.Image) -> Image.Image:
    """Colours of eight bits, on white, as "RGB"."""
    from PIL import Image

    if band.mode == "La":  # which converts to nothing else
        band = band.convert("LA")
    if band.has_transparency_data:
        band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band.convert("RGBA"))
    return band.convert("RGB")


def _colours_of_16_bits(opened: ImageFile.ImageFile, key: tuple[int, ...]) -> Levels:
    """Colours of which one is transparent, in all its 16 bits: Pillow reads the upper eight, and here the lower."""
    from PIL import Image

    del opened.info["transparency"]
    with Image.open(opened.filename) as lower:
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        lower.load()

    def levels(band: Image.Image, box: Box) -> Image.Image:
        colours = np.array(band)
        whole = colours.astype(np.uint16) << 8 | np.asarray(lower.crop(box))
        colours[(whole == np.array(key)).all(-1)] = 255
        return Image.fromarray(colours)

    return levels


def _grey(opened: ImageFile.ImageFile, rawmode: str, key: int | None) -> Levels:
    """Grey levels of more than eight bits as "F" in [0, 1]."""
    from PIL import Image

    sixteen = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM"))
    black, white = (0.0, 4095.0) if rawmode == "I;12" else (0.0, 65535.0) if sixteen else _range(opened)
    if opened.format == "TIFF" and opened.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # type: ignore[attr-defined]
        black, white = white, black

    def levels(band: Image.Image, box: Box) -> Image.Image:
        values = np.asarray(band)
        unit = (_finite(values) - black) / (white - black)
        if key is not None:
            unit[values == key] = 1
        return Image.fromarray(unit.astype(np.float32))

    return levels


def _range(image: Image.Image) -> tuple[float, float]:
    """Black and white of levels of which the file says nothing: of 1, 8 or 16 bits, else from the least to the most."""
    extremes = [(band.min(), band.max()) for band in (_finite(image.crop(box)) for box in _bands(image, 1))]
    least, most = float(min(low for low, _ in extremes)), float(max(high for _, high in extremes))
    for top in (1.0, 255.0, 65535.0):
        if least >= 0 and most <= top:
            return 0.0, top
    return least, most if most > least else least + 1


def _finite(levels: Image.Image | Array) -> Array:
    """Levels as float64, 0 for those that are no number."""
    return np.nan_to_num(np.asarray(levels, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _picture(name: str, image: Image.Image, stored: tuple[int, int], size: tuple[int, int]) -> Picture:
    """Resize a plain image and make the tensor."""
    from PIL import Image

    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    levels = np.array(image, dtype=np.float32)
    if image.mode == "RGB":
        levels /= 255
    else:
        levels = np.repeat(levels[:, :, None], 3, axis=2)
    return Picture(printable(name), torch.from_numpy(levels).clamp_(0, 1), stored)
