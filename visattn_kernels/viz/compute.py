"""The two computations behind the pictures, and what they cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch

from visattn_kernels import Global, attention, attention_map, backends
from visattn_kernels.problem import make_problem

ENGINE_PAIRS = 1 << 29
"""Pairs of a query and a key in one slab of an engine: about a tenth of a second on two cores."""

ENGINE_QUERIES = 4096
"""Queries in one slab of an engine, at least: fewer would leave its threads without work."""

REFERENCE_PAIRS = 1 << 22
"""Pairs in one slab of the reference, which stores each of them: 16 MB a copy."""

NAIVE_COPIES = 2
"""Maps of N×N float32 that the naive code holds at once: the logits and their softmax."""


def taken_backend(positions: int, backend: str) -> str:
    """The name of the backend that runs a picture of so many positions; raises as `attention` does."""
    x = torch.empty(1).expand(1, 1, positions, 1, 3)
    return backends.choose(make_problem(x, x, x, Global(), 1.0, ()), backend)


def naive_bytes(positions: int) -> int:
    """What the naive code would have needed for its maps."""
    return NAIVE_COPIES * 4 * positions**2


def self_attention(
    colours: torch.Tensor, *, backend: str = "auto", advance: Callable[[int], None] | None = None
) -> torch.Tensor:
    """Weightless self-attention of a picture: q = k = v = its colours, no scale.

        out_i = sum_j softmax_j(c_i·c_j) * c_j

    Every query sees every key, so the queries may come in slabs: each slab attends all keys, and the result is that of
    one call. Between slabs the caller hears how far it is.

    Args:
        colours (Tensor[H, W, 3]): the picture.
        backend: as in `attention`.
        advance: called after each slab with its number of queries.

    Returns:
        out (Tensor[H, W, 3]).

    Memory:
        The result and the scratch of one slab.

    References:
        Zhang et al., 2019 (SAGAN), equations 1 and 2 with the identity for every convolution.
    """
    positions = colours.shape[0] * colours.shape[1]
    keys = colours[None, :, :, None]  # [1, H, W, 1, 3]
    queries = colours.reshape(1, 1, positions, 1, -1)  # [1, 1, N, 1, 3]
    out = torch.empty_like(colours, memory_format=torch.contiguous_format)
    flat = out.view(positions, -1)
    for start, stop in _slabs(positions, taken_backend(positions, backend)):
        flat[start:stop] = attention(queries[:, :, start:stop], keys, keys, scale=1.0, backend=backend)[0, 0, :, 0]
        if advance is not None:
            advance(stop - start)
    return out


def _slabs(positions: int, backend: str) -> Iterator[tuple[int, int]]:
    """Cut the queries into slabs, each well below a second and, for the reference, of bounded size."""
    if backend == "reference":
        size = max(1, REFERENCE_PAIRS // positions)
    else:
        size = max(ENGINE_QUERIES, ENGINE_PAIRS // positions)
    for start in range(0, positions, size):
        yield start, min(start + size, positions)


def centred(colours: torch.Tensor) -> torch.Tensor:
    """The colours (Tensor[H, W, 3]) minus their mean, so that unlike colours have negative products."""
    return colours - colours.mean((0, 1))


def natural_scale(colours: torch.Tensor, spread: float) -> float:
    """The factor of q·k that gives the logits of centred colours the standard size `spread`.

        scale = spread / mean_i |c_i - mean|²

    Args:
        colours (Tensor[H, W, 3]): the picture.
        spread: the logit of a typical colour with itself.
    """
    energy = float(centred(colours).square().sum(-1).mean())
    return spread / energy if energy > 1e-12 else 1.0


def colour_rows(
    colours: torch.Tensor, at: Sequence[tuple[int, int]], *, scale: float, backend: str = "auto"
) -> torch.Tensor:
    """Exact rows of the attention map of a picture, q = k = its centred colours.

        row_i[j] = softmax_j(scale * (c_i - mean)·(c_j - mean))

    Only the queries asked for are passed, so that no backend computes another row.

    Args:
        colours (Tensor[H, W, 3]): the picture.
        at: points (y, x).
        scale: factor of q·k.
        backend: as in `attention_map`.

    Returns:
        Tensor[len(at), H, W]; each row sums to 1.
    """
    keys = centred(colours)[None, :, :, None]  # [1, H, W, 1, 3]
    queries = torch.stack([keys[:, y, x] for y, x in at], dim=1)[:, None]  # [1, 1, P, 1, 3]
    points = [(0, i) for i in range(len(at))]
    return attention_map(queries, keys, points, scale=scale, backend=backend)[0, :, 0]


class Meter:
    """Time and memory of a block of code.

    Memory is the peak of resident memory above its value before the block. Linux can reset the peak (VmHWM) first;
    elsewhere the peak since the start of the process is all there is, and its growth is a lower bound.

    Attributes:
        seconds: elapsed time.
        peak_bytes: peak resident memory above the value before, None where the system does not tell.
        method: how it was measured, for a person.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None
    method: str = "not measured on this system"

    def __enter__(self) -> Meter:
        self._resettable = _reset_peak()
        self._before = _status_bytes("VmRSS") if self._resettable else _highest_bytes()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        after = _status_bytes("VmHWM") if self._resettable else _highest_bytes()
        if self._before is not None and after is not None:
            self.peak_bytes = max(0, after - self._before)
            self.method = (
                "peak of the resident memory above its value before the computation"
                if self._resettable
                else "growth of the process's peak resident memory, a lower bound"
            )


def _reset_peak() -> bool:
    """Set the kernel's record of the peak back to the present value; whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status_bytes("VmHWM") is not None


def _status_bytes(field: str) -> int | None:
    """A size from Linux's /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _highest_bytes() -> int | None:
    """The peak resident memory since the process began."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
