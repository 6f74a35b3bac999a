"""The attention of the autoencoder of latent diffusion (Rombach et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visattn_kernels.attention import attention, attention_map, channels_first, heads_last
from visattn_kernels.errors import expected, told
from visattn_kernels.nn.common import Layer, convolutions, count, image, renamed, share


class VAEAttention(Layer):
    """Every position looks at all others, with one head of all channels.

        h = GroupNorm(x),  q = W_q h,  k = W_k h,  v = W_v h
        y = x + W (softmax(q kᵀ / sqrt(C)) v)

    Args:
        channels: C, those of the map; 512 in Stable Diffusion.
        groups: of the norm; divides C.
        eps: of the norm.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), float64, float32, bfloat16 or float16, in either memory format; the result alike.

    Raises:
        TypeError, ValueError: an argument is no integer or too small, `groups` does not divide C, `eps` is not
            positive.
        RuntimeError: x is no map of C channels.

    Memory:
        The norm's and the convolutions' outputs, and what `attention` takes. Never a map of positions × positions.

    References:
        Rombach et al., 2022; the layer is that of the authors' code (`AttnBlock`), which is that of Ho et al., 2020,
        "Denoising diffusion probabilistic models".
    """

    def __init__(self, channels: int, *, groups: int = 32, eps: float = 1e-6, backend: str = "auto") -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        share(channels, groups, "groups")
        self.backend = backend
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
            raise expected("eps to be a positive number", "eps", told(eps), ValueError)
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map and what its positions gathered."""
        h = self.norm(image(x, self.channels))
        q, k, v = heads_last(self.query(h)), heads_last(self.key(h)), heads_last(self.value(h))
        out: torch.Tensor = self.project(channels_first(attention(q, k, v, backend=self.backend)))
        return x + out

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The map's rows of the positions `at`, points (y, x): `[B, len(at), H, W]`, float32.

        See `visattn_kernels.attention_map`; no other row is computed.
        """
        h = self.norm(image(x, self.channels))
        return attention_map(heads_last(self.query(h)), heads_last(self.key(h)), at, backend=self.backend).squeeze(2)

    @staticmethod
    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of that of a well-known implementation.

        Understood are, by the names of their entries: CompVis's `AttnBlock` (norm, q, k, v, proj_out), diffusers'
        `Attention` (group_norm, to_q, to_k, to_v, to_out.0) and its older `AttentionBlock` (group_norm, query, key,
        value, proj_attn). Weights of linear layers become those of 1x1 convolutions.
        """
        return convolutions(renamed(state, _NAMES))


_NAMES = {
    **{"norm": "norm", "q": "query", "k": "key", "v": "value", "proj_out": "project"},
    **{"group_norm": "norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "project"},
    **{"query": "query", "key": "key", "value": "value", "proj_attn": "project"},
}
