"""The neighborhood attention of NAT (Hassani et al., 2023) and DiNAT (Hassani and Shi, 2022)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from visattn_kernels.nn.common import PackedAttention, as_convolution, flag, pair, renamed
from visattn_kernels.patterns import Neighborhood, Pattern
from visattn_kernels.terms import RelativeBias, Term


class NeighborhoodAttention(PackedAttention):
    """Attention of every position to the k × k nearest ones, with a bias of the offset.

        y_i = W_o sum_j softmax_j(scale * q_i·k_j + b[j - i]) v_j        over j in the neighborhood of i

    At the border the neighborhood is pushed inside, so that it always has k × k positions.

    Args:
        channels: C, those of the map.
        kernel_size: k, an integer or a pair (h, w).
        dilation: how far apart the positions are, an integer or a pair; 1 is NAT, more is DiNAT.
        is_causal: whether the neighborhood ends at the position, a bool or a pair.
        pad: whether a map smaller than `kernel_size * dilation` is padded to that at its end, with zeros before the
            projection, so that what is padded has the biases for keys and values, and takes part: NATTEN's layer to
            0.17. Without, such a map is refused.
        heads: number of heads; divides C.
        bias_table: whether there is b.
        qkv_bias: whether the projection to q, k and v has a bias.
        scale: factor of q·k; None means `1/sqrt(C // heads)`.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result in channels-last, cut out of a larger one where the
        map was padded.

    Raises:
        TypeError, ValueError: an argument is no integer or too small; the map is too small, without `pad`.
        RuntimeError: x is no map of C channels.

    Memory:
        The projections, and what `attention` takes; a padded copy of a map that is too small. Never k² numbers for a
        position.

    References:
        Hassani et al., 2023, equations 2 to 4; Hassani and Shi, 2022, for the dilation.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 7,
        *,
        dilation: int | tuple[int, int] = 1,
        is_causal: bool | tuple[bool, bool] = False,
        pad: bool = False,
        heads: int = 4,
        bias_table: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        pattern = Neighborhood(kernel_size, dilation, is_causal=is_causal)
        height, width = pair(pattern.kernel_size)
        steps = pair(pattern.dilation)
        least = (height * steps[0], width * steps[1]) if flag(pad, "pad") else (1, 1)
        super().__init__(channels, heads, qkv_bias=qkv_bias, scale=scale, least=least, backend=backend)
        self.pad, self.pattern = pad, pattern
        table = nn.Parameter(torch.empty(heads, 2 * height - 1, 2 * width - 1)) if bias_table else None
        self.bias_table = table if table is None else nn.init.trunc_normal_(table, std=0.02)

    def _geometry(self, height: int, width: int) -> tuple[Pattern, tuple[Term, ...]]:
        return self.pattern, () if self.bias_table is None else (RelativeBias(self.bias_table),)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of `NeighborhoodAttention2D` in NATTEN to 0.17, whose `rpb` has our order."""
        ours = renamed(state, {"qkv": "qkv", "proj": "proj", "rpb": "bias_table"})
        return {name: as_convolution(x) if name.endswith(".weight") else x for name, x in ours.items()}

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"{self.pattern}, pad={self.pad}, heads={self.heads}"
