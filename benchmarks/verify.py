"""No speed without a right answer: a provider's results against float64, by the tolerance policy.

R is the formula in float64, L the same formula run eagerly in the case's dtype, x what the provider gave. All
three are compared on one map, at a sample of its queries (out and dq) and of its keys (dk and dv). R and L never
store the whole map, so that the largest workload is verified like the smallest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch

from benchmarks.cases import Case, Inputs
from benchmarks.machine import ROOT
from benchmarks.workloads import positions

SAMPLES = 64
"""Queries, and keys, that are compared per map and head."""

_CHUNK = {"cpu": 2**21, "cuda": 2**26}
"""Scores that are held at a time."""


@dataclass(frozen=True)
class Check:
    """One result against the policy.

    Attributes:
        name: "out", or the input whose gradient it is.
        error: the largest `|x - R|`.
        usual: the largest `|L - R|`.
        size: the largest `|R|`.
        reason: what the policy says against it; empty if it passes.
    """

    name: str
    error: float
    usual: float
    size: float
    reason: str

    def plain(self) -> dict[str, float | str | None]:
        """As plain values, for a results file; JSON has no NaN."""
        numbers = {"error": self.error, "usual": self.usual, "size": self.size}
        return {**{name: x if math.isfinite(x) else None for name, x in numbers.items()}, "reason": self.reason}


@cache
def _policy() -> Any:
    """The module of the one tolerance policy, which is the tests' (`tests` is no installed package)."""
    path = ROOT / "tests" / "tolerance.py"
    spec = spec_from_file_location("visattn_tolerance", path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"the tolerance policy {path} is missing: benchmarks run from the repository")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(
    name: str,
    x: torch.Tensor,
    exact: torch.Tensor,
    eager: torch.Tensor,
    bound: torch.Tensor | None = None,
    uncancelled: torch.Tensor | None = None,
) -> Check:
    """Hold one result to the policy of `tests/tolerance.py`.

    Args:
        name: "out", or the input whose gradient it is.
        x: the provider's result; its dtype is the case's.
        exact: R, float64.
        eager: L.
        bound: what each element of out may err.
        uncancelled: the gradient with nothing cancelled.
    """
    policy = _policy()
    factor = policy.RESULT if name == "out" else policy.GRADIENT
    what = "out" if name == "out" else f"gradient of {name}"
    reason = ""
    try:
        policy.check(what, x, exact, eager, x.dtype, factor, bound, uncancelled)
    except AssertionError as refusal:
        reason = str(refusal).splitlines()[0]
    error, usual = (x.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    return Check(name, float(error), float(usual), float(exact.abs().max()), reason)


@dataclass(frozen=True)
class Sample:
    """The formula at the sampled queries and keys of one map.

    Attributes:
        out, q (Tensor[heads, samples, width]): out and the gradient of q at the queries.
        k, v (Tensor[heads, samples, width]): the gradients of k and v at the keys.
        bound: what each element of out may err, by rule 3 of the policy.
    """

    out: torch.Tensor
    bound: torch.Tensor | None = None
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None


class Truth:
    """R and L of a case, computed once and shared by its providers.

    Args:
        case: what is computed.
        inputs: its tensors, heads-last.

    Raises:
        NotImplementedError: the workload has terms.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        w, reason = case.workload, why_not(case)
        if reason is not None:
            raise NotImplementedError(reason)
        self.case, self.inputs = case, inputs
        self.map = case.batch - 1
        generator = torch.Generator().manual_seed(1)
        self.queries = _draw(positions(w.queries), generator).to(case.device)
        self.keys = _draw(positions(w.keys), generator).to(case.device)

    def verify(self, results: dict[str, torch.Tensor]) -> list[Check]:
        """Hold a provider's results (`Bench.results`) to the policy."""
        exact, eager, sizes = self._gradients if len(results) > 1 else self._forward
        checks = []
        for name, x in results.items():
            index = self.queries if name in ("out", "q") else self.keys
            sample = x[self.map].flatten(0, 1)[index].transpose(0, 1)  # [heads, samples, width]
            bound = exact.bound if name == "out" else None
            size = getattr(sizes, name) if sizes is not None and name != "out" else None
            checks.append(check(name, sample, getattr(exact, name), getattr(eager, name), bound, size))
        return checks

    @cached_property
    def _forward(self) -> tuple[Sample, Sample, None]:
        return self._exact(False)[0], self._eager(False), None

    @cached_property
    def _gradients(self) -> tuple[Sample, Sample, Sample | None]:
        exact, sizes = self._exact(True)
        return exact, self._eager(True), sizes

    @torch.no_grad()
    def _exact(self, gradients: bool) -> tuple[Sample, Sample | None]:
        """R, and the gradients with nothing cancelled: every factor but the map positive, every difference a sum."""
        f = _Formula(self.case, self.inputs, self.map, torch.float64)
        p = f.weights(self.queries)
        both = torch.cat([f.v, f.v.abs()], -1)
        out, mass = (p @ both).chunk(2, -1)
        unit = _policy().UNIT
        logits = (f.q[:, self.queries].abs() @ f.k.abs().mT).amax(-1, keepdim=True) * abs(f.factor)
        bound = (8 * unit.get(self.case.dtype, 0.0) + 2 * unit[torch.float32] * logits) * mass
        if not gradients:
            return Sample(out, bound), None
        p_keys = f.rows(len(self.keys))
        outs = f.rows(both.shape[-1])
        for part in f.parts():
            weights = f.weights(part)
            p_keys[:, part] = weights[..., self.keys]
            outs[:, part] = weights @ both

        def sample(positive: bool) -> Sample:
            q, k, v, grad = (x.abs() if positive else x for x in (f.q, f.k, f.v, f.grad))
            factor, sign = (abs(f.factor), 1) if positive else (f.factor, -1)
            delta = (grad * outs.chunk(2, -1)[positive]).sum(-1, keepdim=True)
            dp = grad[:, self.queries] @ v.mT
            dq = (p * (dp + sign * delta[:, self.queries])) @ k * factor
            dk = (p_keys * (grad @ v[:, self.keys].mT + sign * delta)).mT @ q * factor
            return Sample(out, bound, dq, dk, p_keys.mT @ grad)

        return sample(False), sample(True)

    @torch.no_grad()
    def _eager(self, gradients: bool) -> Sample:
        """L: each step, and each step of the backward, as autograd would run it, rounded to the case's dtype."""
        f = _Formula(self.case, self.inputs, self.map, self.case.dtype)

        def score_gradient(index: torch.Tensor | slice, p: torch.Tensor) -> torch.Tensor:
            dp = f.grad[:, index] @ f.v.mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            return ds * f.factor if f.factor != 1 else ds

        p = f.weights(self.queries)
        if not gradients:
            return Sample(p @ f.v)
        dq = score_gradient(self.queries, p) @ f.k
        p_keys, ds_keys = f.rows(len(self.keys)), f.rows(len(self.keys))
        for part in f.parts():
            weights = f.weights(part)
            p_keys[:, part] = weights[..., self.keys]
            ds_keys[:, part] = score_gradient(part, weights)[..., self.keys]
        return Sample(p @ f.v, None, dq, ds_keys.mT @ f.q, p_keys.mT @ f.grad)


class _Formula:
    """The tensors of one map in one dtype, `[heads, N, width]`, and the rows of its attention map."""

    def __init__(self, case: Case, inputs: Inputs, index: int, dtype: torch.dtype) -> None:
        w = case.workload
        self.q, self.k, self.v, self.grad = (
            x[index].flatten(0, 1).transpose(0, 1).to(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.grad)
        )
        mask = w.pattern.mask(w.queries, w.keys, self.q.device)
        self.mask = None if mask is None else mask.flatten(2).flatten(0, 1)  # [N, keys]
        self.factor = w.factor
        self.step = max(1, _CHUNK[case.device] // (case.heads * positions(w.keys)))

    def weights(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Rows of the map; a query with no key has weights 0."""
        scores = self.q[:, index] @ self.k.mT
        if self.factor != 1:
            scores = scores * self.factor
        if self.mask is None:
            return torch.softmax(scores, -1)
        return torch.softmax(scores.masked_fill(~self.mask[index], -torch.inf), -1).nan_to_num()

    def rows(self, width: int) -> torch.Tensor:
        """Room for so many numbers a query, `[heads, N, width]`; pieces kept between large ones tear up the heap."""
        return self.q.new_empty(*self.q.shape[:2], width)

    def parts(self) -> Iterator[slice]:
        """All queries, some at a time."""
        count = self.q.shape[1]
        return (slice(start, start + self.step) for start in range(0, count, self.step))


def _draw(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sorted positions to compare: the first, the last, and others at random."""
    chosen = torch.randperm(count, generator=generator)[: SAMPLES - 2].tolist()
    return torch.tensor(sorted({0, count - 1, *chosen}))


def verdict(checks: list[Check]) -> list[str]:
    """Every reason to refuse a provider; empty if there is none."""
    return [one.reason for one in checks if one.reason]


def why_not(case: Case) -> str | None:
    """Why a case can't be verified; None if it can."""
    if case.workload.terms:
        return "verify: the dense formula of a workload with terms is not written yet"
    return None
