"""Which tests a tier runs. A rule chooses them and never a hand: what a tier leaves out, the next one has.

    fast    of the tests marked `fast`, every value of every parameter at least once
    test    of those not marked `full`, every pair of values of two parameters that occurs, at least once; of those that
            are marked `singly`, since they take long, every value
    full    everything; what passed before with the same sources is not run again

A test's parameters are its function's, where a `Case` counts as many: its pattern, its terms, its dtype and so on.
VISATTN_TIER names the tier; without it, "test".
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import os
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from cases import Case

T = TypeVar("T")

ROOT = Path(__file__).parent.parent

TIERS = {"fast": 1, "test": 2, "full": 0}
"""How many parameters are taken together; 0 takes all cases."""

TIER = os.environ.get("VISATTN_TIER") or "test"
if TIER not in TIERS:
    raise pytest.UsageError(f"visattn: expected VISATTN_TIER to be of {', '.join(TIERS)}, but got VISATTN_TIER={TIER}")


def covering(cases: Sequence[T], values_of: Callable[[T], Sequence[Hashable]], together: int) -> list[T]:
    """The cases that cover every combination of so many values, in their order.

    Greedy: the case that has the most combinations that none had before, and so on until all are had. Cases that have
    as many are taken in an order that is mixed by a fixed seed.

    Args:
        cases: all that there are.
        values_of: the values of a case's parameters, as many for each case.
        together: how many parameters make a combination; fewer where there are fewer.
    """
    numbers: dict[tuple[int, Hashable], int] = {}  # of the values of each parameter: patterns are slow to compare
    rows = [
        [numbers.setdefault((i, value), len(numbers)) for i, value in enumerate(values)]
        for values in map(values_of, cases)
    ]
    combinations = [set(itertools.combinations(row, min(together, len(row)))) for row in rows]
    mixed = random.Random(20).sample(range(len(cases)), len(cases))
    # What a case adds only shrinks, so that one which still adds what the heap says adds the most.
    heap = [(-len(combinations[i]), turn, i) for turn, i in enumerate(mixed)]
    heapq.heapify(heap)
    had: set[tuple[int, ...]] = set()
    taken = []
    while heap:
        before, turn, i = heapq.heappop(heap)
        adds = len(combinations[i] - had)
        if adds == -before:
            had |= combinations[i]
            taken.append(i)
        elif adds:
            heapq.heappush(heap, (-adds, turn, i))
    return [cases[i] for i in sorted(taken)]


def values(item: pytest.Item) -> Sequence[Hashable]:
    """The values of a test's parameters."""
    found: list[Hashable] = []
    for name, x in item.callspec.params.items():  # type: ignore[attr-defined]
        found += x.features if isinstance(x, Case) else [(name, x if isinstance(x, Hashable) else id(x))]
    return found


def chosen(items: Sequence[pytest.Item], tier: str = TIER) -> list[pytest.Item]:
    """The tests that a tier runs, in their order."""
    together = TIERS[tier]
    if together == 0:
        return list(items)
    functions: dict[tuple[Path, str], list[pytest.Item]] = {}
    kept: set[pytest.Item] = set()
    for item in items:
        if "gpu" in item.path.parts:  # a tier of its own, with an order of its own
            kept.add(item)
            continue
        if item.get_closest_marker("full") or (tier == "fast" and not item.get_closest_marker("fast")):
            continue
        if hasattr(item, "callspec"):
            functions.setdefault((item.path, item.originalname), []).append(item)  # type: ignore[attr-defined]
        else:
            kept.add(item)
    for group in functions.values():
        kept.update(covering(group, values, 1 if group[0].get_closest_marker("singly") else together))
    return [item for item in items if item in kept]


class Resumed:
    """The plugin of the tier "full": it leaves out what passed before with the same sources, and notes what passes."""

    def __init__(self, folder: Path = ROOT / "build" / "tests") -> None:
        self.folder = folder
        self.path = folder / f"passed-{digest()}"
        self.called: set[str] = set()  # those whose own part passed, and not yet what comes after it

    def passed(self) -> set[str]:
        """The names of the tests that passed."""
        return set(self.path.read_text().splitlines()) if self.path.exists() else set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.called.add(report.nodeid)
        if report.when == "teardown" and report.passed and report.nodeid in self.called:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(report.nodeid + "\n")


def digest() -> str:
    """Of all that results depend on: files, torch's release and our settings."""
    settings = {name: x for name, x in os.environ.items() if name.startswith("VISATTN_") and name != "VISATTN_TIER"}
    whole = hashlib.sha256(repr((torch.__version__, sorted(settings.items()))).encode())
    for path in sorted(_sources()):
        whole.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


def _sources() -> Iterator[Path]:
    for folder in ("visattn_kernels", "csrc", "tests", "benchmarks", "examples", "docs", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                yield path
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the tier, the long ones first, and count them."""
    everything, kept = len(items), chosen(items)
    if resumed := config.pluginmanager.get_plugin(RESUMED):
        before = resumed.passed()
        kept = [item for item in kept if item.nodeid not in before]
    config.hook.pytest_deselected(items=sorted(set(items) - set(kept), key=lambda item: item.nodeid))
    items[:] = sorted(kept, key=lambda item: item.get_closest_marker("long") is None)
    note(config, (len(items), everything))


def note(config: pytest.Config, counts: tuple[int, int]) -> None:
    """Keep the counts for the summary, a worker's where its controller finds them."""
    config.stash[COUNTS] = counts
    if hasattr(config, "workeroutput"):
        config.workeroutput["tier"] = counts


def summary(config: pytest.Config) -> str:
    """One line on what the tier ran, and where the rest is run."""
    if COUNTS not in config.stash:
        return ""
    kept, everything = config.stash[COUNTS]
    text = f"tier {TIER}: {kept} of {everything} tests"
    if kept == everything:
        return text
    rest = {"fast": "make test", "test": "make test-full", "full": "an earlier run of this tier, in which they passed"}
    return f"{text}; the others are left to {rest[TIER]}"


COUNTS = pytest.StashKey[tuple[int, int]]()

RESUMED = "visattn-resumed"
