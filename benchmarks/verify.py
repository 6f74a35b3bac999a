"""No speed without a right answer: a provider's results against float64, by the tolerance policy.

R is the formula in float64, L the same formula run eagerly in the case's dtype, x what the provider gave. All
three are compared on one map, at a sample of its queries (out and dq) and of its keys (dk and dv); gradients of a
term's tables, which are sums over all maps, are compared whole. R and L never store the whole map, so that the
largest workload is verified like the smallest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, Inputs
from benchmarks.machine import ROOT
from benchmarks.workloads import positions

SAMPLES = 64
"""Queries, and keys, that are compared per map and head."""

_CHUNK = {"cpu": 2**21, "cuda": 2**26}
"""Scores that are held at a time."""

_SMALL = 2**19
"""Scores that one thread computes sooner than two that wait for each other."""


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


Results = dict[str, torch.Tensor]
"""What `Bench.results` gives of one map, sampled: [heads, samples, width]; gradients of tables are whole."""


class Truth:
    """R and L of a case, computed once and shared by its providers.

    Args:
        case: what is computed.
        inputs: its tensors, heads-last.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        w = case.workload
        self.case, self.inputs = case, inputs
        generator = torch.Generator().manual_seed(1)
        self.queries = _draw(positions(w.queries), generator).to(case.device)
        self.keys = _draw(positions(w.keys), generator).to(case.device)

    def verify(self, results: dict[str, torch.Tensor]) -> list[Check]:
        """Hold a provider's results (`Bench.results`) to the policy."""
        exact, eager, sizes, bound = self._gradients if len(results) > 1 else self._forward
        checks = []
        for name, x in results.items():
            if name in ("out", "q", "k", "v"):
                index = self.queries if name in ("out", "q") else self.keys
                x = x[-1].flatten(0, 1)[index].transpose(0, 1)  # [heads, samples, width]
            rule3 = bound if name == "out" else None
            checks.append(check(name, x, exact[name], eager[name], rule3, sizes.get(name)))
        return checks

    @cached_property
    def _forward(self) -> tuple[Results, Results, Results, torch.Tensor]:
        exact, _, bound = self._exact(False)
        return exact, self._eager(False), {}, bound

    @cached_property
    def _gradients(self) -> tuple[Results, Results, Results, torch.Tensor]:
        exact, sizes, bound = self._exact(True)
        return exact, self._eager(True), sizes, bound

    @torch.no_grad()
    def _exact(self, gradients: bool) -> tuple[Results, Results, torch.Tensor]:
        """R, the gradients with nothing cancelled, and what each element of out may err by rule 3 of the policy."""
        f = _Formula(self.case, self.inputs, torch.float64)
        sampled = f.sampled(self.queries)
        positive = sampled.positive()
        p = sampled.weights()
        largest = sampled.visible(positive.scores()).amax(-1, keepdim=True)
        unit = _policy().UNIT
        bound = (8 * unit.get(self.case.dtype, 0.0) + 2 * unit[torch.float32] * largest) * positive.values(p)
        exact = {"out": sampled.values(p)[0]}
        if not gradients:
            return exact, {}, bound[0]
        grads, sizes = self._backward(f, sampled, (False, True))
        return exact | grads, sizes, bound[0]

    @torch.no_grad()
    def _eager(self, gradients: bool) -> Results:
        """L: each step, and each step of the backward, as autograd would run it, rounded to the case's dtype."""
        f = _Formula(self.case, self.inputs, self.case.dtype)
        sampled = f.sampled(self.queries)
        eager = {"out": sampled.values(sampled.weights())[0]}
        if gradients:
            eager |= self._backward(f, sampled, (False,))[0]
        return eager

    def _backward(self, f: _Formula, sampled: _Rows, signs: Sequence[bool]) -> list[Results]:
        """The gradients: of q at the sampled queries, of k and v at the sampled keys, of the tables whole.

        Pieces are summed in float32 at least: that there are any is this file's doing, and no rounding of L.

        Args:
            f: the formula.
            sampled: its sampled queries.
            signs: for each set of gradients whether it is the one with nothing cancelled.
        """
        at = f.inside[self.keys]
        found: list[Results] = []
        for _ in signs:
            room = {"k": torch.zeros_like(f.k[-1], dtype=f.wide), "v": torch.zeros_like(f.v[-1], dtype=f.wide)}
            found.append(room | {name: torch.zeros_like(x, dtype=f.wide) for name, x in f.tables.items()})
        for rows in f.parts():
            p = rows.weights()
            # Without tables only the sampled keys need the gradients of their scores.
            index = None if f.tables else torch.isin(rows.keys, at).nonzero()[:, 0]
            keys = rows.keys if index is None else rows.keys[index]
            for positive, sums in zip(signs, found, strict=True):
                for name, grad in _gradients(rows, p, positive, index).items():
                    if name in ("k", "v"):
                        sums[name].index_add_(1, keys, grad[-1].to(f.wide))
                    elif name != "q":
                        sums[name] += grad
        p = sampled.weights()
        for positive, sums in zip(signs, found, strict=True):
            sums |= {name: sums[name][:, at] for name in ("k", "v")}
            sums |= {name: x.to(f.q.dtype) for name, x in sums.items()}
            sums["q"] = _gradients(sampled, p, positive)["q"][0]
        return found


