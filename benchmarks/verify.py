"""No speed without a right answer: a provider's results against float64, by the tolerance policy.

R is the formula in float64, L the same formula run eagerly in the case's dtype, x what the provider gave. All
three are compared on one map, at a sample of its queries (out and dq) and of its keys (dk and dv). R and L never
store the whole map, so that the largest workload is verified like the smallest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.cases import Case, Inputs, Pass
from benchmarks.workloads import positions

SAMPLES = 64
"""Queries, and keys, that are compared per map and head."""

UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""u of the policy, by dtype."""

_CHUNK = {"cpu": 2**21, "cuda": 2**26}
"""Scores that are held at a time."""


@dataclass(frozen=True)
class Check:
    """One result against the policy; each number is what was found over what is allowed, so that 1 passes.

    Attributes:
        name: "out", or the input whose gradient it is.
        worst: of the largest error.
        mean: of the mean error.
        element: of each element's error, for out.
        finite: whether it has NaN and Inf only where the truth has them.
    """

    name: str
    worst: float
    mean: float
    element: float | None
    finite: bool

    def reasons(self) -> list[str]:
        """Why the result is refused; empty if it is not."""
        what = "out" if self.name == "out" else f"the gradient of {self.name}"
        if not self.finite:
            return [f"{what} has NaN or Inf"]
        found = {"largest": self.worst, "mean": self.mean, "elementwise": self.element or 0.0}
        return [f"{what}: {kind} error {x:.2g} times the tolerance" for kind, x in found.items() if not x <= 1]


def check(
    name: str, x: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor, weight: torch.Tensor | None = None
) -> Check:
    """Hold one result to the policy.

        max|x - R|  <= 2·max|L - R| + 4u·max|R|        (a gradient: 3 in place of 2)
        mean|x - R| <= 1.25·mean|L - R| + u·mean|R|    (float32: 10 in place of 1.25)
        |x - R|     <= 8u·sum_j p_j |v_j|              (each element of out)

    Args:
        name: "out", or the input whose gradient it is.
        x: the provider's result; its dtype is the case's.
        truth: R, float64.
        eager: L.
        weight: `sum_j p_j |v_j|` of each element, float64.
    """
    dtype = x.dtype
    x, eager = x.double(), eager.double()
    finite = bool((x.isfinite() == truth.isfinite()).all())
    error, usual = (x - truth).abs(), (eager - truth).abs()
    if dtype == torch.float64:
        ratio = float((error / (1e-12 + 1e-10 * truth.abs())).max())
        return Check(name, ratio, ratio, None, finite)
    u = UNITS[dtype]
    worst = (2 if name == "out" else 3) * usual.max() + 4 * u * truth.abs().max()
    mean = (10 if dtype == torch.float32 else 1.25) * usual.mean() + u * truth.abs().mean()
    element = None if weight is None else _over(error, 8 * u * weight)
    return Check(name, _over(error.max(), worst), _over(error.mean(), mean), element, finite)


def _over(found: torch.Tensor, allowed: torch.Tensor) -> float:
    """The largest quotient; 0 / 0 is 0."""
    return float(torch.where(found == 0, 0.0, found / allowed).max())


