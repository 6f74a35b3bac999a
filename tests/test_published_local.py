"""State dicts of others, translated: their modules against ours with their weights.

Those of timm and transformers run as they are installed. Code that is in no package, Axial-DeepLab's, a
re-implementation of stand-alone self-attention and NAT's, is written here by its formulas, with the names and the
layout of its weights.
"""

from __future__ import annotations

import pytest
import torch
from modules import close, normal
from torch import nn

import visattn_kernels.nn as vn
from visattn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))


def random_state(module: nn.Module) -> nn.Module:
    """In float64, with random parameters and statistics."""
    module = module.double().eval()
    for i, (name, x) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        if isinstance(x, nn.Parameter) or "running" in name:
            x.data = normal(*x.shape, seed=i) * (x[0].numel() ** -0.5 if x.dim() > 1 else 0.5)
            x.data = x.data.abs() + 0.5 if name.endswith("running_var") else x.data
    return module


def hold(theirs, ours: nn.Module, state: dict[str, torch.Tensor], x: torch.Tensor, rtol: float = 1e-9) -> None:
    """Load the whole of a translated state dict and compare results, and the gradients of the map."""
    assert all(x.is_contiguous() for x in state.values())  # as safetensors and FSDP2 want them
    ours.double().load_state_dict(state)
    results = []
    for forward in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        (grad,) = torch.autograd.grad(out, leaf, normal(*out.shape, seed=5))
        results.append({"out": out.detach(), "x": grad})
    close(results[1], results[0], rtol)


def libraries():
    """The imports of the tests of attention itself, which skip where a library is missing."""
    import test_published

    return test_published


def on_tokens(module):
    """A module of [B, H, W, C] on [B, C, H, W]."""
    return lambda x: module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# Libraries


@pytest.mark.parametrize(("grid", "window", "shift"), [((14, 21), 7, 3), ((12, 20), (4, 5), (2, 1)), ((6, 14), 7, 3)])
def test_swin(grid, window, shift):
    """The last map is lower than the window, which timm then makes as low as the map, without a shift there."""
    block = libraries().SwinTransformerBlock(24, grid, num_heads=3, window_size=window, shift_size=shift)
    random_state(block)
    size = tuple(block.window_size)
    ours = vn.SwinBlock(24, size, shift=shift, heads=3)
    hold(on_tokens(block), ours, vn.SwinBlock.translate(block.state_dict(), size), normal(2, 24, *grid))


def test_swin_padded():
    """Without a shift, timm's padding is that of the published code."""
    block = random_state(libraries().SwinTransformerBlock(24, (10, 17), num_heads=3, window_size=7))
    ours = vn.SwinBlock(24, 7, pad=True, heads=3)
    hold(on_tokens(block), ours, vn.SwinBlock.translate(block.state_dict()), normal(2, 24, 10, 17))


def test_swin_attention():
    libraries()
    from timm.models.swin_transformer import WindowAttention

    theirs = random_state(WindowAttention(24, num_heads=3, window_size=(6, 6)))
    ours = vn.WindowAttention(24, 6, heads=3)
    state = vn.WindowAttention.translate(theirs.state_dict())
    hold(on_tokens(lambda x: theirs(x.flatten(1, 2)).view(x.shape)), ours, state, normal(2, 24, 6, 6))
    with pytest.raises(ValueError, match="expected the sides of a table of 121 entries"):
        vn.WindowAttention.translate(theirs.state_dict(), (3, 12))


@pytest.mark.parametrize("partition", ["grid", "block"])
@pytest.mark.parametrize("table", ["bias", "bias_tf"])
@pytest.mark.parametrize("head_first", [True, False])
def test_maxvit(partition, table, head_first):
    published = libraries()
    options = {"dim_head": 8, "head_first": head_first, "rel_pos_type": table, "window_size": (5, 7)}
    config = published.MaxxVitTransformerCfg(**options, grid_size=(5, 7))
    block = random_state(published.PartitionAttentionCl(24, partition, config))
    block.norm1 = nn.Identity()
    block.norm2, block.mlp = nn.Identity(), Zero()
    ours = vn.GridAttention(24, (5, 7), partition=partition, heads=3)
    state = vn.GridAttention.translate(block.attn.state_dict(), (5, 7), head_first)
    hold(on_tokens(lambda x: block(x) - x), ours, state, normal(2, 24, 15, 21))


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_sam_global():
    published = libraries()
    theirs = random_state(published.SamVisionSdpaAttention(published.sam_config(13), window_size=0))
    state = vn.ViTDetAttention.translate(theirs.state_dict())
    x = normal(2, 24, 13, 13)
    hold(on_tokens(lambda x: theirs(x)[0]), vn.ViTDetAttention(24, 13, heads=3), state, x)
    larger = normal(2, 24, 16, 16)  # with interpolated tables
    hold(on_tokens(lambda x: theirs(x)[0]), vn.ViTDetAttention(24, 13, heads=3), state, larger)


