"""What the modules share: the checks of their arguments, and the names of other libraries' weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from visattn_kernels.errors import expected, strided, told


def image(x: object, channels: int | None = None, argument: str = "x") -> torch.Tensor:
    """Return `x` if it is an image `[B, channels, H, W]`, of any channels with None, else raise an error.

    Raises:
        TypeError, RuntimeError: it is none.
    """
    x = strided(x, argument)
    if x.dim() != 4 or channels not in (None, x.shape[1]):
        shape = f"[B, {'C' if channels is None else channels}, H, W]"
        raise expected(f"{argument} of shape {shape}", f"{argument}.shape", list(x.shape), RuntimeError)
    return x


def count(value: object, argument: str, least: int = 1) -> int:
    """Return `value` if it is an integer of `least` or more, else raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise expected(f"{argument} to be an integer", argument, told(value), TypeError)
    if value < least:
        raise expected(f"{argument} of {least} or more", argument, value, ValueError)
    return value


def share(channels: int, parts: int, argument: str = "heads") -> int:
    """Return `channels // parts`; raise ValueError where `parts` does not divide the channels."""
    if channels % count(parts, argument):
        raise expected(f"{argument} to divide {channels} channels", argument, parts, ValueError)
    return channels // parts


def choice(value: object, argument: str, options: tuple[str, ...]) -> str:
    """Return `value` if it is one of `options`, else raise ValueError."""
    if not isinstance(value, str) or value not in options:
        raise expected(f"{argument} to be one of {', '.join(options)}", argument, told(value), ValueError)
    return value


def pooled(x: torch.Tensor, factor: int) -> torch.Tensor:
    """The map max-pooled by a factor; what it leaves over of an odd size is dropped."""
    return x if factor == 1 else nn.functional.max_pool2d(x, factor)


def renamed(state: Mapping[str, torch.Tensor], names: Mapping[str, str | None]) -> dict[str, torch.Tensor]:
    """Give the entries of another library's state dict our names.

    Args:
        state: their state dict.
        names: their prefixes, whole dotted parts, and ours; None leaves the entries out. The longest that fits counts.

    Raises:
        ValueError: no prefix fits an entry: this is the state dict of something else.
    """
    ours = {}
    for key, value in state.items():
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        found = next((prefix for prefix in prefixes if prefix in names), None)
        if found is None:
            raise expected(f"a state dict with the entries {', '.join(names)}", "an entry", key, ValueError)
        name = names[found]
        if name is not None:
            ours[name + key[len(found) :]] = value
    return ours


def convolutions(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of linear layers as those of 1x1 convolutions; all others as they are."""
    return {name: x[:, :, None, None] if x.dim() == 2 else x for name, x in state.items()}
