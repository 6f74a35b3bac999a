"""The one table of cases that every test draws from, so that a new backend or pattern is tested everywhere at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache

import torch
from tolerance import GRADIENT, RESULT, check, element_bound, gradient_sizes

from visattn_kernels import Global, reference
from visattn_kernels.patterns import Pattern

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "nchw", "packed", "expanded", "offset", "strided", "transposed")


GLOBAL = Global()


@dataclass(frozen=True)
class Case:
    """One problem: shapes, strides, dtype, pattern, and which results and inputs take part."""

    dtype: torch.dtype = torch.float32
    batch: int = 2
    queries: tuple[int, int] = (5, 7)
    keys: tuple[int, int] = (5, 7)
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    scale: float | None = None
    layouts: tuple[str, str, str, str] = ("contiguous",) * 4  # of q, k, v and the gradient of out
    needs: str = "qkv"
    pattern: Pattern = GLOBAL
    spread: float = 1.0  # standard deviation of q: large for a peaked softmax

    @property
    def id(self) -> str:
        """What differs from the default, for the test's name."""
        default = Case()
        parts = [str(self.dtype).removeprefix("torch.")]
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name != "dtype" and value != getattr(default, name):
                text = "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
                parts.append(f"{name}={text}")
        return ",".join(parts)

    @property
    def true_scale(self) -> float:
        """The scale as the reference wants it."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor equal to the contiguous `x` [B, H, W, heads, D] in another layout."""
    b, h, w, heads, d = x.shape
    if layout == "contiguous":
        return x.clone()
    if layout in ("channels_last", "nchw"):
        image = x.permute(0, 3, 4, 1, 2).reshape(b, heads * d, h, w)
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        return image.contiguous(memory_format=memory).unflatten(1, (heads, d)).permute(0, 3, 4, 1, 2)
    if layout == "packed":  # a slice of a projection's output, after other channels
        whole = torch.full((b, h, w, 3 * heads * d + 1), torch.nan, dtype=x.dtype)
        whole[..., heads * d + 1 : 2 * heads * d + 1] = x.flatten(3)
        return whole[..., heads * d + 1 : 2 * heads * d + 1].unflatten(3, (heads, d))
    if layout == "expanded":  # one map and one head for all
        return x[:1, :, :, :1].expand(b, h, w, heads, d)
    if layout == "offset":  # one element off any alignment
        flat = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    if layout == "strided":  # every second channel
        wide = torch.full((b, h, w, heads, 2 * d), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    assert layout == "transposed"  # columns before rows, heads before both
    return x.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4)


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """q, k, v and the gradients of out and lse, the same for every call."""
    generator = torch.Generator().manual_seed(1234)

    def make(shape: tuple[int, ...], layout: str, spread: float = 1.0) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        return laid_out(x.to(case.dtype), layout)

    q_layout, k_layout, v_layout, grad_layout = case.layouts
    tensors = {
        "q": make((case.batch, *case.queries, case.heads, case.head_dim), q_layout, case.spread),
        "k": make((case.batch, *case.keys, case.kv_heads, case.head_dim), k_layout),
        "v": make((case.batch, *case.keys, case.kv_heads, case.value_dim), v_layout),
        "grad_out": make((case.batch, *case.queries, case.heads, case.value_dim), grad_layout),
    }
    lse_shape = (case.batch, *case.queries, case.heads)
    lse_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    tensors["grad_lse"] = torch.randn(lse_shape, generator=generator, dtype=torch.float64).to(lse_dtype)
    return tensors


