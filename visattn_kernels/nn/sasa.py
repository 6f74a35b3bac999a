"""Stand-alone self-attention (Ramachandran et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visattn_kernels.attention import attention, attention_map, channels_first, heads_last
from visattn_kernels.errors import expected
from visattn_kernels.nn.common import Layer, averaged, by_reach, choice, count, image, renamed, share
from visattn_kernels.patterns import Neighborhood
from visattn_kernels.terms import RelativeQuery


class StandAloneSelfAttention(Layer):
    """Attention in place of a convolution: every position looks at the k × k positions around it.

        y_i = sum_j softmax_j(scale * (q_i·k_j + q_i·r[j - i])) v_j

    One half of the channels of each head has r by rows, the other by columns: r[Δy, Δx] = (r_h[Δy], r_w[Δx]).

    Args:
        channels: C, those of the map.
        kernel_size: k; the positions are k // 2 before the query and those after.
        out_channels: those of queries, keys, values and of the result; None means C.
        heads: number of heads; divides `out_channels` into even numbers, or into 1: then each channel is a head, the
            first half of them with r by rows, as in a popular re-implementation that sums q·k over no channels.
        share_tables: whether the heads have one r.
        border: "zero": positions outside the map have k = 0 and v = 0 and take their share of the softmax, as padding
            does; "mask": they do not exist; "shift": the neighborhood is pushed inside.
        scale: factor of the logits; the paper has none.
        bias: whether the projections have biases. What is outside the map is zeros all the same.
        stride: factor of an average pooling of the result, which drops what is left over.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result
        `[B, out_channels, H // stride, W // stride]`, in channels-last.

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or no choice; heads of an odd number of channels;
            with border="shift" a kernel larger than the map.
        RuntimeError: x is no map of C channels.

    Memory:
        The projections, and what `attention` takes: of each query k + k products with r. Never k² copies of the map.

    References:
        Ramachandran et al., 2019, equations 2 and 3, and section 3.2 for the stride.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        *,
        out_channels: int | None = None,
        heads: int = 8,
        share_tables: bool = False,
        border: str = "zero",
        scale: float = 1.0,
        bias: bool = False,
        stride: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels, self.heads = count(channels, "channels"), heads
        out = channels if out_channels is None else count(out_channels, "out_channels")
        width = share(out, heads)
        if out % 2 or (width % 2 and (width > 1 or share_tables)):
            rule = f"heads that divide {out} channels into even numbers, or into 1 without share_tables"
            raise expected(rule, "heads", heads, ValueError)
        choice(border, "border", ("zero", "mask", "shift"))
        self.pattern = Neighborhood(count(kernel_size, "kernel_size"), border=border)
        self.scale, self.stride, self.backend = scale, count(stride, "stride"), backend
        self.query = nn.Conv2d(channels, out, 1, bias=bias)
        self.key = nn.Conv2d(channels, out, 1, bias=bias)
        self.value = nn.Conv2d(channels, out, 1, bias=bias)
        self.shared = share_tables
        rows = (width if share_tables else out) // 2
        self.relative_h = nn.Parameter(torch.randn(rows, kernel_size))
        self.relative_w = nn.Parameter(torch.randn(rows, kernel_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What each position gathered."""
        q, k = self._query_and_key(x)
        v = heads_last(self.value(x), self.heads)
        terms = (self._term(),)
        y = channels_first(attention(q, k, v, self.pattern, scale=self.scale, terms=terms, backend=self.backend))
        return averaged(y, self.stride)

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The map's rows of the positions `at`, points (y, x): `[B, len(at), heads, H, W]`, float32.

        With border="zero" a row sums to less than 1 near the border, where the zeros around the map take a share.
        """
        q, k = self._query_and_key(x)
        terms = (self._term(),)
        return attention_map(q, k, at, self.pattern, scale=self.scale, terms=terms, backend=self.backend)

    def _query_and_key(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = image(x, self.channels)
        return heads_last(self.query(x), self.heads), heads_last(self.key(x), self.heads)

    def _term(self) -> RelativeQuery:
        """The tables by heads, with zeros in the channels of the other, or where heads are channels, in its heads."""
        width = self.query.out_channels // self.heads
        rows, columns = (
            by_reach(table.view(-1, max(width // 2, 1), self.relative_h.shape[1]), -1).transpose(1, 2)
            for table in (self.relative_h, self.relative_w)
        )  # [heads, 2k-1, D // 2]
        none, dim = torch.zeros_like(rows), 2 if width > 1 else 0
        rel_h, rel_w = torch.cat((rows, none), dim), torch.cat((none, columns), dim)
        return RelativeQuery(*((rel_h[0], rel_w[0]) if self.shared else (rel_h, rel_w)), scale=self.scale)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of `AttentionConv` in leaderj1001/Stand-Alone-Self-Attention.

        That layer sums q·k over no channels, whatever its `groups`: it is ours with `heads=out_channels`.
        """
        ours = renamed(state, _NAMES)
        return {name: x.flatten(1) if name.startswith("relative") else x for name, x in ours.items()}

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"{self.pattern}, heads={self.heads}, scale={self.scale}, stride={self.stride}"


_NAMES = {
    **{"query_conv": "query", "key_conv": "key", "value_conv": "value"},
    **{"rel_h": "relative_h", "rel_w": "relative_w"},
}
