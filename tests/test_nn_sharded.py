"""Every module sharded by FSDP2 over two processes: what a step trains and what a map shows, as without shards."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from modules import close, maps, normal, ready
from nn_global import ROWS as GLOBAL_ROWS
from nn_local import ROWS as LOCAL_ROWS
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from visattn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))


def test_fully_shard() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(both_ways, (f"file://{Path(folder) / 'store'}",), 2)


def both_ways(rank: int, store: str) -> None:
    """One of two processes, each with a map of its own; the gradients of both are averaged."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody here writes to
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for row in GLOBAL_ROWS + LOCAL_ROWS:
        start = ready(row, row.training)
        x = maps(row, row.sizes[0])[0]
        batches = (x, x.flip(0) * 0.5)
        alone = [copy.deepcopy(start) for _ in batches]
        for module, batch in zip(alone, batches, strict=True):
            trained(module, batch)
        for mine, *both in zip(*(module.parameters() for module in (alone[rank], *alone)), strict=True):
            mine.grad = sum(parameter.grad for parameter in both) / 2
        whole = stepped(alone[rank])
        module = stepped(trained(fully_shard(start, mesh=mesh), batches[rank]))
        full = {name: x.full_tensor().detach() for name, x in module.named_parameters()}
        close(full, {name: x.detach() for name, x in whole.named_parameters()})
        close(dict(module.named_buffers()), dict(whole.named_buffers()))
        if hasattr(module, "attention_map"):
            register_fsdp_forward_method(module, "attention_map")
            at = [(0, 0), (1, 1)]
            close({row.name: module.attention_map(x, at)}, {row.name: whole.attention_map(x, at)})
    dist.destroy_process_group()


def trained(module: torch.nn.Module, x: torch.Tensor) -> torch.nn.Module:
    """The module with the gradients of a loss."""
    out = module(x)
    if out.requires_grad:
        (out * normal(*out.shape, seed=5)).sum().backward()
    return module


def stepped(module: torch.nn.Module) -> torch.nn.Module:
    """The module after a step down its gradients."""
    parameters = list(module.parameters())
    if parameters:
        torch.optim.SGD(parameters, lr=0.1).step()
    return module
