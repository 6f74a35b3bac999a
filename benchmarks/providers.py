"""Providers: everyone who can compute attention, side by side, each with the reasons why it cannot run a case.

Peers get contiguous `[B, heads, N, D]` tensors, the layout that they like best, made outside the timed region.
A workload's pattern or term that a peer's code does not have is a reason, never an approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import flex, naive
from benchmarks.cases import Case, Inputs, Layout, Pass, from_layout, to_layout
from benchmarks.machine import free_memory
from benchmarks.workloads import Workload, pair
from visattn_kernels import attention
from visattn_kernels.backends import REGISTRY, Backend
from visattn_kernels.patterns import Column, CrissCross, Global, Grid, Neighborhood, Pattern, Row, Window
from visattn_kernels.problem import make_problem

MEMORY_SHARE = 0.6
"""The share of the free memory above which a provider that stores the map is not tried."""

Terms = Sequence[Sequence[torch.Tensor]]
Run = Callable[[Case, torch.Tensor, torch.Tensor, torch.Tensor, Terms], torch.Tensor]
"""Computes out from q, k, v and the terms' tensors, all in the provider's layout."""


@dataclass(frozen=True)
class Provider:
    """One way to compute attention.

    Attributes:
        name: what `--provider` takes.
        about: one line for a person.
        layout: how it takes q, k and v, and gives out.
        run: computes out.
        unavailable: reasons why it cannot run on a device ("cpu" or "cuda") at all.
        unsupported: reasons why it cannot run a pass of a case, given that it is available.
        ours: whether it is this library.
        slow_start: whether its first call compiles.
    """

    name: str
    about: str
    layout: Layout
    run: Run
    unavailable: Callable[[str], list[str]]
    unsupported: Callable[[Case, Pass], list[str]]
    ours: bool = False
    slow_start: bool = False

    def reasons(self, case: Case, which: Pass) -> list[str]:
        """Why it cannot run a pass of a case here; empty if it can."""
        return self.unavailable(case.device) or self.unsupported(case, which)


class Bench:
    """A provider with the tensors of a case as leaves, ready for one pass.

    Args:
        provider: who computes.
        case: what is computed.
        which: the pass; the leaves of a forward alone don't require grad.
        inputs: the case's tensors, heads-last; they are copied into the provider's layout.
    """

    def __init__(self, provider: Provider, case: Case, which: Pass, inputs: Inputs) -> None:
        self.provider, self.case, self.which = provider, case, which
        train = which != "forward"
        self.q, self.k, self.v = (
            to_layout(x, provider.layout).requires_grad_(train) for x in (inputs.q, inputs.k, inputs.v)
        )
        self.terms = [[x.clone().requires_grad_(train) for x in term] for term in inputs.terms]
        self.grad = to_layout(inputs.grad, provider.layout)
        self.leaves = [self.q, self.k, self.v, *(x for term in self.terms for x in term)]

    def forward(self) -> torch.Tensor:
        """The forward: as inference runs it for a forward pass, else with a graph."""
        return self.provider.run(self.case, self.q, self.k, self.v, self.terms)

    def backward(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The gradients of the leaves, through the graph of `out`."""
        return torch.autograd.grad(out, self.leaves, self.grad)

    def once(self) -> None:
        """Do the pass once; a backward does the forward that it needs."""
        out = self.forward()
        if self.which != "forward":
            self.backward(out)

    def results(self) -> dict[str, torch.Tensor]:
        """What the pass gives, heads-last: "out", and unless it is a forward alone the gradients.

        These are named "q", "k", "v", and as `Workload.term_names` has it.
        """
        w = self.case.workload
        layout = self.provider.layout
        out = self.forward()
        results = {"out": from_layout(out.detach(), layout, w.queries)}
        if self.which != "forward":
            grads = self.backward(out)
            for name, grad, grid in zip("qkv", grads[:3], (w.queries, w.keys, w.keys), strict=True):
                results[name] = from_layout(grad, layout, grid)
            results |= dict(zip(w.term_names, grads[3:], strict=True))
        return results


def dense_bytes(case: Case, which: Pass, itemsize: int | None = None) -> int:
    """What a provider that stores the map needs: scores and softmax, and in the backward one gradient more.

    Of a local pattern only the pairs that there are; each term is stored with them, and so are the keys and values that
    a neighborhood gathers.
    """
    w = case.workload
    copies = (2 if which == "forward" else 3) + len(w.terms)
    if isinstance(w.pattern, Neighborhood):
        copies += (1 if which == "forward" else 2) * (w.head_dim + w.value_dim)
    return case.scores() * (itemsize or case.dtype.itemsize) * copies


