"""The one tolerance policy. Nothing widens it for one test.

R is the dense reference in float64, L the same formula run eagerly in the operation's dtype, u the dtype's unit
roundoff. A result x must satisfy:

1. max |x - R| <= factor * max |L - R| + 4u * max |R|, factor 2 for results and 3 for gradients;
2. mean |x - R| <= 1.25 * mean |L - R| + u * mean |R| (float32: 10 instead of 1.25);
   for gradients both also allow 4 * 2^-24 * G (its maximum, its mean), where G is the gradient with nothing cancelled:
   every factor replaced by its magnitude and every difference by a sum. A gradient is a sum of P * (dP - delta), whose
   two terms cancel, altogether for a query with one key; what float32 then leaves is noise of the size of the terms;
3. |x - R| <= bound for each element of out, where

       bound_i = (8u + 2 * 2^-24 * max_j sum_d |scale * q_id * k_jd|) * sum_j p_j |v_j|

   (with terms: the products and numbers they add to the score by their magnitudes too, and |v_j| + |value terms|)

   so that an outlier can't hide under the maximum. The second summand is what the rounding of the scores themselves
   does, which are float32 for every dtype but float64: scores off by e move out by up to 2e * sum_j p_j |v_j|. Without
   it no float32 program passes, the eager formula included, as soon as logits reach 10 (docs/design.md);
4. in float64, instead of all this: rtol 1e-10, atol 1e-12;
5. NaN and Inf where R has them and nowhere else.

TF32 has a row of its own: float32 in which the operands of products have 11 bits. There u is 2^-11, L has products
whose operands are cut to that (`tf32_products`), and since scores and the terms of a gradient are products, 2^-11 takes
the place of 2^-24 in G and in rule 3. The mean may be 1.25 times L's, as in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from visattn_kernels import RelativeKey, RelativeQuery, RelativeValue, reference
from visattn_kernels.patterns import Pattern
from visattn_kernels.terms import TERM_TENSORS, Term, cast, tensors_of

TF32 = "tf32"
"""The row of float32 with TF32 products."""

UNIT: dict[torch.dtype | str, float] = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    TF32: 2.0**-11,
}
RESULT, GRADIENT = 2.0, 3.0


def product_unit(dtype: torch.dtype | str) -> float:
    """The unit roundoff of scores and of the terms of a gradient: float32's, whose products are exact, but for TF32."""
    return UNIT[TF32] if dtype == TF32 else UNIT[torch.float32]


def check(
    name: str,
    x: torch.Tensor,
    exact: torch.Tensor,
    eager: torch.Tensor,
    dtype: torch.dtype | str,
    factor: float = RESULT,
    bound: torch.Tensor | None = None,
    uncancelled: torch.Tensor | None = None,
) -> None:
    """Hold `x` to the policy.

    Args:
        name: what `x` is, for the message.
        x: the result under test.
        exact: R, float64.
        eager: L.
        dtype: dtype of the operation, which `x` need not have (lse is float32), or TF32.
        factor: RESULT or GRADIENT.
        bound: that of rule 3 for each element of out, as `element_bound` gives it.
        uncancelled: G of rules 1 and 2, as `gradient_sizes` gives it.
    """
    assert x.shape == exact.shape, f"{name}: shape {list(x.shape)}, expected {list(exact.shape)}"
    x, eager = x.detach().double(), eager.detach().double()
    exact = exact.detach()
    assert torch.equal(x.isnan(), exact.isnan()), f"{name}: NaN in other places than the reference"
    infinite = exact.isinf()
    assert torch.equal(x.isinf(), infinite), f"{name}: Inf in other places than the reference"
    assert torch.equal(x[infinite], exact[infinite]), f"{name}: Inf of the other sign"
    finite = exact.isfinite()
    if not finite.any():
        return
    error, spread = (x - exact)[finite].abs(), (eager - exact)[finite].abs()
    size = exact[finite].abs()
    if dtype == torch.float64:
        worst = (error - 1e-10 * size).max()
        assert worst <= 1e-12, f"{name}: float64 error exceeds rtol 1e-10 by {worst:.3g}"
        return
    u = UNIT[dtype]
    noise = torch.zeros_like(size) if uncancelled is None else 4 * product_unit(dtype) * uncancelled[finite]
    largest = factor * spread.max() + 4 * u * size.max() + noise.max()
    assert error.max() <= largest, f"{name}: largest error {error.max():.3g}, allowed {largest:.3g}"
    mean = (10 if dtype == torch.float32 else 1.25) * spread.mean() + u * size.mean() + noise.mean()
    assert error.mean() <= mean, f"{name}: mean error {error.mean():.3g}, allowed {mean:.3g}"
    if bound is not None:
        excess = (error / bound[finite].clamp_min(torch.finfo(torch.float64).tiny)).max()
        assert excess <= 1, f"{name}: an element's error is {excess:.3g} times its bound (rule 3)"


