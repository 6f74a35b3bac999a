"""What the modules share: the checks of their arguments, and the names of other libraries' weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from visattn_kernels.errors import expected, strided, told


def image(x: object, channels: int) -> torch.Tensor:
    """Return `x` if it is an image `[B, channels, H, W]`, else raise TypeError or RuntimeError."""
    x = strided(x, "x")
    if x.dim() != 4 or x.shape[1] != channels:
        raise expected(f"x of shape [B, {channels}, H, W]", "x.shape", list(x.shape), RuntimeError)
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