@dataclass(frozen=True)
class Sample:
    """The formula at the sampled queries and keys of one map.

    Attributes:
        out, q (Tensor[heads, samples, ...]): out and the gradient of q at the queries.
        k, v (Tensor[heads, samples, ...]): the gradients of k and v at the keys.
        weight: `sum_j p_j |v_j|` at the queries, like out.
    """

    out: torch.Tensor
    weight: torch.Tensor
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
        w = case.workload
        if w.terms:
            raise NotImplementedError("verify: the dense formula of a workload with terms is not written yet")
        self.case, self.inputs = case, inputs
        self.map = case.batch - 1
        generator = torch.Generator().manual_seed(1)
        self.queries = _draw(positions(w.queries), generator).to(case.device)
        self.keys = _draw(positions(w.keys), generator).to(case.device)

    def verify(self, results: dict[str, torch.Tensor]) -> list[Check]:
        """Hold a provider's results (`Bench.results`) to the policy."""
        gradients = len(results) > 1
        truth, eager = (self._gradients if gradients else self._forward)
        checks = []
        for name, x in results.items():
            index = self.queries if name in ("out", "q") else self.keys
            sample = x[self.map].flatten(0, 1)[index].transpose(0, 1)  # [heads, samples, width]
            weight = truth.weight if name == "out" else None
            checks.append(check(name, sample, getattr(truth, name), getattr(eager, name), weight))
        return checks

    @cached_property
    def _forward(self) -> tuple[Sample, Sample]:
        return self._sample(torch.float64, False), self._sample(self.case.dtype, False)

    @cached_property
    def _gradients(self) -> tuple[Sample, Sample]:
        return self._sample(torch.float64, True), self._sample(self.case.dtype, True)

    @torch.no_grad()
    def _sample(self, dtype: torch.dtype, gradients: bool) -> Sample:
        """The formula in `dtype` at the sampled positions."""
        w = self.case.workload
        q, k, v, grad = (
            x[self.map].flatten(0, 1).transpose(0, 1).to(dtype)  # [heads, N, width]
            for x in (self.inputs.q, self.inputs.k, self.inputs.v, self.inputs.grad)
        )
        mask = w.pattern.mask(w.queries, w.keys, q.device)
        if mask is not None:
            mask = mask.flatten(2).flatten(0, 1)  # [N, keys]

        def weights(index: torch.Tensor | slice) -> torch.Tensor:
            scores = q[:, index] @ k.mT
            if w.factor != 1:
                scores = scores * w.factor
            if mask is not None:
                scores = scores.masked_fill(~mask[index], -torch.inf)
            return torch.softmax(scores, -1).nan_to_num()  # a query with no key has weights 0

        def score_gradient(index: torch.Tensor | slice, p: torch.Tensor) -> torch.Tensor:
            dp = grad[:, index] @ v.mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            return ds * w.factor if w.factor != 1 else ds

        p = weights(self.queries)
        out, weight = p @ v, p @ v.abs()
        if not gradients:
            return Sample(out, weight)
        dq = score_gradient(self.queries, p) @ k
        count = positions(w.queries)
        step = max(1, _CHUNK[self.case.device] // (self.case.heads * positions(w.keys)))
        columns, gradient_columns = [], []  # [heads, step, samples]
        for start in range(0, count, step):
            part = slice(start, start + step)
            p = weights(part)
            columns.append(p[..., self.keys])
            gradient_columns.append(score_gradient(part, p)[..., self.keys])
        dv = torch.cat(columns, 1).mT @ grad
        dk = torch.cat(gradient_columns, 1).mT @ q
        return Sample(out, weight, dq, dk, dv)


def _draw(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sorted positions to compare: the first, the last, and others at random."""
    chosen = torch.randperm(count, generator=generator)[: SAMPLES - 2].tolist()
    return torch.tensor(sorted({0, count - 1, *chosen}))


def verdict(checks: list[Check]) -> list[str]:
    """Every reason to refuse a provider; empty if there is none."""
    return [reason for one in checks for reason in one.reasons()]


def why_not(case: Case, which: Pass) -> str | None:
    """Why a pass of a case can't be verified; None if it can."""
    if case.workload.terms:
        return "verify: the dense formula of a workload with terms is not written yet"
    return None


def plain(checks: list[Check]) -> dict[str, dict[str, float | bool | None]]:
    """The checks as plain values, for a results file; JSON has no NaN."""
    return {
        one.name: {
            "worst": _number(one.worst),
            "mean": _number(one.mean),
            "element": _number(one.element),
            "finite": one.finite,
        }
        for one in checks
    }


def _number(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else x