def _too_big(case: Case, which: Pass, itemsize: int | None = None) -> list[str]:
    """A reason if storing the map would take too much of the free memory."""
    need, free = dense_bytes(case, which, itemsize), free_memory(case.device)
    if need <= MEMORY_SHARE * free:
        return []
    return [f"needs {need / 1e9:.1f} GB to store the map; {free / 1e9:.1f} GB are free"]


def _no_code(case: Case, patterns: tuple[type[Pattern], ...] = (Global,), terms: tuple[str, ...] = ()) -> list[str]:
    """Reasons for a pattern or a term that a peer has no code for."""
    w = case.workload
    reasons = [] if isinstance(w.pattern, patterns) else [f"has no code for {type(w.pattern).__name__}"]
    return reasons + [f"has no code for {term.name}" for term in w.terms if term.name not in terms]


def _everywhere(device: str) -> list[str]:
    """No reason on any device."""
    return []


# This library, with a backend forced by name.


def _ours(backend: str) -> Provider:
    record = _record(backend)
    return Provider(
        f"visattn-{backend}",
        record.about,
        "maps",
        partial(_run_ours, backend),
        partial(_ours_unavailable, backend),
        partial(_ours_unsupported, backend),
        ours=True,
    )


def _record(backend: str) -> Backend:
    return next(record for record in REGISTRY if record.name == backend)


def _ours_unavailable(backend: str, device: str) -> list[str]:
    return _record(backend).unavailable()


def _ours_unsupported(backend: str, case: Case, which: Pass) -> list[str]:
    w, shapes = case.workload, case.shapes

    def shaped(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty((), dtype=case.dtype, device=case.device).expand(shape)

    shapes_of_terms = zip(w.terms, w.term_shapes(case.heads), strict=True)
    terms = tuple(term.build(*(shaped(shape) for shape in sizes)) for term, sizes in shapes_of_terms)
    try:
        q, k, v = (shaped(shapes[name]) for name in "qkv")
        problem = make_problem(q, k, v, w.pattern, w.scale, terms)
    except (NotImplementedError, ValueError) as error:
        return [str(error)]
    return _record(backend).unsupported(problem)


def _run_ours(
    backend: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms
) -> torch.Tensor:
    w = case.workload
    built = tuple(term.build(*tensors) for term, tensors in zip(w.terms, terms, strict=True))
    return attention(q, k, v, w.pattern, scale=w.scale, terms=built, backend=backend)


# What the papers' code does: see `naive`.

_RELATIVE = ("RelativeBias", "RelativeQuery", "RelativeKey")


def _naive() -> Provider:
    about = "softmax(QK^T)V as the papers' code has it: bmm, with its roll, partition, permute or unfold"
    return Provider("naive", about, "tokens", _run_naive, _everywhere, _naive_unsupported)


def _cut(w: Workload) -> naive.Cells | None:
    """The equal cells that a pattern cuts the map into; None where it does not."""
    pattern, (height, width) = w.pattern, w.queries
    cut = None
    if isinstance(pattern, Window):
        cut = naive.Cells(*pair(pattern.window_size), shift=pair(pattern.shift))
    elif isinstance(pattern, Grid):
        cut = naive.Cells(*pair(pattern.grid_size), strided=True)
    elif isinstance(pattern, Row) and pattern.span is None:
        cut = naive.Cells(1, width)
    elif isinstance(pattern, Column) and pattern.span is None:
        cut = naive.Cells(height, 1)
    elif isinstance(pattern, Global) and w.queries == w.keys:
        cut = naive.Cells(height, width)
    return cut if cut is not None and height % cut.height == width % cut.width == 0 else None


def _naive_unsupported(case: Case, which: Pass) -> list[str]:
    w = case.workload
    if _cut(w):
        return _no_code(case, (Pattern,), (*_RELATIVE, "RelativeValue")) or _too_big(case, which)
    if not isinstance(w.pattern, Neighborhood):
        return _no_code(case, (Global, CrissCross)) or _too_big(case, which)
    plain = replace(w.pattern, kernel_size=1, border="shift") == Neighborhood(1)
    if not plain or w.pattern.border == "mask" or any(size % 2 == 0 for size in pair(w.pattern.kernel_size)):
        return [f"has no code for {w.pattern}"]
    terms = "RelativeBias" if w.pattern.border == "shift" else "RelativeQuery"
    return _no_code(case, (Neighborhood,), (terms,)) or _too_big(case, which)


def _run_naive(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms) -> torch.Tensor:
    w, cut, tables = case.workload, _cut(case.workload), case.workload.tables(terms)
    if cut:
        return naive.cells(q, k, v, w.queries, cut, w.factor, tables)
    if isinstance(w.pattern, Neighborhood):
        attend = naive.neighborhood if w.pattern.border == "shift" else naive.neighborhood_zero
        return attend(q, k, v, w.queries, pair(w.pattern.kernel_size), w.factor, tables)
    if isinstance(w.pattern, CrissCross):
        return naive.criss_cross(q, k, v, w.queries, w.factor)
    return naive.plain(q, k, v, w.factor)


# SDPA as a user calls it; with unequal widths a CPU takes its math path.


def _sdpa() -> Provider:
    about = "scaled_dot_product_attention as a user calls it, after roll and partition, terms as attn_mask"
    return Provider("sdpa", about, "tokens", _run_sdpa, _sdpa_unavailable, _sdpa_unsupported)


def _sdpa_unavailable(device: str) -> list[str]:
    return [] if device == "cpu" else ["on a GPU each of SDPA's backends is a provider of its own"]


def _sdpa_unsupported(case: Case, which: Pass) -> list[str]:
    w = case.workload
    if _no_cells(case):
        return _no_cells(case)
    # Widths that differ, and a mask that has a gradient, take the path that stores the map; terms are a map themselves.
    return _too_big(case, which, 4) if w.head_dim != w.value_dim or w.terms else []


def _no_cells(case: Case) -> list[str]:
    """Reasons for what SDPA cannot do in cells."""
    w = case.workload
    return _no_code(case, (Pattern,), _RELATIVE) if _cut(w) else _no_code(case)


def _run_sdpa(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms) -> torch.Tensor:
    w, cut = case.workload, _cut(case.workload)
    if cut is not None:
        return naive.cells_sdpa(q, k, v, w.queries, cut, w.factor, w.tables(terms))
    return F.scaled_dot_product_attention(q, k, v, scale=w.factor)


# SDPA with the narrower of q, k and v filled up with zeros, which reaches its flash kernels.


def _sdpa_padded() -> Provider:
    about = "scaled_dot_product_attention, the narrower width padded with zeros"
    return Provider("sdpa-padded", about, "tokens", _run_sdpa_padded, _everywhere, _sdpa_padded_unsupported)


def _sdpa_padded_unsupported(case: Case, which: Pass) -> list[str]:
    if case.workload.head_dim == case.workload.value_dim:
        return ["the widths are equal: nothing to pad"]
    return _no_code(case)


def _run_sdpa_padded(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms) -> torch.Tensor:
    w = case.workload
    width = max(w.head_dim, w.value_dim)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=w.factor)[..., : w.value_dim]


