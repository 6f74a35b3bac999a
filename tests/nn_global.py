"""Rows of modules whose positions attend the whole map, or its channels."""

from __future__ import annotations

import torch
from modules import Row, dense_attention, flat
from torch import nn

import visattn_kernels.nn as vn


def unflat(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B, H * W, C] as an image of the size of `like`."""
    return y.transpose(1, 2).unflatten(2, like.shape[2:])


def sagan(module: vn.SAGANAttention, x: torch.Tensor) -> torch.Tensor:
    def pool(y):
        return y if module.pool == 1 else nn.functional.max_pool2d(y, module.pool)

    q, k, v = flat(module.query(x)), flat(pool(module.key(x))), flat(pool(module.value(x)))
    if module.softmax_over == "queries":  # [B, query, key], a column of weights for each position
        y = torch.softmax(q @ k.transpose(1, 2), dim=1).transpose(1, 2) @ v
    else:
        y = dense_attention(q, k, v)
    y = unflat(y, x)
    return x + module.sigma * (y if module.project is None else module.project(y))


def weightless(module: vn.WeightlessSelfAttention, x: torch.Tensor) -> torch.Tensor:
    scale = x.shape[1] ** -0.5 if module.scale is None else module.scale
    return unflat(dense_attention(flat(x), flat(x), flat(x), scale), x)


ROWS = [
    Row("sagan", lambda: vn.SAGANAttention(16), sagan, 16, sizes=((5, 7), (6, 4), (2, 9))),
    Row(
        "sagan-spectral",
        lambda: vn.SAGANAttention(16, spectral_norm=True),
        sagan,
        16,
        sizes=((5, 7),),
        training=True,
        moves=True,
    ),
    Row("sagan-tutorial", lambda: vn.SAGANAttention(8, pool=1, bias=True, project=False), sagan),
    Row(
        "sagan-over-queries",
        lambda: vn.SAGANAttention(8, pool=1, bias=True, project=False, softmax_over="queries"),
        sagan,
    ),
    Row("sagan-widths", lambda: vn.SAGANAttention(8, key_channels=3, value_channels=5, pool=3), sagan, sizes=((7, 8),)),
    Row("weightless", vn.WeightlessSelfAttention, weightless, 3),
    Row("weightless-scale", lambda: vn.WeightlessSelfAttention(0.3), weightless, 3),
]