def element_bound(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float,
    dtype: torch.dtype | str,
    terms: Sequence[Term] = (),
) -> torch.Tensor:
    """The bound of rule 3 for each element of out, from float64 inputs."""
    absolute = magnitudes(terms)
    values = [term for term in absolute if isinstance(term, RelativeValue)]
    mass_terms = [term for term in terms if not isinstance(term, RelativeValue)] + values
    mass = reference.formula(q, k, v.abs(), pattern, scale=scale, terms=mass_terms)[0]
    scores = reference.logits(q.abs(), k.abs(), pattern, scale=abs(scale), terms=absolute)
    size = scores.flatten(-2).amax(-1).clamp_min(0).permute(0, 2, 3, 1)[..., None]  # [B, H, W, heads, 1]
    return (8 * UNIT.get(dtype, 0.0) + 2 * product_unit(dtype) * size) * mass


def magnitudes(terms: Sequence[Term]) -> list[Term]:
    """The terms with every number replaced by its magnitude; what -inf removes stays removed."""
    absolute = []
    for term in cast(terms, lambda x: torch.where(x == -torch.inf, x, x.abs())):
        if isinstance(term, (RelativeQuery, RelativeKey)):
            term = type(term)(term.rel_h, term.rel_w, abs(term.scale))
        absolute.append(term)
    return absolute


def gradient_sizes(
    tensors: dict[str, torch.Tensor], pattern: Pattern, scale: float, terms: Sequence[Term] = ()
) -> dict[str, torch.Tensor]:
    """G of rules 1 and 2 for the gradients of q, k, v and every term tensor, from float64 tensors by name.

    Scores and results are sums of products. With every factor replaced by its magnitude their derivatives have no
    negative summand, so that differentiating them gives the sums of magnitudes.
    """
    leaf = lambda x: x.detach().abs().requires_grad_()
    q, k, v = (leaf(tensors[name]) for name in "qkv")
    absolute = cast(magnitudes(terms), lambda x: x.detach().requires_grad_())
    extra = dict(zip(TERM_TENSORS, tensors_of(absolute), strict=True))
    with torch.no_grad():
        scores = reference.logits(tensors["q"], tensors["k"], pattern, scale=scale, terms=terms)
        weights = reference.weights(scores)[0]
    weights.requires_grad_()
    grad_out = tensors["grad_out"].abs()
    sizes = {}

    def differentiate(y: torch.Tensor, grad: torch.Tensor, **wanted: torch.Tensor | None) -> None:
        names = [name for name, x in wanted.items() if x is not None]
        grads = torch.autograd.grad(y, [wanted[name] for name in names], grad, allow_unused=True)
        for name, x in zip(names, grads, strict=True):
            if x is not None:
                sizes[f"grad_{name}"] = x

    out = reference.combine(weights, q, k, v, pattern, terms=absolute)
    values = {name: x for name, x in extra.items() if name.startswith("relative_value")}
    differentiate(out, grad_out, v=v, weights=weights, **values)
    delta = (grad_out * out.detach()).sum(-1) + tensors["grad_lse"].abs()  # [B, H, W, heads]
    grad_scores = weights * (sizes.pop("grad_weights") + delta.permute(0, 3, 1, 2)[..., None, None])
    scores = reference.logits(q, k, pattern, scale=abs(scale), terms=absolute)
    added = {name: x for name, x in extra.items() if name not in values}
    differentiate(scores, grad_scores.detach(), q=q, k=k, **added)
    return sizes


def cut_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """A float32 tensor as a product of TF32 reads it: without the lower 13 bits; other dtypes as they are."""
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32) if x.dtype == torch.float32 else x


class _Tf32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, equation: str) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        ctx.equation = equation
        return torch.einsum(equation, cut_to_tf32(a), cut_to_tf32(b))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        a, b = (cut_to_tf32(x) for x in ctx.saved_tensors)
        names, result = ctx.equation.split("->")
        a_name, b_name = names.split(",")
        grad = cut_to_tf32(grad)
        grad_a = torch.einsum(f"{result},{b_name}->{a_name}", grad, b)
        return grad_a, torch.einsum(f"{result},{a_name}->{b_name}", grad, a), None


class tf32_products(TorchFunctionMode):  # noqa: N801 (used as a function)
    """While this is open, the operands of every contraction of the reference are cut to TF32, in its backward too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.einsum:
            equation, a, b = args
            return _Tf32Product.apply(a, b, equation)
        return function(*args, **(kwargs or {}))
