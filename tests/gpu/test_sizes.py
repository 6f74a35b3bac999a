"""Sizes past what 32 bits, or one dimension of a grid of programs, can count; memory that grows with N."""

from __future__ import annotations

import pytest
import torch
from cases import Case, TermCase, differentiate, hold, inputs, short, truth

import visattn_kernels as va
from gpu.common import (
    FOR_GPUS,
    all_to_cpu,
    all_to_gpu,
    attend,
    each_backend,
    each_of_any_width,
    each_reader,
    named,
    needs_memory,
)
from visattn_kernels import reference
from visattn_kernels.patterns import Size
from visattn_kernels.problem import Problem

GB, MB = 10**9, 2**20

PAST = 2**31
"""The first element that 32 bits with a sign do not reach."""


def large(layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps of 840x840 positions, 4 heads of 64 channels, in bfloat16, with elements past `PAST`.

    packed: views of one projection's output, of which the elements past are those of the last map. contiguous, nchw:
    maps that have more elements each; q, k and v are the same.
    """
    if layout == "packed":
        whole = torch.randn(4, 840, 840, 3 * 256, dtype=torch.bfloat16, device="cuda")
        q, k, v = (x.unflatten(3, (4, 64)) for x in whole.chunk(3, dim=3))
    elif layout == "contiguous":
        whole = torch.randn(12, 840, 840, 4, 64, dtype=torch.bfloat16, device="cuda")
        q = k = v = whole
    else:
        whole = torch.randn(12, 256, 840, 840, dtype=torch.bfloat16, device="cuda")
        q = k = v = va.heads_last(whole, 4)
    assert whole.numel() > PAST
    return q, k, v


@each_backend
@pytest.mark.parametrize("layout", ["packed", "contiguous", "nchw"])
def test_more_than_two_to_the_31_elements(layout: str, backend: str, alone: None) -> None:
    """Windows that no other touches, the first and the last ones, against the reference on these alone."""
    needs_memory(50 * GB)
    torch.manual_seed(0)
    q, k, v = large(layout)
    grad_out = q.detach()  # as good as any other numbers
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = va.attention(*leaves, va.Window(7), backend=backend, return_lse=True)
    grads = torch.autograd.grad(out, leaves, grad_out)
    results = dict(zip(("out", "lse", "grad_q", "grad_k", "grad_v"), (out.detach(), lse.detach(), *grads), strict=True))
    case = Case(torch.bfloat16, 1, (7, 7), (7, 7), 4, 4, 64, 64)
    for b, y, x in ((0, 0, 0), (0, 833, 833), (-1, 0, 0), (-1, 833, 0), (-1, 833, 833), (-1, 420, 833)):
        crop = lambda t, b=b, y=y, x=x: t.detach()[b][None, y : y + 7, x : x + 7].cpu()
        tensors = {"q": crop(q), "k": crop(k), "v": crop(v), "grad_out": crop(grad_out)}
        tensors["grad_lse"] = torch.zeros(1, 7, 7, 4)
        hold(case, {name: crop(t) for name, t in results.items()}, known=truth(case, tensors))


@each_reader
def test_more_than_two_to_the_31_weights(backend: str, alone: None) -> None:
    """Rows of a map for so many points that they have as many elements."""
    needs_memory(30 * GB)
    torch.manual_seed(0)
    q = torch.randn(1, 256, 256, 4, 8, device="cuda")
    at = torch.stack([torch.arange(8200) // 256, torch.arange(8200) % 256], 1)
    rows = va.attention_map(q, q, at, backend=backend)
    assert rows.numel() > PAST
    for p in (0, 4100, 8191, 8192, 8199):
        scores = torch.einsum("hd,yxhd->hyx", q[0, p // 256, p % 256].double(), q[0].double()) * 8**-0.5
        exact = scores.flatten(1).softmax(1).view_as(scores)
        torch.testing.assert_close(rows[0, p].double(), exact, rtol=1e-4, atol=1e-9)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=named)
def test_more_than_65_536_windows(dtype: torch.dtype, backend: str) -> None:
    """Every window against the reference, where each is a map of a batch."""
    rows, columns = 260, 256
    assert rows * columns > 65_536
    batch = Case(dtype, rows * columns, (4, 4), (4, 4), 1, 1, 8, 8)
    tensors = inputs(batch)

    def joined(x: torch.Tensor) -> torch.Tensor:
        """Windows side by side."""
        return x.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)[None].contiguous()

    def apart(x: torch.Tensor) -> torch.Tensor:
        return x[0].unflatten(1, (columns, 4)).unflatten(0, (rows, 4)).transpose(1, 2).flatten(0, 1)

    assert torch.equal(apart(joined(tensors["q"])), tensors["q"])
    one = Case(dtype, 1, (4 * rows, 4 * columns), (4 * rows, 4 * columns), 1, 1, 8, 8, pattern=va.Window(4))
    joint = all_to_gpu({name: joined(x) for name, x in tensors.items()})
    results = all_to_cpu(differentiate(attend(one, backend), joint, one.wanted))
    hold(batch, {name: apart(x) for name, x in results.items()})


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=named)
@pytest.mark.parametrize("pattern", [va.Global(), va.Neighborhood(3, border="zero")], ids=short)
def test_a_batch_of_more_than_65_535(pattern, dtype: torch.dtype, backend: str) -> None:
    case = Case(dtype, 70_000, (2, 3), (2, 3), 2, 1, 8, 8, pattern=pattern, terms=(TermCase("RelativeQuery"),))
    hold(case, all_to_cpu(differentiate(attend(case, backend), all_to_gpu(inputs(case)), case.wanted)))


@each_backend
def test_many_heads(backend: str) -> None:
    """More heads than the smaller dimensions of a grid of programs hold."""
    heads = 66_000
    case = Case(torch.float32, 1, (2, 3), (2, 3), heads, heads, 8, 8)
    hold(case, all_to_cpu(differentiate(attend(case, backend), all_to_gpu(inputs(case)), case.wanted)))


def why_not(case: Case, backend: str) -> str:
    """Why a backend has no room for a problem on this GPU, or nothing."""
    grids = Size(*case.queries), Size(*case.keys)
    names = tuple(term.kind for term in case.terms)
    sizes = case.heads, case.kv_heads, case.head_dim, case.value_dim
    problem = Problem("cuda", case.dtype, case.batch, *grids, *sizes, 1.0, case.pattern, names)
    (record,) = (one for one in FOR_GPUS if one.name == backend)
    reasons = record.unsupported(problem)
    assert all("shared memory" in reason for reason in reasons)
    return "; ".join(reasons)


def peak(case: Case, backend: str, backward: bool) -> tuple[int, int]:
    """Bytes above the inputs at the highest point of a call, and the bytes of its results."""
    shape = lambda grid, heads, width: (case.batch, *grid, heads, width)
    tensors = {
        "q": torch.randn(shape(case.queries, case.heads, case.head_dim), dtype=case.dtype, device="cuda"),
        "k": torch.randn(shape(case.keys, case.kv_heads, case.head_dim), dtype=case.dtype, device="cuda"),
        "v": torch.randn(shape(case.keys, case.kv_heads, case.value_dim), dtype=case.dtype, device="cuda"),
        "grad_out": torch.randn(shape(case.queries, case.heads, case.value_dim), dtype=case.dtype, device="cuda"),
        "grad_lse": torch.randn(shape(case.queries, case.heads, 1)[:4], device="cuda"),
    }
    for term in case.terms:
        sizes = term.shapes(case).items()
        tensors |= {name: torch.randn(size, dtype=case.dtype, device="cuda") for name, size in sizes}
    wanted = case.wanted if backward else ()
    differentiate(attend(case, backend), tensors, wanted)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = differentiate(attend(case, backend), tensors, wanted)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, sum(x.nbytes for x in results.values())


SPREAD = [
    (va.Global(), ()),
    (va.Global(), (TermCase("RelativeQuery"), TermCase("KeyBias"))),
    (va.Window(8, shift=3), (TermCase("RelativeBias"),)),
    (va.Neighborhood(7), (TermCase("RelativeBias"),)),
    (va.CrissCross(), ()),
]


@each_backend
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("pattern", "terms"), SPREAD, ids=lambda x: short(x) if isinstance(x, va.patterns.Pattern) else ""
)
def test_memory_grows_with_n(pattern, terms, backward: bool, backend: str) -> None:
    """At 256x256 positions the map alone would take 8.6 GB, its unfolded keys 50 times the keys.

    Above inputs and results there may be float32 copies of all results (`CrissCross` has two of some), and the shares
    of the gradients of tables, which a backend limits to 64 MB.
    """
    used, results = {}, {}
    for side in (128, 256):
        case = Case(torch.bfloat16, 1, (side, side), (side, side), 1, 1, 16, 32, pattern=pattern, terms=terms)
        if refused := why_not(case, backend):
            pytest.skip(refused)
        used[side], results[side] = peak(case, backend, backward)
        assert used[side] < 5 * results[side] + 80 * MB
    assert used[256] - used[128] < 5 * (results[256] - results[128]) + 80 * MB


@each_reader
def test_reading_the_map_takes_what_it_gives(backend: str) -> None:
    """Two rows and one sum per key of a map of 17 GB."""
    q = torch.randn(1, 256, 256, 1, 8, device="cuda")
    for read in (lambda: va.attention_map(q, q, [(0, 0), (9, 9)], backend=backend),
                 lambda: va.attention_received(q, q, backend=backend)):  # fmt: skip
        read()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        read()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 16 * MB


@each_of_any_width
def test_a_photograph(backend: str) -> None:
    """320x213 positions at scale 1, some rows of the result against the reference; the map would take 18.6 GB."""
    torch.manual_seed(0)
    x = torch.rand(1, 213, 320, 1, 3, device="cuda")
    out = va.attention(x, x, x, scale=1.0, backend=backend)
    flat = x.double().flatten(0, 3)  # [68160, 3]
    for y, at in ((0, 0), (106, 160), (212, 319)):
        query = x[:, y : y + 1, at : at + 1].double()
        exact = reference.formula(query, x.double(), x.double(), va.Global(), scale=1.0)[0].flatten()
        weights = (flat @ query.flatten()).softmax(0)
        torch.testing.assert_close(exact, weights @ flat)
        torch.testing.assert_close(out[0, y, at, 0].double(), exact, rtol=1e-4, atol=1e-6)
