"""A pytest plugin: which tests of the tier run, in which order and until when, and a log of what became of each.

`benchmarks.gpu` loads it (`-p gpu.schedule`) and hands over a plan, a JSON file that the environment variable
VISATTN_GPU_PLAN names:

    passed      tests that are not run again
    last        tests that come last: those that failed, or did not end, before
    until       seconds since 1970 after which no test begins; those that did not run are left for the next time
    log         a file of JSON lines to write, {"event": "start" or "end", "id": ...}
    collected   a file to write: the names of all tests of the tier, in order
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

PLAN = "VISATTN_GPU_PLAN"

RANKS = {"test_backends": 0, "test_sizes": 1, "test_streams": 1, "test_races": 1}
"""Which files come first; the tests of all others are mixed, so that each part of them is a fair sample of them."""


def order(nodeid: str, last: frozenset[str] = frozenset()) -> tuple[bool, int, str]:
    """What tests are sorted by; the same in every process."""
    file = Path(nodeid.partition("::")[0]).stem
    return nodeid in last, RANKS.get(file, 2), hashlib.sha256(nodeid.encode()).hexdigest()


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get(PLAN)
    if path:
        config.pluginmanager.register(Schedule(json.loads(Path(path).read_text()), hasattr(config, "workerinput")))
        config.pluginmanager.register(Context())


class Schedule:
    """Carries out a plan.

    Args:
        plan: as above.
        worker: whether this is a worker of pytest-xdist; the process that hands out the tests writes the log.
    """

    def __init__(self, plan: dict[str, Any], worker: bool) -> None:
        self.passed, self.last = frozenset(plan["passed"]), frozenset(plan["last"])
        self.until: float | None = plan["until"]
        self.log, self.collected = Path(plan["log"]), Path(plan["collected"])
        self.worker = worker
        self.phases: dict[str, list[pytest.TestReport]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: order(item.nodeid, self.last))
        if not self.worker or config.workerinput["workerid"] == "gw0":  # type: ignore[attr-defined]
            part = self.collected.with_suffix(".part")
            part.write_text(json.dumps([item.nodeid for item in items]))
            part.replace(self.collected)
        done = [item for item in items if item.nodeid in self.passed]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self.passed]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        late = self.until is not None and time.time() > self.until
        return True if late else None  # True: as if it were done, with no report

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(event="start", id=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect the phases of a test; a crashed worker's has one, of no name."""
        phases = self.phases.setdefault(report.nodeid, [])
        phases.append(report)
        if report.when in ("setup", "call"):
            return
        del self.phases[report.nodeid]
        worst = max(phases, key=lambda one: ("passed", "skipped", "failed").index(one.outcome))
        seconds = round(sum(one.duration for one in phases), 2)
        self._write(event="end", id=report.nodeid, outcome=worst.outcome, seconds=seconds, message=head(worst))

    def _write(self, **line: Any) -> None:
        if not self.worker:
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")


class Context:
    """Ends a process in which a fault on the device made every later call fail: pytest-xdist starts another."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        done = yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(70)
        return done


def head(report: pytest.TestReport) -> str:
    """The first line of a failure's message, or the reason of a skip."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    lines = report.longreprtext.splitlines()
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or [line.strip() for line in lines if line.strip()][-1:] or ["no message"])[0][:300]