def differentiate(forward, tensors: dict[str, torch.Tensor], needs: str) -> dict[str, torch.Tensor]:
    """Results and gradients of `forward(q, k, v) -> (out, lse)`."""
    leaves = {name: tensors[name].detach().requires_grad_(name in needs) for name in "qkv"}
    out, lse = forward(**leaves)
    wanted = [leaves[name] for name in needs]
    pairs = [(out, tensors["grad_out"].to(out.dtype)), (lse, tensors["grad_lse"].to(lse.dtype))]
    pairs = [(x, grad) for x, grad in pairs if x.requires_grad]  # lse does not depend on v
    grads = torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs]) if wanted else ()
    return {"out": out.detach(), "lse": lse.detach(), **{f"grad_{n}": g for n, g in zip(needs, grads, strict=True)}}


@cache
def expected(case: Case):
    """R and L of a case: results and gradients in float64 (and the policy's bounds), and eagerly in its dtype."""
    tensors = inputs(case)
    doubles = {name: x.double() for name, x in tensors.items()}

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return reference.formula(q, k, v, case.pattern, scale=case.true_scale)

    exact = differentiate(formula, doubles, case.needs)
    eager = differentiate(formula, tensors, case.needs)
    call = case.pattern, case.true_scale, case.dtype
    exact["bound"] = element_bound(doubles["q"], doubles["k"], doubles["v"], *call)
    exact["sizes"] = gradient_sizes(doubles, case.pattern, case.true_scale)
    return exact, eager


def hold(case: Case, results: dict[str, torch.Tensor]) -> None:
    """Hold results and gradients of a case to the policy."""
    exact, eager = expected(case)
    for name, x in results.items():
        factor = GRADIENT if name.startswith("grad_") else RESULT
        bound = exact["bound"] if name == "out" else None
        check(name, x, exact[name], eager[name], case.dtype, factor, bound, exact["sizes"].get(name))


def _table() -> list[Case]:
    """Problems in one dtype; `CASES` has them in all."""
    grids = [(3, 5), (7, 11), (1, 9), (9, 1), (1, 1), (13, 17)]
    widths = [(1, 1), (3, 3), (8, 8), (33, 33), (40, 80), (80, 40), (1, 8), (8, 1), (7, 2), (64, 64)]
    cases = [Case(queries=grid, keys=grid) for grid in grids]
    cases += [Case(head_dim=d, value_dim=dv) for d, dv in widths]
    cases += [Case(queries=(6, 10), keys=keys) for keys in [(3, 5), (1, 1), (11, 13), (8, 8), (5, 13)]]
    cases += [Case(heads=heads, kv_heads=kv) for heads, kv in [(1, 1), (4, 2), (6, 2), (3, 1)]]
    cases += [Case(layouts=(layout,) * 4, head_dim=5, value_dim=6) for layout in LAYOUTS[1:]]
    cases += [
        Case(layouts=mixed, head_dim=6, value_dim=9, heads=4, kv_heads=2, queries=(5, 7), keys=(4, 9))
        for mixed in [
            ("nchw", "contiguous", "channels_last", "nchw"),
            ("contiguous", "nchw", "packed", "expanded"),
            ("packed", "offset", "nchw", "transposed"),
            ("strided", "transposed", "expanded", "contiguous"),
            ("expanded", "packed", "strided", "offset"),
        ]
    ]
    # many blocks of keys, tiles of several panels with a ragged end, chains of sums long enough to be split
    cases += [Case(batch=1, queries=(13, 23), keys=(37, 41), heads=1, kv_heads=1, head_dim=d) for d in (3, 16)]
    cases += [Case(batch=1, queries=(37, 41), keys=(13, 23), heads=2, kv_heads=1, layouts=("nchw",) * 4)]
    cases += [Case(batch=0), Case(batch=1), Case(batch=5)]
    cases += [Case(scale=scale) for scale in (1.0, 0.0, -0.5, 3.0)]
    cases += [Case(spread=30.0), Case(spread=30.0, batch=1, queries=(9, 9), keys=(17, 19))]
    cases += [Case(needs="".join(needs)) for n in range(3) for needs in itertools.combinations("qkv", n)]
    return cases


CASES = [replace(case, dtype=dtype) for dtype in DTYPES for case in _table()]
