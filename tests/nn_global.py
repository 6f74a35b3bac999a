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


def nonlocal_block(module: vn.NonLocalBlock, x: torch.Tensor) -> torch.Tensor:
    def pool(y):
        return y if module.pool == 1 else nn.functional.max_pool2d(y, module.pool)

    def looked_at(layer):
        return layer(pool(x)) if module.pool_first else pool(layer(x))

    q, k = (x, pool(x)) if module.mode == "gaussian" else (module.query(x), looked_at(module.key))
    scale = q.shape[1] ** -0.5 if module.scale is None else module.scale
    y = module.project(unflat(dense_attention(flat(q), flat(k), flat(looked_at(module.value)), scale), x))
    return x + (module.norm(y) if module.norm else y)


def within(length: int, regions: int) -> torch.Tensor:
    """The region of each position of an axis."""
    return (torch.arange(length) // (length // regions)).clamp(max=regions - 1)


def ocnet(module: vn.OCNetBlock, x: torch.Tensor) -> torch.Tensor:
    y = x if module.pool == 1 else nn.functional.max_pool2d(x, module.pool)
    height, width = y.shape[2:]
    region = (within(height, module.regions)[:, None] * module.regions + within(width, module.regions)).flatten()
    bias = x.new_zeros(()).masked_fill(region[:, None] != region, -torch.inf)
    k = flat(module.key(y))
    y = module.project(unflat(dense_attention(k, k, flat(module.value(y)), k.shape[2] ** -0.5, bias), y))
    return nn.functional.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True)


def base_oc(module: vn.BaseOC, x: torch.Tensor) -> torch.Tensor:
    y = ocnet(module.context, x)
    return module.fuse(torch.cat([y, x], 1) if module.concat else y)


def pyramid_oc(module: vn.PyramidOC, x: torch.Tensor) -> torch.Tensor:
    contexts = [ocnet(block, x) for block in module.contexts]
    return module.fuse(torch.cat([module.widen(x), *contexts], 1))


def danet_position(module: vn.DANetPositionAttention, x: torch.Tensor) -> torch.Tensor:
    y = dense_attention(flat(module.query(x)), flat(module.key(x)), flat(module.value(x)))
    return x + module.gamma * unflat(y, x)


def danet_channel(module: vn.DANetChannelAttention, x: torch.Tensor) -> torch.Tensor:
    energy = torch.einsum("bchw,bdhw->bcd", x, x)
    if module.subtract:
        energy = energy.amax(2, keepdim=True) - energy
    return x + module.gamma * torch.einsum("bcd,bdhw->bchw", energy.softmax(2), x)


def ccnet(module: vn.CrissCrossAttention, x: torch.Tensor) -> torch.Tensor:
    y, column = torch.meshgrid(*map(torch.arange, x.shape[2:]), indexing="ij")
    seen = (y.flatten()[:, None] == y.flatten()) | (column.flatten()[:, None] == column.flatten())
    bias = x.new_zeros(()).masked_fill(~seen, -torch.inf)
    for _ in range(module.recurrence):
        gathered = dense_attention(flat(module.query(x)), flat(module.key(x)), flat(module.value(x)), 1.0, bias)
        x = x + module.gamma * unflat(gathered, x)
    return x


def vae(module: vn.VAEAttention, x: torch.Tensor) -> torch.Tensor:
    grouped = x.unflatten(1, (module.norm.num_groups, -1))
    mean = grouped.mean((2, 3, 4), keepdim=True)
    variance = (grouped - mean).square().mean((2, 3, 4), keepdim=True)
    h = ((grouped - mean) / (variance + module.norm.eps).sqrt()).flatten(1, 2)
    h = h * module.norm.weight[:, None, None] + module.norm.bias[:, None, None]
    y = dense_attention(flat(module.query(h)), flat(module.key(h)), flat(module.value(h)), x.shape[1] ** -0.5)
    return x + module.project(unflat(y, x))


def masks_of(module: vn.MultiHeadAttentionMask | vn.SpatialAttentionMask, x: torch.Tensor) -> torch.Tensor:
    scores = module.score(x)
    if module.activation == "softmax":
        exp = scores.exp()
        return exp / exp.sum((2, 3), keepdim=True)
    return {
        "sigmoid": lambda: 1 / (1 + (-scores).exp()),
        "relu": lambda: scores.clamp(min=0),
        "softplus": lambda: (1 + scores.exp()).log(),
    }[module.activation]()


def spatial_mask(module: vn.SpatialAttentionMask, x: torch.Tensor) -> torch.Tensor:
    return masks_of(module, x) * x


def multi_head_mask(module: vn.MultiHeadAttentionMask, x: torch.Tensor) -> torch.Tensor:
    masks = masks_of(module, x)
    if module.normalize:
        masks = masks / masks.sum((2, 3), keepdim=True)
    return (masks[:, :, None] * x[:, None]).sum((3, 4))