def _gradients(rows: _Rows, p: torch.Tensor, positive: bool, index: torch.Tensor | None = None) -> Results:
    """The gradients of everything from some queries; at some of their keys alone, if an index of these is given.

    Args:
        rows: the queries.
        p (Tensor[maps, heads, n, m]): their weights.
        positive: with nothing cancelled: every factor but p by its magnitude, the softmax's difference a sum.
        index: of keys.
    """
    rows = rows.positive() if positive else rows
    with torch.enable_grad():
        weights = p.detach().requires_grad_()
        (dp,) = torch.autograd.grad(rows.values(weights), weights, rows.grad)
    delta = (p * dp).sum(-1, keepdim=True)
    if index is not None:
        p, dp, rows = p[..., index], dp[..., index], rows.at(index)
    ds = p * (dp + delta if positive else dp - delta)
    with torch.enable_grad():
        rows = rows.leaves()
        of_values = {name: x for name, x in rows.named().items() if name == "v" or name.startswith("RelativeValue")}
        of_scores = {name: x for name, x in rows.named().items() if name not in of_values}
        grads = torch.autograd.grad(rows.values(p), list(of_values.values()), rows.grad)
        grads += torch.autograd.grad(rows.scores(), list(of_scores.values()), ds)
    return dict(zip([*of_values, *of_scores], grads, strict=True))


