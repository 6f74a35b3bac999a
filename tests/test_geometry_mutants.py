"""Tests of the tests of geometry: every small fault in a copy of pattern.h and terms.h must be found.

All faults are compiled at once, each as a choice that an environment variable makes when the code runs.
"""

from __future__ import annotations

import itertools
import re
import shutil
from types import ModuleType

import compiled
import pytest
from geometry_rules import axis_patterns, fits, grid_patterns, hold_axis, hold_criss_cross, hold_grids

import visattn_kernels as va
from visattn_kernels.patterns import Size

pytestmark = pytest.mark.full

# An expression of a header (all of the text, or what stands between « and ») and what is put in its place.
MUTANTS = [
    # cells
    ("(shift > 0) + (floor_zero(queries - shift) + size - 1) / size", "(queries + size - 1) / size"),
    ("(shift > 0) + (floor_zero(queries - shift) + size - 1) / size", "(shift > 0) + (queries - shift) / size"),
    ("(shift > 0) + (floor_zero(queries - shift) + size - 1) / size", "1 + (queries - shift + size - 1) / size"),
    ("position < shift ? 0 : (shift > 0) + (position - shift) / size", "(position - shift) / size"),
    ("position < shift ? 0 : (shift > 0) + (position - shift) / size", "position / size"),
    ("«shift > 0 ? shift + c * size : (c + 1) * size», length", "shift + (c + 1) * size"),
    ("c == 0 ? 0 : (shift > 0 ? shift + (c - 1) * size : c * size)", "shift + c * size"),
    ("position - line(class_of(position), queries).start", "(position - shift + size) % size"),
    ("a.shift = «axis ? p.shift_w : p.shift_h»", "axis ? p.shift_h : p.shift_w"),
    # residues
    ("(length - c + step - 1) / step", "(length + step - 1) / step"),
    ("(length - c + step - 1) / step", "(length - c) / step"),
    ("«least(step, queries)»;", "step"),
    ("a.step = «(queries + size - 1) / size»", "queries > size ? queries / size : 1"),
    ("a.step = «axis ? p.step_w : p.step_h»", "axis ? p.step_h : p.step_w"),
    ("return «(length + step - 1) / step»", "length / step"),
    # the keys of a query
    ("causal ? i - size + 1 : i - size / 2", "causal ? i - size + 1 : i - (size - 1) / 2"),
    ("causal ? i - size + 1 : i - size / 2", "causal ? i - size : i - size / 2"),
    ("(«border == Border::kShift && !causal») {\n      const", "border == Border::kShift"),
    ("(«border == Border::kShift && !causal») {\n      const", "border == Border::kMask && !causal"),
    ("least(floor_zero(first), floor_zero(n - size))", "floor_zero(first)"),
    ("least(floor_zero(first), floor_zero(n - size))", "least(first, floor_zero(n - size))"),
    ("least(floor_zero(first), floor_zero(n - size))", "least(floor_zero(first), floor_zero(n - size - 1))"),
    ("border == Border::kZero", "false"),
    ("«floor_zero(first)», least(first", "first"),
    ("least(first + size, n)", "first + size"),
    ("a.causal = («axis ? p.causal_w : p.causal_h») != 0", "axis ? p.causal_h : p.causal_w"),
    # the queries of a key
    ("ahead = «causal ? size - 1 : size / 2»", "causal ? size - 1 : (size - 1) / 2"),
    ("ahead = «causal ? size - 1 : size / 2»", "size / 2"),
    ("floor_zero(j + ahead - size + 1)", "floor_zero(j - ahead)"),
    ("floor_zero(j + ahead - size + 1)", "j + ahead - size + 1"),
    ("least(j + ahead + 1, n)", "j + ahead + 1"),
    ("least(j + ahead + 1, n)", "least(j + ahead, n)"),
    ("(«border == Border::kShift && !causal») {\n      if", "border == Border::kShift"),
    ("if («j < size») range", "j < size / 2"),
    ("if («j < size») range", "j <= size"),
    ("if («j >= n - size») range", "j > n - size"),
    ("if («j >= n - size») range", "false"),
    # parts and regions
    ("p.kind == PatternKind::kCrissCross && «part == 0»", "part == 1"),
    ("if («row != (axis == 1)»)", "row != (axis == 0)"),
    ("p.kind == PatternKind::kCrissCross ? 2 : 1", "1"),
    ("«part == 1»};", "part == 2"),
    ("others && query_y == key_y && query_x == key_x", "others && query_x == key_x"),
    ("x.keys_of(query_x, «n_x»).contains", "n_y"),
    ("cy = «c / width»", "c % width"),
    ("«part.y.key_line(cy)», part.x", "part.y.query_line(cy)"),
    # boxes
    ("part.y.keys_of(«queries.y + queries.h - 1», n_y).end", "queries.y + queries.h"),
    ("part.x.keys_of(«queries.x + queries.w - 1», n_x).end", "queries.x"),
    ("part.y.queries_of(«keys.y + keys.h - 1», n_y).end", "keys.y + keys.w - 1"),
    ("part.x.queries_of(keys.x + keys.w - 1, n_x).end - x", "part.x.queries_of(keys.x, n_x).size()"),
    # relative tables
    ("if («(p.kind == PatternKind::kRow) != (axis == 1)») return 1", "false"),
    ("return «size > 0 ? size : length»", "size > 0 ? size / 2 + 1 : length"),
    ("return «2 * reach - 1»", "2 * reach"),
    ("return «offset + reach - 1»", "reach - 1 - offset"),
]
HEADERS = ("pattern.h", "terms.h")
CHOICE = """
#include <cstdlib>
inline int64_t mutant() { const char* number = std::getenv("VISATTN_MUTANT"); return number ? std::atoi(number) : -1; }
"""


