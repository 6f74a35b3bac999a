"""The two attentions of DANet (Fu et al., 2019): over positions, and over channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visattn_kernels.attention import attention, attention_map, channels_first, heads_last
from visattn_kernels.nn.common import Layer, count, image, renamed, scaled, without_autocast, zero_factor


class DANetPositionAttention(Layer):
    """Every position looks at all others.

        q = W_q x,  k = W_k x,  v = W_v x
        y = x + gamma * softmax(q kᵀ) v

    There is no scale, and gamma starts at 0, so that a new layer is the identity.

    Args:
        channels: C, those of the map.
        key_channels: those of queries and keys; None means C // 8.
        bias: whether the convolutions have biases; the authors' have.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), float64, float32, bfloat16 or float16, in either memory format; the result alike.

    Raises:
        TypeError, ValueError: an argument is no integer or too small.
        RuntimeError: x is no map of C channels.

    Memory:
        The convolutions' outputs, and what `attention` takes. Never a map of positions × positions.

    References:
        Fu et al., 2019, equations 1 and 2; C // 8 is that of the authors' code.
    """

    def __init__(
        self, channels: int, *, key_channels: int | None = None, bias: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        keys = count(max(channels // 8, 1) if key_channels is None else key_channels, "key_channels")
        self.backend = backend
        self.query = nn.Conv2d(channels, keys, 1, bias=bias)
        self.key = nn.Conv2d(channels, keys, 1, bias=bias)
        self.value = nn.Conv2d(channels, channels, 1, bias=bias)
        self.gamma = zero_factor(self, "gamma")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map and what its positions gathered."""
        x = image(x, self.channels)
        q, k, v = heads_last(self.query(x)), heads_last(self.key(x)), heads_last(self.value(x))
        return x + scaled(self.gamma, channels_first(attention(q, k, v, scale=1.0, backend=self.backend)))

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The map's rows of the positions `at`, points (y, x): `[B, len(at), H, W]`, float32.

        See `visattn_kernels.attention_map`; no other row is computed.
        """
        x = image(x, self.channels)
        q, k = heads_last(self.query(x)), heads_last(self.key(x))
        return attention_map(q, k, at, scale=1.0, backend=self.backend).squeeze(2)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of the authors' `PAM_Module` (query_conv, key_conv, value_conv, gamma)."""
        ours = renamed(
            state, {"query_conv": "query", "key_conv": "key", "value_conv": "value", "gamma": "gamma"}, ("gamma",)
        )
        return {**ours, "gamma": ours["gamma"].reshape(1)}


class DANetChannelAttention(Layer):
    """Every channel gathers from those that are least alike to it.

        E = X Xᵀ,  X = x as [C, H * W]
        y = x + gamma * softmax(max E - E) X

    The paper's equation has softmax(E); its code, whose weights are published, subtracts from the largest. gamma
    starts at 0, so that a new layer is the identity.

    Args:
        subtract: whether E is subtracted from the largest of its row, as the code does, or taken as it is.

    Shape:
        x (Tensor[B, C, H, W]) of any C, in either memory format; the result alike.

    Raises:
        TypeError, RuntimeError: x is no map.

    Memory:
        Two maps of C × C numbers, and the result: two matrix products need no more.

    References:
        Fu et al., 2019, equations 3 and 4; the subtraction is that of the authors' code.
    """

    def __init__(self, *, subtract: bool = True) -> None:
        super().__init__()
        self.subtract = subtract
        self.gamma = zero_factor(self, "gamma")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map and what its channels gathered."""
        weights = self.channel_map(x)
        return x + scaled(self.gamma, (weights @ x.flatten(2)).reshape(x.shape))

    def channel_map(self, x: torch.Tensor) -> torch.Tensor:
        """How much each channel looks at each: `[B, C, C]`, rows sum to 1."""
        seen = image(x).flatten(2)
        with without_autocast(seen.device):  # sums over positions are too large for 16 bits
            wide = seen.to(torch.promote_types(seen.dtype, torch.float32))
            energy = wide @ wide.transpose(1, 2)
            # softmax(max - E) is softmax(-E): what a whole row shares cancels
            return torch.softmax(-energy if self.subtract else energy, dim=-1).to(seen.dtype)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of the authors' `CAM_Module` (gamma)."""
        return {"gamma": renamed(state, {"gamma": "gamma"}, ("gamma",))["gamma"].reshape(1)}

    def extra_repr(self) -> str:
        """Whether it subtracts."""
        return f"subtract={self.subtract}"