@dataclass(frozen=True)
class _Rows:
    """Some queries with the keys that they see, in one dtype.

    Attributes:
        q, grad (Tensor[maps, heads, n, width]): of the queries.
        k, v (Tensor[maps, heads, m, width]): of the keys.
        tables: the terms' tensors, such as "RelativeBias.table".
        keys (Tensor[m]): which keys of the extended grid.
        entries: of each pair in a relative table along the height and the width, `[n, m]`; any where masked.
        mask: the pairs that are there, `bool[n, m]`; None for all.
        factor: of q·k.
    """

    q: torch.Tensor
    grad: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tables: dict[str, torch.Tensor]
    keys: torch.Tensor
    entries: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    factor: float

    def named(self) -> dict[str, torch.Tensor]:
        """Every tensor that has a gradient."""
        return {"q": self.q, "k": self.k, "v": self.v, **self.tables}

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor], **others: Any) -> _Rows:
        tables = {name: change(x) for name, x in self.tables.items()}
        return replace(self, q=change(self.q), k=change(self.k), v=change(self.v), tables=tables, **others)

    def positive(self) -> _Rows:
        """Every factor by its magnitude."""
        return self._changed(torch.abs, grad=self.grad.abs(), factor=abs(self.factor))

    def leaves(self) -> _Rows:
        """The same tensors, for new gradients."""
        return self._changed(lambda x: x.detach().requires_grad_())

    def at(self, index: torch.Tensor) -> _Rows:
        """The same queries with some of the keys."""
        mask = None if self.mask is None else self.mask[:, index]
        along_h, along_w = (x[:, index] for x in self.entries)
        k, v = self.k[:, :, index], self.v[:, :, index]
        return replace(self, k=k, v=v, keys=self.keys[index], entries=(along_h, along_w), mask=mask)

    def visible(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores with 0 for the pairs that are not there."""
        return scores if self.mask is None else scores.masked_fill(~self.mask, 0)

    def weights(self) -> torch.Tensor:
        """Rows of the map; a query with no key has weights 0."""
        scores = self.scores()
        if self.mask is None:
            return torch.softmax(scores, -1)
        return torch.softmax(scores.masked_fill(~self.mask, -torch.inf), -1).nan_to_num()

    def scores(self) -> torch.Tensor:
        """Logits, whatever pairs are there."""
        scores = self.q @ self.k.mT
        if self.factor != 1:
            scores = scores * self.factor
        for axis, name in enumerate(("rel_h", "rel_w")):
            entries = self.entries[axis].expand(scores.shape)
            if (table := self.tables.get(f"RelativeQuery.{name}")) is not None:
                scores = scores + self._gather(self.q @ table.mT, entries)
            if (table := self.tables.get(f"RelativeKey.{name}")) is not None:
                scores = scores + self._gather(self.k @ table.mT, entries.mT).mT
        if (table := self.tables.get("RelativeBias.table")) is not None:
            scores = scores + table.to(self._wide)[:, self.entries[0], self.entries[1]].to(table.dtype)
        return scores

    def values(self, p: torch.Tensor) -> torch.Tensor:
        """The sum of the values with weights."""
        out = p @ self.v
        for axis, name in enumerate(("rel_h", "rel_w")):
            if (table := self.tables.get(f"RelativeValue.{name}")) is not None:
                sums = p.new_zeros(*p.shape[:-1], table.shape[-2], dtype=self._wide)
                sums = sums.scatter_add(-1, self.entries[axis].expand(p.shape), p.to(self._wide))
                out = out + sums.to(p.dtype) @ table
        return out

    @property
    def _wide(self) -> torch.dtype:
        return _wide(self.q.dtype)

    def _gather(self, x: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """`x[..., entries]`, whose gradient is summed as any sum of torch: in float32, rounded once."""
        return x.to(self._wide).gather(-1, entries).to(x.dtype)


class _Formula:
    """The tensors of a case in one dtype, `[maps, heads, N, width]`, and pieces of them.

    The maps are all where there are tables, whose gradients are sums over them; else the last one alone. Keys lie on
    the grid that the pattern's margin extends, with k = 0 and v = 0 outside.
    """

    def __init__(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> None:
        self.case, self.wide = case, _wide(dtype)
        w = case.workload
        maps = slice(None) if w.terms else slice(-1, None)
        (top, bottom), (left, right) = w.pattern.margin()
        self.q, self.grad, self.k, self.v = (
            (F.pad(x[maps], (0, 0, 0, 0, left, right, top, bottom)) if i > 1 else x[maps])
            .to(dtype)
            .permute(0, 3, 1, 2, 4)
            .flatten(2, 3)
            for i, x in enumerate((inputs.q, inputs.grad, inputs.k, inputs.v))
        )
        tensors = [x for term in inputs.terms for x in term]
        self.tables = dict(zip(w.term_names, (x.to(dtype) for x in tensors), strict=True))
        device = self.q.device
        mask = w.pattern.mask(w.queries, w.keys, device, outside=True)
        self.mask = None if mask is None else mask.flatten(2).flatten(0, 1)  # [N, extended keys]
        reach = w.pattern.reach(w.queries, w.keys)
        offsets = w.pattern.offsets(w.queries, w.keys, device, outside=True)
        along_h, along_w = ((x + K - 1).clamp(0, 2 * K - 2) for x, K in zip(offsets, reach, strict=True))
        self.entries = along_h, along_w  # [H, extended Hk], [W, extended Wk]
        grid = torch.arange(self.k.shape[2], device=device).view(along_h.shape[1], along_w.shape[1])
        self.inside = grid[top : top + w.keys.height, left : left + w.keys.width].flatten()

    def sampled(self, queries: torch.Tensor) -> _Rows:
        """Queries of the last map."""
        return self.rows(queries, torch.arange(self.k.shape[2], device=queries.device), slice(-1, None))

    def rows(self, queries: torch.Tensor, keys: torch.Tensor, maps: slice) -> _Rows:
        """Some queries and some keys of some maps."""
        (along_h, along_w), mask = self.entries, self.mask
        width, extended = along_w.shape
        return _Rows(
            self.q[maps, :, queries],
            self.grad[maps, :, queries],
            self.k[maps, :, keys],
            self.v[maps, :, keys],
            self.tables,
            keys,
            (
                along_h[queries // width][:, keys // extended],
                along_w[queries % width][:, keys % extended],
            ),
            None if mask is None else mask[queries][:, keys],
            self.case.workload.factor,
        )

    def parts(self) -> Iterator[_Rows]:
        """All queries, some at a time: those of a cell, or else of a row, where the pattern shows these few keys."""
        every = torch.arange(self.k.shape[2], device=self.q.device)
        groups: Sequence[torch.Tensor] = (torch.arange(self.q.shape[2], device=self.q.device),)
        if self.mask is not None:
            first = self.mask.view(torch.uint8).argmax(1)  # the same for all queries of a cell
            cells, counts = torch.unique(first, return_counts=True)
            if 8 * len(cells) <= len(first):
                groups = torch.split(first.argsort(), counts.tolist())
            else:
                groups = torch.split(groups[0], self.case.workload.queries.width)
        for group in groups:
            keys = every if self.mask is None else self.mask[group].any(0).nonzero()[:, 0]
            scores = self.q.shape[0] * self.q.shape[1] * len(keys)
            for part in torch.split(group, max(1, _CHUNK[self.case.device] // scores)):
                with _threads(1 if scores * len(part) < _SMALL else None):
                    yield self.rows(part, keys, slice(None))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with so many threads; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _draw(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sorted positions to compare: the first, the last, and others at random."""
    chosen = torch.randperm(count, generator=generator)[: SAMPLES - 2].tolist()
    return torch.tensor(sorted({0, count - 1, *chosen}))


def verdict(checks: list[Check]) -> list[str]:
    """Every reason to refuse a provider; empty if there is none."""
    return [one.reason for one in checks if one.reason]
