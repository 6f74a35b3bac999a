"""The reference against hand-written loops, and against itself where two of its results must agree."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, inputs

import visattn_kernels as va
from visattn_kernels import reference


def loops(q, k, v, scale):
    """The formula, one number at a time."""
    batch, height, width, heads, dim = q.shape
    _, key_height, key_width, kv_heads, value_dim = v.shape
    out = torch.zeros(batch, height, width, heads, value_dim, dtype=torch.float64)
    lse = torch.zeros(batch, height, width, heads, dtype=torch.float64)
    weights = torch.zeros(batch, heads, height, width, key_height, key_width, dtype=torch.float64)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                for h in range(heads):
                    g = h // (heads // kv_heads)
                    logits = {}
                    for ky in range(key_height):
                        for kx in range(key_width):
                            dot = sum(float(q[b, y, x, h, d]) * float(k[b, ky, kx, g, d]) for d in range(dim))
                            logits[ky, kx] = scale * dot
                    total = sum(math.exp(logit) for logit in logits.values())
                    lse[b, y, x, h] = math.log(total)
                    for (ky, kx), logit in logits.items():
                        p = math.exp(logit) / total
                        weights[b, h, y, x, ky, kx] = p
                        for c in range(value_dim):
                            out[b, y, x, h, c] += p * float(v[b, ky, kx, g, c])
    return out, lse, weights


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.float64, batch=1, queries=(2, 3), keys=(3, 2), heads=4, kv_heads=2, head_dim=3, value_dim=5),
        Case(dtype=torch.float64, batch=2, queries=(1, 4), keys=(1, 4), heads=1, kv_heads=1, head_dim=1, value_dim=1),
        Case(dtype=torch.float64, queries=(2, 2), keys=(1, 3), heads=3, kv_heads=1, scale=-1.5),
    ],
    ids=lambda case: case.id,
)
def test_against_loops(case: Case) -> None:
    tensors = inputs(case)
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    out, lse, weights = loops(q, k, v, case.true_scale)
    call = {"scale": case.scale, "backend": "reference"}
    torch.testing.assert_close(va.attention(q, k, v, **call, return_lse=True), (out, lse), rtol=1e-12, atol=1e-12)
    points = [(case.queries[0] - 1, 0), (0, case.queries[1] - 1)]
    rows = torch.stack([weights[:, :, y, x] for y, x in points], 1)
    torch.testing.assert_close(va.attention_map(q, k, points, **call), rows, rtol=1e-12, atol=1e-12)
    group = case.heads // case.kv_heads
    sums = torch.stack([weights[:, g * group : (g + 1) * group].sum((1, 2, 3)) for g in range(case.kv_heads)], -1)
    torch.testing.assert_close(va.attention_received(q, k, **call), sums, rtol=1e-12, atol=1e-12)


def test_no_key_gives_zero_and_minus_infinity_and_zero_gradients() -> None:
    scores = torch.full((1, 1, 1, 2, 2, 2), -torch.inf, dtype=torch.float64)
    scores[..., 1, :, :] = 1.0
    scores.requires_grad_()
    weights, lse = reference.weights(scores)
    assert weights[..., 0, :, :].eq(0).all()
    assert lse[..., 0].eq(-torch.inf).all()
    weights.pow(2).sum().backward()
    assert scores.grad is not None
    assert scores.grad[..., 0, :, :].eq(0).all()


def test_sixteen_bit_inputs_are_summed_in_float32() -> None:
    tensors = inputs(Case(dtype=torch.bfloat16, keys=(40, 40)))
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    out, lse = va.attention(q, k, v, backend="reference", return_lse=True)
    exact, exact_lse = reference.formula(q.double(), k.double(), v.double(), va.Global(), scale=8**-0.5)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


def test_differentiable_twice() -> None:
    tensors = inputs(Case(dtype=torch.float64, batch=1, queries=(2, 2), keys=(2, 3), heads=1, kv_heads=1, head_dim=2))
    q, k, v = (tensors[n].requires_grad_() for n in "qkv")
    assert torch.autograd.gradgradcheck(lambda *x: va.attention(*x, backend="reference"), (q, k, v))
