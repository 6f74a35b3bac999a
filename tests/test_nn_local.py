"""What rows cannot say of the layers of axes, windows and neighborhoods: arguments, memory, maps of attention."""

from __future__ import annotations

import pytest
import torch
from modules import close, normal, ready, results
from nn_local import ROWS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import visattn_kernels.nn as vn
from visattn_kernels.backends import cpu
from visattn_kernels.nn.common import BatchNorm2d

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: vn.AxialAttention(8, "depth", size=5), ValueError, "axis to be one of height, width"),
        (lambda: vn.AxialAttention(8, "height", size=5, position="vk"), ValueError, "position to be one of none, q, k"),
        (lambda: vn.AxialAttention(8, "height"), ValueError, "size or span, for the tables of position='qkv'"),
        (lambda: vn.AxialAttention(8, "height", span=4), ValueError, "span to be an odd integer"),
        (lambda: vn.AxialAttention(8, "height", size=5, heads=3), ValueError, "heads to divide 4 channels"),
        (lambda: vn.AxialAttention(8, "height", size=5.0), TypeError, "size to be an integer"),
        (lambda: vn.AxialBlock(8, 0), ValueError, "mid_channels of 1 or more"),
        (lambda: vn.StandAloneSelfAttention(9, heads=3), ValueError, "heads that divide 9 channels into even numbers"),
        (lambda: vn.StandAloneSelfAttention(8, heads=8, share_tables=True), ValueError, "heads that divide 8 channels"),
        (lambda: vn.StandAloneSelfAttention(8, border="pad"), ValueError, "border to be one of zero, mask, shift"),
        (lambda: vn.LocalRelation(9), ValueError, "share_channels to divide 9 channels"),
        (lambda: vn.LocalRelation(8, similarity="l1"), ValueError, "similarity to be one of dot, squared_difference"),
        (lambda: vn.WindowAttention(8, 3, shift=3), ValueError, "0 <= shift < window_size"),
        (lambda: vn.SwinBlock(8, "a"), TypeError, "window_size"),
        (lambda: vn.NeighborhoodAttention(8, 0), ValueError, "kernel_size of at least 1"),
        (lambda: vn.GridAttention(8, partition="axis"), ValueError, "partition to be one of grid, block"),
        (lambda: vn.ViTDetAttention(8, heads=2), ValueError, "size, without a window_size"),
        (lambda: vn.ViTDetAttention(8, "a", heads=2), TypeError, "size to be an integer"),
    ],
)
def test_bad_arguments(make, kind, message):
    with pytest.raises(kind, match=f"visattn: expected {message}"):
        make()


def test_small_maps_of_neighborhoods():
    """Refused, unless they are padded; a map that is large enough is not."""
    small, large = torch.zeros(1, 8, 5, 9), torch.zeros(1, 8, 6, 9)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation <= 5, the height of the map"):
        vn.NeighborhoodAttention(8, 3, dilation=2)(small)
    module = vn.NeighborhoodAttention(8, 3, dilation=2, pad=True)
    assert module(small).shape == small.shape
    assert module.attention_map(small, [(4, 8)]).shape == (1, 1, 4, 6, 9)
    plain = vn.NeighborhoodAttention(8, 3, dilation=2)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(large), plain(large))


def test_axial_tables_are_for_one_size():
    module = vn.AxialAttention(8, "width", heads=2, size=5)
    with pytest.raises(RuntimeError, match=r"expected x of width 5, .* but got x\.shape=\[1, 8, 5, 6\]\. A module"):
        module(torch.zeros(1, 8, 5, 6))


@pytest.mark.parametrize("name", ["axial", "axial-span", "axial-query", "axial-none"])
def test_axial_training_on_one_map(name):
    """On a batch of one, where torch's own batch norm has wrong gradients; here they are those of its formula."""
    row = next(row for row in ROWS if row.name == name)
    x = normal(1, row.channels, *row.sizes[0])
    ours, theirs = ready(row, training=True), ready(row, training=True)
    theirs.norm_qkv, theirs.norm_output = Formula(theirs.norm_qkv), Formula(theirs.norm_output)
    close(results(ours, ours, x), results(theirs, theirs, x))


class Formula(nn.Module):
    """A batch norm as one writes it."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (2, 4, 1, 5), (2, 4, 3, 1), (2, 4, 3, 5)])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(shape, training):
    """Of every order of strides, of the map and of the gradient, as torch's on a map without ambiguous strides."""
    norm = BatchNorm2d(4).double().train(training)
    norm.weight.data = normal(4)
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (2, 0, 3, 1), (2, 3, 0, 1), (3, 2, 1, 0)):
        back = [order.index(i) for i in range(4)]
        x = normal(*shape).permute(order).contiguous().permute(back).requires_grad_()
        grad = normal(*shape, seed=5)
        for form in (grad, grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
            plain = nn.functional.batch_norm(
                *(x.flatten(2), norm.running_mean.clone(), norm.running_var.clone()), norm.weight, norm.bias, training
            )
            (expected,) = torch.autograd.grad(plain.view(shape), x, grad.contiguous())
            (got,) = torch.autograd.grad(norm.forward(x), x, form)
            torch.testing.assert_close(got, expected)


class Largest(TorchDispatchMode):
    """The largest tensor that an operator made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.elements = max(self.elements, x.untyped_storage().nbytes() // 8 if torch.is_tensor(x) else 0)
        return out


@pytest.mark.parametrize("options", [{"size": 256}, {"span": 101}, {"span": 511}], ids=str)
def test_axial_training_stores_no_map(options):
    module = vn.AxialAttention(8, "width", heads=2, **options).double()
    x = normal(1, 8, 2, 256).requires_grad_()
    with Largest() as largest:
        module(x).sum().backward()
    assert largest.elements <= 4 * x.numel() < 2 * 256 * 256


def test_axial_factor_of_zero():
    """A norm whose weight of q·k is 0 leaves the positions."""
    row = next(row for row in ROWS if row.name == "axial")
    for training in (False, True):
        ours, theirs = ready(row, training), ready(row, training)
        for module in (ours, theirs):
            module.norm_logits.weight.data[:2] = 0
        x = normal(2, row.channels, *row.sizes[0])
        close(results(ours, ours, x), results(theirs, lambda x, theirs=theirs: row.dense(theirs, x), x))
