"""The self-attention of SAGAN (Zhang et al., 2019) and its variant without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visattn_kernels.attention import attention, attention_map, channels_first, heads_last
from visattn_kernels.errors import expected
from visattn_kernels.nn.common import Layer, choice, count, image, pooled, renamed, scaled, zero_factor
from visattn_kernels.nn.spectral_norm import spectral_norm as with_spectral_norm


class SAGANAttention(Layer):
    """Self-attention of a GAN's feature map: every position looks at all others, or at all of the pooled map.

        f = W_f x,  g = pool(W_g x),  h = pool(W_h x)
        y = x + sigma * W_v (softmax(f gᵀ) h)

    There is no scale, and sigma starts at 0, so that a new layer is the identity.

    Args:
        channels: C, those of the map.
        key_channels: those of queries and keys; None means C // 8.
        value_channels: those of values; None means C // 2, or C without `project`.
        pool: factor of the max pooling of keys and values, after their convolutions; what it leaves over of an odd
            size is dropped. 1 for none.
        bias: whether the convolutions have biases; the paper's have none.
        project: whether a last convolution brings the values back to C channels; the tutorials have none, and values
            of C channels.
        softmax_over: "keys", or "queries": the weights of a position then sum to 1 over the positions that look at it,
            not over those it looks at, as one tutorial has it. That is the same layer with queries and keys exchanged.
        spectral_norm: divide the convolutions' weights by their spectral norms, as the paper does (Miyato et al.,
            2018). In training the power method takes a step for each update of a weight; torch's for each use.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), float64, float32, bfloat16 or float16, in either memory format; the result alike.

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or no choice.
        RuntimeError: x is no map of C channels.

    Memory:
        The convolutions' outputs, and what `attention` takes. Never a map of positions × positions.

    References:
        Zhang et al., 2019, equations 1 to 3; the pooling is that of the authors' code.
    """

    def __init__(
        self,
        channels: int,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        pool: int = 2,
        bias: bool = False,
        project: bool = True,
        softmax_over: str = "keys",
        spectral_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        keys = count(max(channels // 8, 1) if key_channels is None else key_channels, "key_channels")
        default = max(channels // 2, 1) if project else channels
        values = count(default if value_channels is None else value_channels, "value_channels")
        if not project and values != channels:
            raise expected(f"value_channels of {channels} with project=False", "value_channels", values, ValueError)
        self.pool = count(pool, "pool")
        self.softmax_over = choice(softmax_over, "softmax_over", ("keys", "queries"))
        if self.softmax_over == "queries" and pool != 1:
            raise expected('pool of 1 with softmax_over="queries"', "pool", pool, ValueError)
        self.backend = backend
        wrap = with_spectral_norm if spectral_norm else _as_it_is
        self.query = wrap(nn.Conv2d(channels, keys, 1, bias=bias))
        self.key = wrap(nn.Conv2d(channels, keys, 1, bias=bias))
        self.value = wrap(nn.Conv2d(channels, values, 1, bias=bias))
        self.project = wrap(nn.Conv2d(values, channels, 1, bias=bias)) if project else None
        self.sigma = zero_factor(self, "sigma")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map and what its positions gathered."""
        q, k = self._query_and_key(image(x, self.channels))
        v = heads_last(pooled(self.value(x), self.pool))
        out = channels_first(attention(q, k, v, scale=1.0, backend=self.backend))
        return x + scaled(self.sigma, out if self.project is None else self.project(out))

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The map's rows of the positions `at`, points (y, x): `[B, len(at), H // pool, W // pool]`, float32.

        See `visattn_kernels.attention_map`; no other row is computed.
        """
        q, k = self._query_and_key(image(x, self.channels))
        return attention_map(q, k, at, scale=1.0, backend=self.backend).squeeze(2)

    def _query_and_key(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What looks, and what is looked at."""
        q, k = heads_last(self.query(x)), heads_last(pooled(self.key(x), self.pool))
        return (q, k) if self.softmax_over == "keys" else (k, q)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of a well-known implementation.

        Understood are, by the names of their entries: BigGAN-PyTorch's `Attention` (theta, phi, g, o, gamma), the
        re-implementations with `snconv1x1_*` and sigma, and the tutorials' `query_conv`, `key_conv`, `value_conv` and
        gamma (for which `pool=1, bias=True, project=False`). Spectral norms, BigGAN-PyTorch's and those of
        `torch.nn.utils.spectral_norm`, become those of `torch.nn.utils.parametrizations`: `spectral_norm=True`.
        """
        ours = renamed(state, _NAMES, ("sigma",))
        for suffix, place in _SPECTRAL.items():
            ours = {name.removesuffix(suffix) + place if name.endswith(suffix) else name: x for name, x in ours.items()}
        for layer in [name.removesuffix(".u0") for name in ours if name.endswith(".u0")]:  # BigGAN-PyTorch's own norm
            weight, u = ours.pop(f"{layer}.weight"), ours.pop(f"{layer}.u0").flatten()
            v = nn.functional.normalize(weight.flatten(1).T @ u, dim=0)
            u = nn.functional.normalize(weight.flatten(1) @ v, dim=0)  # theirs steps in evaluation too: |W v| is u W v
            del ours[f"{layer}.sv0"]
            ours |= {f"{layer}{place}": x for place, x in zip(_SPECTRAL.values(), (weight, u, v), strict=True)}
        return {**ours, "sigma": ours["sigma"].reshape(1)}

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"pool={self.pool}, softmax_over={self.softmax_over!r}"


_NAMES = {
    **{"theta": "query", "phi": "key", "g": "value", "o": "project", "gamma": "sigma"},
    **{"snconv1x1_theta": "query", "snconv1x1_phi": "key", "snconv1x1_g": "value", "snconv1x1_attn": "project"},
    **{"query_conv": "query", "key_conv": "key", "value_conv": "value", "sigma": "sigma"},
}
_SPECTRAL = {
    ".weight_orig": ".parametrizations.weight.original",
    ".weight_u": ".parametrizations.weight.0._u",
    ".weight_v": ".parametrizations.weight.0._v",
}


def _as_it_is(layer: nn.Conv2d) -> nn.Conv2d:
    return layer


class WeightlessSelfAttention(Layer):
    """Self-attention without a weight: queries, keys and values are the map itself.

        y_i = sum_j softmax_j(scale * x_i·x_j) x_j

    Args:
        scale: factor of the products; None means `1/sqrt(C)`. Large factors make each position look at those alike
            to it alone, small ones at all.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result in channels-last.

    Memory:
        What `attention` takes.

    References:
        Wang et al., 2018, section 3.2, "Gaussian", without the projections.
    """

    def __init__(self, scale: float | None = None, *, backend: str = "auto") -> None:
        super().__init__()
        self.scale = scale
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What each position gathered."""
        q = heads_last(x)
        return channels_first(attention(q, q, q, scale=self.scale, backend=self.backend))

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The map's rows of the positions `at`, points (y, x): `[B, len(at), H, W]`, float32."""
        q = heads_last(x)
        return attention_map(q, q, at, scale=self.scale, backend=self.backend).squeeze(2)

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.scale}"
