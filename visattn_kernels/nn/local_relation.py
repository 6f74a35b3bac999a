"""The local relation layer of LR-Net (Hu et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from visattn_kernels.attention import attention, attention_map, channels_first, heads_last
from visattn_kernels.nn.common import Layer, by_reach, choice, count, image, share
from visattn_kernels.patterns import Neighborhood
from visattn_kernels.terms import KeyBias, RelativeBias, Term


class LocalRelation(Layer):
    """An adaptive convolution: weights from how alike two positions are, and from how they lie to one another.

        y_i = W_o sum_j softmax_j(s(q_i, k_j) + g(j - i)) x_j

    over the k × k positions around i. A group of m channels shares its weights, and has one channel of q and of k.
    g is a net of two layers on the offset, whose sides go from -1 to 1.

    Args:
        channels: C, those of the map.
        kernel_size: k; the positions are k // 2 before the query and those after.
        share_channels: m; divides C.
        key_channels: those of q and k in each group; 1 in the paper.
        similarity: s: "dot", q·k; or "squared_difference", -|q - k|².
        hidden_channels: those between the two layers of g; None means half the number of groups, or 1.
        border: "mask": positions outside the map do not exist; "zero": they are zeros, as in padding; "shift": the
            neighborhood is pushed inside.
        project: whether there is W_o.
        backend: as in `attention`.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result in channels-last.

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or no choice; with border="shift" a kernel larger
            than the map.
        RuntimeError: x is no map of C channels.

    Memory:
        q, k, for the squared difference those once more and a number for each key and group, and what `attention`
        takes. Never a number for each pair.

    References:
        Hu et al., 2019, equations 2 to 4. Their |q - k| is no dot product and is not here.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        *,
        share_channels: int = 8,
        key_channels: int = 1,
        similarity: str = "dot",
        hidden_channels: int | None = None,
        border: str = "mask",
        project: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        self.heads = share(channels, share_channels, "share_channels")
        self.similarity = choice(similarity, "similarity", ("dot", "squared_difference"))
        choice(border, "border", ("mask", "zero", "shift"))
        self.kernel_size = count(kernel_size, "kernel_size")
        self.pattern = Neighborhood(kernel_size, border=border)
        self.backend = backend
        self.scale = 1.0 if similarity == "dot" else 2.0
        width = self.heads * count(key_channels, "key_channels")
        hidden = max(self.heads // 2, 1) if hidden_channels is None else count(hidden_channels, "hidden_channels")
        self.query = nn.Conv2d(channels, width, 1)
        self.key = nn.Conv2d(channels, width, 1)
        self.prior = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, self.heads))
        self.project = nn.Conv2d(channels, channels, 1) if project else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What each position gathered, projected."""
        q, k, terms = self._logits(x)
        v = heads_last(x, self.heads)
        y = attention(q, k, v.to(q.dtype), self.pattern, scale=self.scale, terms=terms, backend=self.backend)
        y = channels_first(y)
        return y if self.project is None else self.project(y)

    def attention_map(self, x: torch.Tensor, at: Sequence[tuple[int, int]] | torch.Tensor) -> torch.Tensor:
        """The map's rows of the positions `at`, points (y, x): `[B, len(at), C // share_channels, H, W]`, float32."""
        q, k, terms = self._logits(x)
        return attention_map(q, k, at, self.pattern, scale=self.scale, terms=terms, backend=self.backend)

    def _logits(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[Term]]:
        """q, k and the terms: -|q - k|² is 2 q·k - |k|², but for a constant of each query."""
        x = image(x, self.channels)
        q, k = heads_last(self.query(x), self.heads), heads_last(self.key(x), self.heads)
        terms: list[Term] = [RelativeBias(by_reach(by_reach(self._prior(x), 1), 2).to(q.dtype))]
        if self.similarity == "squared_difference":
            if self.pattern.border != "zero":  # what q and k share cancels, and would take the digits of 16 bits
                centre = k.detach().mean((1, 2), keepdim=True)
                q, k = q - centre, k - centre
            terms.append(KeyBias(-k.square().sum(-1)))
        return q, k, terms

    def _prior(self, x: torch.Tensor) -> torch.Tensor:
        """The net g on every offset: [heads, k, k]."""
        dtype = self.query.weight.dtype
        before = self.kernel_size // 2
        side = (torch.arange(self.kernel_size, device=x.device, dtype=dtype) - before) / max(before, 1)
        offsets = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)  # [k, k, 2]
        return self.prior(offsets).permute(2, 0, 1)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"{self.pattern}, heads={self.heads}, similarity={self.similarity!r}"
