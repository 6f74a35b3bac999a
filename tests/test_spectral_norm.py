"""Our spectral norm beside torch's, and where torch's steps too often: checkpoints, several uses between updates."""

from __future__ import annotations

import copy

import pytest
import torch
from modules import close, normal
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as norm_of_torch
from torch.utils.checkpoint import checkpoint

import visattn_kernels.nn as vn
from visattn_kernels.backends import cpu
from visattn_kernels.nn.spectral_norm import spectral_norm


def weights_moved(module: nn.Module) -> nn.Module:
    """Every parameter far from what the power method has seen, as after a step of training."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i))
    return module


def both() -> tuple[nn.Module, nn.Module]:
    """Two convolutions in one state, ours and torch's."""
    ours, theirs = spectral_norm(nn.Conv2d(5, 7, 1).double()), norm_of_torch(nn.Conv2d(5, 7, 1).double())
    theirs.load_state_dict(weights_moved(ours).state_dict())
    return ours, theirs


def test_trains_as_that_of_torch() -> None:
    """A use for each update: results, gradients, vectors, and a state dict either way."""
    ours, theirs = both()
    for step in range(4):
        x, outputs = normal(2, 5, 3, 4, seed=step), []
        for layer in (ours, theirs):
            out = layer(x)
            grads = torch.autograd.grad(out.sin().sum(), list(layer.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(layer.parameters(), grads, strict=True):
                    parameter -= 0.1 * grad
            outputs.append({"out": out.detach(), **layer.state_dict()})
        close(*outputs)
    ours.load_state_dict(theirs.state_dict())
    close({"weight": ours.eval().weight.detach()}, {"weight": theirs.eval().weight.detach()})


def test_steps_where_the_weight_has_changed() -> None:
    layer, _ = both()
    norm = layer.parametrizations.weight[0]
    changes = {
        "used again": (lambda: None, False),
        "in place": (lambda: layer.parametrizations.weight.original.data.mul_(1.5).add_(0.1), True),
        "one number": (lambda: layer.parametrizations.weight.original.data[3, 2].add_(1e-3), True),
        "loaded": (lambda: layer.load_state_dict({**layer.state_dict()}), False),
        "assigned": (lambda: setattr(layer, "weight", normal(7, 5, 1, 1)), True),
    }
    layer.train()(normal(1, 5, 2, 2))
    for name, (change, steps) in changes.items():
        change()
        before = norm._u.clone()
        layer.eval()(normal(1, 5, 2, 2))
        assert torch.equal(norm._u, before), name
        layer.train()(normal(1, 5, 2, 2))
        assert torch.equal(norm._u, before) != steps, name


@pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_checkpoints(use_reentrant: bool) -> None:
    """Gradients and buffers of two uses before a backward, as of a discriminator, are those without checkpoints."""
    start = weights_moved(vn.SAGANAttention(16, spectral_norm=True).double().train())
    x = normal(2, 16, 6, 8)
    found = []
    for wrapped in (False, True):
        module, leaf = copy.deepcopy(start), x.clone().requires_grad_()
        call = (lambda y, m=module: checkpoint(m, y, use_reentrant=use_reentrant)) if wrapped else module
        loss = call(leaf).sin().sum() - call(leaf * 0.5).cos().sum()
        loss.backward()
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        found.append({"x": leaf.grad, **grads, **dict(module.named_buffers())})
    close(*found)


@pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))
def test_reading_a_map_changes_no_result() -> None:
    start = weights_moved(vn.SAGANAttention(16, spectral_norm=True).double().train())
    x = normal(2, 16, 6, 8)
    read = copy.deepcopy(start)
    read.attention_map(x, [(0, 0)])
    assert torch.equal(read(x), start(x))


def test_under_autocast() -> None:
    """The power method is in float32."""
    ours, _ = both()
    ours = ours.float().train()
    plain = copy.deepcopy(ours)
    x = normal(1, 5, 2, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours(x)
    plain(x)
    close(ours.state_dict(), plain.state_dict(), rtol=1e-6)


def test_assigned_to_a_layer_on_meta() -> None:
    """What is in no state dict stays on meta when one is assigned."""
    whole = vn.SAGANAttention(8, spectral_norm=True)
    with torch.device("meta"):
        module = vn.SAGANAttention(8, spectral_norm=True)
    module.load_state_dict(copy.deepcopy(whole.state_dict()), assign=True)
    x = normal(1, 8, 4, 6, dtype=torch.float32)
    close({"out": module.train()(x)}, {"out": whole.train()(x)})
