"""Masks over positions, one or several, from 1x1 convolutions; what they pool, and how much they overlap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from visattn_kernels.errors import expected
from visattn_kernels.nn.common import Layer, choice, count, image, without_autocast
from visattn_kernels.tracing import one_node, refusing


def _over_positions(scores: torch.Tensor) -> torch.Tensor:
    """A softmax over the positions of each map."""
    return scores.flatten(2).softmax(-1).reshape(scores.shape)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": nn.functional.relu,
    "softplus": nn.functional.softplus,
    "softmax": _over_positions,
}


class SpatialAttentionMask(Layer):
    """Multiply every position by a weight of its own.

        m = act(W x),  or  act(W relu(W_1 x)) with `hidden_channels`
        y = m * x

    Args:
        channels: C, those of the map.
        hidden_channels: those between two convolutions; None for one convolution alone.
        activation: "sigmoid", "relu", "softplus", or "softmax" over positions.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result alike.

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or no choice.
        RuntimeError: x is no map of C channels.

    Memory:
        The result, the mask, and the hidden channels.

    References:
        The softmax: Xu et al., 2015, "Show, attend and tell", equations 4 to 6 without the recurrent state; two
        convolutions and a softplus: Noh et al., 2017 (DELF), section 3.2; a sigmoid: Woo et al., 2018 (CBAM), section
        3, whose convolution is another.
    """

    def __init__(self, channels: int, *, hidden_channels: int | None = None, activation: str = "sigmoid") -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        self.activation = choice(activation, "activation", tuple(_ACTIVATIONS))
        self.score = _scores(channels, hidden_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The map, its positions weighted."""
        return x * self.mask(x)

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """The mask, `[B, 1, H, W]`."""
        return _ACTIVATIONS[self.activation](self.score(image(x, self.channels)))

    def pool(self, x: torch.Tensor, *, normalize: bool = False) -> torch.Tensor:
        """The features under the mask, `[B, C]`; see `masked_pool`."""
        return masked_pool(x, self.mask(x), normalize=normalize).squeeze(1)

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation!r}"


class MultiHeadAttentionMask(Layer):
    """Several masks over one map, each of which pools its own features.

        m_h = act(W x)_h,  or  act(W relu(W_1 x))_h with `hidden_channels`
        y_h = sum_p m_h[p] x[p]

    To train with `diversity_loss`, compute the masks once: `masks = layer.masks(x)`, then `masked_pool(x, masks)` and
    `diversity_loss(masks)`.

    Args:
        channels: C, those of the map.
        heads: M, the number of masks.
        hidden_channels: those between two convolutions; None for one convolution alone.
        activation: "softmax" over positions, "sigmoid", "relu" or "softplus".
        normalize: whether each mask is divided by its sum before it pools; softmax masks sum to 1 as they are.

    Shape:
        x (Tensor[B, C, H, W]), in either memory format; the result is [B, M, C].

    Raises:
        TypeError, ValueError: an argument is no integer, too small, or no choice.
        RuntimeError: x is no map of C channels.

    Memory:
        The masks, [B, M, H, W], the hidden channels and the result, and in the backward their gradients. Never a masked
        copy of the map per head, [B, M, C, H, W].

    References:
        Lin et al., 2017, "A structured self-attentive sentence embedding", equations 6 and 7; over the positions of
        images Li et al., 2018, "Diversity regularized spatiotemporal attention for video-based person
        re-identification", section 3.2.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        hidden_channels: int | None = None,
        activation: str = "softmax",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.channels = count(channels, "channels")
        self.heads = count(heads, "heads")
        self.activation = choice(activation, "activation", tuple(_ACTIVATIONS))
        self.normalize = normalize
        self.score = _scores(channels, hidden_channels, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The features under each mask, `[B, M, C]`."""
        return masked_pool(x, self.masks(x), normalize=self.normalize)

    def masks(self, x: torch.Tensor) -> torch.Tensor:
        """The masks, `[B, M, H, W]`, as the activation gives them."""
        return _ACTIVATIONS[self.activation](self.score(image(x, self.channels)))

    def weighted(self, x: torch.Tensor) -> torch.Tensor:
        """The masked maps summed over heads, `[B, C, H, W]`.

        The masks are summed before they multiply x, which is the same and takes one map instead of M.
        """
        return x * self.masks(x).sum(1, keepdim=True)

    def extra_repr(self) -> str:
        """What is not seen in the convolutions."""
        return f"heads={self.heads}, activation={self.activation!r}, normalize={self.normalize}"


