"""Every module of `visattn_kernels.nn` against the dense formula of its paper, and as a module among torch's."""

from __future__ import annotations

import io
import pickle
import sys

import pytest
import torch
import torch._dynamo
from modules import CountCopies, Row, close, copied, maps, normal, ready, results
from nn_global import ROWS as GLOBAL_ROWS
from nn_local import ROWS as LOCAL_ROWS
from tolerance import GRADIENT
from torch import nn
from torch.utils.checkpoint import checkpoint

import visattn_kernels as va
import visattn_kernels.nn as vn
from visattn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))

ROWS = GLOBAL_ROWS + LOCAL_ROWS
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
MODES = [(row, training) for row in ROWS for training in ((False, True) if row.training else (False,))]


def on(modes: list[tuple[Row, bool]]):
    """Parametrize by modules in evaluation or training."""
    ids = [f"{row.name}-{'training' if training else 'evaluation'}" for row, training in modes]
    return pytest.mark.parametrize(("row", "training"), modes, ids=ids)


each_mode = on(MODES)


def test_every_module_has_a_row() -> None:
    made = {type(part).__name__ for row in ROWS for part in row.make().modules()}
    assert made >= {name for name in vn.__all__ if isinstance(getattr(vn, name), type)}


@pytest.mark.fast
@each_mode
def test_dense(row: Row, training: bool) -> None:
    """Results, gradients, and what training leaves in the buffers; in either memory format, and of a slice."""
    for size in row.sizes:
        for x in maps(row, size):
            ours, theirs = ready(row, training), ready(row, training)
            got = results(ours, ours, x)
            close(got, results(theirs, lambda x, theirs=theirs: row.dense(theirs, x), x))
            close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@each_mode
