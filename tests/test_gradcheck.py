"""Gradients in float64 against finite differences, with gradcheck's own tolerances."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, TERM_CASES, Case, TermCase, inputs, laid_out, short

import visattn_kernels as va
from visattn_kernels.backends import cpu

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))),
    "reference",
]


def leaves(queries, keys, heads, kv_heads, d, dv, needs, layout="contiguous"):
    generator = torch.Generator().manual_seed(7)

    def leaf(name, shape):
        x = laid_out(torch.randn(shape, generator=generator, dtype=torch.float64), layout)
        return x.requires_grad_(name in needs)

    q = leaf("q", (1, *queries, heads, d))
    return q, leaf("k", (1, *keys, kv_heads, d)), leaf("v", (1, *keys, kv_heads, dv))


@pytest.mark.fast
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["".join(n) for i in (1, 2, 3) for n in itertools.combinations("qkv", i)])
def test_every_input_alone_and_together(backend: str, needs: str) -> None:
    inputs = leaves((2, 3), (2, 3), 2, 2, 3, 3, needs)
    assert torch.autograd.gradcheck(lambda q, k, v: va.attention(q, k, v, backend=backend, return_lse=True), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "d", "dv"),
    [
        ((2, 3), (2, 3), 1, 1, 2, 5),  # unequal widths
        ((2, 3), (2, 3), 1, 1, 5, 1),
        ((4, 4), (2, 2), 1, 1, 1, 4),  # pooled keys, as in SAGAN
        ((2, 1), (3, 5), 1, 1, 2, 2),  # more keys than queries
        ((2, 2), (2, 3), 4, 2, 2, 3),  # grouped-query heads
        ((1, 1), (1, 1), 1, 1, 1, 1),
    ],
)
def test_shapes(backend: str, queries, keys, heads, kv_heads, d, dv) -> None:
    inputs = leaves(queries, keys, heads, kv_heads, d, dv, "qkv")
    for scale in (None, 1.3):
        assert torch.autograd.gradcheck(
            lambda q, k, v, s=scale: va.attention(q, k, v, scale=s, backend=backend, return_lse=True), inputs
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_through_lse_alone(backend: str) -> None:
    inputs = leaves((2, 3), (3, 2), 1, 1, 3, 2, "qk")
    f = lambda q, k, v: va.attention(q, k, v, backend=backend, return_lse=True)[1]
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "after",
    [
        lambda out: va.channels_first(out).contiguous(),  # the gradient arrives as an NCHW view
        lambda out: out.transpose(1, 2).contiguous(),
        lambda out: out.sum((1, 2)),  # ... expanded, with strides of 0
        lambda out: out[..., ::2],
        lambda out: out.flip(1),
    ],
    ids=["nchw", "transposed", "expanded", "strided", "flipped"],
)
def test_non_contiguous_gradients(backend: str, after) -> None:
    inputs = leaves((2, 3), (2, 3), 2, 1, 2, 3, "qkv")
    assert torch.autograd.gradcheck(lambda q, k, v: after(va.attention(q, k, v, backend=backend)), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_non_contiguous_inputs(backend: str, layout: str) -> None:
    """(gradcheck cannot perturb an expanded tensor; the case table covers it.)"""
    inputs = leaves((2, 3), (2, 3), 2, 2, 2, 2, "qkv", layout)
    assert torch.autograd.gradcheck(lambda q, k, v: va.attention(q, k, v, backend=backend), inputs)


TINY = [
    (va.Global(), (2, 2)),
    (va.Window(2, shift=(1, 0)), (3, 2)),
    (va.Grid((2, 1)), (3, 2)),
    (va.Neighborhood((2, 3)), (2, 3)),
    (va.Neighborhood((2, 1), is_causal=(True, False)), (3, 2)),
    (va.Neighborhood(2, dilation=(1, 2), border="mask"), (2, 3)),
    (va.Neighborhood((3, 2), border="zero"), (2, 2)),
    (va.Neighborhood(2, border="zero", is_causal=(False, True)), (2, 2)),
    (va.Row(3), (2, 3)),
    (va.Column(), (3, 2)),
    (va.CrissCross(), (2, 3)),
]
TERM_SETS = [(), *((options[0],) for options in TERM_CASES), tuple(options[1] for options in TERM_CASES)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("terms", TERM_SETS, ids=lambda terms: "-".join(map(str, terms)) or "none")
@pytest.mark.parametrize(("pattern", "grid"), TINY, ids=[short(pattern) for pattern, _ in TINY])
def test_every_pattern_with_every_term(backend: str, pattern, grid, terms: tuple[TermCase, ...]) -> None:
    terms = tuple(replace(term, layout="contiguous") for term in terms)  # gradcheck cannot perturb an expanded tensor
    shapes = {"batch": 1, "queries": grid, "keys": grid, "heads": 2, "kv_heads": 1, "head_dim": 2, "value_dim": 1}
    case = Case(dtype=torch.float64, pattern=pattern, terms=terms, **shapes)
    tensors, names = inputs(case), case.wanted

    def f(*leaves):
        given = dict(zip(names, leaves, strict=True))
        if "key_bias" in given:  # finite differences of a removed key are not numbers
            given["key_bias"] = given["key_bias"].masked_fill(gone, -torch.inf)
        q, k, v = (given[name] for name in "qkv")
        built = case.build_terms(given)
        return va.attention(q, k, v, pattern, scale=0.9, terms=built, backend=backend, return_lse=True)

    if "key_bias" in tensors:
        tensors["key_bias"] = tensors["key_bias"].nan_to_num(neginf=0.5)
        gone = torch.zeros_like(tensors["key_bias"], dtype=torch.bool)
        gone[0, 0, 0] = isinstance(pattern, (va.Global, va.Row, va.CrissCross))  # where no query is left without a key
    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_halves(backend: str) -> None:
    """The gradient of lse makes results over two halves of the keys merge exactly."""

    def halves(q, k, v):
        cut = k.shape[1] // 2
        parts = [
            va.attention(q, k[:, s], v[:, s], backend=backend, return_lse=True)
            for s in (slice(0, cut), slice(cut, None))
        ]
        return va.merge(parts)

    inputs = leaves((2, 2), (4, 2), 2, 2, 2, 3, "qkv")
    assert torch.autograd.gradcheck(halves, inputs)
    whole = va.attention(*inputs, backend=backend, return_lse=True)
    torch.testing.assert_close(halves(*inputs), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))
def test_second_derivatives_raise() -> None:
    q, k, v = leaves((2, 2), (2, 2), 1, 1, 2, 2, "qkv")
    out = va.attention(q, k, v, backend="cpu")
    (grad,) = torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'visattn: .*double backward.*backend="reference"'):
        grad.sum().backward()


@pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))
def test_gradient_of_the_map_raises() -> None:
    q, k, _ = leaves((2, 2), (2, 2), 1, 1, 2, 2, "qk")
    with pytest.raises(NotImplementedError, match=r'attention_map.*backend="reference"'):
        va.attention_map(q, k, [(0, 0)], backend="cpu").sum().backward()
    with pytest.raises(NotImplementedError, match=r'attention_received.*backend="reference"'):
        va.attention_received(q, k, backend="cpu").sum().backward()
    assert torch.autograd.gradcheck(lambda q, k: va.attention_map(q, k, [(0, 1)], backend="reference"), (q, k))
