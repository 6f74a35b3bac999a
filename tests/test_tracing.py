"""Graphs of the modules and of the functions: torch.fx, torch.jit.trace, and torch.export for ranges of sizes."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from modules import Row, close, maps, normal, ready, results
from nn_global import ROWS as GLOBAL_ROWS
from nn_local import ROWS as LOCAL_ROWS
from torch import fx, nn

import visattn_kernels as va
import visattn_kernels.nn as vn
from visattn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))

ROWS = GLOBAL_ROWS + LOCAL_ROWS
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


# torch.fx


@each_row
@pytest.mark.parametrize("alone", [False, True], ids=["in-a-model", "alone"])
def test_symbolic_trace(row: Row, alone: bool) -> None:
    """A module is one node, with its parameters, whatever it does with sizes."""
    model, plain = (m if alone else nn.Sequential(nn.Identity(), m) for m in (ready(row), ready(row)))
    graph = fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 2 - alone
    assert {id(x) for x in graph.parameters()} == {id(x) for x in model.parameters()}
    prefix = "itself." if alone else ""
    for size in row.sizes:
        x = maps(row, size)[0]
        got = results(graph, graph, x)
        close({name.removeprefix(prefix): value for name, value in got.items()}, results(plain, plain, x))
    parametrized = any(nn.utils.parametrize.is_parametrized(part) for part in model.modules())
    if not (parametrized or alone):  # torch pickles neither those nor graphs whose input has an annotation in quotes
        loaded = pickle.loads(pickle.dumps(graph))
        close({"out": loaded(x).detach()}, {"out": plain(x).detach()}, rtol=0)


class Reader(nn.Module):
    """A model of the functions, with parameters in terms, that reads maps of a layer beside."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 8, 1)
        self.layer = vn.DANetPositionAttention(8)
        self.masks = vn.MultiHeadAttentionMask(8, 2)
        self.table, self.rel = nn.Parameter(normal(2, 5, 5).float()), nn.Parameter(normal(5, 4).float())

    def forward(self, x):
        y = self.project(x)
        q = va.heads_last(y, heads=2)
        pattern, terms = va.Window(3, shift=1), (va.RelativeBias(self.table), va.RelativeQuery(self.rel, scale=0.5))
        out, lse = va.attention(q, q, q, pattern, terms=terms, return_lse=True)
        out, _ = va.merge([(out, lse), va.attention(q, q, q, va.Row(), return_lse=True)])
        masks = self.masks.masks(y)
        return (
            va.channels_first(out),
            va.attention_map(q, q, [(0, 1), (2, 2)], pattern, terms=terms),
            va.attention_received(q, q, terms=(va.KeyBias(lse),)),
            self.layer.attention_map(y, at=[(1, 1)]),
            vn.masked_pool(y, masks, normalize=True),
            vn.diversity_loss(masks),
        )


def test_symbolic_trace_of_functions() -> None:
    model = Reader()
    graph = fx.symbolic_trace(model)
    assert va.attention in {node.target for node in graph.graph.nodes}
    loaded = pickle.loads(pickle.dumps(graph))
    for height, width in ((4, 5), (7, 3)):
        x = normal(2, 3, height, width, dtype=torch.float32)
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_a_proxy_anywhere_in_the_arguments_is_seen() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q", normal(1, 3, 4, 1, 2))

        def forward(self, bias: torch.Tensor) -> torch.Tensor:
            q = self.q
            pair = va.attention(q, q, q, terms=(va.KeyBias(bias),), return_lse=True)
            return va.merge([va.attention(q, q, q, return_lse=True), (pair[0], pair[1])])[0]

    layer, bias = Layer(), normal(1, 3, 4)
    close({"out": torch.fx.symbolic_trace(layer)(bias)}, {"out": layer(bias)})


def test_proxies_are_no_tensors_elsewhere() -> None:
    """What is checked beside them still is."""
    with pytest.raises(TypeError, match=r"table to be a torch\.Tensor"):
        va.RelativeBias([1, 2])
    with pytest.raises(TypeError, match=r"q to be a torch\.Tensor"):
        va.attention(None, None, None)


# torch.jit.trace