@pytest.mark.parametrize("side", [14, 17], ids=["divides", "padded"])
def test_sam_windowed(side):
    published = libraries()
    config = published.sam_config(side, attn_implementation="sdpa")
    layer = random_state(published.SamVisionLayer(config, window_size=7))
    layer.layer_norm1 = nn.Identity()
    layer.layer_norm2, layer.mlp = nn.Identity(), Zero()
    state = vn.ViTDetAttention.translate(layer.attn.state_dict())
    ours = vn.ViTDetAttention(24, window_size=7, heads=3)

    def theirs(x):
        y = layer(x)
        return (y[0] if isinstance(y, tuple) else y) - x

    hold(on_tokens(theirs), ours, state, normal(2, 24, side, side))


# Axial-DeepLab


class PublishedAxial(nn.Module):
    """The names and the layout of csrhddlam/axial-deeplab; `relative` has the channels of q, k and v in turn."""

    def __init__(self, channels, out, heads, size, stride=1, width=False):
        super().__init__()
        self.heads, self.wide, self.stride = heads, width, stride
        self.qkv_transform = nn.Conv1d(channels, 2 * out, 1, bias=False)
        self.bn_qkv = nn.BatchNorm1d(2 * out)
        self.bn_similarity = nn.BatchNorm2d(3 * heads)
        self.bn_output = nn.BatchNorm1d(2 * out)
        self.relative = nn.Parameter(torch.randn(2 * out // heads, 2 * size - 1))
        place = torch.arange(size)
        self.register_buffer("flatten_index", (place[:, None] - place + size - 1).flatten())

    def forward(self, x):
        x = x if self.wide else x.transpose(2, 3)
        batch, _, lines, size = x.shape
        qkv = self.bn_qkv(self.qkv_transform(x.transpose(1, 2).flatten(0, 1)))
        qkv = qkv.unflatten(1, (self.heads, -1))  # [B * lines, heads, 4 D, size]
        by_pair = self.relative[:, self.flatten_index].unflatten(1, (size, size))
        quarter = len(self.relative) // 4
        (q, k, v), (r_q, r_k, r_v) = (x.split([quarter, quarter, 2 * quarter], -3 + (x is qkv)) for x in (qkv, by_pair))
        parts = (
            torch.einsum("nhci,nhcj->nhij", q, k),
            torch.einsum("nhci,cij->nhij", q, r_q),
            torch.einsum("nhcj,cji->nhij", k, r_k),
        )
        weights = self.bn_similarity(torch.cat(parts, 1)).unflatten(1, (3, -1)).sum(1).softmax(-1)
        sums = torch.einsum("nhij,nhcj->nhci", weights, v), torch.einsum("nhij,cij->nhci", weights, r_v)
        y = self.bn_output(torch.stack(sums, 3).flatten(1, 3))
        y = (y[:, ::2] + y[:, 1::2]).unflatten(0, (batch, lines)).transpose(1, 2)
        return nn.functional.avg_pool2d(y if self.wide else y.transpose(2, 3), self.stride)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("axis", ["height", "width"])
def test_axial(axis, training):
    theirs = random_state(PublishedAxial(6, 8, 2, 5, 2, axis == "width")).train(training)
    ours = vn.AxialAttention(6, axis, out_channels=8, heads=2, size=5, stride=2).train(training)
    x = normal(2, 6, 5, 7) if axis == "height" else normal(2, 6, 7, 5)
    hold(theirs, ours, vn.AxialAttention.translate(theirs.state_dict()), x)
    close(dict(ours.state_dict()), vn.AxialAttention.translate(theirs.state_dict()))


class PublishedAxialBlock(nn.Module):
    def __init__(self, channels, width, heads, size):
        super().__init__()
        self.conv_down = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.hight_block = PublishedAxial(width, width, heads, size)
        self.width_block = PublishedAxial(width, width, heads, size, 2, True)
        self.conv_up = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        shortcut = nn.Conv2d(channels, 2 * width, 1, stride=2, bias=False)
        self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(2 * width))

    def forward(self, x):
        y = self.width_block(self.hight_block(self.bn1(self.conv_down(x)).relu())).relu()
        return (self.bn2(self.conv_up(y)) + self.downsample(x)).relu()


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_axial_block(training):
    theirs = random_state(PublishedAxialBlock(6, 8, 2, 4)).train(training)
    ours = vn.AxialBlock(6, 8, heads=2, size=4, stride=2).train(training)
    hold(theirs, ours, vn.AxialBlock.translate(theirs.state_dict()), normal(2, 6, 4, 4))
    close(dict(ours.state_dict()), vn.AxialBlock.translate(theirs.state_dict()))


# Stand-alone self-attention


class PublishedSASA(nn.Module):
    """The names and the layout of leaderj1001/Stand-Alone-Self-Attention: a softmax for each channel."""

    def __init__(self, channels, out, kernel):
        super().__init__()
        self.rel_h = nn.Parameter(torch.randn(out // 2, 1, 1, kernel, 1))
        self.rel_w = nn.Parameter(torch.randn(out // 2, 1, 1, 1, kernel))
        self.key_conv = nn.Conv2d(channels, out, 1, bias=False)
        self.query_conv = nn.Conv2d(channels, out, 1, bias=False)
        self.value_conv = nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x):
        kernel, half = self.rel_h.shape[3], len(self.rel_h)
        padded = nn.functional.pad(x, [kernel // 2] * 4)
        k, v = (conv(padded).unfold(2, kernel, 1).unfold(3, kernel, 1) for conv in (self.key_conv, self.value_conv))
        k = torch.cat((k[:, :half] + self.rel_h, k[:, half:] + self.rel_w), 1)  # [B, C, H, W, k, k]
        logits = self.query_conv(x)[..., None] * k.flatten(4)
        return (logits.softmax(-1) * v.flatten(4)).sum(-1)


def test_sasa():
    theirs = random_state(PublishedSASA(6, 8, 5))
    ours = vn.StandAloneSelfAttention(6, 5, out_channels=8, heads=8)
    hold(theirs, ours, vn.StandAloneSelfAttention.translate(theirs.state_dict()), normal(2, 6, 5, 7))


# NAT


class PublishedNAT(nn.Module):
    """The names and the layout of NATTEN's layer up to 0.17, one position after the other."""

    def __init__(self, channels, heads, kernel, dilation):
        super().__init__()
        self.heads, self.kernel, self.dilation = heads, kernel, dilation
        self.qkv = nn.Linear(channels, 3 * channels)
        self.rpb = nn.Parameter(torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1))
        self.proj = nn.Linear(channels, channels)

    def keys(self, place, length):
        same = list(range(place % self.dilation, length, self.dilation))
        first = min(max(same.index(place) - self.kernel // 2, 0), len(same) - self.kernel)
        keys = torch.tensor(same[first : first + self.kernel])
        return keys, (keys - place) // self.dilation + self.kernel - 1

    def forward(self, x):
        _, *sides, channels = x.shape
        window = self.kernel * self.dilation
        x = nn.functional.pad(x, (0, 0, 0, max(0, window - sides[1]), 0, max(0, window - sides[0])))
        height, width = x.shape[1:3]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(3)
        rows = []
        for y in range(height):
            for x in range(width):
                (ys, dy), (xs, dx) = self.keys(y, height), self.keys(x, width)
                logits = torch.einsum("bnd,byxnd->bnyx", q[:, y, x], k[:, ys][:, :, xs]) * q.shape[-1] ** -0.5
                weights = (logits + self.rpb[:, dy][:, :, dx]).flatten(2).softmax(-1).unflatten(2, (len(ys), len(xs)))
                rows.append(torch.einsum("bnyx,byxnd->bnd", weights, v[:, ys][:, :, xs]))
        y = torch.stack(rows, 1).reshape(-1, height, width, channels)
        return self.proj(y[:, : sides[0], : sides[1]])


@pytest.mark.parametrize("size", [(6, 7), (5, 7), (2, 1), (9, 4)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_nat(dilation, size):
    """On maps that are smaller than the neighborhood too, which that layer pads."""
    theirs = random_state(PublishedNAT(8, 2, 3, dilation))
    ours = vn.NeighborhoodAttention(8, 3, dilation=dilation, pad=True, heads=2)
    hold(on_tokens(theirs), ours, vn.NeighborhoodAttention.translate(theirs.state_dict()), normal(2, 8, *size))
