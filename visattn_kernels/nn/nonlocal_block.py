"""The non-local block (Wang et al., 2018), with a softmax over positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visattn_kernels.attention import attention, attention_map, channels_first, heads_last
from visattn_kernels.nn.common import BatchNorm2d, Layer, choice, count, image, pooled, renamed


class NonLocalBlock(Layer):
    """Every position gathers from all others, or from all of the pooled map, beside a residual connection.

        theta = W_theta x,  phi = W_phi pool(x),  g = W_g pool(x)
        z = x + BN(W_z (softmax(scale * theta phiᵀ) g))

    A new block is the identity, unless `zero_init` is False. The paper's other two forms, "dot product" and
    "concatenation", have no softmax and are not here.

    Args:
        channels: C, those of the map.
        inner_channels: those of theta, phi and g; None means C // 2.
        mode: "embedded_gaussian", as above, or "gaussian": theta is x and phi is pool(x), without convolutions.
        pool: factor of the max pooling of what is looked at; 1 for none.
        pool_first: whether x is pooled before the convolutions phi and g, as in the paper and in the authors' code, or
            their outputs are, as in most re-implementations.
        scale: factor of the products. The paper's is 1; None means 1/sqrt of the channels that are multiplied
            (`inner_channels`; C with "gaussian"), which is what the authors' code and mmcv do by default.
        bias: whether the convolutions have biases.
        batch_norm: whether a batch norm follows W_z.
        zero_init: whether the batch norm's gamma, or without one W_z, starts at 0.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), float64, float32, bfloat16 or float16, in either memory format; the result alike.

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or no choice.
        RuntimeError: x is no map of C channels.

    Memory:
        The convolutions' outputs, the pooled map, and what `attention` takes. Never a map of positions × positions.

    References:
        Wang et al., 2018, equations 1 to 3 and 6; pooling: section 3.3; the batch norm: section 4.1.
    """

    def __init__(
        self,
        channels: int,
        *,
        inner_channels: int | None = None,
        mode: str = "embedded_gaussian",
        pool: int = 2,
        pool_first: bool = True,
        scale: float | None = 1.0,
        bias: bool = True,
        batch_norm: bool = True,
        zero_init: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        inner = count(max(channels // 2, 1) if inner_channels is None else inner_channels, "inner_channels")
        self.mode = choice(mode, "mode", ("embedded_gaussian", "gaussian"))
        self.pool = count(pool, "pool")
        self.pool_first = pool_first
        self.scale = scale
        self.backend = backend
        embedded = mode == "embedded_gaussian"
        self.query = nn.Conv2d(channels, inner, 1, bias=bias) if embedded else None
        self.key = nn.Conv2d(channels, inner, 1, bias=bias) if embedded else None
        self.value = nn.Conv2d(channels, inner, 1, bias=bias)
        self.project = nn.Conv2d(inner, channels, 1, bias=bias)
        self.norm = BatchNorm2d(channels) if batch_norm else None
        if zero_init:
            last = self.project if self.norm is None else self.norm
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map and what its positions gathered."""
        seen = self._seen(image(x, self.channels))
        q, k = self._query_and_key(x, seen)
        v = heads_last(self._shrunk(self.value(seen)))
        out: torch.Tensor = self.project(channels_first(attention(q, k, v, scale=self.scale, backend=self.backend)))
        if self.norm is not None:
            out = self.norm(out)
        return x + out

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The map's rows of the positions `at`, points (y, x): `[B, len(at), H // pool, W // pool]`, float32.

        See `visattn_kernels.attention_map`; no other row is computed.
        """
        q, k = self._query_and_key(x, self._seen(image(x, self.channels)))
        return attention_map(q, k, at, scale=self.scale, backend=self.backend).squeeze(2)

    def _query_and_key(self, x: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What looks, and what is looked at."""
        q = x if self.query is None else self.query(x)
        k = seen if self.key is None else self.key(seen)
        return heads_last(q), heads_last(self._shrunk(k))

    def _seen(self, x: torch.Tensor) -> torch.Tensor:
        """What the convolutions of keys and values take."""
        return pooled(x, self.pool) if self.pool_first else x

    def _shrunk(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values, pooled if they are not yet."""
        return x if self.pool_first else pooled(x, self.pool)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of a well-known implementation.

        Understood are, by the names of their entries:

        - AlexHex7's `NONLocalBlock2D` (g, theta, phi, W), for which `pool_first=False`, and `pool=1` without
          `sub_sample`;
        - mmcv's `NonLocal2d` (g, theta, phi, conv_out), likewise; `scale=None` with its `use_scale` in the embedded
          mode; `batch_norm` where it has a norm, before which its last convolution has no bias: ours is then 0;
        - timm's `NonLocalAttn` (t, p, g, z, norm), for which `pool=1` and `scale=channels**-0.5`.
        """
        ours = renamed(state, _NAMES)
        if "value.bias" in ours and "project.bias" not in ours:
            ours["project.bias"] = torch.zeros_like(ours["norm.bias"])
        return ours

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"mode={self.mode!r}, pool={self.pool}, pool_first={self.pool_first}, scale={self.scale}"


_NAMES = {
    **{"theta": "query", "phi": "key", "phi.0": "key", "g": "value", "g.0": "value"},
    **{"W": "project", "W.0": "project", "W.1": "norm"},
    **{"theta.conv": "query", "phi.conv": "key", "phi.0.conv": "key", "g.conv": "value", "g.0.conv": "value"},
    **{"conv_out.conv": "project", "conv_out.bn": "norm"},
    **{"t": "query", "p": "key", "z": "project", "norm": "norm"},
}
