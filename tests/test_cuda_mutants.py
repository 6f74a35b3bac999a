"""Tests of the tests of the CUDA kernels: each of the faults below, in a copy of the sources, is found by a named check.

All faults are compiled at once, each as a choice that an environment variable makes when the code runs. Kernels with a
fault run in processes of their own: one that crashes or hangs has not been found, and says so.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cuda_emulated as emulated
import pytest
import torch
from building import ROOT
from cases import TERM_CASES, Case, TermCase, differentiate, expected, hold, inputs
from conftest import poison
from test_cuda import attend, run
from tolerance import GRADIENT, RESULT, check

import visattn_kernels as va
from visattn_kernels import reference
from visattn_kernels.backends import cuda

BIAS, QUERY, KEY, VALUE, KEY_BIAS = (options[0] for options in TERM_CASES)
EVERYTHING = (BIAS, QUERY, KEY, VALUE, KEY_BIAS)
WIDTHS = {"float16": [(8, 8), (16, 32)], "float32": [(8, 8)], "bfloat16": [], "tf32": []}


def half(pattern, grid: tuple[int, int], *terms: TermCase, wide: bool = False, **fields) -> Case:
    """A small case in float16, of D and Dv 8 or, if `wide`, 16 and 32."""
    d, dv = (16, 32) if wide else (8, 8)
    shapes = {"batch": 1, "queries": grid, "keys": grid, "heads": 1, "kv_heads": 1, "head_dim": d, "value_dim": dv}
    return Case(dtype=torch.float16, pattern=pattern, terms=terms, **{**shapes, **fields})


def single(pattern, grid: tuple[int, int], *terms: TermCase, **fields) -> Case:
    """A small case in float32."""
    return replace(half(pattern, grid, *terms, **fields), dtype=torch.float32)


GROUPED = {"batch": 2, "heads": 4, "kv_heads": 2}
MIXED = ("packed", "strided", "contiguous", "transposed")
CASES: dict[str, tuple[Case, ...]] = {
    "hold_windows": (
        half(va.Window(4, shift=(1, 3)), (7, 11), **GROUPED),
        half(va.Global(), (9, 11)),
        half(va.Grid(2), (5, 7), wide=True),
        half(va.Window((9, 11), shift=(2, 0)), (20, 13)),
        single(va.Global(), (5, 7), keys=(6, 11), heads=2),
    ),
    "hold_neighbourhoods": (
        half(va.Neighborhood(5), (11, 19)),
        half(va.Neighborhood((4, 3), dilation=(1, 2), border="zero"), (7, 11), wide=True),
        half(va.Neighborhood((3, 5), border="mask", is_causal=(True, False)), (7, 11)),
        half(va.Row(5), (3, 40)),
        single(va.Neighborhood(3, border="zero"), (9, 11)),
    ),
    "hold_criss_cross": (
        half(va.CrissCross(), (7, 11)),
        half(va.CrissCross(), (3, 5), KEY_BIAS, heads=2),
        single(va.CrissCross(), (5, 7), TermCase("KeyBias", per_head=True)),
    ),
    "hold_terms": (
        half(va.Neighborhood(3), (7, 11), *EVERYTHING, wide=True),
        half(va.Window(5, shift=2), (7, 11), BIAS, KEY_BIAS, heads=2),
        half(va.Window((6, 11)), (13, 11), QUERY, VALUE),
        single(va.Neighborhood(3, dilation=(1, 2), border="zero"), (7, 11), *EVERYTHING),
        single(va.Window((9, 11)), (9, 11), *EVERYTHING, heads=2),
        single(va.Row(5), (2, 21), TermCase("RelativeQuery", per_head=True), TermCase("RelativeKey"), heads=2),
        single(va.Global(), (5, 7), TermCase("KeyBias", removed=0.8), keys=(4, 11)),
    ),
    "hold_many_stages": (
        half(va.Global(), (9, 17), spread=4.0, wide=True),
        single(va.Global(), (9, 11), spread=4.0),
        half(va.Row(), (1, 100), *EVERYTHING),
    ),
    "hold_schedules": (
        half(va.Global(), (9, 17)),
        half(va.Neighborhood(5), (9, 21), wide=True),
        half(va.Row(), (1, 70), QUERY, VALUE),
        half(va.Global(), (9, 9), *EVERYTHING),
    ),
    "hold_layouts": (
        half(va.Window(4), (5, 7), layouts=MIXED, wide=True, **GROUPED),
        single(va.Window(4), (5, 7), layouts=("nchw", "offset", "channels_last", "packed"), **GROUPED),
        half(va.Neighborhood(3), (5, 7), layouts=("contiguous", "contiguous", "offset", "nchw"), **GROUPED),
    ),
    "hold_shares": (
        half(va.Window(2), (5, 7), *EVERYTHING, heads=2, batch=2),
        single(va.CrissCross(), (3, 5), BIAS, replace(VALUE, per_head=True), heads=2),
    ),
}


def hold_windows() -> None:
    """Windows, grids and whole maps: the least kind of kernel, heads that share keys."""
    hold_cases("hold_windows")


def hold_neighbourhoods() -> None:
    hold_cases("hold_neighbourhoods")


def hold_criss_cross() -> None:
    """Two parts, of which the second goes on from the first."""
    hold_cases("hold_criss_cross")


def hold_terms() -> None:
    hold_cases("hold_terms")


def hold_many_stages() -> None:
    """More keys than a stage has slots, of very different scores."""
    hold_cases("hold_many_stages")


def hold_layouts() -> None:
    """q, k, v and the gradient of out each with strides of its own."""
    hold_cases("hold_layouts")


def hold_shares() -> None:
    """Blocks that go on with other tiles: gradients of tables are summed."""
    hold_cases("hold_shares")


def hold_schedules() -> None:
    """Every order in which the emulator lets threads run gives the same bits."""
    for case in CASES["hold_schedules"]:
        emulated.control(0)
        first = run(case)
        hold(case, first)
        for schedule in emulated.SCHEDULES[1:]:
            emulated.control(schedule)
            for name, x in run(case).items():
                assert torch.equal(x, first[name]), f"{name} of schedule {schedule}"


NAN = [
    (half(pattern, (7, 11), *EVERYTHING[:-1], TermCase("KeyBias")), where)
    for pattern in (va.Neighborhood(3, border="zero"), va.CrissCross())
    for where in ("k", "v", "q", "grad_out", "relative_key_w", "relative_value_h")
]


def with_nan(case: Case, where: str) -> dict[str, torch.Tensor]:
    """Tensors of a case with a number that is none, and another at a key that was removed."""
    tensors = inputs(case)
    tensors["key_bias"][0, 2, 2] = -torch.inf
    tensors["k"][0, 2, 2] = torch.nan
    if where.startswith("relative"):
        tensors[where][..., 0, 0] = torch.nan
    else:
        tensors[where][0, 3, 5, 0, 1] = torch.nan
    return tensors


@cache
def expected_with_nan(case: Case, where: str):
    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **extra: torch.Tensor):
        return reference.formula(q, k, v, case.pattern, scale=case.true_scale, terms=case.build_terms(extra))

    tensors = with_nan(case, where)
    exact = differentiate(formula, {name: x.double() for name, x in tensors.items()}, case.wanted)
    return exact, differentiate(formula, tensors, case.wanted)


def hold_nan() -> None:
    """A NaN reaches what it reaches in the reference, and the rest is as exact as ever."""
    for case, where in NAN:
        exact, eager = expected_with_nan(case, where)
        for name, x in differentiate(attend(case), with_nan(case, where), case.wanted).items():
            factor = GRADIENT if name.startswith("grad_") else RESULT
            sizes = expected(case)[0]["sizes"].get(name)
            check(name, x, exact[name], eager[name], case.dtype, factor, None, sizes)


def hold_cases(name: str) -> None:
    for case in CASES[name]:
        hold(case, run(case))


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        hold_windows,
        hold_neighbourhoods,
        hold_criss_cross,
        hold_terms,
        hold_many_stages,
        hold_layouts,
        hold_shares,
        hold_schedules,
        hold_nan,
    )
}


def prepare(name: str) -> None:
    """Work out what a check compares with, which is the same for every fault."""
    if name == "hold_nan":
        for case, where in NAN:
            expected(case), expected_with_nan(case, where)
    else:
        for case in CASES[name]:
            expected(case)


class Mutant(NamedTuple):
    """A fault: an expression (what stands between « and »), what is put in its place, and which check finds it."""

    name: str
    file: str
    place: str
    new: str
    check: str


MUTANTS = [
    # which tiles there are, and what lies where in them
    Mutant("blocks counted by rows", "engine.cuh", "block % «plan.blocks_x» * w", "plan.blocks_y", "hold_neighbourhoods"),
    Mutant("the class of another block", "engine.cuh", "region_of(t.part, «tile / blocks»)", "tile % t.part.classes()", "hold_windows"),
    Mutant("the last row of a block's box", "engine.cuh", "h = «last / grid.w - y + 1»", "greatest(last / grid.w - y, 1)", "hold_terms"),
    Mutant("a warp's box of other sides", "engine.cuh", "i % «plan.warp_w»;", "plan.warp_h", "hold_neighbourhoods"),
    Mutant("rows of a warp that overlap", "engine.cuh", "«warp * plan.warp_h») + i", "warp", "hold_neighbourhoods"),
    Mutant("a first position of another map", "engine.cuh", "t.batch = «item / plan.tiles»", "0", "hold_windows"),
    Mutant("boxes of keys half as large", "plan.h", "(of_keys ? «2» : 1) * axis.size", "1", "hold_terms"),
    # which groups of slots are skipped
    Mutant("a group's last slot but one more", "block.cuh", "left < 16 ? «left - 1» : 15", "left", "hold_neighbourhoods"),
    Mutant("a group that ends at the last row", "block.cuh", "p[0].y >= «reach_y + reach_h»", "reach_y + reach_h - 1", "hold_neighbourhoods"),
    Mutant("a group that ends before the first row", "block.cuh", "«p[last].y < reach_y»", "p[last].y <= reach_y", "hold_neighbourhoods"),
    Mutant("the reach of half a warp", "block.cuh", "«mask < 32»; mask *= 2) {\n      const int other", "mask < 16", "hold_neighbourhoods"),
    # masks
    Mutant("no mask", "block.cuh", "x = «member» ? x", "true", "hold_neighbourhoods"),
    Mutant("a window longer by one", "block.cuh", "«uint32_t(far.y - r.first_y) < uint32_t(r.count_y)»", "uint32_t(far.y - r.first_y) <= uint32_t(r.count_y)", "hold_neighbourhoods"),
    Mutant("a window of rows alone", "block.cuh", "«uint32_t(far.x - r.first_x) < uint32_t(r.count_x)»", "true", "hold_neighbourhoods"),
    Mutant("slots past the last key", "block.cuh", "return «slot < tile.count»;", "true", "hold_windows"),
    Mutant("one's own key twice", "block.cuh", "!(«tile.part.others» &&", "false", "hold_criss_cross"),
    Mutant("the whole line of the other grid", "block.cuh", "int(y.size()) : «int(far.h)»", "int(y.size())", "hold_terms"),
    Mutant("a column past the map", "block.cuh", "p.x < «grid.w»;", "grid.w + 1", "hold_neighbourhoods"),
    Mutant("a removed key", "block.cuh", "member && «bias != -kInfinity»", "true", "hold_nan"),
    Mutant("no mark of absent weights", "forward.cuh", "if («none») x = kAbsent", "false", "hold_nan"),
    Mutant("no mark of absent gradients", "backward.cuh", "if («none») p = kAbsent", "false", "hold_nan"),
    Mutant("never careful in the forward", "forward.cuh", "C::kMasked && «careful»)", "false", "hold_nan"),
    Mutant("never careful in the backward", "backward.cuh", "«any_not_finite(b.sums1)»", "false", "hold_nan"),
    Mutant("dead groups count as present", "block.cuh", "weights[j][i] : «kAbsent»", "0.0f", "hold_nan"),
    Mutant("nothing fell on an offset", "block.cuh", "sums_of(term, r)[i] = «kAbsent»", "0.0f", "hold_nan"),
    # barriers
    Mutant("forward: before the tile is read", "forward.cuh", "first);\n  «sync_block()»;", "void()", "hold_schedules"),
    Mutant("forward: before places are read", "forward.cuh", "«sync_block()»;\n  f.find_rows()", "void()", "hold_schedules"),
    Mutant("forward: before a stage is read", "forward.cuh", "«sync_block()»;\n      f.step", "void()", "hold_schedules"),
    Mutant("forward: before a stage is loaded again", "forward.cuh", "f.step(stage, start, careful);\n      «sync_block()»", "void()", "hold_schedules"),
    Mutant("forward: copies on their way", "forward.cuh", "«copy_wait<1>()»", "copy_wait<2>()", "hold_schedules"),
    Mutant("forward: before slots' lookups are read", "forward.cuh", "this->far1(stage));\n        «sync_block()»", "void()", "hold_schedules"),
    Mutant("forward: before staged weights are read", "forward.cuh", "stage_weights(scores, groups);\n        «sync_warp()»", "void()", "hold_schedules"),
    Mutant("backward: before the tile changes", "backward.cuh", "«sync_block()»;\n    if (thread() == 0) *tile", "void()", "hold_schedules"),
    Mutant("backward: before a stage is read", "backward.cuh", "«sync_block()»;\n          b.step", "void()", "hold_schedules"),
    Mutant("backward: before a stage is loaded again", "backward.cuh", "b.step(stage, start, careful);\n          «sync_block()»", "void()", "hold_schedules"),
    Mutant("backward: copies on their way", "backward.cuh", "«copy_wait<1>()»", "copy_wait<2>()", "hold_schedules"),
    Mutant("backward: near rows on their way", "backward.cuh", "copy_commit(), «copy_wait<0>()»", "void()", "hold_windows"),
    Mutant("backward: before slots' lookups are read", "backward.cuh", "        }\n        «sync_block()»;\n      }", "void()", "hold_schedules"),
    Mutant("backward: before all staged weights are read", "backward.cuh", "«sync_block()»;\n        this->add_staged_bias", "void()", "hold_schedules"),
    Mutant("backward: before weights are staged again", "backward.cuh", "add_staged_bias(start);\n        «sync_block()»", "void()", "hold_schedules"),
    Mutant("before a table's buffer is read", "block.cuh", "copy_wait<0>(), «sync_block()»;\n        write_lookups", "void()", "hold_schedules"),
    Mutant("before a table's buffer is loaded again", "block.cuh", "to, span, first);\n        «sync_block()»", "void()", "hold_schedules"),
    Mutant("before a warp stages weights again", "block.cuh", "sums[v.sums_h + x] = sum;\n      }\n    }\n    «sync_warp()»", "void()", "hold_schedules"),
    Mutant("before entries' buffer is loaded again", "block.cuh", "part[n][i] * factor;\n        «sync_block()»", "void()", "hold_schedules"),
    # fragments
    Mutant("operand b of other columns", "engine.cuh", "mma_k16<typename C::E>(scores[2 * j], a, «b[0]», b[1])", "b[2]", "hold_layouts"),
    Mutant("halves of operand b", "engine.cuh", "mma_k16<typename C::E>(scores[2 * j + 1], a, b[2], «b[3]»)", "b[1]", "hold_layouts"),
    Mutant("operand b of eight numbers", "engine.cuh", "mma_k8<typename C::E>(scores[2 * j + 1], a[0], a[1], «b[2]»)", "b[1]", "hold_windows"),
    Mutant("rows below those of operand a", "engine.cuh", "mma_k8<typename C::E>(scores[2 * j], a[0], «a[1]»", "a[0]", "hold_windows"),
    Mutant("halves of near rows", "engine.cuh", "(l & 15) * kLd + «(l >> 4)» * C::kVector", "(1 - (l >> 4))", "hold_windows"),
    Mutant("halves of far rows", "engine.cuh", "«(l >> 3 & 1)» * C::kVector", "(1 - (l >> 3 & 1))", "hold_windows"),
    Mutant("not transposed", "engine.cuh", "«ldmatrix_transposed(b, row + 8 * n)»", "ldmatrix(b, row + 8 * n)", "hold_windows"),
    Mutant("columns of values", "engine.cuh", "mma_k16<typename C::E>(sums[n + 1], a, «b[2]», b[3])", "b[0]", "hold_neighbourhoods"),
    Mutant("registers of operand a", "engine.cuh", "as_bits(x[«(i & 1) * 2 + (i >> 1)»])", "i", "hold_terms"),
    Mutant("columns of a pair exchanged", "engine.cuh", "pack<typename C::E>(«x[2 * i]», x[2 * i + 1])", "x[2 * i + 1]", "hold_windows"),
    Mutant("the next columns", "engine.cuh", "operand<C>(a, weights[j], weights[«j + kChunks - 1»])", "j", "hold_windows"),
    Mutant("float32: rows that pair with columns", "engine.cuh", "second = column[«kLd + 8 * n»]", "4 * kLd + 8 * n", "hold_neighbourhoods"),
    Mutant("a careful weight of another lane", "engine.cuh", "«(l & ~3) | column >> 1»", "(l & ~3) | (column & 3)", "hold_nan"),
    Mutant("a row's numbers of the row below", "engine.cuh", "second = «x[n][2 * r + 1]» * factor", "x[n][2 * r]", "hold_windows"),
    # strides and heads
    Mutant("v by k's places", "block.cuh", "offset_of<kOfKeys>(tile.region, «second», p)", "first", "hold_layouts"),
    Mutant("v by k's channels", "block.cuh", "«second.channel»,", "first.channel", "hold_layouts"),
    Mutant("v by k's heads", "block.cuh", "«second.at(tile.batch, first_head)»", "first.at(tile.batch, first_head)", "hold_layouts"),
    Mutant("v copied as k is", "block.cuh", "plan.vector[«3»]", "2", "hold_layouts"),
    Mutant("copies of odd rows", "choose.cpp", "«m.x % vector == 0»", "true", "hold_layouts"),
    Mutant("copies from odd addresses", "choose.cpp", "«reinterpret_cast<uintptr_t>(m.data) % 16 == 0»", "true", "hold_layouts"),
    Mutant("rows of slots without padding", "block.cuh", "far1(stage) + slot * «C::kLd»", "C::kD", "hold_windows"),
    Mutant("a class that starts at zero", "engine.cuh", "«region.query_y.at(p.y)» * m.y", "p.y", "hold_windows"),
    Mutant("rows by columns' strides", "engine.cuh", "region.key_y.at(p.y) * «m.y»", "m.x", "hold_windows"),
    Mutant("the keys of another head", "forward.cuh", "«h / args.call.problem.group()»", "h % args.call.problem.kv_heads", "hold_windows"),
    Mutant("the queries of another head", "block.cuh", "first_head = kOfKeys ? «head» : kv_head", "kv_head", "hold_windows"),
    Mutant("one head of a group", "backward.cuh", "(kOfKeys ? «p.group()» : 1)", "1", "hold_windows"),
    # softmax
    Mutant("sums that are not rescaled", "forward.cuh", "out[n][i] *= «rescale[i >> 1]»", "1.0f", "hold_many_stages"),
    Mutant("a total that is not rescaled", "forward.cuh", "total[r] = total[r] * «rescale[r]»", "1.0f", "hold_many_stages"),
    Mutant("lse without the total", "forward.cuh", "base / C::kUnit + «log2_fast(total[r])»", "0.0f", "hold_windows"),
    Mutant("lse in base 2", "block.cuh", "m, p)] * «C::kUnit»", "1.0f", "hold_windows"),
    Mutant("the maximum of half a row", "engine.cuh", "return «__builtin_fmaxf(x, shuffle_xor(x, 2))»", "x", "hold_many_stages"),
    Mutant("the total of half a row", "engine.cuh", "return x + «shuffle_xor(x, 2)»", "0.0f", "hold_windows"),
    Mutant("a row of no key", "forward.cuh", "base = «most == -kInfinity» ? 0.0f : most", "false", "hold_terms"),
    Mutant("the part before forgotten", "forward.cuh", "maximum[r] = before, «total[r] = 1»", "total[r] = 0", "hold_criss_cross"),
    Mutant("not divided by the total", "forward.cuh", "none ? 0.0f : «1.0f / total[r]»", "1.0f", "hold_windows"),
    # terms
    Mutant("the bias of the opposite offset", "block.cuh", "y = kOfKeys ? «near.y - far.y»", "far.y - near.y", "hold_terms"),
    Mutant("rows of the bias as columns", "block.cuh", "«bias_entry(rows[r].place, far)»", "bias_entry(far, rows[r].place)", "hold_terms"),
    Mutant("the bias of the first head", "block.cuh", "call.bias.data) + «head» * call.bias.head", "0", "hold_terms"),
    Mutant("the table of the first head", "block.cuh", "table.data) + «head» * table.head", "0", "hold_terms"),
    Mutant("an entry next to the offset's", "block.cuh", "table_entry(«span.first + e», call.problem.reach(axis));\n    load_row", "greatest(span.first + e - 1, 1 - call.problem.reach(axis))", "hold_terms"),
    Mutant("a span that ends early", "block.cuh", "int(least(last, k - 1) - from + «1»)", "0", "hold_terms"),
    Mutant("offsets of keys counted backwards", "block.cuh", "of_queries ? own + offset : «own - offset»", "own + offset", "hold_terms"),
    Mutant("the factor of a term", "block.cuh", "1.0f : «float(call.vector_scale[term])» * C::kUnit", "1.0f", "hold_terms"),
    Mutant("lookups of rows for columns", "block.cuh", "numbers[«v.lookup_h» + (near", "0", "hold_terms"),
    Mutant("a stage's last row of sums", "block.cuh", "y <= «last_y»; ++y", "last_y - 1", "hold_terms"),
    Mutant("sums that are not rescaled, of rows", "block.cuh", "sums[y] * «factor»", "1.0f", "hold_many_stages"),
    Mutant("sums of the upper row", "block.cuh", "row(«i >> 1 & 1»), span.first", "0", "hold_terms"),
    Mutant("bias sums past a stage", "block.cuh", "s >= 0 && «s < end»", "true", "hold_many_stages"),
    Mutant("a table's terms left out of dQ and dK", "backward.cuh", "b.sums1[n][j] += «b.extra[n][j]»", "0.0f", "hold_terms"),
    Mutant("a gradient without the term's factor", "backward.cuh", "(kTerm, extra, «float(call.vector_scale[kTerm])»)", "1.0f", "hold_terms"),
    Mutant("the share of another head", "backward.cuh", "share * call.problem.heads + «head»", "0", "hold_shares"),
    Mutant("a share of the last tile", "block.cuh", "«entry[8 * n + 2 * (lane() & 3) + c] += part[n][2 * i + c] * factor»", "entry[8 * n + 2 * (lane() & 3) + c] = part[n][2 * i + c] * factor", "hold_shares"),
    Mutant("bias shares of the last tile", "backward.cuh", "«to[e] += shared<float>(plan.bias_sums)[e]»", "to[e] = shared<float>(plan.bias_sums)[e]", "hold_shares"),
    Mutant("a key bias's gradient of the last part", "backward.cuh", "call.part == 0 ? sum : «to + sum»", "sum", "hold_criss_cross"),
    # backward
    Mutant("no delta", "backward.cuh", "x - («kOfKeys ? column_delta : delta[r]»)", "0.0f", "hold_windows"),
    Mutant("lse for delta", "backward.cuh", "numbers[«kSlots + column»]", "column", "hold_windows"),
    Mutant("no scale", "backward.cuh", "b.sums1[n][j] *= «scale»", "1.0f", "hold_windows"),
    Mutant("dV from dS", "backward.cuh", "multiply_columns<C, C::kDv, kSlots>(sums2, «weights»", "gradients", "hold_windows"),
    Mutant("dK from P", "backward.cuh", "multiply_columns<C, C::kD, kSlots>(sums1, «gradients»", "weights", "hold_windows"),
    Mutant("no gradient of lse", "backward.cuh", "sum - «static_cast<const float*>(call.grad_lse.data)[at(call.grad_lse)]»", "0.0f", "hold_windows"),
    Mutant("delta of half the channels", "backward.cuh", "for (int mask = 1; «mask < 32»; mask *= 2) sum", "mask < 16", "hold_windows"),
    Mutant("gradients of the part before", "backward.cuh", "x[n][2 * r + c] += «old[n][2 * r + c]»", "0.0f", "hold_criss_cross"),
]  # fmt: skip
SHARES = "kShares = 1024"  # so many that only large problems deal their tiles
CHOICE = """
#include <cstdlib>
inline int mutant() {
  static const char* const number = std::getenv("VISATTN_MUTANT");
  static const int chosen = number ? std::atoi(number) : -1;
  return chosen;
}
"""


def mutated(csrc: Path) -> None:
    """Put every fault into the sources, each of which works if the environment names its number."""
    choices: dict[tuple[str, str], str] = {}
    for number, (_, file, place, new, _) in enumerate(MUTANTS):
        choices[file, place] = choices.get((file, place), "") + f"mutant() == {number} ? ({new}) : "
    edits: dict[str, list[tuple[int, int, str]]] = {file: [] for file, _ in choices}
    texts = {file: (csrc / "cuda" / file).read_text() for file in edits}
    for (file, place), choice in choices.items():
        match = re.fullmatch("(.*)«(.+)»(.*)", place, re.S)
        assert match, f"no « and »: {place}"
        before, old, after = match.groups()
        context = before + old + after
        assert texts[file].count(context) == 1, f"{file}: {texts[file].count(context)} places, not one: {place}"
        at = texts[file].index(context) + len(before)
        edits[file].append((at, at + len(old), f"({choice}({old}))"))
    for file, listed in edits.items():
        text, end = texts[file], len(texts[file])
        for start, stop, new in sorted(listed, reverse=True):
            assert stop <= end, f"{file}: places overlap at: {texts[file][start:stop]}"
            text, end = text[:start] + new + text[stop:], start
        (csrc / "cuda" / file).write_text(text)
    for path, old, new in (
        (csrc / "pattern.h", "#include <cstdint>\n", f"#include <cstdint>\n{CHOICE}"),
        (csrc / "cuda" / "plan.h", SHARES, "kShares = 4"),
    ):
        text = path.read_text()
        assert text.count(old) == 1, f"{path.name}: {text.count(old)} places, not one: {old}"
        path.write_text(text.replace(old, new))


Ask = Callable[[str, int], str]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """What becomes of a check with a fault, or with none (-1)."""
    csrc = tmp_path_factory.mktemp("mutants") / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    mutated(csrc)
    library = emulated.build(csrc, WIDTHS)
    # The operators are registered once a process, and test_cuda has its own. A fork must not meet threads of a GPU's.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(library)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout
        talk = server.stdin, server.stdout

        def answer(check: str, number: int) -> str:
            talk[0].write(f"{check} {number}\n")
            talk[0].flush()
            return talk[1].readline().strip()

        yield answer
        server.stdin.close()


def serve() -> None:
    """Answer, in a process of its own, what becomes of checks."""
    torch.set_num_threads(1)  # threads do not live on in a fork
    cuda.emulate = True
    emulated.load(Path(sys.argv[1]))
    for line in sys.stdin:
        check, number = line.split()
        prepare(check)
        print(outcome(check, number), flush=True)


def outcome(check: str, number: str) -> str:
    """Run a check in a fork: "held", "found: ..." or what else has happened."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ["VISATTN_MUTANT"] = number
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))  # ends what hangs
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(write, " ".join(attempt(check).split())[:2000].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    return text if status == 0 else f"died with status {status}"


def attempt(check: str) -> str:
    try:
        CHECKS[check]()
    except (AssertionError, RuntimeError) as error:
        return f"found: {error}"
    except BaseException:
        return f"broke: {traceback.format_exc()}"
    return "held"


@pytest.mark.parametrize("check", CHECKS)
def test_the_copy_without_a_fault_holds(ask: Ask, check: str) -> None:
    assert ask(check, -1) == "held"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_fault_is_found(ask: Ask, mutant: Mutant) -> None:
    answer = ask(mutant.check, MUTANTS.index(mutant))
    assert answer.startswith("found: "), answer


def test_every_check_finds_a_fault() -> None:
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


if __name__ == "__main__":
    serve()
