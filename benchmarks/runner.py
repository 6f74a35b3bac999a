"""The run: for every workload, dtype and pass, ask every provider, verify it, time it in turns, weigh it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import torch

from benchmarks import ceilings, machine
from benchmarks.cases import PASSES, Case, Inputs, Pass, make_inputs
from benchmarks.measure import Budget, interleave, warm_up
from benchmarks.peak import peak_bytes
from benchmarks.providers import PROVIDERS, Bench, Provider
from benchmarks.results import Cell, Entry, Report, load
from benchmarks.verify import Truth, verdict
from benchmarks.workloads import WORKLOADS, Workload


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        workloads, providers, passes: in order.
        dtypes: names; None means each workload's own.
        device: "cpu" or "cuda".
        threads: that torch may use.
        budget: samples per provider and cell.
        memory: whether to measure peak memory too.
        out: the results file; None writes none.
        resume: keep what the file already has, where it is of the same sources, threads and device.
        stop_after: seconds after which no cell begins; those that are left make the report incomplete.
    """

    workloads: Sequence[Workload] = WORKLOADS
    providers: Sequence[Provider] = PROVIDERS
    passes: Sequence[Pass] = PASSES
    dtypes: Sequence[str] | None = None
    device: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)
    budget: Budget = field(default_factory=Budget)
    memory: bool = True
    out: Path | None = None
    resume: bool = False
    stop_after: float | None = None

    def cells(self) -> list[tuple[Case, Pass]]:
        """Every cell, in order; a workload that is not run on the device has none."""
        return [
            (Case(workload, dtype, self.device), which)
            for workload in self.workloads
            if workload.batch(self.device) > 0
            for dtype in (self.dtypes or workload.dtypes(self.device))
            if self.dtypes is None or dtype in workload.dtypes(self.device)
            for which in self.passes
        ]


class Listener:
    """Is told how a run goes; this one does nothing."""

    def begin(self, cells: int) -> None:
        """The run starts, with so many cells to measure."""

    def cell(self, case: Case, which: Pass) -> None:
        """A cell starts."""

    def step(self, text: str, done: int, count: int) -> None:
        """Something inside the cell is done."""

    def done(self, cell: Cell) -> None:
        """A cell is measured."""


def run(plan: Plan, listener: Listener | None = None) -> Report:
    """Measure every cell of a plan.

    After each cell the file is written, so that an interrupted run leaves whole cells behind, marked incomplete.

    Raises:
        KeyboardInterrupt: as it came; what was measured is in the file.
        ValueError: the file to resume from is no results file, or of something else.
    """
    listener = listener or Listener()
    report = _begin(plan)
    todo = [(case, which) for case, which in plan.cells() if not _has(report, case, which, plan.providers)]
    listener.begin(len(todo))
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    start = time.monotonic()
    try:
        if not report.ceilings:
            report.ceilings = ceilings.measure(plan.device, plan.threads).plain()
        limits = ceilings.Ceilings(**report.ceilings)
        known = _Known()
        for case, which in todo:
            if plan.stop_after is not None and time.monotonic() - start > plan.stop_after:
                return report
            listener.cell(case, which)
            if known.case != case:
                known = _Known(case)
            cell = _empty(case, which, limits)
            _measure(cell, case, which, known, plan, listener)
            if plan.memory:
                _weigh(cell, case, which, known, plan, listener)
            report.put(cell)
            listener.done(cell)
            _save(report, plan)
        report.complete = True
        _save(report, plan)
    finally:
        torch.set_num_threads(before)
    return report


def new_report(plan: Plan) -> Report:
    """A report with no cell yet, of this code on this machine."""
    name = plan.out.stem if plan.out else plan.device
    commit, dirty = machine.commit()
    settings = {name: x if math.isfinite(x) else None for name, x in asdict(plan.budget).items()}
    return Report(
        name,
        plan.device,
        plan.threads,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit,
        dirty=dirty,
        sources=machine.sources(),
        hardware=machine.hardware(),
        versions=machine.versions(),
        settings={**settings, "memory": plan.memory, "load_average": os.getloadavg()[0]},
    )


def differences(old: Report, new: Report) -> list[str]:
    """What keeps a run from going on with an old report."""
    same = ("device", "threads", "commit", "sources", "versions")
    found = [what for what in same if getattr(old, what) != getattr(new, what)]
    # A virtual machine's memory may grow while it is used.
    mine, its = ({name: x for name, x in one.hardware.items() if name != "memory_bytes"} for one in (old, new))
    return found if mine == its else [*found, "hardware"]


