"""The rule by which a tier chooses its tests: what it covers, and what it leaves to the next one."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiers
from building import ROOT
from cases import CASES
from tiers import covering


def pairs(rows, together: int = 2) -> set:
    return {
        (slots, *(row[i] for i in slots)) for row in rows for slots in itertools.combinations(range(len(row)), together)
    }


def test_every_pair_is_covered_by_few() -> None:
    rows = list(itertools.product(range(7), "abcde", (False, True), (None, 1, 2)))
    some = covering(rows, lambda row: row, 2)
    assert pairs(some) == pairs(rows)
    assert len(rows) == 210
    assert len(some) <= 40  # 35 at least: 7 values with 5
    assert some == [row for row in rows if row in some]
    assert some == covering(rows, lambda row: row, 2)


def test_every_value_is_covered_by_fewer() -> None:
    rows = list(itertools.product(range(7), "abcde", (False, True)))
    assert len(covering(rows, lambda row: row, 1)) == 7


def test_combinations_that_do_not_occur_are_not_asked_for() -> None:
    rows = [(1, "a"), (2, "b"), (3, "c")]
    assert covering(rows, lambda row: row, 2) == rows


def test_a_single_parameter_keeps_all_of_its_values() -> None:
    assert covering(range(5), lambda x: (x,), 2) == list(range(5))
    assert covering([], lambda x: (x,), 2) == []


def test_the_case_table_is_covered_in_pairs() -> None:
    some = covering(CASES, lambda case: case.features, 2)
    assert pairs(case.features for case in some) == pairs(case.features for case in CASES)
    assert len(some) < 0.7 * len(CASES)


FILE = """
import itertools, pytest
pytestmark = pytest.mark.fast
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(4))
@pytest.mark.parametrize("c", range(4))
def test_product(a, b, c): pass
@pytest.mark.full
@pytest.mark.parametrize("a", range(3))
def test_rest(a): pass
@pytest.mark.singly
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(4))
def test_slow(a, b): pass
"""

CONFTEST = """
import tiers
def pytest_configure(config):
    if tiers.TIER == "full":
        config.pluginmanager.register(tiers.Resumed(tiers.Path("passed")), tiers.RESUMED)
def pytest_collection_modifyitems(config, items):
    tiers.select(config, items)
def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(tiers.summary(config))
"""


def run(folder: Path, tier: str, text: str = FILE) -> str:
    """What pytest says of a file in a tier."""
    (folder / "test_file.py").write_text(text)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    fast\n    full\n    singly\n")
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    environment = {**os.environ, "VISATTN_TIER": tier, "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_tiers_one_after_the_other(tmp_path: Path) -> None:
    assert "tier fast: 8 of 79 tests; the others are left to make test\n" in run(tmp_path, "fast")
    text = run(tmp_path, "test")
    kept = int(re.search(r"tier test: (\d+) of 79 tests; the others are left to make test-full", text)[1])
    assert 16 + 4 <= kept < 24 + 4
    assert f"{kept} passed, {79 - kept} deselected" in text
    text = run(tmp_path, "full")
    assert "tier full: 79 of 79 tests" in text
    assert "79 passed" in text
    assert "79 deselected" in run(tmp_path, "full")  # it goes on: all have passed
    assert "expected VISATTN_TIER to be of fast, test, full, but got VISATTN_TIER=slow" in run(tmp_path, "slow")


AFTERWARDS = """
import pytest
@pytest.fixture
def breaks():
    yield
    assert 0
def test_with_it(breaks): pass
def test_alone(): pass
"""


def test_what_fails_afterwards_has_not_passed(tmp_path: Path) -> None:
    for _ in range(2):
        text = run(tmp_path, "full", AFTERWARDS)
        assert "1 error" in text
    assert "1 passed, 1 deselected, 1 error" in text


def test_what_differs_in_the_sources_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiers.digest()
    assert first == tiers.digest()
    monkeypatch.setattr(tiers, "_sources", lambda: iter([ROOT / "setup.py"]))
    assert tiers.digest() != first