def _scores(channels: int, hidden_channels: int | None, heads: int) -> nn.Sequential:
    """One convolution, or two with a ReLU between them."""
    if hidden_channels is None:
        return nn.Sequential(nn.Conv2d(channels, heads, 1))
    hidden = count(hidden_channels, "hidden_channels")
    return nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, heads, 1))


@one_node
def masked_pool(x: torch.Tensor, masks: torch.Tensor, *, normalize: bool = False) -> torch.Tensor:
    """The features of a map summed under each mask: one matrix product.

        y_h = sum_p m_h[p] x[p],  divided by sum_p m_h[p] with `normalize`

    Args:
        x (Tensor[B, C, H, W]): the map.
        masks (Tensor[B, M, H, W]): the masks; not negative with `normalize`, where one of zeros gives zeros.
        normalize: whether y is a weighted mean.

    Returns:
        Tensor[B, M, C].

    Raises:
        TypeError, RuntimeError: these are no maps of one size.

    Memory:
        The result; never [B, M, C, H, W].
    """
    _check_size(image(x), image(masks, argument="masks"))
    flat = masks.flatten(2)  # [B, M, H * W]
    return (_shares(flat) if normalize else flat) @ x.flatten(2).transpose(1, 2)


@refusing
def _check_size(x: torch.Tensor, masks: torch.Tensor) -> None:
    if (x.shape[0], *x.shape[2:]) != (masks.shape[0], *masks.shape[2:]):
        shapes = f"{list(x.shape)} and masks.shape={list(masks.shape)}"
        raise expected("x [B, C, H, W] and masks [B, M, H, W] of one size", "x.shape", shapes, RuntimeError)


@one_node
def diversity_loss(masks: torch.Tensor, *, norm: str = "sqrt") -> torch.Tensor:
    """How much masks overlap: the mean over the batch of a penalty of each image.

        ||P Pᵀ - I||_F²,  P = the masks of an image as [M, H * W], each normalised

    I is the identity of M × M, so each pair of masks counts twice. By `norm` a mask m becomes

        "sqrt":  sqrt(m / sum(m)): P Pᵀ holds the masks' Bhattacharyya coefficients, one minus the squared Hellinger
                 distance; 0 for masks that share no position, M (M - 1) for equal ones (Li et al., 2018)
        "l2":    m / ||m||: P Pᵀ holds the cosines of the angles between masks; the same range
        "sum":   m / sum(m): the diagonal is below 1 unless a mask is one position, so the penalty also asks for small
                 masks (Lin et al., 2017)

    Args:
        masks (Tensor[B, M, H, W]): not negative. A mask of zeros stays one, and its diagonal counts 1.
        norm: "sqrt", "l2" or "sum".

    Returns:
        Tensor[], differentiable; float32, or float64 for float64 masks.

    Raises:
        TypeError, ValueError, RuntimeError: the masks are no maps, or `norm` is no choice.

    Memory:
        The normalised masks, and M × M numbers per image.

    References:
        Lin et al., 2017, equation 8; Li et al., 2018, section 3.3.
    """
    kind = choice(norm, "norm", tuple(_NORMS))
    masks = image(masks, argument="masks")
    with without_autocast(masks.device):  # 16 bits are too few for a difference of products
        normalised = _NORMS[kind](masks.flatten(2).to(torch.promote_types(masks.dtype, torch.float32)))
        gram = normalised @ normalised.transpose(1, 2)  # [B, M, M]
        unit = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        return (gram - unit).square().sum() / max(len(gram), 1)  # 0 of no image


def _shares(flat: torch.Tensor) -> torch.Tensor:
    """Masks that sum to 1; the sums are taken in float32 at least, as those of large maps exceed float16."""
    total = flat.sum(-1, keepdim=True, dtype=torch.promote_types(flat.dtype, torch.float32))
    return (flat / total.clamp_min(torch.finfo(total.dtype).tiny)).to(flat.dtype)


def _roots(flat: torch.Tensor) -> torch.Tensor:
    """Their square roots; where a mask is 0, so is the gradient, which would be infinite."""
    return _shares(flat).clamp_min(torch.finfo(flat.dtype).tiny).sqrt()


def _directions(flat: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(flat, dim=-1)


_NORMS = {"sqrt": _roots, "l2": _directions, "sum": _shares}
