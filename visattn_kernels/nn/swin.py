"""The window attention and the block of Swin (Liu et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from visattn_kernels.nn.common import Layer, PackedAttention, as_convolution, by_head, count, flag, image, pair, renamed
from visattn_kernels.patterns import Pattern, Window
from visattn_kernels.terms import RelativeBias, Term
from visattn_kernels.tracing import frozen


class WindowAttention(PackedAttention):
    """Attention inside windows, with a bias of the offset; shifted, with windows cut elsewhere.

        y_i = W_o sum_j softmax_j(scale * q_i·k_j + b[j - i]) v_j        over j in the window of i

    A shifted window is Swin's: cut where its rolled map is, and smaller at the border, where Swin masks. Where windows
    do not divide the map they are smaller at the border too, unless it is padded. On an axis that a window covers,
    there is no shift, unless it is padded.

    Args:
        channels: C, those of the map.
        window_size: sides of a window, an integer or a pair (h, w).
        shift: where the first cut lies, an integer or a pair, less than the window; Swin's is half the window.
        pad: whether the map is padded at its end to whole windows, with zeros before the projection, so that what is
            padded has the biases for keys and values, and takes part: Swin's for detection. (timm rolls the map before
            it pads, which is another layer if it is shifted.)
        heads: number of heads; divides C.
        qkv_bias: whether the projection to q, k and v has a bias.
        scale: factor of q·k; None means `1/sqrt(C // heads)`.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result in channels-last, cut out of a larger one
        where the map was padded.

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or the shift no less than the window.
        RuntimeError: x is no map of C channels.

    Memory:
        The projections, and what `attention` takes. No rolled or partitioned copy of the map, and no mask;
        a padded copy where `pad` adds something.

    References:
        Liu et al., 2021, equation 4 and section 3.2.
    """

    def __init__(
        self,
        channels: int,
        window_size: int | tuple[int, int] = 7,
        *,
        shift: int | tuple[int, int] = 0,
        pad: bool = False,
        heads: int = 4,
        qkv_bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        Window(window_size, shift)
        multiple = pair(window_size) if flag(pad, "pad") else (1, 1)
        super().__init__(channels, heads, qkv_bias=qkv_bias, scale=scale, multiple=multiple, backend=backend)
        self.pad = pad
        self.window_size, self.shift = pair(window_size), pair(shift)
        height, width = self.window_size
        self.bias_table = nn.Parameter(torch.empty(heads, 2 * height - 1, 2 * width - 1))
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def _geometry(self, height: int, width: int) -> tuple[Pattern, tuple[Term, ...]]:
        shift = self.shift
        if max(shift) and not self.pad:
            what = "the shift of WindowAttention, which ends where a window covers an axis"
            height, width = frozen(what, height, width)
            axes = zip(shift, self.window_size, (height, width), strict=True)
            first, second = (0 if start and length <= size else start for start, size, length in axes)
            shift = first, second
        return Window(self.window_size, shift), (RelativeBias(self.bias_table),)

    @staticmethod
    def translate(
        state: Mapping[str, torch.Tensor], window_size: int | tuple[int, int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Our state dict of that of `WindowAttention` in timm, or in Swin's published code.

        Args:
            state: theirs, with a table by query minus key, `[(2h-1)(2w-1), heads]`.
            window_size: sides of a window that is not square.
        """
        ours = renamed(state, _NAMES, ("bias_table",))
        ours["bias_table"] = by_head(ours["bias_table"], window_size)
        return {name: as_convolution(x) if name.endswith(".weight") else x for name, x in ours.items()}

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"window_size={self.window_size}, shift={self.shift}, pad={self.pad}, heads={self.heads}"


_NAMES = {
    **{"qkv": "qkv", "proj": "proj", "relative_position_bias_table": "bias_table"},
    **{"relative_position_index": None, "attn_mask": None},
}


class SwinBlock(Layer):
    """Swin's block: window attention and a net on each position, both residual, both after a layer norm.

        y = x + attention(LN(x)),    z = y + W_2 gelu(W_1 LN(y))

    Args:
        channels, window_size, shift, pad, heads, qkv_bias, scale, backend: as in `WindowAttention`.
        mlp_channels: those between W_1 and W_2; None means four times C.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result alike. The layer norms copy a map that is not in
        the channels-last format.

    Raises:
        TypeError, ValueError, RuntimeError: as `WindowAttention`.

    Memory:
        That of `WindowAttention`, and the net's `mlp_channels` for each position.

    References:
        Liu et al., 2021, equation 3.
    """

    def __init__(
        self,
        channels: int,
        window_size: int | tuple[int, int] = 7,
        *,
        shift: int | tuple[int, int] = 0,
        pad: bool = False,
        heads: int = 4,
        qkv_bias: bool = True,
        scale: float | None = None,
        mlp_channels: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        hidden = 4 * channels if mlp_channels is None else count(mlp_channels, "mlp_channels")
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(
            channels, window_size, shift=shift, pad=pad, heads=heads, qkv_bias=qkv_bias, scale=scale, backend=backend
        )
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map, what its positions gathered, and what each made of it."""
        x = image(x, self.channels)
        x = x + self.attn(_over_channels(self.norm1, x))
        return x + self.mlp(_over_channels(self.norm2, x))  # type: ignore[no-any-return]

    @staticmethod
    def translate(
        state: Mapping[str, torch.Tensor], window_size: int | tuple[int, int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Our state dict of that of `SwinTransformerBlock` in timm, or in Swin's published code.

        There a map that a window covers makes the window as small as the map, and with it the table: so must ours be.
        """
        ours = renamed(state, _BLOCK_NAMES)
        attn = {name.removeprefix("attn."): ours.pop(name) for name in list(ours) if name.startswith("attn.")}
        ours |= {f"attn.{name}": x for name, x in WindowAttention.translate(attn, window_size).items()}
        return {name: as_convolution(x) if name.startswith("mlp") else x for name, x in ours.items()}


_BLOCK_NAMES = {
    **{"norm1": "norm1", "attn": "attn", "norm2": "norm2", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"},
    **{"attn_mask": None},
}


def _over_channels(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """A layer norm of each position's channels."""
    y: torch.Tensor = norm(x.permute(0, 2, 3, 1))
    return y.permute(0, 3, 1, 2)
