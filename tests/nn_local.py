"""Rows of modules whose positions attend an axis, a window, a grid or a neighborhood."""

from __future__ import annotations

import torch
from modules import Row
from torch import nn

import visattn_kernels.nn as vn


def axial(module: vn.AxialAttention, x: torch.Tensor) -> torch.Tensor:
    """On lines [R, heads, D, L], with every logit [R, heads, L, L] stored and normed as one batch."""
    heads, width, along = module.heads, module.widths[0], module.axis == "width"
    qkv = module.qkv(x) if module.norm_qkv is None else module.norm_qkv(module.qkv(x))
    lines = qkv if along else qkv.transpose(2, 3)  # [B, C, lines, L]
    batch, _, count, length = lines.shape
    lines = lines.transpose(1, 2).reshape(batch * count, heads, -1, length)
    q, k, v = lines[:, :, :width], lines[:, :, width : 2 * width], lines[:, :, 2 * width :]
    offset = torch.arange(length) - torch.arange(length)[:, None]  # [query, key]
    centre = length - 1 if module.pattern.span is None else module.pattern.span // 2
    seen = offset.abs() <= centre

    def entries(table):  # [D, query, key]
        return table[(offset + centre).clamp(0, 2 * centre)].permute(2, 0, 1)

    parts = [torch.einsum("rhdi,rhdj->rhij", q, k)]
    if module.relative_query is not None:
        parts.append(torch.einsum("rhdi,dij->rhij", q, entries(module.relative_query)))
    if module.relative_key is not None:
        parts.append(torch.einsum("rhdj,dij->rhij", k, entries(module.relative_key)))
    if module.norm_logits is None:
        logits = sum(parts)[:, :, seen] * width**-0.5
    else:
        norm = module.norm_logits
        stacked = nn.functional.batch_norm(
            torch.cat(parts, 1)[:, :, seen],
            norm.running_mean,
            norm.running_var,
            norm.weight,
            training=module.training,
            momentum=0.1,
            eps=1e-5,
        )
        norm.num_batches_tracked += module.training
        logits = stacked.unflatten(1, (-1, heads)).sum(1)
    weights = torch.full((len(lines), heads, length, length), -torch.inf, dtype=x.dtype)
    weights[:, :, seen] = logits
    weights = weights.softmax(-1)
    y = torch.einsum("rhij,rhdj->rhdi", weights, v)
    if module.relative_value is not None:
        both = (y, torch.einsum("rhij,dij->rhdi", weights, entries(module.relative_value)))
        y = torch.stack(both, 3).flatten(1, 3) if module.norm_output else sum(both).flatten(1, 2)
    else:
        y = y.flatten(1, 2)
    y = y.unflatten(0, (batch, count)).transpose(1, 2)  # [B, channels, lines, L]
    y = y if along else y.transpose(2, 3)
    y = module.norm_output(y) if module.norm_output else y
    if module.relative_value is not None and module.norm_output:
        y = y[:, ::2] + y[:, 1::2]
    return nn.functional.avg_pool2d(y, module.stride)


def axial_block(module: vn.AxialBlock, x: torch.Tensor) -> torch.Tensor:
    y = module.norm_down(module.down(x)).relu()
    y = axial(module.width, axial(module.height, y)).relu()
    y = module.norm_up(module.up(y))
    if module.shortcut is None:
        return (x + y).relu()
    height, width = y.shape[2] * module.stride, y.shape[3] * module.stride
    conv, norm = module.shortcut
    picked = x[:, :, : height : module.stride, : width : module.stride]
    return (y + norm(nn.functional.conv2d(picked, conv.weight))).relu()


HIGH = ((5, 7), (5, 4), (5, 1))
WIDE = ((7, 5), (4, 5), (1, 5))

ROWS = [
    Row(
        "axial",
        lambda: vn.AxialAttention(8, "height", heads=2, size=5),
        axial,
        sizes=HIGH,
        large=(5, 80),
        training=True,
    ),
    Row(
        "axial-width-stride",
        lambda: vn.AxialAttention(6, "width", out_channels=12, heads=3, size=5, stride=2),
        axial,
        6,
        sizes=((7, 5), (4, 5)),
        large=(80, 5),
        training=True,
    ),
    Row("axial-span", lambda: vn.AxialAttention(8, "width", heads=2, span=3, bias=True), axial, training=True),
    Row(
        "axial-query",
        lambda: vn.AxialAttention(8, "width", heads=2, size=5, position="q"),
        axial,
        sizes=WIDE,
        large=(80, 5),
        training=True,
    ),
    Row(
        "axial-key-value",
        lambda: vn.AxialAttention(8, "height", heads=2, span=5, position="kv"),
        axial,
        sizes=((5, 7),),
        training=True,
    ),
    Row("axial-none", lambda: vn.AxialAttention(8, "height", heads=2, position="none"), axial, training=True),
    Row(
        "axial-none-no-norm",
        lambda: vn.AxialAttention(8, "width", heads=2, key_channels=8, position="none", norm=False),
        axial,
    ),
    Row(
        "axial-no-norm",
        lambda: vn.AxialAttention(8, "width", heads=2, size=5, norm=False),
        axial,
        sizes=WIDE,
        large=(80, 5),
    ),
    Row(
        "axial-block",
        lambda: vn.AxialBlock(8, 4, heads=2, size=(5, 7)),
        axial_block,
        sizes=((5, 7),),
        large=(5, 7),
        training=True,
    ),
    Row(
        "axial-block-stride",
        lambda: vn.AxialBlock(8, 8, out_channels=6, heads=2, span=3, stride=2),
        axial_block,
        sizes=((5, 7), (4, 6)),
        training=True,
    ),
]
