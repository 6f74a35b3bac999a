"""Reading pictures of any kind as colours in [0, 1]."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from visattn_kernels.errors import expected
from visattn_kernels.viz.exits import InputError, MissingError

if TYPE_CHECKING:
    from PIL import Image

Array = npt.NDArray[Any]

SAMPLES = ("china", "flower")
"""Photographs that ship with scikit-learn, 640×427."""

DEFAULT_POSITIONS = 100_000
"""A user's picture with more pixels is shrunk to as many, unless `--size` says otherwise."""

MAX_POSITIONS = 1 << 24
"""The largest picture: the time grows with the square, and here it is hours."""


@dataclass(frozen=True)
class Picture:
    """A picture and where it came from.

    Attributes:
        name: the file's name, for a person.
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
    return _picture(f"{name}.jpg", image, size or (image.width // 2, image.height // 2))


def load_file(path: Path, size: tuple[int, int] | None) -> Picture:
    """A picture of the user's, upright, transparency on white, the first frame.

    Args:
        path: the file.
        size: width and height; None means its own, or as much of it as `DEFAULT_POSITIONS` allows.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise MissingError(error.name or "pillow", "reading a picture") from error
    try:
        if path.is_dir():
            raise expected("IMAGE to be a file that holds a picture, not a directory", "IMAGE", path, InputError)
        with warnings.catch_warnings():
            # A large picture is no attack here: the user named it.
            warnings.simplefilter("ignore")
            with Image.open(path) as opened:
                image = _plain(ImageOps.exif_transpose(opened))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise expected("IMAGE to be a file that exists", "IMAGE", path, InputError) from error
    except PermissionError as error:
        raise expected("IMAGE to be a file that may be read", "IMAGE", path, InputError) from error
    # Decoders raise nearly anything on a broken file.
    except Exception as error:
        reason = f"Pillow says: {' '.join(str(error).split()) or type(error).__name__}"
        raise expected("IMAGE to be a file that holds a picture", "IMAGE", path, InputError, reason) from error
    return _picture(path.name, image, size or _default_size(image.width, image.height))


def _default_size(width: int, height: int) -> tuple[int, int]:
    """The size itself, or the largest of the same shape with `DEFAULT_POSITIONS` pixels."""
    factor = math.sqrt(DEFAULT_POSITIONS / (width * height))
    if factor >= 1:
        return width, height
    short = max(1, int(min(width, height) * factor))
    long = max(1, min(int(max(width, height) * factor), DEFAULT_POSITIONS // short))
    return (long, short) if width >= height else (short, long)


def _plain(image: Image.Image) -> Image.Image:
    """Any mode as "RGB", or as "F" in [0, 1] for grey levels of more than eight bits."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        levels = np.asarray(image, dtype=np.float32) / 65535
        return Image.fromarray(levels)
    if image.mode in ("I", "F"):
        return Image.fromarray(_unit_levels(np.asarray(image, dtype=np.float64)).astype(np.float32))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _unit_levels(levels: Array) -> Array:
    """Grey levels (float64[H, W]) of unknown range in [0, 1]: of 1, 8 or 16 bits, else from least to most."""
    levels = np.nan_to_num(levels, nan=0.0, posinf=0.0, neginf=0.0)
    least, most = float(levels.min()), float(levels.max())
    for top in (1.0, 255.0, 65535.0):
        if least >= 0 and most <= top:
            return levels / top
    return (levels - least) / max(most - least, 1e-300)


def _picture(name: str, image: Image.Image, size: tuple[int, int]) -> Picture:
    """Resize and make the tensor."""
    from PIL import Image

    stored = (image.width, image.height)
    if size != stored:
        image = image.resize(size, Image.Resampling.LANCZOS)
    levels = np.array(image, dtype=np.float32)
    if image.mode == "RGB":
        levels /= 255
    else:
        levels = np.repeat(levels[:, :, None], 3, axis=2)
    return Picture(name, torch.from_numpy(levels).clamp_(0, 1), stored)
