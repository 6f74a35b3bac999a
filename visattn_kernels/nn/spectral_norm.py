"""The spectral norm of a layer's weight (Miyato et al., 2018), by one step of the power method for each update."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from visattn_kernels.nn.common import without_autocast


def spectral_norm(layer: nn.Conv2d) -> nn.Conv2d:
    """Divide a layer's weight by its largest singular value, as `torch.nn.utils.parametrizations.spectral_norm`.

    The state dict has torch's entries. Torch's takes a step of the power method at each use of the weight in training,
    so that checkpointing, which uses it twice, computes gradients of another weight than the forward had. This one
    takes a step where the weight has changed since the last, once for each update, as the paper's algorithm 1 does.
    """
    parametrize.register_parametrization(layer, "weight", _SpectralNorm(layer.weight))
    return layer


class _SpectralNorm(nn.Module):
    """W / (uᵀ W v), where u and v come nearer to the first singular vectors with each W that training sees."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            matrix = weight.flatten(1)
            u, v = (nn.functional.normalize(matrix.new_empty(size).normal_(), dim=0) for size in matrix.shape)
            for _ in range(15):
                u, v = _step(matrix, v)
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)
        self.register_buffer("_seen", torch.full_like(matrix, torch.nan), persistent=False)
        self._u: torch.Tensor
        self._v: torch.Tensor
        self._seen: torch.Tensor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight of norm 1."""
        with without_autocast(weight.device):  # 16 bits are too few for a step
            matrix = weight.flatten(1)
            u, v = self._vectors(matrix)
            return weight / torch.dot(u, torch.mv(matrix, v))

    @torch.no_grad()
    def _vectors(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of u and v, since a later step must not change them under a backward."""
        u, v = self._u.clone(), self._v.clone()
        if not self.training:
            return u, v
        if self._seen.device != matrix.device:  # it is in no state dict that was assigned to a layer on meta
            self._seen = torch.full_like(matrix, torch.nan)
        # Chosen by a tensor, so that a graph of torch.compile holds for both.
        changed = (matrix != self._seen).any()
        u, v = (torch.where(changed, new, old) for new, old in zip(_step(matrix, v), (u, v), strict=True))
        for buffer, value in ((self._u, u), (self._v, v), (self._seen, matrix)):
            buffer.copy_(value)
        return u, v

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight that is assigned is taken as it is."""
        return weight


def _step(matrix: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of the power method."""
    u = nn.functional.normalize(torch.mv(matrix, v), dim=0, eps=1e-12)
    return u, nn.functional.normalize(torch.mv(matrix.T, u), dim=0, eps=1e-12)
