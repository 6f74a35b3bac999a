"""What a module of `visattn_kernels.nn` is held to, and the table of them.

A row names a module and its dense re-implementation: the paper's formula in plain torch, with the map stored, on the
module's own parameters. The tests of test_nn.py hold every row to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

Dense = Callable[[nn.Module, torch.Tensor], torch.Tensor]
Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """A module under test."""

    name: str
    make: Callable[[], nn.Module]
    dense: Dense
    channels: int = 8
    sizes: tuple[tuple[int, int], ...] = ((5, 7), (6, 4), (1, 9))
    """Sizes of maps, odd ones among them."""
    large: tuple[int, int] = (24, 16)
    """Size of the map on which copies are counted."""
    training: bool = False
    """Whether training is another computation than evaluation, with batch norm or spectral norm."""
    copies: int = 0
    """How many copies of a map's size the module may make beyond what its own additions and norms write."""


def normal(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A normal tensor, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ready(row: Row, training: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module of a row, every parameter and statistic random: sigma and gamma start at 0, which shows nothing."""
    torch.manual_seed(11)
    module = row.make().double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
        for part in module.modules():
            if parametrize.is_parametrized(part):  # the spectral norm of what the weight is now
                norm, weight = part.parametrizations.weight[0], part.parametrizations.weight.original
                u, _, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
                norm._u.copy_(u[:, 0])
                norm._v.copy_(v[0])
    return module.to(dtype).train(training)


def maps(row: Row, size: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """One map in both memory formats, and as a slice of a larger one."""
    height, width = size
    x = normal(2, row.channels, height, width, dtype=dtype)
    sliced = torch.zeros(2, row.channels + 1, height + 1, width + 2, dtype=dtype)[:, 1:, 1:, :-2].copy_(x)
    return [x, x.contiguous(memory_format=torch.channels_last), sliced]


def results(
    module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x and of every parameter from a random one of the output."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = forward(leaf)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(out, [leaf, *parameters.values()], normal(*out.shape, seed=5, dtype=out.dtype))
    return dict(zip(("out", "x", *parameters), (out.detach(), *grads), strict=True))


def close(got: Results, expected: Results, rtol: float = 1e-9) -> None:
    """Hold results together, each relative to its largest element."""
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name].shape == x.shape, name
        error, size = (got[name].double() - x.double()).abs().max().item(), x.double().abs().max().item()
        assert error <= rtol * max(size, 1), f"{name}: off by {error} of {size}"


class CountCopies(TorchDispatchMode):
    """Count the copies of tensors of at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            shape = list(args[0].shape)
            if args[0].numel() >= self.elements:
                self.seen.append(f"{function}{shape}")
        return out


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, which must not share a tensor."""
    other = copy.deepcopy(module)
    ours = {x.data_ptr() for x in module.state_dict().values()}
    assert not ours & {x.data_ptr() for x in other.state_dict().values()}
    return other


# Dense attention, as every paper writes it --------------------------------------------------------------------------


def flat(x: torch.Tensor) -> torch.Tensor:
    """An image as a sequence of its positions: [B, H * W, C]."""
    return x.flatten(2).transpose(1, 2)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 1.0, bias=0.0) -> torch.Tensor:
    """softmax(scale * QKᵀ + bias) V with the map stored; [..., N, D], [..., M, D], [..., M, Dv]."""
    return torch.softmax(scale * (q @ k.transpose(-2, -1)) + bias, dim=-1) @ v