# SDPA with one of its CUDA backends; it says itself what that backend cannot run.

_SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _sdpa_forced(name: str) -> Provider:
    return Provider(
        f"sdpa-{name}",
        f"scaled_dot_product_attention, its {name} backend alone",
        "tokens",
        partial(_run_sdpa_forced, name),
        _sdpa_forced_unavailable,
        partial(_sdpa_forced_unsupported, name),
    )


def _sdpa_forced_unavailable(device: str) -> list[str]:
    return [] if device == "cuda" else ["only on cuda"]


def _sdpa_forced_unsupported(name: str, case: Case, which: Pass) -> list[str]:
    return _no_cells(case) or (_too_big(case, which, 4) if name == "math" or case.workload.terms else [])


def _run_sdpa_forced(
    name: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms
) -> torch.Tensor:
    with sdpa_kernel(_SDPA_BACKENDS[name]):
        return _run_sdpa(case, q, k, v, terms)


# flex_attention, compiled: see `flex`.


def _flex() -> Provider:
    about = "flex_attention, compiled"
    return Provider("flex", about, "tokens", _run_flex, _flex_unavailable, _flex_unsupported, slow_start=True)


def _flex_unavailable(device: str) -> list[str]:
    return [] if device == "cpu" or find_spec("triton") else ["triton is not installed"]


def _flex_unsupported(case: Case, which: Pass) -> list[str]:
    if case.device == "cpu" and which != "forward":
        return ["flex_attention has no backward on a CPU"]
    return _no_code(case, (Pattern,), _RELATIVE if case.workload.queries == case.workload.keys else ())


def _run_flex(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms) -> torch.Tensor:
    return flex.attend(case.workload, q, k, v, case.workload.tables(terms), flex.compiled())


PROVIDERS: tuple[Provider, ...] = (
    _naive(),
    _sdpa(),
    _sdpa_padded(),
    *(_sdpa_forced(name) for name in _SDPA_BACKENDS),
    _flex(),
    *(_ours(backend.name) for backend in REGISTRY if backend.name != "reference"),
)


def find(name: str) -> Provider:
    """The provider of a name.

    Raises:
        KeyError: there is none.
    """
    for provider in PROVIDERS:
        if provider.name == name:
            return provider
    raise KeyError(f"no provider {name!r}; there are {', '.join(provider.name for provider in PROVIDERS)}")
