"""Squeeze and excitation (Hu et al., 2018): a weight for each channel, from the means of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from visattn_kernels.nn.common import Layer, choice, convolutions, count, image, renamed


def _hard_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Torch's, whose own gradient in float64 has a sixth in float32."""
    return nn.functional.relu6(x + 3) / 6


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}
_GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": _hard_sigmoid,
}


class SqueezeExcite(Layer):
    """Multiply each channel by a weight that depends on the means of all channels.

        s = gate(W_2 act(W_1 mean(x)))
        y = s * x

    Args:
        channels: C, those of the map.
        reduction: C // reduction channels lie between W_1 and W_2, at least one.
        rd_channels: how many lie there, whatever `reduction` says.
        bias: whether W_1 and W_2 have biases.
        activation: "relu", or "silu" as in EfficientNet (Tan and Le, 2019).
        gate: "sigmoid", or "hard_sigmoid" as in MobileNetV3 (Howard et al., 2019).

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result alike.

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or no choice.
        RuntimeError: x is no map of C channels.

    Memory:
        The result, and some numbers per channel.

    References:
        Hu et al., 2018, equations 2 to 4.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        rd_channels: int | None = None,
        bias: bool = True,
        activation: str = "relu",
        gate: str = "sigmoid",
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        fewer = max(channels // count(reduction, "reduction"), 1)
        inner = count(fewer if rd_channels is None else rd_channels, "rd_channels")
        self.activation = choice(activation, "activation", tuple(_ACTIVATIONS))
        self.gate = choice(gate, "gate", tuple(_GATES))
        self.reduce = nn.Conv2d(channels, inner, 1, bias=bias)
        self.expand = nn.Conv2d(inner, channels, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map, its channels weighted."""
        return x * self.weights(x)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """The weights of the channels, `[B, C, 1, 1]`."""
        means = image(x, self.channels).mean((2, 3), keepdim=True)
        return _GATES[self.gate](self.expand(_ACTIVATIONS[self.activation](self.reduce(means))))

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of a well-known implementation.

        Understood are, by the names of their entries: timm's `SqueezeExcite` of EfficientNet and MobileNet
        (conv_reduce, conv_expand), timm's `SEModule` without a norm and torchvision's `SqueezeExcitation` (fc1, fc2),
        and the form with linear layers in a row (fc.0, fc.2). Their numbers of inner channels are rounded in ways of
        their own: give `rd_channels`.
        """
        return convolutions(renamed(state, _NAMES))

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"activation={self.activation!r}, gate={self.gate!r}"


_NAMES = {
    **{"conv_reduce": "reduce", "conv_expand": "expand"},
    **{"fc1": "reduce", "fc2": "expand"},
    **{"fc.0": "reduce", "fc.2": "expand"},
}
