"""The attention of ViTDet (Li et al., 2022) and SAM (Kirillov et al., 2023), global and windowed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from visattn_kernels.errors import expected
from visattn_kernels.nn.common import PackedAttention, as_convolution, count, pair, renamed
from visattn_kernels.patterns import Global, Pattern, Window
from visattn_kernels.terms import RelativeQuery, Term
from visattn_kernels.tracing import surely


class ViTDetAttention(PackedAttention):
    """Attention to the whole map or inside windows, with products of the query and of vectors for the offset.

        y_i = W_o sum_j softmax_j(scale * q_i·k_j + q_i·r_h[Δy] + q_i·r_w[Δx]) v_j

    Where windows do not divide the map, it is padded at its end with zeros before the projection, so that what is
    padded has the biases for keys and values, and takes part.

    Args:
        channels: C, those of the map.
        size: sides (h, w) of the map that the tables are made for, or one for both; needed without a window, with
            relative positions. On a map of another size the tables are interpolated linearly.
        window_size: side of the windows; 0 for the whole map.
        heads: number of heads; divides C.
        relative: whether there is r.
        qkv_bias: whether the projection to q, k and v has a bias.
        scale: factor of q·k; None means `1/sqrt(C // heads)`.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result in channels-last, cut out of a larger one
        where the map was padded.

    Raises:
        TypeError, ValueError: an argument is no integer or too small; no `size` where it is needed.
        RuntimeError: x is no map of C channels.

    Memory:
        The projections, what `attention` takes, and where windows do not divide the map, a padded copy of it.

    References:
        Li et al., 2022 (ViTDet), section 3; the relative positions are those of Li et al., 2022 (MViTv2), equation 4.
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int] | None = None,
        *,
        window_size: int = 0,
        heads: int = 12,
        relative: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        multiple = pair(max(count(window_size, "window_size", 0), 1))
        super().__init__(channels, heads, qkv_bias=qkv_bias, scale=scale, multiple=multiple, backend=backend)
        self.window_size = window_size
        if relative and not window_size and size is None:
            raise expected("size, without a window_size", "size", size, ValueError)
        height, width = (count(side, "size") for side in pair(window_size or (1 if size is None else size)))
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, self.head_dim)) if relative else None
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, self.head_dim)) if relative else None

    def _geometry(self, height: int, width: int) -> tuple[Pattern, tuple[Term, ...]]:
        pattern = Window(self.window_size) if self.window_size else Global()
        if self.rel_pos_h is None or self.rel_pos_w is None:
            return pattern, ()
        reach = pair(self.window_size) if self.window_size else (height, width)
        rel_h, rel_w = _resized(self.rel_pos_h, 2 * reach[0] - 1), _resized(self.rel_pos_w, 2 * reach[1] - 1)
        return pattern, (RelativeQuery(rel_h, rel_w),)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of `Attention` in segment-anything or detectron2, or SAM's in transformers.

        Their tables go by query minus key.
        """
        ours = renamed(state, {name: name for name in ("qkv", "proj", "rel_pos_h", "rel_pos_w")})
        ours |= {name: x.flip(0) for name, x in ours.items() if name.startswith("rel_pos")}
        return {name: as_convolution(x) if name.endswith(".weight") else x for name, x in ours.items()}

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"window_size={self.window_size}, heads={self.heads}"


def _resized(table: torch.Tensor, entries: int) -> torch.Tensor:
    """A table interpolated to this many entries."""
    if surely(table.shape[0] == entries):
        return table
    return nn.functional.interpolate(table.T[None], entries, mode="linear")[0].T
