"""Streams, captured graphs, compiled functions, a second device."""

from __future__ import annotations

import pytest
import torch
from cases import Case, differentiate, inputs, short

import visattn_kernels as va
from gpu.common import EVERYTHING, all_to_gpu, attend, each_backend, each_reader, named

CYCLES = 2_000_000_000
"""About a second: whoever does not wait for it is done long before."""

PATTERNS = [va.Global(), va.Window(4, shift=1), va.Neighborhood(5, border="zero"), va.CrissCross()]

CASES = [
    Case(dtype, 2, (9, 11), (9, 11), 2, 1, 8, 8, pattern=pattern, terms=EVERYTHING)
    for dtype in (torch.bfloat16, torch.float32)
    for pattern in PATTERNS
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{named(case.dtype)}-{short(case.pattern)}")


def empty_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same strides, full of NaN."""
    return {name: torch.full_like(x, torch.nan) for name, x in tensors.items()}


def fill(to: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """Write inputs on the current stream."""
    for name, x in tensors.items():
        to[name].copy_(x)


def assert_same(results: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, x in results.items():
        assert torch.equal(x, wanted[name]), name


@each_backend
@each_case
def test_a_side_stream_that_sleeps_first(case: Case, backend: str) -> None:
    """Inputs are written on the stream after a sleep: who runs on another stream reads NaN."""
    tensors = all_to_gpu(inputs(case))
    wanted = differentiate(attend(case, backend), tensors, case.wanted)
    late = empty_like(tensors)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        fill(late, tensors)
        results = differentiate(attend(case, backend), late, case.wanted)
        assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    assert_same(results, wanted)


@each_reader
@pytest.mark.parametrize("pattern", [va.Global(), va.CrissCross()], ids=short)
def test_the_map_on_a_side_stream(pattern, backend: str) -> None:
    q = torch.randn(2, 9, 11, 2, 8, device="cuda")
    at = torch.tensor([[0, 0], [8, 10]])
    run = lambda x: (va.attention_map(x, x, at, pattern, backend=backend),
                     va.attention_received(x, x, pattern, backend=backend))  # fmt: skip
    wanted = run(q)
    late = torch.full_like(q, torch.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        late.copy_(q)
        results = run(late)
    stream.synchronize()
    for x, y in zip(results, wanted, strict=True):
        assert torch.equal(x, y)


@each_backend
@each_case
def test_a_captured_graph_follows_its_inputs(case: Case, backend: str) -> None:
    """Captured once, forward and backward; replayed with other inputs, it gives what a call gives."""
    first = all_to_gpu(inputs(case))
    static = {name: x.clone() for name, x in first.items()}
    call = attend(case, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and loaded before
        for _ in range(2):
            differentiate(call, static, case.wanted)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = differentiate(call, static, case.wanted)
    for factor in (1.0, -0.5, 2.0):
        changed = {name: x * factor if name not in ("lse", "key_bias") else x for name, x in first.items()}
        fill(static, changed)
        for x in results.values():
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, differentiate(call, changed, case.wanted))


@each_backend
@each_case
def test_compiles_in_one_graph(case: Case, backend: str) -> None:
    """torch.compile with inductor, forward and backward."""
    torch._dynamo.reset()
    call, tensors = attend(case, backend), all_to_gpu(inputs(case))
    names = case.wanted

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        out, lse = call(**dict(zip(names, leaves, strict=True)))
        return out.float().square().sum() + lse.where(lse.isfinite(), 0).sin().sum()

    def gradients(function) -> list[torch.Tensor]:
        leaves = [tensors[name].detach().requires_grad_() for name in names]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    compiled = gradients(torch.compile(loss, fullgraph=True))
    near = 1e-2 if case.dtype == torch.bfloat16 else 1e-4  # a compiled loss sums and rounds in another order
    for name, x, y in zip(("loss", *names), compiled, gradients(loss), strict=True):
        assert (x - y).abs().max() <= near * y.abs().max(), name


@each_backend
def test_a_second_device(backend: str) -> None:
    """Tensors elsewhere than on the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("a second GPU is not here, and so not tested")
    case = CASES[0]
    tensors = all_to_gpu(inputs(case))
    wanted = differentiate(attend(case, backend), tensors, case.wanted)
    elsewhere = {name: x.to("cuda:1") for name, x in tensors.items()}
    results = differentiate(attend(case, backend), elsewhere, case.wanted)
    assert {x.device for x in results.values()} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert_same({name: x.cpu() for name, x in results.items()}, {name: x.cpu() for name, x in wanted.items()})