def _begin(plan: Plan) -> Report:
    """A new report, or the one that is resumed."""
    new = new_report(plan)
    if not (plan.resume and plan.out and plan.out.exists()):
        return new
    old = load(plan.out)
    for what in differences(old, new):
        raise ValueError(
            f"cannot resume {plan.out}: its {what} is {getattr(old, what)}, now {getattr(new, what)}. "
            "Run without --resume to measure everything anew."
        )
    old.complete, old.finished = False, None
    return old


def _has(report: Report, case: Case, which: Pass, providers: Sequence[Provider]) -> bool:
    """Whether a report has a cell with all these providers."""
    cell = report.find(case.workload.name, case.dtype_name, which)
    return cell is not None and all(cell.entry(provider.name) for provider in providers)


def _save(report: Report, plan: Plan) -> None:
    if plan.out:
        report.finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report.save(plan.out)


def _empty(case: Case, which: Pass, limits: ceilings.Ceilings) -> Cell:
    cost, floor = case.cost(which), limits.floor(case, which)
    return Cell(
        case.workload.name,
        case.dtype_name,
        which,
        case.batch,
        case.heads,
        case.workload.describe(),
        cost.flops,
        cost.bytes,
        cost.exps,
        floor.seconds,
        floor.binds,
    )


class _Known:
    """What the passes of one case share: tensors, truth, verdicts, peaks. "backward" and "both" give the same."""

    def __init__(self, case: Case | None = None) -> None:
        self.case = case
        self.verdicts: dict[tuple[str, bool], Entry] = {}
        self.peaks: dict[tuple[str, bool], int | None] = {}

    @cached_property
    def inputs(self) -> Inputs:
        assert self.case is not None
        return make_inputs(self.case)

    @cached_property
    def truth(self) -> Truth:
        assert self.case is not None
        return Truth(self.case, self.inputs)


def _measure(cell: Cell, case: Case, which: Pass, known: _Known, plan: Plan, listener: Listener) -> None:
    """Fill a cell with verdicts and samples."""
    ready: list[tuple[Bench, Entry, float]] = []
    for i, provider in enumerate(plan.providers):
        listener.step(f"verify {provider.name}", i, len(plan.providers))
        key = (provider.name, which != "forward")
        if key not in known.verdicts:
            known.verdicts[key] = _verify(provider, case, which, known)
        entry = replace(known.verdicts[key], samples=[])
        cell.entries.append(entry)
        if entry.status == "absent":
            continue
        listener.step(f"warm up {provider.name}", i, len(plan.providers))
        bench = Bench(provider, case, which, known.inputs)
        ready.append((bench, entry, warm_up(bench)))
    samples = interleave(
        [bench for bench, _, _ in ready],
        plan.budget,
        [seconds for _, _, seconds in ready],
        lambda done, count: listener.step("measure", done, count),
    )
    for (_, entry, _), taken in zip(ready, samples, strict=True):
        entry.samples = taken


def _verify(provider: Provider, case: Case, which: Pass, known: _Known) -> Entry:
    """A provider's entry, without samples. A wrong one is refused, and timed all the same."""
    entry = Entry(provider.name, provider.ours, "measured")
    reasons = provider.reasons(case, which)
    if reasons:
        entry.status, entry.reason = "absent", "; ".join(reasons)
        return entry
    try:
        checks = known.truth.verify(Bench(provider, case, which, known.inputs).results())
    except Exception as error:  # whatever a peer raises is its reason
        if case.device == "cuda":
            torch.cuda.synchronize()  # raises where the device is lost to this process: no peer's reason any more
        first = (str(error).strip().splitlines() or [""])[0]
        entry.status, entry.reason = "absent", f"raised {type(error).__name__}: {first[:200]}"
        return entry
    entry.checks = {one.name: one.plain() for one in checks}
    refusals = verdict(checks)
    if refusals:
        entry.status, entry.reason = "refused", "; ".join(refusals)
    return entry


def _weigh(cell: Cell, case: Case, which: Pass, known: _Known, plan: Plan, listener: Listener) -> None:
    """Fill in the peak memory of whoever was timed."""
    for i, entry in enumerate(cell.entries):
        if entry.status == "absent":
            continue
        listener.step(f"memory of {entry.name}", i, len(cell.entries))
        key = (entry.name, which != "forward")
        if key not in known.peaks:
            known.peaks[key] = None
            provider = next(provider for provider in plan.providers if provider.name == entry.name)
            with suppress(RuntimeError):
                known.peaks[key] = peak_bytes(provider, case, which, plan.threads)
        entry.peak_bytes = known.peaks[key]