def traced(module: nn.Module, x: torch.Tensor, folder: Path) -> tuple[torch.nn.Module, list[str]]:
    """What torch.jit.trace makes of a module, saved and loaded; and what was warned of this package's decisions."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = torch.jit.trace(module.requires_grad_(False), (x,), check_trace=False)
        torch.jit.save(trace, folder / "trace.pt")
        trace = torch.jit.load(folder / "trace.pt")
    return trace, [str(w.message) for w in caught if "visattn" in f"{w.message} {w.filename}"]


@each_row
def test_jit_trace(row: Row, tmp_path: Path) -> None:
    """A trace serves maps of all sizes, or was said not to; nothing else is warned of."""
    module = ready(row)
    others = [*row.sizes, *((height + 3, width + 2) for height, width in row.sizes), (8, 8), (4, 9), (2, 8), (1, 9)]
    first = row.sizes[-1] if "vitdet" in row.name else row.sizes[0]  # one that windows divide
    trace, said = traced(module, maps(row, first)[0], tmp_path)
    wrong = []
    for size in others:
        x = maps(row, size)[0]
        try:
            expected = module(x)
        except (RuntimeError, ValueError):
            continue  # a size that the module does not take
        try:
            got = trace(x)
        except RuntimeError:
            wrong.append(size)
            continue
        if got.shape != expected.shape or (got - expected).abs().max() > 1e-9 * expected.abs().max():
            wrong.append(size)
    assert first not in wrong
    assert bool(wrong) == bool(said), (wrong, said)
    assert all(text.startswith("visattn: torch.jit.trace keeps for maps of all sizes") for text in said)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vn.SwinBlock(8, 7, shift=3), "the shift of WindowAttention, .*, as for this one of 8×6"),
        (lambda: vn.OCNetBlock(8, regions=2), "the regions of OCNetBlock, as for this one of 8×6"),
        (lambda: vn.SwinBlock(8, 7, shift=0), None),
        (lambda: vn.SwinBlock(8, 7, shift=3, pad=True), None),
    ],
)
def test_jit_trace_says_what_is_frozen(make, message, tmp_path: Path) -> None:
    _, said = traced(make(), torch.zeros(1, 8, 8, 6), tmp_path)
    assert [bool(re.search(message or "", text)) for text in said] == [True] * bool(message)


# torch.export


EXPORTED = {
    "vitdet": (lambda: vn.ViTDetAttention(8, 14, heads=2), 2),
    "vitdet-windows": (lambda: vn.ViTDetAttention(8, window_size=7, heads=2), 2),
    "swin": (lambda: vn.SwinBlock(8, 7, heads=2), 2),
    "swin-shifted": (lambda: vn.SwinBlock(8, 7, shift=3, heads=2), 8),
    "swin-padded": (lambda: vn.SwinBlock(8, 7, shift=3, pad=True, heads=2), 2),
    "sagan": (lambda: vn.SAGANAttention(8), 4),
    "nonlocal": (lambda: vn.NonLocalBlock(8), 4),
    "nat-padded": (lambda: vn.NeighborhoodAttention(8, 7, pad=True, heads=2), 7),
}
"""Modules, and the least side of the range of sizes that their graph is for, as docs/modules.md has it."""


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in EXPORTED), ("swin-padded", True), ("vitdet", True)], ids=str
)
def test_export_for_a_range_of_sizes(name: str, strict: bool) -> None:
    make, least = EXPORTED[name]
    module = make().double().eval()
    sides = {i: torch.export.Dim(side, min=least, max=64) for i, side in ((2, "height"), (3, "width"))}
    dims = ({0: torch.export.Dim("batch", max=8), **sides},)
    program = torch.export.export(module, (normal(2, 8, 14, 16),), dynamic_shapes=dims, strict=strict).module()
    for size in ((14, 14), (8, 9), (64, 15), (21, 28), *(((2, 5), (7, 14)) if least == 2 else ((least, 14),))):
        x = normal(3, 8, *size)
        close({"out": program(x).detach()}, {"out": module(x).detach()})


def test_export_refuses_a_range_that_windows_cover() -> None:
    sides = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    with pytest.raises(Exception, match=r"8 <= .*size"):
        torch.export.export(
            vn.SwinBlock(8, 7, shift=3), (torch.zeros(2, 8, 14, 16),), dynamic_shapes=(sides,), strict=False
        )