def test_gradcheck(row: Row, training: bool) -> None:
    """On the smallest map; batch statistics are updated by every call, and change no result of training."""
    module = ready(row, training)
    height, width = min(row.sizes, key=lambda size: size[0] * size[1])
    x = normal(1 if not training else 2, row.channels, height, width).requires_grad_()
    parameters = dict(module.named_parameters())

    def f(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    torch.autograd.gradcheck(f, (x, *parameters.values()), fast_mode=True)


@each_mode
def test_float32(row: Row, training: bool) -> None:
    """Rounding, and no more, lies between float32 and float64: some times what the dense formula rounds in float32."""
    x = maps(row, row.sizes[0])[0]
    exact, module, dense = (ready(row, training, dtype) for dtype in (torch.float64, torch.float32, torch.float32))
    true = results(exact, exact, x)
    eager = results(dense, lambda x: row.dense(dense, x), x.float())
    got = results(module, module, x.float())
    assert got["out"].dtype == torch.float32
    for name, value in true.items():
        error, rounded = ((found[name] - value).abs().max().item() for found in (got, eager))
        allowed = training * GRADIENT * rounded + 2e-5 * max(value.abs().max().item(), 1)
        assert error <= allowed, f"{name}: off by {error}, not {rounded}"


@each_row
def test_autocast(row: Row) -> None:
    module = ready(row, dtype=torch.float32)
    x = maps(row, row.sizes[0], torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    close({"out": got}, {"out": module(x)}, rtol=0.1)


@each_row
def test_parameters_can_be_sharded(row: Row) -> None:
    """FSDP2 cuts the first dimension, and takes contiguous parameters alone; test_nn_sharded.py runs it."""
    assert all(x.dim() and x.is_contiguous() for x in row.make().parameters())


@each_row
def test_no_copy_of_the_map(row: Row) -> None:
    module = ready(row, dtype=torch.float32)
    for x in maps(row, row.large, torch.float32)[:2]:
        with torch.no_grad(), CountCopies(x.numel() // 2) as counted:
            module(x)
        assert len(counted.seen) <= row.copies, counted.seen


@each_row
def test_copies_and_state(row: Row) -> None:
    """deepcopy, pickle, torch.save and the state dict give the same layer."""
    module = ready(row)
    x = maps(row, row.sizes[0])[0]
    expected = {"out": module(x).detach()}
    fresh = row.make().double().eval()
    fresh.load_state_dict(module.state_dict())
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    loaded = row.make().double().eval()
    loaded.load_state_dict(torch.load(saved))
    others = [copied(module), fresh, loaded]
    if not any(nn.utils.parametrize.is_parametrized(part) for part in module.modules()):  # torch refuses those
        others.append(pickle.loads(pickle.dumps(module)))
    for other in others:
        close({"out": other(x).detach()}, expected, rtol=0)
    assert repr(others[0]) == repr(module)


@each_mode
def test_compile(row: Row, training: bool) -> None:
    """The whole of forward and backward in one graph."""
    torch._dynamo.reset()
    module, plain = ready(row, training), ready(row, training)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = maps(row, row.sizes[0])[0]
    close(results(module, compiled, x), results(plain, plain, x))


@each_mode
def test_checkpoint(row: Row, training: bool) -> None:
    """What is computed twice is the same: results and gradients as without checkpoints."""
    module = ready(row, training)
    x = maps(row, row.sizes[0])[0]
    expected = results(module, module, x)
    for use_reentrant in (False, True):
        again = ready(row, training)
        call = lambda y, m=again, way=use_reentrant: checkpoint(m, y, use_reentrant=way)
        close(backward(again, call, x), expected)


def backward(module: nn.Module, forward, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """As `results`, by `backward`, since reentrant checkpoints refuse `torch.autograd.grad`."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = forward(leaf)
    out.backward(normal(*out.shape, seed=5, dtype=out.dtype))
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "x": leaf.grad, **grads}


DYNAMIC = {type(row.make()): row for row in reversed(ROWS) if len(row.sizes) > 1 and "pyramid" not in row.name}
"""A row of each module."""


@pytest.mark.parametrize("row", DYNAMIC.values(), ids=lambda row: row.name)
def test_compile_for_any_size(row: Row) -> None:
    """Not OCNet's pyramid: its windows are as large as its regions, so each size compiles anew."""
    torch._dynamo.reset()
    module = ready(row)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for size in row.sizes[:2]:
        x = maps(row, size)[0]
        close({"out": compiled(x).detach()}, {"out": module(x).detach()})


def normed(row: Row) -> bool:
    """Whether a module has torch's batch norm, which refuses an empty batch in training."""
    return any(isinstance(part, nn.BatchNorm2d) for part in row.make().modules())


@on([(row, training) for row, training in MODES if not (training and normed(row))])
def test_no_map(row: Row, training: bool) -> None:
    """An empty batch gives an empty result, and leaves no NaN behind."""
    module = ready(row, training)
    height, width = row.sizes[0]
    y = module(torch.zeros(0, row.channels, height, width, dtype=torch.float64))
    assert len(y) == 0
    assert not any(x.isnan().any() for x in module.state_dict().values())


GLOBAL = va.Global()
MAPPED = [row for row in ROWS if hasattr(row.make(), "attention_map") and getattr(row.make(), "regions", 1) == 1]


@pytest.mark.parametrize("row", MAPPED, ids=lambda row: row.name)
def test_attention_map(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of what `forward` attends by, its last call, which the dense formula holds."""
    module = ready(row)
    calls = []

    def recorded(q, k, v, pattern=GLOBAL, *, scale=None, terms=(), backend="auto"):
        calls.append((q, k, pattern, scale, terms))
        return va.attention(q, k, v, pattern, scale=scale, terms=terms, backend=backend)

    for name in {cls.__module__ for cls in type(module).__mro__ if cls.__module__.startswith("visattn_kernels.nn")}:
        monkeypatch.setattr(sys.modules[name], "attention", recorded, raising=False)
    x = maps(row, row.sizes[0])[0]
    module(x)
    q, k, pattern, scale, terms = calls[-1]
    at = [(0, 0), (q.shape[1] - 1, q.shape[2] // 2)]
    expected = va.attention_map(q, k, at, pattern, scale=scale, terms=terms, backend="reference")
    rows = module.attention_map(x, at)
    if rows.dim() == 4:  # of one head
        expected = expected.squeeze(2)
    close({"rows": rows}, {"rows": expected})


@each_row
def test_bad_maps(row: Row) -> None:
    module = ready(row)
    with pytest.raises(TypeError, match=r"expected x to be a torch\.Tensor, but got x=list"):
        module([1, 2])
    with pytest.raises(RuntimeError, match=r"expected x of shape \[B, .*C?.*H, W\], but got x\.shape=\[3, 4\]"):
        module(normal(3, 4))


@pytest.mark.filterwarnings("ignore:visattn. falling back to the reference:UserWarning")
@each_mode
def test_meta(row: Row, training: bool) -> None:
    """Shapes without numbers, as tools that plan memory ask for them."""
    x = maps(row, row.sizes[0])[0]
    expected = ready(row, training)(x).shape
    assert ready(row, training).to("meta")(x.to("meta")).shape == expected


TRANSLATES = [name for name in vn.__all__ if hasattr(getattr(vn, name), "translate")]
NEEDS = {
    "AxialBlock": "relative",
    "GridAttention": "rel_pos.relative_position_bias_table",
    "SwinBlock": "relative_position_bias_table",
    "AxialAttention": "relative",
    "CrissCrossAttention": "gamma or gamma.scale",
    "DANetChannelAttention": "gamma",
    "DANetPositionAttention": "gamma",
    "SAGANAttention": "gamma or sigma",
    "WindowAttention": "relative_position_bias_table",
}
"""What the translations of state dicts change, so that it must be there."""


@pytest.mark.parametrize("name", TRANSLATES)
def test_translate_refuses_the_state_of_something_else(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^visattn: expected a state dict with the entries .*, but got an entry=other"
    ):
        getattr(vn, name).translate({"other": torch.ones(1)})


@pytest.mark.parametrize("name", NEEDS)
def test_translate_names_what_is_not_there(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^visattn: expected a state dict with an entry {NEEDS[name]}, but got entries="
    ):
        getattr(vn, name).translate({})
