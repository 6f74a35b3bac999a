"""Two revisions against each other: does a change make this library faster?

The base is checked out in a temporary worktree and built there; then the base's package and this tree's are timed in
processes of their own, in alternation. Both are driven by this tree's `benchmarks`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.measure import Budget

# The package first, from the tree under test; then `benchmarks`, from this one.
_BOOT = """
import sys
sys.path[:] = [path for path in sys.path if path not in ("", sys.argv[2])]
sys.path.insert(0, sys.argv[1])
import visattn_kernels
assert visattn_kernels.__file__.startswith(sys.argv[1]), visattn_kernels.__file__
sys.path[0] = sys.argv[2]
from benchmarks.compare import worker
worker(sys.argv[3])
"""


@dataclass(frozen=True)
class Task:
    """What to time: names, as the tables have them."""

    workloads: tuple[str, ...]
    passes: tuple[str, ...]
    dtypes: tuple[str, ...]
    backend: str = "cpu"
    device: str = "cpu"
    threads: int = 2
    budget: Budget = field(default_factory=lambda: Budget(seconds=0.5, least=3))
    rounds: int = 5


Times = dict[str, list[float]]
"""Samples by "workload dtype pass"."""


def compare(base: str, task: Task, say: Callable[[str], None] = lambda text: None) -> tuple[Times, Times]:
    """Samples of the base and of this tree, in seconds.

    Raises:
        RuntimeError: the revision does not exist, does not build, or cannot run the task.
    """
    with _worktree(base) as tree:
        say(f"building {base} in {tree}")
        _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree)
        found: dict[Path, Times] = {tree: {}, ROOT: {}}
        for turn in range(task.rounds):
            for side in (tree, ROOT) if turn % 2 == 0 else (ROOT, tree):
                say(f"round {turn + 1} of {task.rounds}: {'base' if side == tree else 'this tree'}")
                for key, samples in _time(side, task).items():
                    found[side].setdefault(key, []).extend(samples)
        return found[tree], found[ROOT]


@contextmanager
def _worktree(revision: str) -> Iterator[Path]:
    """A revision, checked out in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="visattn-base-") as folder:
        tree = Path(folder).resolve() / "tree"
        _run(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision], ROOT)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True)


def _time(tree: Path, task: Task) -> Times:
    """One process's samples of a tree."""
    request = {
        "workloads": task.workloads,
        "passes": task.passes,
        "dtypes": task.dtypes,
        "backend": task.backend,
        "device": task.device,
        "threads": task.threads,
        "budget": [task.budget.seconds, task.budget.least, task.budget.most],
    }
    # Not in the repository: Python would find its packages before the tree's.
    done = _run([sys.executable, "-c", _BOOT, str(tree), str(ROOT), json.dumps(request)], tree.parent)
    times = json.loads(done.splitlines()[-1])
    assert isinstance(times, dict)
    return times


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise RuntimeError(f"{' '.join(command[:4])} failed in {folder}:\n{tail}")
    return done.stdout


def worker(request: str) -> None:
    """Runs in the process of one tree: print the samples as one line of JSON."""
    import torch

    from benchmarks.cases import PASSES, Case, make_inputs
    from benchmarks.measure import interleave, warm_up
    from benchmarks.providers import Bench, find
    from benchmarks.workloads import find as find_workload

    task = json.loads(request)
    torch.set_num_threads(task["threads"])
    seconds, least, most = task["budget"]
    provider = find(f"visattn-{task['backend']}")
    times: Times = {}
    for name in task["workloads"]:
        workload = find_workload(name)
        for dtype in workload.dtypes(task["device"]):
            if (task["dtypes"] and dtype not in task["dtypes"]) or workload.batch(task["device"]) == 0:
                continue
            case = Case(workload, dtype, task["device"])
            for which in PASSES:
                if which not in task["passes"]:
                    continue
                reasons = provider.reasons(case, which)
                if reasons:
                    raise RuntimeError(f"{provider.name} cannot run {name} here: {'; '.join(reasons)}")
                bench = Bench(provider, case, which, make_inputs(case))
                key = f"{name} {dtype} {which}"
                times[key] = interleave([bench], Budget(seconds, least, most), [warm_up(bench)])[0]
    print(json.dumps(times))