def mutated(headers: dict[str, str]) -> dict[str, str]:
    """The headers with every fault, each of which works if the environment names its number."""
    for place in dict.fromkeys(place for place, _ in MUTANTS):
        before, old, after = re.fullmatch(r"(?:(.*)«)?([^«»]*)(?:»(.*))?", place, re.S).groups(default="")
        faults = [(number, new) for number, (where, new) in enumerate(MUTANTS) if where == place]
        choice = "".join(f"mutant() == {number} ? ({new}) : " for number, new in faults)
        text = before + old + after
        assert sum(header.count(text) for header in headers.values()) == 1, f"no place, or not one: {place}"
        for name, header in headers.items():
            headers[name] = header.replace(text, f"{before}({choice}({old})){after}")
    headers[HEADERS[0]] = headers[HEADERS[0]].replace("#include <cstdint>\n", f"#include <cstdint>\n{CHOICE}", 1)
    return headers


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The geometry of a copy of the sources with every fault."""
    csrc = tmp_path_factory.mktemp("mutants")
    sources = compiled.ROOT / "csrc"
    (csrc / "binding").mkdir()
    shutil.copy(sources / "binding" / "geometry.cpp", csrc / "binding")
    for name, text in mutated({name: (sources / name).read_text() for name in HEADERS}).items():
        (csrc / name).write_text(text)
    return compiled.geometry(csrc)


def hold_all(geometry: ModuleType) -> None:
    """What `test_geometry` holds, on fewer axes and grids."""
    for length, axis in itertools.product((1, 2, 3, 5, 7), (0, 1)):
        for pattern in axis_patterns(axis, length):
            hold_axis(geometry, pattern, axis, length)
    grids = Size(3, 2), Size(4, 7)
    for grid in grids:
        hold_criss_cross(geometry, grid)
        for pattern in grid_patterns():
            if fits(pattern, grid):
                hold_grids(geometry, pattern, grid, grid)
    hold_grids(geometry, va.Global(), *grids)


def test_the_copy_without_a_fault_holds(faulty: ModuleType) -> None:
    hold_all(faulty)


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=lambda number: f"{number}: {MUTANTS[number][1]}")
def test_fault_is_found(faulty: ModuleType, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISATTN_MUTANT", str(number))
    with pytest.raises((AssertionError, IndexError)):
        hold_all(faulty)
