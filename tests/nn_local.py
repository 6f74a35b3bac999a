"""Rows of modules whose positions attend an axis, a window, a grid or a neighborhood."""

from __future__ import annotations

import math

import torch
from modules import Row
from torch import nn

import visattn_kernels as va
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


def unfolded(x: torch.Tensor, kernel: int) -> torch.Tensor:
    """What a kernel sees at every position, zeros outside: [B, C, H, W] to [B, C, k * k, H, W]."""
    before = kernel // 2
    padded = nn.functional.pad(x, (before, kernel - 1 - before) * 2)
    return nn.functional.unfold(padded, kernel).unflatten(2, x.shape[2:]).unflatten(1, (x.shape[1], -1))


def outside(x: torch.Tensor, kernel: int, border: str) -> torch.Tensor:
    """-inf where a kernel sees no position of the map, [k * k, H, W]."""
    inside = unfolded(torch.ones_like(x[:1, :1]), kernel)[0, 0]
    return torch.where(inside == 0, -torch.inf, 0.0) if border == "mask" else torch.zeros_like(inside)


def sasa(module: vn.StandAloneSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """The concatenated r_h and r_w added to every key, as equation 3 has it."""
    kernel, heads = module.pattern.kernel_size[0], module.heads
    q, k, v = module.query(x), unfolded(module.key(x), kernel), unfolded(module.value(x), kernel)
    rows = module.relative_h[:, :, None].expand(-1, -1, kernel).flatten(1)  # [C / 2, k * k]
    columns = module.relative_w[:, None, :].expand(-1, kernel, -1).flatten(1)
    width = q.shape[1] // heads
    tables = [rows[:0]]
    for head in range(heads):
        if width == 1:
            half = heads // 2
            tables.append(rows[head : head + 1] if head < half else columns[head - half : head - half + 1])
        else:
            part = slice(0, width // 2) if module.shared else slice(head * width // 2, (head + 1) * width // 2)
            tables += [rows[part], columns[part]]
    logits = q[:, :, None] * (k + torch.cat(tables)[:, :, None, None])
    logits = module.scale * logits.unflatten(1, (heads, -1)).sum(2)  # [B, heads, k * k, H, W]
    weights = (logits + outside(x, kernel, module.pattern.border)).softmax(2)
    y = (weights[:, :, None] * v.unflatten(1, (heads, -1))).sum(3).flatten(1, 2)
    return nn.functional.avg_pool2d(y, module.stride)


def local_relation(module: vn.LocalRelation, x: torch.Tensor) -> torch.Tensor:
    kernel, heads = module.kernel_size, module.heads
    q = module.query(x)[:, :, None].unflatten(1, (heads, -1))
    k = unfolded(module.key(x), kernel).unflatten(1, (heads, -1))  # [B, heads, D, k * k, H, W]
    similarity = (q * k if module.similarity == "dot" else -((q - k) ** 2)).sum(2)
    before = kernel // 2
    offsets = [
        [(i - before) / max(before, 1), (j - before) / max(before, 1)] for i in range(kernel) for j in range(kernel)
    ]
    first, _, second = module.prior
    prior = second(first(torch.tensor(offsets, dtype=x.dtype)).relu()).T  # [heads, k * k]
    logits = similarity + prior[:, :, None, None] + outside(x, kernel, module.pattern.border)
    y = (logits.softmax(2)[:, :, None] * unfolded(x, kernel).unflatten(1, (heads, -1))).sum(3).flatten(1, 2)
    return y if module.project is None else module.project(y)


def packed(module: nn.Module, x: torch.Tensor, seen: tuple[torch.Tensor, torch.Tensor], steps=(1, 1)) -> torch.Tensor:
    """Multi-head attention with a bias of the offset over the pairs that are seen on both axes, [H, H] and [W, W]."""
    height, width = x.shape[2:]
    q, k, v = (y.flatten(2).unflatten(1, (module.heads, -1)).transpose(2, 3) for y in module.qkv(x).chunk(3, 1))
    both = seen[0][:, None, :, None] & seen[1][None, :, None, :]
    logits = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if module.scale is None else module.scale)
    if getattr(module, "bias_table", None) is not None:
        table = module.bias_table
        places = []
        for length, entries, step in zip((height, width), table.shape[1:], steps, strict=True):
            offset = torch.arange(length) - torch.arange(length)[:, None]
            places.append((offset // step + entries // 2).clamp(0, entries - 1))
        bias = table[:, places[0]][:, :, :, places[1]]  # [heads, H, H, W, W]
        logits = logits + bias.permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2)
    if getattr(module, "rel_pos_h", None) is not None:
        tables = [module.rel_pos_h, module.rel_pos_w]
        for axis, table in enumerate(tables):
            length = (height, width)[axis]
            if not module.window_size and len(table) != 2 * length - 1:
                table = nn.functional.interpolate(table.T[None], 2 * length - 1, mode="linear")[0].T
            offset = torch.arange(length) - torch.arange(length)[:, None]
            entries = table[(offset + len(table) // 2).clamp(0, len(table) - 1)]  # [query, key, D]
            image = q.unflatten(2, (height, width))
            along = "bnyxd,ykd->bnyxk" if axis == 0 else "bnyxd,xkd->bnyxk"
            products = torch.einsum(along, image, entries)
            products = products[..., :, None] if axis == 0 else products[..., None, :]
            logits = logits + products.expand(*image.shape[:-1], height, width).flatten(4).flatten(2, 3)
    logits = logits.masked_fill(~both.flatten(2).flatten(0, 1), -torch.inf)
    y = logits.softmax(-1) @ v
    return module.proj(y.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width)))


def same_cell(length: int, size: int, shift: int = 0) -> torch.Tensor:
    cell = torch.tensor([(y - shift) // size for y in range(length)])
    return cell == cell[:, None]


def padded(x: torch.Tensor, full: list[int]) -> torch.Tensor:
    """The map with zeros at its end."""
    larger = torch.zeros(*x.shape[:2], *full, dtype=x.dtype)
    larger[:, :, : x.shape[2], : x.shape[3]] = x
    return larger


def window(module: vn.WindowAttention, x: torch.Tensor) -> torch.Tensor:
    sides = list(zip(x.shape[2:], module.window_size, module.shift, strict=True))
    if not module.pad:
        return packed(module, x, tuple(same_cell(n, size, shift if n > size else 0) for n, size, shift in sides))
    full = [math.ceil(n / size) * size for n, size, _ in sides]
    seen = tuple(same_cell(n, size, shift) for n, (_, size, shift) in zip(full, sides, strict=True))
    return packed(module, padded(x, full), seen)[:, :, : x.shape[2], : x.shape[3]]


def swin_block(module: vn.SwinBlock, x: torch.Tensor) -> torch.Tensor:
    def norm(layer, x):
        y = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + layer.eps).sqrt()
        return y * layer.weight[:, None, None] + layer.bias[:, None, None]

    x = x + window(module.attn, norm(module.norm1, x))
    first, _, second = module.mlp
    return x + second(nn.functional.gelu(first(norm(module.norm2, x))))


def nearest(length: int, kernel: int, dilation: int, causal: bool) -> torch.Tensor:
    """The kernel positions of a class nearest to each, or the last up to it: bool[length, length]."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for y in range(length):
        of_class = list(range(y % dilation, length, dilation))
        place = of_class.index(y)
        first = max(place - kernel + 1, 0) if causal else min(max(place - kernel // 2, 0), len(of_class) - kernel)
        seen[y, of_class[first : place + 1 if causal else first + kernel]] = True
    return seen


def neighborhood(module: vn.NeighborhoodAttention, x: torch.Tensor) -> torch.Tensor:
    pattern = module.pattern
    full = list(x.shape[2:])
    if module.pad:
        full = [max(n, k * d) for n, k, d in zip(full, pattern.kernel_size, pattern.dilation, strict=True)]
    axes = zip(full, pattern.kernel_size, pattern.dilation, pattern.is_causal, strict=True)
    return packed(module, padded(x, full), tuple(nearest(*axis) for axis in axes), pattern.dilation)[
        :, :, : x.shape[2], : x.shape[3]
    ]


def grid(module: vn.GridAttention, x: torch.Tensor) -> torch.Tensor:
    sides = [(n, (entries + 1) // 2) for n, entries in zip(x.shape[2:], module.bias_table.shape[1:], strict=True)]
    if module.pattern == va.Window(module.pattern.reach(None, None)):
        return packed(module, x, tuple(same_cell(n, size) for n, size in sides))
    steps = [math.ceil(n / size) for n, size in sides]
    residues = [torch.arange(n) % step for (n, _), step in zip(sides, steps, strict=True)]
    return packed(module, x, tuple(r == r[:, None] for r in residues), steps)


def vitdet(module: vn.ViTDetAttention, x: torch.Tensor) -> torch.Tensor:
    height, width = x.shape[2:]
    if not module.window_size:
        return packed(module, x, tuple(torch.ones(n, n, dtype=torch.bool) for n in (height, width)))
    size = module.window_size
    full = [math.ceil(n / size) * size for n in (height, width)]
    return packed(module, padded(x, full), tuple(same_cell(n, size) for n in full))[:, :, :height, :width]


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
        lambda: vn.AxialBlock(8, 4, heads=2, size=(5, 7), position="none"),
        axial_block,
        sizes=((5, 7),),
        large=(5, 7),
        training=True,
    ),
    Row(
        "axial-block-stride",
        lambda: vn.AxialBlock(8, 8, out_channels=6, heads=2, span=3, position="q", stride=2),
        axial_block,
        sizes=((5, 7), (4, 6)),
        training=True,
    ),
    Row("sasa", lambda: vn.StandAloneSelfAttention(8, 3, heads=2), sasa),
    Row("sasa-mask", lambda: vn.StandAloneSelfAttention(8, 5, heads=2, border="mask", scale=0.5, bias=True), sasa),
    Row(
        "sasa-shared-even",
        lambda: vn.StandAloneSelfAttention(6, 4, out_channels=8, heads=2, share_tables=True, stride=2),
        sasa,
        6,
        sizes=((5, 7), (6, 4)),
    ),
    Row("sasa-per-channel", lambda: vn.StandAloneSelfAttention(8, 3, heads=8), sasa),
    Row("local-relation", lambda: vn.LocalRelation(8, 3, share_channels=4), local_relation),
    Row(
        "local-relation-difference",
        lambda: vn.LocalRelation(8, 5, share_channels=4, similarity="squared_difference", border="zero"),
        local_relation,
    ),
    Row(
        "local-relation-widths",
        lambda: vn.LocalRelation(
            8, 1, share_channels=2, key_channels=3, similarity="squared_difference", hidden_channels=5, project=False
        ),
        local_relation,
        sizes=((5, 7),),
    ),
    Row("window", lambda: vn.WindowAttention(8, 3, heads=2), window),
    Row(
        "window-shift",
        lambda: vn.WindowAttention(8, (4, 5), shift=(2, 1), heads=2, qkv_bias=False, scale=0.7),
        window,
    ),
    Row("window-pad", lambda: vn.WindowAttention(8, 3, shift=1, pad=True, heads=2), window),
    Row("swin-block", lambda: vn.SwinBlock(8, 3, shift=1, heads=2, mlp_channels=12), swin_block, copies=2),
    Row("neighborhood", lambda: vn.NeighborhoodAttention(8, 3, heads=2), neighborhood, sizes=((5, 7), (6, 4), (3, 9))),
    Row(
        "neighborhood-dilated",
        lambda: vn.NeighborhoodAttention(8, (3, 2), dilation=(1, 2), heads=2, qkv_bias=False, scale=0.7),
        neighborhood,
        sizes=((5, 7), (6, 4)),
    ),
    Row(
        "neighborhood-causal",
        lambda: vn.NeighborhoodAttention(8, 3, is_causal=(True, False), heads=2, bias_table=False),
        neighborhood,
        sizes=((5, 7), (3, 9)),
    ),
    Row(
        "neighborhood-pad",
        lambda: vn.NeighborhoodAttention(8, (3, 5), dilation=(2, 1), pad=True, heads=2),
        neighborhood,
        sizes=((5, 7), (7, 4), (2, 3), (1, 9)),
    ),
    Row("grid", lambda: vn.GridAttention(8, (2, 3), heads=2), grid),
    Row("grid-block", lambda: vn.GridAttention(8, 3, partition="block", heads=2, qkv_bias=False, scale=0.7), grid),
    Row("vitdet", lambda: vn.ViTDetAttention(8, (5, 7), heads=2), vitdet),
    Row("vitdet-window", lambda: vn.ViTDetAttention(8, window_size=3, heads=2), vitdet, sizes=((5, 7), (6, 3), (1, 9))),
    Row("vitdet-plain", lambda: vn.ViTDetAttention(8, heads=2, relative=False, qkv_bias=False, scale=0.7), vitdet),
]
