"""The attention of MaxViT (Tu et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from visattn_kernels.nn.common import PackedAttention, as_convolution, by_head, choice, pair, renamed
from visattn_kernels.patterns import Grid, Pattern, Window
from visattn_kernels.terms import RelativeBias, Term


class GridAttention(PackedAttention):
    """Attention over a sparse grid that spans the map, or inside windows, with a bias of the offset.

        y_i = W_o sum_j softmax_j(scale * q_i·k_j + b[j - i]) v_j

    Args:
        channels: C, those of the map.
        grid_size: how many positions along each axis one looks at, an integer or a pair (h, w); with
            partition="block" the sides of a window.
        partition: "grid": positions as far apart as fits the map; "block": a window, as in Swin without shift.
        heads: number of heads; divides C.
        qkv_bias: whether the projection to q, k and v has a bias.
        scale: factor of q·k; None means `1/sqrt(C // heads)`.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result in channels-last. Any size: where the published
        code wants the grid to divide the map, here some positions see fewer.

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or no choice.
        RuntimeError: x is no map of C channels.

    Memory:
        The projections, and what `attention` takes. No partitioned copy of the map.

    References:
        Tu et al., 2022, section 3.2.
    """

    def __init__(
        self,
        channels: int,
        grid_size: int | tuple[int, int] = 7,
        *,
        partition: str = "grid",
        heads: int = 4,
        qkv_bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(channels, heads, qkv_bias=qkv_bias, scale=scale, backend=backend)
        self.pattern = (Grid if choice(partition, "partition", ("grid", "block")) == "grid" else Window)(grid_size)
        height, width = pair(grid_size)
        self.bias_table = nn.Parameter(torch.empty(heads, 2 * height - 1, 2 * width - 1))
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def _geometry(self, height: int, width: int) -> tuple[Pattern, tuple[Term, ...]]:
        return self.pattern, (RelativeBias(self.bias_table),)

    @staticmethod
    def translate(
        state: Mapping[str, torch.Tensor],
        grid_size: int | tuple[int, int] | None = None,
        head_first: bool | None = None,
    ) -> dict[str, torch.Tensor]:
        """Our state dict of that of `AttentionCl` or `Attention2d` in timm's MaxViT.

        Args:
            state: theirs, with a table `[heads, 2h-1, 2w-1]` by key minus query (their `rel_pos_type="bias_tf"`), or
                `[(2h-1)(2w-1), heads]` by query minus key ("bias").
            grid_size: sides of a window that is not square; only the second table needs them.
            head_first: theirs: whether the projection's channels go by head first, then by q, k and v. None: as timm's
                own models with such a table have it; those with weights of the paper (`maxvit_*_tf_*`) have the first
                table, and channels by q, k and v first.
        """
        ours = renamed(state, _NAMES, ("bias_table",))
        head_first = ours["bias_table"].dim() == 2 if head_first is None else head_first
        ours["bias_table"] = by_head(ours["bias_table"], grid_size)
        if head_first:
            heads = len(ours["bias_table"])
            for name in [name for name in ours if name.startswith("qkv.")]:
                x = ours[name]
                ours[name] = x.reshape(heads, 3, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 2)
        return {name: as_convolution(x) if name.endswith(".weight") else x for name, x in ours.items()}

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"{self.pattern}, heads={self.heads}"


_NAMES = {
    **{"qkv": "qkv", "proj": "proj", "rel_pos.relative_position_bias_table": "bias_table"},
    **{"rel_pos.relative_position_index": None, "rel_pos.height_lookup": None, "rel_pos.width_lookup": None},
}