def squeeze_excite(module: vn.SqueezeExcite, x: torch.Tensor) -> torch.Tensor:
    def linear(layer, y):
        y = y @ layer.weight[:, :, 0, 0].T
        return y if layer.bias is None else y + layer.bias

    y = linear(module.reduce, x.mean((2, 3)))
    y = linear(module.expand, y.clamp(min=0) if module.activation == "relu" else y / (1 + (-y).exp()))
    y = 1 / (1 + (-y).exp()) if module.gate == "sigmoid" else (y / 6 + 0.5).clamp(0, 1)
    return x * y[:, :, None, None]


ONE = ((5, 7),)

ROWS = [
    Row("sagan", lambda: vn.SAGANAttention(16), sagan, 16, sizes=((5, 7), (6, 4), (2, 9))),
    Row(
        "sagan-spectral",
        lambda: vn.SAGANAttention(16, spectral_norm=True),
        sagan,
        16,
        sizes=((5, 7),),
        training=True,
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
    Row("nonlocal", lambda: vn.NonLocalBlock(6), nonlocal_block, 6, sizes=((5, 7), (2, 9)), training=True),
    Row(
        "nonlocal-pooled-after",
        lambda: vn.NonLocalBlock(6, pool_first=False, scale=None, batch_norm=False),
        nonlocal_block,
        6,
        sizes=ONE,
    ),
    Row("nonlocal-whole", lambda: vn.NonLocalBlock(6, inner_channels=5, pool=1, bias=False), nonlocal_block, 6),
    Row("nonlocal-gaussian", lambda: vn.NonLocalBlock(6, mode="gaussian", scale=None), nonlocal_block, 6, sizes=ONE),
    Row(
        "nonlocal-gaussian-pooled-after",
        lambda: vn.NonLocalBlock(6, mode="gaussian", scale=0.3, pool_first=False),
        nonlocal_block,
        6,
        sizes=ONE,
    ),
    Row("ocnet", lambda: vn.OCNetBlock(6), ocnet, 6, sizes=((5, 7), (1, 9)), training=True),
    Row("ocnet-pooled", lambda: vn.OCNetBlock(6, pool=2, activation="leaky_relu"), ocnet, 6, sizes=((5, 7), (6, 4))),
    Row("ocnet-regions", lambda: vn.OCNetBlock(6, regions=3), ocnet, 6, sizes=((8, 10), (6, 3), (6, 7), (4, 5))),
    Row("ocnet-base", lambda: vn.BaseOC(4, dropout=0.0), base_oc, 4, sizes=((5, 7), (6, 4)), training=True),
    Row(
        "ocnet-base-context",
        lambda: vn.BaseOC(4, out_channels=5, key_channels=2, value_channels=3, pool=2, concat=False),
        base_oc,
        4,
        sizes=ONE,
    ),
    Row("ocnet-pyramid", lambda: vn.PyramidOC(4), pyramid_oc, 4, sizes=((6, 12), (7, 9))),
    Row(
        "ocnet-pyramid-two",
        lambda: vn.PyramidOC(4, out_channels=3, regions=(1, 2), dropout=0.0, activation="leaky_relu"),
        pyramid_oc,
        4,
        sizes=((5, 4),),
        training=True,
    ),
    Row("danet-position", lambda: vn.DANetPositionAttention(16), danet_position, 16),
    Row(
        "danet-position-widths",
        lambda: vn.DANetPositionAttention(4, key_channels=3, bias=False),
        danet_position,
        4,
        sizes=ONE,
    ),
    Row("danet-channel", vn.DANetChannelAttention, danet_channel, 6),
    Row("danet-channel-paper", lambda: vn.DANetChannelAttention(subtract=False), danet_channel, 6, sizes=ONE),
    Row("ccnet", lambda: vn.CrissCrossAttention(16), ccnet, 16),
    Row(
        "ccnet-once",
        lambda: vn.CrissCrossAttention(4, key_channels=3, recurrence=1, bias=False),
        ccnet,
        4,
        sizes=ONE,
    ),
    Row("vae", lambda: vn.VAEAttention(32), vae, 32, sizes=((5, 7), (3, 2))),
    Row("vae-groups", lambda: vn.VAEAttention(6, groups=3, eps=1e-3), vae, 6),
    Row("spatial-mask", lambda: vn.SpatialAttentionMask(4), spatial_mask, 4),
    *(
        Row(
            f"spatial-mask-{activation}",
            lambda activation=activation: vn.SpatialAttentionMask(4, hidden_channels=3, activation=activation),
            spatial_mask,
            4,
            sizes=ONE,
        )
        for activation in ("relu", "softplus", "softmax")
    ),
    Row("multi-head-mask", lambda: vn.MultiHeadAttentionMask(4, 3), multi_head_mask, 4),
    Row(
        "multi-head-mask-normalized",
        lambda: vn.MultiHeadAttentionMask(4, 2, hidden_channels=5, activation="sigmoid", normalize=True),
        multi_head_mask,
        4,
        sizes=ONE,
    ),
    Row("squeeze-excite", lambda: vn.SqueezeExcite(32), squeeze_excite, 32, sizes=((5, 7), (1, 9))),
    Row(
        "squeeze-excite-mobile",
        lambda: vn.SqueezeExcite(8, rd_channels=5, bias=False, activation="silu", gate="hard_sigmoid"),
        squeeze_excite,
        8,
        sizes=ONE,
    ),
]
