"""Tests of the tests of the CUDA kernels: each fault in a copy of the sources is found by a named check.

All faults are compiled at once, each as a choice that an environment variable makes when the code runs. What has a
fault runs in a process of its own; one that crashes or hangs there has not been found.
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
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import cuda_emulated as emulated
import pytest
import test_cuda
import torch
from building import ROOT
from cases import TERM_CASES, Case, TermCase, differentiate, expected, hold, inputs
from test_cuda import attend, run
from tolerance import GRADIENT, RESULT, check

import visattn_kernels as va
from visattn_kernels import reference
from visattn_kernels.backends import cuda

pytestmark = pytest.mark.full

WIDTHS = {numbers: listed for numbers, listed in emulated.NARROW.items() if listed}


class Mutant(NamedTuple):
    """A fault."""

    name: str
    file: str
    place: str  # an expression: what stands between « and »
    new: str  # what is put there
    check: str  # what finds it


PLAN, CHOOSE, ENGINE, BLOCK = "plan.h", "choose.cpp", "engine.cuh", "block.cuh"
FORWARD, BACKWARD = "forward.cuh", "backward.cuh"

FAULTS = (
    # which tiles there are, and what lies where in them
    ("blocks counted by rows", ENGINE, "block % «plan.blocks_x» * w", "plan.blocks_y", "neighbourhoods"),
    ("the class of another block", ENGINE, "region_of(t.part, «tile / blocks»)", "tile % t.part.classes()", "windows"),
    ("the last row of a block's box", ENGINE, "h = «last / grid.w - y + 1»", "greatest(last / grid.w - y, 1)", "terms"),
    ("a warp's box of other sides", ENGINE, "i % «plan.warp_w»;", "plan.warp_h", "neighbourhoods"),
    ("rows of a warp that overlap", ENGINE, "«warp * plan.warp_h») + i", "warp", "neighbourhoods"),
    ("a first position of another map", ENGINE, "t.batch = «item / plan.tiles»", "0", "windows"),
    ("boxes of keys half as large", PLAN, "(of_keys ? «2» : 1) * axis.size", "1", "terms"),
    ("boxes without the width of a block", PLAN, "range = least(«own - 1» +", "0", "terms"),
    (
        "boxes cut at a map's border",
        PLAN,
        "axis.border == Border::kZero && !of_keys ? «range» :",
        "least(range, longest)",
        "terms",
    ),
    ("tables shorter than a span", PLAN, "«int64_t(plan.box_w) + plan.own_w - 1»", "plan.box_w", "many_stages"),
    # which groups of slots are skipped
    ("a group's last slot but one more", BLOCK, "left < 16 ? «left - 1» : 15", "left", "neighbourhoods"),
    (
        "a group that ends at the last row",
        BLOCK,
        "p[0].y >= «reach_y + reach_h»",
        "reach_y + reach_h - 1",
        "neighbourhoods",
    ),
    (
        "a group that ends before the first row",
        BLOCK,
        "«p[last].y < reach_y»",
        "p[last].y <= reach_y",
        "neighbourhoods",
    ),
    (
        "the reach of half a warp",
        BLOCK,
        "«mask < 32»; mask *= 2) {\n      const int other",
        "mask < 16",
        "neighbourhoods",
    ),
    # masks
    ("no mask", BLOCK, "x = «member» ? x", "true", "neighbourhoods"),
    (
        "a window longer by one",
        BLOCK,
        "«uint32_t(far.y - r.first_y) < uint32_t(r.count_y)»",
        "uint32_t(far.y - r.first_y) <= uint32_t(r.count_y)",
        "neighbourhoods",
    ),
    ("a window of rows alone", BLOCK, "«uint32_t(far.x - r.first_x) < uint32_t(r.count_x)»", "true", "neighbourhoods"),
    ("slots past the last key", BLOCK, "return «slot < tile.count»;", "true", "windows"),
    ("one's own key twice", BLOCK, "!(«tile.part.others» &&", "false", "criss_cross"),
    ("the whole line of the other grid", BLOCK, "int(y.size()) : «int(far.h)»", "int(y.size())", "terms"),
    ("a column past the map", BLOCK, "p.x < «grid.w»;", "grid.w + 1", "neighbourhoods"),
    ("a removed key", BLOCK, "member && «bias != -kInfinity»", "true", "nan"),
    ("no mark of absent weights", FORWARD, "if («none») x = kAbsent", "false", "nan"),
    ("no mark of absent gradients", BACKWARD, "if («none») p = kAbsent", "false", "nan"),
    ("never careful in the forward", FORWARD, "C::kMasked && «careful»)", "false", "nan"),
    ("never careful in the backward", BACKWARD, "«any_not_finite(b.sums1)»", "false", "nan"),
    ("dead groups count as present", BLOCK, "weights[j][i] : «kAbsent»", "0.0f", "nan"),
    ("nothing fell on an offset", BLOCK, "sums_of(term, r)[i] = «kAbsent»", "0.0f", "nan"),
    ("a careful walk that forgets its terms", BACKWARD, "if («careful») return;\n#pragma", "false", "nan"),
    (
        "sums by entries, never careful",
        BLOCK,
        "buffer + k * (kWidth + C::kVector));\n        }\n        if («warp_any(any_not_finite(part))»)",
        "false",
        "nan",
    ),
    (
        "gradients of tables, never careful",
        BLOCK,
        "e = first + (lane() >> 2);\n        if («warp_any(any_not_finite(part))»)",
        "false",
        "nan",
    ),
    (
        "slots outside the map that are not zero",
        ENGINE,
        "copy_async(to + at, from + at, «present»)",
        "true",
        "neighbourhoods",
    ),
    ("lse of infinite scores", FORWARD, "«maximum[r] == kInfinity»", "false", "nan"),
    ("absent weights, carefully", ENGINE, "«!absent(weight[i >> 1])»", "true", "nan"),
    ("absent sums, carefully", BLOCK, "«!absent(x[i >> 1])»", "true", "nan"),
    ("dV never careful", BACKWARD, "|| «any_not_finite(b.sums2)»", "false", "nan"),
    (
        "careful by a thread's own sums",
        FORWARD,
        "!C::kMasked || careful || «!sync_block_or(any_not_finite(f.out))»",
        "!any_not_finite(f.out)",
        "nan",
    ),
    # barriers
    ("forward: before a stage is read", FORWARD, "«sync_block()»;\n      f.step", "void()", "schedules"),
    (
        "forward: before a stage is loaded again",
        FORWARD,
        "f.step(stage, start, careful);\n      «sync_block()»",
        "void()",
        "schedules",
    ),
    ("forward: copies on their way", FORWARD, "«copy_wait<1>()»", "copy_wait<2>()", "schedules"),
    (
        "forward: before slots' lookups are read",
        FORWARD,
        "this->far1(stage));\n        «sync_block()»",
        "void()",
        "schedules",
    ),
    (
        "backward: before the tile changes",
        BACKWARD,
        "«sync_block()»;\n    if (thread() == 0) *tile",
        "void()",
        "shares",
    ),
    ("backward: before a stage is read", BACKWARD, "«sync_block()»;\n          b.step", "void()", "schedules"),
    (
        "backward: before a stage is loaded again",
        BACKWARD,
        "b.step(stage, start, careful);\n          «sync_block()»",
        "void()",
        "schedules",
    ),
    ("backward: copies on their way", BACKWARD, "«copy_wait<1>()»", "copy_wait<2>()", "schedules"),
    (
        "backward: before slots' lookups are read",
        BACKWARD,
        "        }\n        «sync_block()»;\n      }",
        "void()",
        "schedules",
    ),
    (
        "backward: before all staged weights are read",
        BACKWARD,
        "«sync_block()»;\n        this->add_staged_bias",
        "void()",
        "schedules",
    ),
    (
        "backward: before weights are staged again",
        BACKWARD,
        "add_staged_bias(start);\n        «sync_block()»",
        "void()",
        "schedules",
    ),
    (
        "before a table's buffer is read",
        BLOCK,
        "copy_wait<0>(), «sync_block()»;\n        write_lookups",
        "void()",
        "schedules",
    ),
    (
        "before a table's buffer is loaded again",
        BLOCK,
        "to, span, first);\n        «sync_block()»",
        "void()",
        "schedules",
    ),
    (
        "before a warp stages weights again",
        BLOCK,
        "sums[v.sums_h + x] = sum;\n      }\n    }\n    «sync_warp()»",
        "void()",
        "schedules",
    ),
    (
        "before entries' buffer is loaded again",
        BLOCK,
        "part[n][i] * factor;\n        «sync_block()»",
        "void()",
        "schedules",
    ),
    # fragments
    ("operand b of other columns", ENGINE, "mma_k16<typename C::E>(scores[2 * j], a, «b[0]», b[1])", "b[2]", "layouts"),
    ("halves of operand b", ENGINE, "mma_k16<typename C::E>(scores[2 * j + 1], a, b[2], «b[3]»)", "b[1]", "layouts"),
    (
        "operand b of eight numbers",
        ENGINE,
        "mma_k8<typename C::E>(scores[2 * j + 1], a[0], a[1], «b[2]»)",
        "b[1]",
        "windows",
    ),
    ("rows below those of operand a", ENGINE, "mma_k8<typename C::E>(scores[2 * j], a[0], «a[1]»", "a[0]", "windows"),
    ("halves of near rows", ENGINE, "(l & 15) * kLd + «(l >> 4)» * C::kVector", "(1 - (l >> 4))", "windows"),
    ("halves of far rows", ENGINE, "«(l >> 3 & 1)» * C::kVector", "(1 - (l >> 3 & 1))", "windows"),
    ("not transposed", ENGINE, "«ldmatrix_transposed(b, row + 8 * n)»", "ldmatrix(b, row + 8 * n)", "windows"),
    ("columns of values", ENGINE, "mma_k16<typename C::E>(sums[n + 1], a, «b[2]», b[3])", "b[0]", "neighbourhoods"),
    ("registers of operand a", ENGINE, "as_bits(x[«(i & 1) * 2 + (i >> 1)»])", "i", "terms"),
    ("columns of a pair exchanged", ENGINE, "pack<typename C::E>(«x[2 * i]», x[2 * i + 1])", "x[2 * i + 1]", "windows"),
    ("the next columns", ENGINE, "operand<C>(a, weights[j], weights[«j + kChunks - 1»])", "j", "windows"),
    (
        "float32: rows that pair with columns",
        ENGINE,
        "second = column[«kLd + 8 * n»]",
        "4 * kLd + 8 * n",
        "neighbourhoods",
    ),
    ("a careful weight of another lane", ENGINE, "«(l & ~3) | column >> 1»", "(l & ~3) | (column & 3)", "nan"),
    ("a row's numbers of the row below", ENGINE, "second = «x[n][2 * r + 1]» * factor", "x[n][2 * r]", "windows"),
    # strides and heads
    ("v by k's places", BLOCK, "offset_of<kOfKeys>(tile.region, «second», p)", "first", "layouts"),
    ("v by k's channels", BLOCK, "«second.channel»,", "first.channel", "layouts"),
    ("v by k's heads", BLOCK, "«second.at(tile.batch, first_head)»", "first.at(tile.batch, first_head)", "layouts"),
    ("v copied as k is", BLOCK, "plan.vector[«3»]", "2", "layouts"),
    ("positions at odd addresses", CHOOSE, "«m.x % vector == 0»", "true", "layouts"),
    ("a map at an odd address", CHOOSE, "«reinterpret_cast<uintptr_t>(m.data) % 16 == 0»", "true", "layouts"),
    ("rows of slots without padding", BLOCK, "far1(stage) + slot * «C::kLd»", "C::kD", "windows"),
    ("a class that starts at zero", ENGINE, "«region.query_y.at(p.y)» * m.y", "p.y", "windows"),
    ("rows by columns' strides", ENGINE, "region.key_y.at(p.y) * «m.y»", "m.x", "windows"),
    (
        "the keys of another head",
        FORWARD,
        "«h / args.call.problem.group()»",
        "h % args.call.problem.kv_heads",
        "windows",
    ),
    ("the queries of another head", BLOCK, "first_head = kOfKeys ? «head» : kv_head", "kv_head", "windows"),
    ("one head of a group", BACKWARD, "(kOfKeys ? «p.group()» : 1)", "1", "windows"),
    ("rows of a table with gaps", BLOCK, "«table.column == 1»", "true", "layouts"),
    ("entries of a table at odd addresses", BLOCK, "«table.entry * bytes % 16 == 0»", "true", "layouts"),
    ("a table at an odd address", BLOCK, "«reinterpret_cast<uintptr_t>(table.data) % 16 == 0»", "true", "layouts"),
    ("rows with gaps", CHOOSE, "«m.channel == 1»", "true", "layouts"),
    ("heads at odd addresses", CHOOSE, "«m.head % vector == 0»", "true", "layouts"),
    ("maps at odd addresses", CHOOSE, "«m.batch % vector == 0»", "true", "layouts"),
    ("lines at odd addresses", CHOOSE, "«m.y % vector == 0»", "true", "layouts"),
    ("heads of a table at odd addresses", BLOCK, "«table.head * bytes % 16 == 0»", "true", "layouts"),
    # softmax
    ("sums that are not rescaled", FORWARD, "out[n][i] *= «rescale[i >> 1]»", "1.0f", "many_stages"),
    ("a total that is not rescaled", FORWARD, "total[r] = total[r] * «rescale[r]»", "1.0f", "many_stages"),
    ("lse without the total", FORWARD, "base / C::kUnit + «log2_fast(total[r])»", "0.0f", "windows"),
    ("lse in base 2", BLOCK, "m, p)] * «C::kUnit»", "1.0f", "windows"),
    ("the maximum of half a row", ENGINE, "return «__builtin_fmaxf(x, shuffle_xor(x, 2))»", "x", "many_stages"),
    ("the total of half a row", ENGINE, "return x + «shuffle_xor(x, 2)»", "0.0f", "windows"),
    ("a row of no key", FORWARD, "base = «most == -kInfinity» ? 0.0f : most", "false", "terms"),
    ("the part before forgotten", FORWARD, "maximum[r] = before, «total[r] = 1»", "total[r] = 0", "criss_cross"),
    ("not divided by the total", FORWARD, "none ? 0.0f : «1.0f / total[r]»", "1.0f", "windows"),
    ("a row of no key divided by its total", FORWARD, "«none» ? 0.0f : 1.0f", "false", "terms"),
    ("the last part left in the sum", FORWARD, "to = last ? «call.out» : from()", "from()", "criss_cross"),
    # terms
    ("the bias of the opposite offset", BLOCK, "y = kOfKeys ? «near.y - far.y»", "far.y - near.y", "terms"),
    (
        "rows of the bias as columns",
        BLOCK,
        "«bias_entry(rows[r].place, far)»",
        "bias_entry(far, rows[r].place)",
        "terms",
    ),
    ("the bias of the first head", BLOCK, "call.bias.data) + «head» * call.bias.head", "0", "terms"),
    ("the table of the first head", BLOCK, "table.data) + «head» * table.head", "0", "terms"),
    (
        "an entry next to the offset's",
        BLOCK,
        "table_entry(«span.first + e», plan.reach[axis]);\n    load_row",
        "greatest(span.first + e - 1, 1 - plan.reach[axis])",
        "terms",
    ),
    ("a span that ends early", BLOCK, "int(least(last, k - 1) - from + «1»)", "0", "terms"),
    ("offsets of keys counted backwards", BLOCK, "of_queries ? own + offset : «own - offset»", "own + offset", "terms"),
    ("the factor of a term", BLOCK, "1.0f : «float(call.vector_scale[term])» * C::kUnit", "1.0f", "terms"),
    ("lookups of rows for columns", BLOCK, "numbers[«v.lookup_h» + (near", "0", "terms"),
    ("a stage's last row of sums", BLOCK, "y <= «last_y»; ++y", "last_y - 1", "terms"),
    ("sums that are not rescaled, of rows", BLOCK, "sums[y] * «factor»", "1.0f", "many_stages"),
    ("sums of the upper row", BLOCK, "row(«i >> 1 & 1»), span.first", "0", "terms"),
    ("bias sums past a stage", BLOCK, "s >= 0 && «s < end»", "true", "many_stages"),
    ("a table's terms left out of dQ and dK", BACKWARD, "b.sums1[n][j] += «b.extra[n][j]»", "0.0f", "terms"),
    (
        "a gradient without the term's factor",
        BACKWARD,
        "(kTerm, extra, «float(call.vector_scale[kTerm])»)",
        "1.0f",
        "terms",
    ),
    ("the share of another head", BACKWARD, "share * call.problem.heads + «head»", "0", "shares"),
    (
        "a share of the last tile",
        BLOCK,
        "«entry[8 * n + 2 * (lane() & 3) + c] += part[n][2 * i + c] * factor»",
        "entry[8 * n + 2 * (lane() & 3) + c] = part[n][2 * i + c] * factor",
        "shares",
    ),
    (
        "bias shares of the last tile",
        BACKWARD,
        "«to[e] += shared<float>(plan.bias_sums)[e]»",
        "to[e] = shared<float>(plan.bias_sums)[e]",
        "shares",
    ),
    ("a key bias's gradient of the last part", BACKWARD, "call.part == 0 ? sum : «to + sum»", "sum", "criss_cross"),
    ("a bias of a key outside the map", BLOCK, "numbers[slot] = «present» ? key_bias", "there", "terms"),
    (
        "bias sums of the tile before",
        BACKWARD,
        "«shared<float>(plan.bias_sums)[e] = 0»",
        "shared<float>(plan.bias_sums)[e] += 0",
        "shares",
    ),
    ("sums of a row that go on with the next", BLOCK, "stop = «(y + 1) * width < end» ?", "false", "terms"),
    ("sums that are not rescaled, of columns", BLOCK, "sums[v.sums_h + x] * «factor»", "1.0f", "many_stages"),
    ("sums rescaled as other rows", BLOCK, "shuffle(rescale[0], «(i & 7) * 4»)", "i & 7", "many_stages"),
    # backward
    ("no delta", BACKWARD, "x - («kOfKeys ? column_delta : delta[r]»)", "0.0f", "windows"),
    ("lse for delta", BACKWARD, "numbers[«kSlots + column»]", "column", "windows"),
    ("no scale", BACKWARD, "b.sums1[n][j] *= «scale»", "1.0f", "windows"),
    ("dV from dS", BACKWARD, "multiply_columns<C, C::kDv, kSlots>(sums2, «weights»", "gradients", "windows"),
    ("dK from P", BACKWARD, "multiply_columns<C, C::kD, kSlots>(sums1, «gradients»", "weights", "windows"),
    (
        "no gradient of lse",
        BACKWARD,
        "sum - «static_cast<const float*>(call.grad_lse.data)[at(call.grad_lse)]»",
        "0.0f",
        "windows",
    ),
    ("delta of half the channels", BACKWARD, "for (int mask = 1; «mask < 32»; mask *= 2) sum", "mask < 16", "windows"),
    ("gradients of the part before", BACKWARD, "x[n][2 * r + c] += «old[n][2 * r + c]»", "0.0f", "criss_cross"),
)
MUTANTS = [Mutant(*fault) for fault in FAULTS]
FEWER_SHARES = ("kShares = 1024", "kShares = 4")  # so that small problems deal their tiles
CHOICE = """
#include <cstdlib>
inline int mutant() {
  static const char* const number = std::getenv("VISATTN_MUTANT");
  static const int chosen = number ? std::atoi(number) : -1;
  return chosen;
}
"""


def mutate(csrc: Path) -> None:
    """Put every fault into the sources, each of which works if the environment names its number."""
    choices: dict[tuple[str, str], str] = {}
    for number, fault in enumerate(MUTANTS):
        place = fault.file, fault.place
        choices[place] = choices.get(place, "") + f"mutant() == {number} ? ({fault.new}) : "
    edits: dict[str, list[tuple[int, int, str]]] = {file: [] for file, _ in choices}
    texts = {file: (csrc / "cuda" / file).read_text() for file in edits}
    for (file, place), choice in choices.items():
        match = re.fullmatch("(.*)«(.+)»(.*)", place, re.S)
        assert match, f"no « and »: {place}"
        before, old, after = match.groups()
        text = before + old + after
        assert texts[file].count(text) == 1, f"{file}: {texts[file].count(text)} places, not one: {place}"
        start = texts[file].index(text) + len(before)
        edits[file].append((start, start + len(old), f"({choice}({old}))"))
    for file, found in edits.items():
        text, done = texts[file], len(texts[file])
        for start, end, new in sorted(found, reverse=True):
            assert end <= done, f"{file}: two places overlap: {texts[file][start:end]}"
            text, done = text[:start] + new + text[end:], start
        (csrc / "cuda" / file).write_text(text)
    include = "#include <cstdint>\n"
    for path, old, new in (
        (csrc / "pattern.h", include, include + CHOICE),
        (csrc / "cuda" / PLAN, *FEWER_SHARES),
    ):
        text = path.read_text()
        assert text.count(old) == 1, f"{path.name}: {text.count(old)} places, not one: {old}"
        path.write_text(text.replace(old, new))


def half(pattern, grid: tuple[int, int], *terms: TermCase, wide: bool = False, **fields) -> Case:
    """A small case in float16, of D and Dv 8 or, if `wide`, 16 and 32."""
    d, dv = (16, 32) if wide else (8, 8)
    shapes = {"batch": 1, "queries": grid, "keys": grid, "heads": 1, "kv_heads": 1, "head_dim": d, "value_dim": dv}
    return Case(dtype=torch.float16, pattern=pattern, terms=terms, **{**shapes, **fields})


def single(pattern, grid: tuple[int, int], *terms: TermCase, **fields) -> Case:
    """A small case in float32."""
    return replace(half(pattern, grid, *terms, **fields), dtype=torch.float32)


BIAS, QUERY, KEY, VALUE, KEY_BIAS = EVERYTHING = tuple(options[0] for options in TERM_CASES)
PER_HEAD = [replace(term, per_head=True) for term in (QUERY, KEY, VALUE)]
GROUPED = {"batch": 2, "heads": 4, "kv_heads": 2}

CASES: dict[str, tuple[Case, ...]] = {
    # the least kind of kernel
    "windows": (
        half(va.Window(4, shift=(1, 3)), (7, 11), **GROUPED),
        half(va.Global(), (9, 11)),
        half(va.Grid(2), (5, 7), wide=True),
        half(va.Window((9, 11), shift=(2, 0)), (20, 13)),
        single(va.Global(), (5, 7), keys=(6, 11), heads=2),
    ),
    "neighbourhoods": (
        half(va.Neighborhood(5), (11, 19)),
        half(va.Neighborhood((4, 3), dilation=(1, 2), border="zero"), (7, 11), wide=True),
        half(va.Neighborhood((3, 5), border="mask", is_causal=(True, False)), (7, 11)),
        half(va.Row(5), (3, 40)),
        single(va.Neighborhood(3, border="zero"), (9, 11)),
    ),
    # two parts, of which the second goes on from the first
    "criss_cross": (
        half(va.CrissCross(), (7, 11)),
        half(va.CrissCross(), (3, 5), KEY_BIAS, heads=2),
        half(va.CrissCross(), (3, 5), TermCase("KeyBias", removed=0.9), VALUE),
        single(va.CrissCross(), (5, 7), TermCase("KeyBias", per_head=True)),
    ),
    "terms": (
        half(va.Neighborhood(3), (7, 11), *EVERYTHING, wide=True),
        half(va.Window(5, shift=2), (7, 11), BIAS, KEY_BIAS, heads=2),
        half(va.Window((6, 11)), (13, 11), QUERY, VALUE),
        single(va.Neighborhood(3, dilation=(1, 2), border="zero"), (7, 11), *EVERYTHING),
        single(va.Window((9, 11)), (9, 11), *EVERYTHING, heads=2),
        single(va.Row(5), (2, 21), QUERY, PER_HEAD[1], heads=2),
        single(va.Global(), (5, 7), KEY_BIAS, keys=(4, 11)),
        single(va.Window(2), (5, 7), TermCase("KeyBias", removed=0.8)),
        half(va.Neighborhood((1, 11)), (2, 27), QUERY, KEY),
    ),
    # more keys than a stage has slots, of very different scores
    "many_stages": (
        half(va.Global(), (9, 17), spread=4.0, wide=True),
        single(va.Global(), (9, 11), spread=4.0),
        half(va.Row(), (1, 100), *EVERYTHING),
    ),
    # q, k, v and the gradient of out each with strides of its own
    "layouts": (
        half(va.Window(4), (5, 7), layouts=("packed", "strided", "contiguous", "transposed"), wide=True, **GROUPED),
        single(va.Window(4), (5, 7), layouts=("nchw", "offset", "channels_last", "packed"), **GROUPED),
        half(va.Neighborhood(3), (5, 7), layouts=("contiguous", "contiguous", "offset", "nchw"), **GROUPED),
        half(va.Window(3), (5, 7), *(replace(term, layout="strided") for term in (BIAS, *PER_HEAD)), **GROUPED),
    ),
    # blocks that go on with another tile
    "shares": (
        half(va.Global(), (3, 5), BIAS, batch=7),
        half(va.Window(2), (5, 7), *EVERYTHING, heads=2, batch=2),
        single(va.CrissCross(), (3, 5), BIAS, VALUE, heads=2),
    ),
    "schedules": (
        half(va.Global(), (9, 17)),
        half(va.Neighborhood(5), (9, 21), wide=True),
        half(va.Row(), (1, 70), QUERY, VALUE),
        half(va.Global(), (9, 9), *EVERYTHING),
    ),
}


def hold_cases(name: str) -> None:
    for case in CASES[name]:
        hold(case, run(case))


def hold_layouts() -> None:
    """Also strides of which one alone is odd, on which nothing but a copy of 16 bytes depends."""
    hold_cases("layouts")
    for odd in range(5):
        tensors = {name: x if name.startswith("grad_lse") else spread_out(x, odd) for name, x in inputs(UNEVEN).items()}
        hold(UNEVEN, differentiate(attend(UNEVEN), tensors, UNEVEN.wanted))


UNEVEN = half(va.Window(3), (5, 7), *PER_HEAD, **GROUPED)


def spread_out(x: torch.Tensor, odd: int) -> torch.Tensor:
    """A tensor equal to `x`, all strides of which but that of one axis are whole numbers of 16 bytes.

    Args:
        x: of 16-bit numbers.
        odd: the axis, counted from the last but one; 4: the address, and all strides are even.
    """
    strides, extent = [1], x.shape[-1]
    for axis, length in enumerate(reversed(x.shape[:-1])):
        strides.append(-(-extent // 8) * 8 + (axis == odd))
        extent += (length - 1) * strides[-1]
    memory = torch.full((extent + 1,), torch.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, strides[::-1], int(odd == 4)).copy_(x)


def hold_schedules() -> None:
    """Every order in which the emulator lets threads run gives the same bits."""
    for case in CASES["schedules"]:
        emulated.control()
        first = run(case)
        hold(case, first)
        for schedule in emulated.SCHEDULES[1:]:
            emulated.control(schedule)
            for name, x in run(case).items():
                assert torch.equal(x, first[name]), f"{name} of schedule {schedule}"


class Bad(NamedTuple):
    """A problem with a NaN, and a removed key that is another."""

    case: Case
    where: str
    at: tuple[int, int] = (3, 5)
    removed: tuple[int, int] = (2, 2)


BAD = (
    *(
        Bad(half(pattern, (7, 11), BIAS, QUERY, KEY, VALUE, TermCase("KeyBias")), where)
        for pattern in (va.Neighborhood(3, border="zero"), va.CrissCross())
        for where in ("k", "v", "q", "grad_out", "relative_key_w", "relative_value_h")
    ),
    # of the first block of keys, the query sees the removed one alone
    Bad(half(va.Neighborhood((1, 3)), (2, 20), TermCase("KeyBias")), "grad_out", (0, 8), (0, 7)),
)


def bad_tensors(bad: Bad) -> dict[str, torch.Tensor]:
    tensors, (y, x), (gone_y, gone_x) = inputs(bad.case), bad.at, bad.removed
    tensors["key_bias"][0, gone_y, gone_x] = -torch.inf
    tensors["k"][0, gone_y, gone_x] = torch.nan
    if bad.where.startswith("relative"):
        tensors[bad.where][..., 0, 0] = torch.nan  # the longest offset, which few pairs have
    else:
        tensors[bad.where][0, y, x, 0, 1] = torch.nan
    return tensors


@cache
def expected_of_bad(bad: Bad):
    """R and L, and G of the policy as if nothing were bad."""
    case, tensors = bad.case, bad_tensors(bad)

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **extra: torch.Tensor):
        return reference.formula(q, k, v, case.pattern, scale=case.true_scale, terms=case.build_terms(extra))

    exact = differentiate(formula, {name: x.double() for name, x in tensors.items()}, case.wanted)
    return exact, differentiate(formula, tensors, case.wanted), expected(case)[0]["sizes"]


def hold_nan() -> None:
    """A NaN reaches what it reaches in the reference, and the rest is as exact as ever; so with an infinite score."""
    for bad in BAD:
        exact, eager, sizes = expected_of_bad(bad)
        for name, x in differentiate(attend(bad.case), bad_tensors(bad), bad.case.wanted).items():
            factor = GRADIENT if name.startswith("grad_") else RESULT
            check(name, x, exact[name], eager[name], bad.case.dtype, factor, None, sizes.get(name))
    test_cuda.test_nan_and_inf_reach_what_they_reach_in_the_reference(va.Neighborhood(3), torch.inf, "q")


CHECKS: dict[str, Callable[[], None]] = {
    **{name: partial(hold_cases, name) for name in CASES},
    "layouts": hold_layouts,
    "schedules": hold_schedules,
    "nan": hold_nan,
}


def prepare(name: str) -> None:
    """Work out what a check compares with, which is the same for every fault."""
    for case in CASES.get(name, ()):
        expected(case)
    if name == "layouts":
        expected(UNEVEN)
    if name == "nan":
        for bad in BAD:
            expected_of_bad(bad)


Ask = Callable[[str, int], str]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """What becomes of a check with a fault, or with none (-1)."""
    csrc = tmp_path_factory.mktemp("mutants") / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    mutate(csrc)
    library = emulated.build(csrc, WIDTHS, sanitize=False)
    # Another process, since this one may have the operators of test_cuda; without the threads that autograd has for a
    # GPU, which would not live on in a fork.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(library)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout
        questions, answers = server.stdin, server.stdout

        def answer(check: str, number: int) -> str:
            print(check, number, file=questions, flush=True)
            return answers.readline().strip()

        yield answer
        questions.close()


def serve() -> None:
    """Answer what becomes of checks."""
    torch.set_num_threads(1)
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
        os.write(write, " ".join(attempt(check).split()).encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    return text if status == 0 else f"died: {status}"


def attempt(check: str) -> str:
    try:
        CHECKS[check]()
    except (AssertionError, RuntimeError) as error:  # the emulator's reports are the latter
        return f"found: {error}"
    except BaseException:
        return f"broke: {traceback.format_exc()}"
    return "held"


@pytest.mark.parametrize("check", CHECKS)
def test_the_copy_without_a_fault_holds(ask: Ask, check: str) -> None:
    assert ask(check, -1) == "held"


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=lambda number: MUTANTS[number].name)
def test_fault_is_found(ask: Ask, number: int) -> None:
    assert re.match("found: ", ask(MUTANTS[number].check, number))


def test_every_check_finds_a_fault() -> None:
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


if __name__ == "__main__":
    serve()
