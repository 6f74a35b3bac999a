"""The criss-cross attention of CCNet (Huang et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visattn_kernels.attention import attention, attention_map, channels_first, heads_last
from visattn_kernels.nn.common import Layer, count, image, renamed, scaled, zero_factor
from visattn_kernels.patterns import CrissCross

_PATTERN = CrissCross()


class CrissCrossAttention(Layer):
    """Every position looks at its row and its column; twice, and it has heard of the whole map.

        q = W_q x,  k = W_k x,  v = W_v x
        y = x + gamma * sum_j softmax_j(q·k_j) v_j        over the H + W - 1 positions j of its row and column

    `recurrence` times, with the same weights. There is no scale, and gamma starts at 0, so that a new layer is the
    identity.

    Args:
        channels: C, those of the map.
        key_channels: those of queries and keys; None means C // 8.
        recurrence: how many times; the paper's R. 2 is what its models have.
        bias: whether the convolutions have biases; the authors' have.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), float64, float32, bfloat16 or float16, in either memory format; the result alike.

    Raises:
        TypeError, ValueError: an argument is no integer or too small.
        RuntimeError: x is no map of C channels.

    Memory:
        Each time the convolutions' outputs, and what `attention` takes.

    References:
        Huang et al., 2019, section 3.2 and equations 1 and 2; recurrence: section 3.3.
    """

    def __init__(
        self,
        channels: int,
        *,
        key_channels: int | None = None,
        recurrence: int = 2,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        keys = count(max(channels // 8, 1) if key_channels is None else key_channels, "key_channels")
        self.recurrence = count(recurrence, "recurrence")
        self.backend = backend
        self.query = nn.Conv2d(channels, keys, 1, bias=bias)
        self.key = nn.Conv2d(channels, keys, 1, bias=bias)
        self.value = nn.Conv2d(channels, channels, 1, bias=bias)
        self.gamma = zero_factor(self, "gamma")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map and what its positions gathered."""
        return self._after(image(x, self.channels), self.recurrence)

    def _after(self, x: torch.Tensor, times: int) -> torch.Tensor:
        for _ in range(times):
            q, k, v = heads_last(self.query(x)), heads_last(self.key(x)), heads_last(self.value(x))
            x = x + scaled(self.gamma, channels_first(attention(q, k, v, _PATTERN, scale=1.0, backend=self.backend)))
        return x

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The rows of the last time's map, of the positions `at`, points (y, x): `[B, len(at), H, W]`, float32.

        Zeros outside the row and the column. See `visattn_kernels.attention_map`; no other row is computed.
        """
        x = self._after(image(x, self.channels), self.recurrence - 1)
        q, k = heads_last(self.query(x)), heads_last(self.key(x))
        return attention_map(q, k, at, _PATTERN, scale=1.0, backend=self.backend).squeeze(2)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of a well-known implementation.

        Understood are the authors' `CrissCrossAttention` (query_conv, key_conv, value_conv, gamma; called
        `PixelwiseAttention` at first) and mmcv's, whose gamma is a layer with a scale.
        """
        ours = renamed(state, _NAMES, ("gamma",))
        return {**ours, "gamma": ours["gamma"].reshape(1)}

    def extra_repr(self) -> str:
        """How many times."""
        return f"recurrence={self.recurrence}"


_NAMES = {
    **{"query_conv": "query", "key_conv": "key", "value_conv": "value"},
    **{"gamma": "gamma", "gamma.scale": "gamma"},
}
