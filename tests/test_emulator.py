"""The emulator of CUDA kernels, primitive by primitive, against tables worked out from the PTX ISA manual.

Two wrong primitives can agree: the layouts of fragments stand here once more, as the manual writes them, and share
nothing with csrc/emulator. The same file runs again on a build with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import building
import compiled
import pytest
from building import ROOT, run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
else:
    np = pytest.importorskip("numpy")

SANITIZE = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
SANITIZED = os.environ.get("VISATTN_SANITIZE") == "1"
SCHEDULES = ("forward", "reverse", "random", "warp-greedy forward", "warp-greedy reverse", "warp-greedy random")
GREEDY = [name for name in SCHEDULES if "greedy" in name]
LANES = range(32)


def build() -> ModuleType:
    return compiled.emulated(*(SANITIZE if SANITIZED else ()))


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return build()


@pytest.fixture
def emulated(module: ModuleType) -> Iterator[ModuleType]:
    """The module, with its settings put back afterwards."""
    before = module.schedule()
    yield module
    module.set_schedule(before)
    module.set_seed(1)
    module.set_max_grid_x(2**31 - 1)


@pytest.fixture(params=SCHEDULES)
def scheduled(request: pytest.FixtureRequest, emulated: ModuleType) -> ModuleType:
    """The module under each schedule."""
    emulated.set_schedule(SCHEDULES.index(request.param))
    return emulated


def bits(x: object) -> Array:
    """Floats as words."""
    return np.asarray(x, np.float32).view(np.uint32)


def floats(words: Array) -> Array:
    return np.ascontiguousarray(words).view(np.float32)


# Layouts of fragments: the row and the column of element i of a lane, as in the manual's section on each shape. Of
# 16-bit types, elements 2 r and 2 r + 1 lie in the low and the high half of register r.
Layout = Callable[[int, int], tuple[int, int]]


def group(lane: int) -> int:
    return lane >> 2


def thread_in_group(lane: int) -> int:
    return lane % 4


def a_m16n8k16(lane: int, i: int) -> tuple[int, int]:
    row = group(lane) if 0 <= i < 2 or 4 <= i < 6 else group(lane) + 8
    column = thread_in_group(lane) * 2 + (i & 1) + (0 if i < 4 else 8)
    return row, column


def b_m16n8k16(lane: int, i: int) -> tuple[int, int]:
    row = thread_in_group(lane) * 2 + (i & 1) + (0 if i < 2 else 8)
    return row, group(lane)


def a_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    row = group(lane) if i < 2 else group(lane) + 8
    return row, thread_in_group(lane) * 2 + (i & 1)


def b_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    return thread_in_group(lane) * 2 + i, group(lane)


def a_m16n8k8_tf32(lane: int, i: int) -> tuple[int, int]:
    row = group(lane) if i in (0, 2) else group(lane) + 8
    column = thread_in_group(lane) if i in (0, 1) else thread_in_group(lane) + 4
    return row, column


def b_m16n8k8_tf32(lane: int, i: int) -> tuple[int, int]:
    return (thread_in_group(lane) if i == 0 else thread_in_group(lane) + 4), group(lane)


def c_m16n8(lane: int, i: int) -> tuple[int, int]:
    row = group(lane) if i < 2 else group(lane) + 8
    return row, thread_in_group(lane) * 2 + (i & 1)


def word(x: float, kind: str) -> int:
    """A number that the type holds exactly, as bits."""
    if kind == "f16":
        return int(struct.unpack("<H", struct.pack("<e", x))[0])
    (single,) = struct.unpack("<I", struct.pack("<f", x))
    if kind == "bf16":
        assert single & 0xFFFF == 0
        return int(single >> 16)
    return int(single)


def fragment(matrix: Array, layout: Layout, registers: int, kind: str) -> Array:
    """A matrix in the registers of 32 lanes, [32, registers]."""
    elements = registers * (2 if kind in ("f16", "bf16") else 1)
    words = np.zeros((32, registers), np.uint32)
    for lane in LANES:
        for i in range(elements):
            at = word(float(matrix[layout(lane, i)]), kind)
            if kind in ("f16", "bf16"):
                words[lane, i // 2] |= np.uint32(at << 16 * (i % 2))
            else:
                words[lane, i] = at
    return words


def matrix_of(words: Array) -> Array:
    """The accumulators of 32 lanes as a matrix."""
    d = np.full((16, 8), np.nan, np.float32)
    for lane in LANES:
        for i in range(4):
            d[c_m16n8(lane, i)] = floats(words[lane])[i]
    return d


SHAPES: dict[str, tuple[int, Layout, int, Layout, int, str]] = {
    "mma_k16 f16": (16, a_m16n8k16, 4, b_m16n8k16, 2, "f16"),
    "mma_k16 bf16": (16, a_m16n8k16, 4, b_m16n8k16, 2, "bf16"),
    "mma_k8 f16": (8, a_m16n8k8, 2, b_m16n8k8, 1, "f16"),
    "mma_k8 bf16": (8, a_m16n8k8, 2, b_m16n8k8, 1, "bf16"),
    "mma_tf32": (8, a_m16n8k8_tf32, 4, b_m16n8k8_tf32, 2, "f32"),
    "mma_fp32": (8, a_m16n8k8_tf32, 4, b_m16n8k8_tf32, 2, "f32"),
}


def multiply(emulated: ModuleType, name: str, a: Array, b: Array, c: Array) -> Array:
    """D = A B + C by one mma; registers that the shape has not hold NaN, which must not matter."""
    _, a_layout, a_registers, b_layout, b_registers, kind = SHAPES[name]
    rows = np.full((32, 10), 0xFFFFFFFF, np.uint32)
    rows[:, :4] = fragment(c, c_m16n8, 4, "f32")
    rows[:, 4 : 4 + a_registers] = fragment(a, a_layout, a_registers, kind)
    rows[:, 8 : 8 + b_registers] = fragment(b, b_layout, b_registers, kind)
    return matrix_of(emulated.run(name, rows))


@pytest.mark.parametrize("name", SHAPES)
def test_layouts_cover_each_matrix_once(name: str) -> None:
    k, a_layout, a_registers, b_layout, b_registers, kind = SHAPES[name]
    per = 1 if kind == "f32" else 2
    for layout, elements, shape in (
        (a_layout, a_registers * per, (16, k)),
        (b_layout, b_registers * per, (k, 8)),
        (c_m16n8, 4, (16, 8)),
    ):
        places = sorted(layout(lane, i) for lane in LANES for i in range(elements))
        assert places == sorted(np.ndindex(*shape))


@pytest.mark.parametrize("name", SHAPES)
def test_mma(scheduled: ModuleType, name: str) -> None:
    """Small whole numbers, so that every sum is exact."""
    k, rng = SHAPES[name][0], np.random.default_rng(3)
    for _ in range(4):
        a, b, c = (rng.integers(-9, 10, size).astype(np.float64) for size in ((16, k), (k, 8), (16, 8)))
        assert (multiply(scheduled, name, a, b, c) == a @ b + c).all()


@pytest.mark.parametrize("name", SHAPES)
def test_mma_of_one_element_each(emulated: ModuleType, name: str) -> None:
    """A one in each place of A and of B shows in the one place of D where it belongs, in float32."""
    k = SHAPES[name][0]
    for inner in range(k):
        row, column = inner * 5 % 16, inner * 3 % 8
        a, b, c = np.zeros((16, k)), np.zeros((k, 8)), np.full((16, 8), 2.0**-20)
        a[row, inner], b[inner, column] = 1, 3
        expected = c.copy()
        expected[row, column] = 3 + 2.0**-20
        assert (multiply(emulated, name, a, b, c) == expected).all()


@pytest.mark.parametrize("name", SHAPES)
def test_mma_of_nan_and_infinity(emulated: ModuleType, name: str) -> None:
    k = SHAPES[name][0]
    a, b, c = np.ones((16, k)), np.ones((k, 8)), np.zeros((16, 8))
    a[3, k - 1], a[5, 0], b[2, 6] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(multiply(emulated, name, a, b, c), a @ b + c)


def test_mma_f16_takes_subnormals(emulated: ModuleType) -> None:
    a, b = np.full((16, 16), 2.0**-24), np.full((16, 8), 2.0**-15)
    assert (multiply(emulated, "mma_k16 f16", a, b, np.zeros((16, 8))) == 2.0**-35).all()


def test_mma_tf32_ignores_the_low_13_bits(emulated: ModuleType) -> None:
    a, b = np.full((16, 8), 1 + 2.0**-10 + 2.0**-11), np.full((8, 8), 1 + 2.0**-23)
    d = multiply(emulated, "mma_tf32", a, b, np.zeros((16, 8)))
    assert (d == 8 * (1 + 2.0**-10)).all()


def nearest_float(x: Fraction) -> float:
    """Of a normal number, to even."""
    if not x:
        return 0.0
    exponent = math.frexp(float(x))[1] - 24
    return math.ldexp(round(x / Fraction(2) ** exponent), exponent)  # round() goes to even


def test_mma_fp32_is_multiply_adds_in_order(emulated: ModuleType) -> None:
    """All 24 bits of the operands, one rounding for each step."""
    rng = np.random.default_rng(5)
    a, b, c = (rng.standard_normal(size).astype(np.float32) for size in ((16, 8), (8, 8), (16, 8)))
    expected = np.empty((16, 8), np.float32)
    for row, column in np.ndindex(16, 8):
        x = float(c[row, column])
        for k in range(8):
            x = nearest_float(Fraction(float(a[row, k])) * Fraction(float(b[k, column])) + Fraction(x))
        expected[row, column] = x
    assert (multiply(emulated, "mma_fp32", a, b, c) == expected).all()


def test_ldmatrix(scheduled: ModuleType) -> None:
    """Lane 8 i + j names row j of matrix i, anywhere; lane l gets two elements of row l / 4, from 2 (l % 4) on."""
    rng = np.random.default_rng(7)
    memory = rng.integers(0, 2**16, 8 * 80, dtype=np.uint16)
    for transposed in (False, True):
        offsets = rng.permutation(80)[:32] * 16
        loaded = scheduled.run(
            "ldmatrix_transposed" if transposed else "ldmatrix", offsets[:, None], 32, memory.tobytes()
        )
        for i in range(4):
            matrix = [memory[offsets[8 * i + row] // 2 :][:8] for row in range(8)]
            for lane in LANES:
                row, column = lane // 4, lane % 4 * 2
                low, high = (
                    (matrix[column][row], matrix[column + 1][row])
                    if transposed
                    else (matrix[row][column], matrix[row][column + 1])
                )
                assert loaded[lane, i] == int(low) | int(high) << 16


def test_ldmatrix_gives_the_fragments_of_mma(emulated: ModuleType) -> None:
    """What kernels rest on: A from rows, B from the rows of its transpose, or from its own rows by .trans."""
    rng = np.random.default_rng(8)
    a, b = (rng.integers(-9, 10, size).astype(np.float16) for size in ((16, 16), (16, 8)))
    lanes = np.arange(32)
    rows = ((lanes % 16) * 16 + lanes // 16 * 8)[:, None] * 2
    loaded = emulated.run("ldmatrix", rows, 32, a.tobytes())
    assert (loaded == fragment(a, a_m16n8k16, 4, "f16")).all()
    expected = fragment(b, b_m16n8k16, 2, "f16")
    loaded = emulated.run("ldmatrix_transposed", (lanes % 16)[:, None] * 16, 32, b.tobytes())
    assert (loaded[:, :2] == expected).all()
    rows = (lanes % 8 * 16 + lanes // 8 % 2 * 8)[:, None] * 2
    loaded = emulated.run("ldmatrix", rows, 32, np.ascontiguousarray(b.T).tobytes())
    assert (loaded[:, :2] == expected).all()


def test_shuffles(scheduled: ModuleType) -> None:
    rng = np.random.default_rng(9)
    values = rng.integers(0, 2**32, 64, dtype=np.uint32)
    values[5], values[40] = 0x7F800001, 0xFFFFFFFF  # NaN goes through as it is
    warps = values.reshape(2, 32)
    for _ in range(8):
        lanes = rng.integers(0, 32, (2, 32))
        out = scheduled.run("shuffle", np.stack([values, lanes.ravel()], 1), 64)
        expected = np.take_along_axis(warps, lanes, 1).ravel()
        assert (out[:, :3] == expected[:, None]).all()
    for mask in (0, 1, 2, 4, 8, 16, 31):
        out = scheduled.run("shuffle_xor", np.stack([values, np.full(64, mask)], 1), 64)
        assert (out[:, :3] == warps[:, np.arange(32) ^ mask].ravel()[:, None]).all()


@pytest.mark.parametrize("where", [[], [0], [31], [32], [70, 95], list(range(96))])
def test_votes(scheduled: ModuleType, where: list[int]) -> None:
    predicate = np.zeros((96, 1), np.uint32)
    predicate[where] = 1
    out = scheduled.run("any", predicate, 96)
    assert (out[:, 0].reshape(3, 32) == predicate.reshape(3, 32).any(1, keepdims=True)).all()
    assert (out[:, 1] == bool(where)).all()
    assert (out[:, 2] == 0).all()


def test_places(scheduled: ModuleType) -> None:
    out = scheduled.run("place", np.zeros((96, 1), np.uint32), 96)
    threads = np.arange(96)
    assert (out == np.stack([threads, threads % 32, threads // 32, 0 * threads], 1)).all()


def test_a_warp_need_not_be_whole_for_a_barrier(scheduled: ModuleType) -> None:
    """A block of 40 threads has barriers, and no collectives of its second warp."""
    assert (scheduled.run("place", np.zeros((40, 1), np.uint32), 40)[:, 0] == np.arange(40)).all()
    with pytest.raises(RuntimeError, match="warp 1 lane 8 is not in the block"):
        scheduled.run("shuffle", np.zeros((40, 2), np.uint32), 40)


def convert(emulated: ModuleType, name: str, *columns: Array) -> Array:
    out: Array = emulated.run(name, np.stack(columns, 1))
    return out[:, 0]


def hard_floats(places: int) -> Array:
    """Words around what a type with so many places of mantissa rounds: ties, halves of the least, overflow, NaN."""
    step = 1 << 23 - places
    rng = np.random.default_rng(11)
    bases = np.concatenate([np.arange(256) << 23, rng.integers(0, 2**31, 4000)]) // step * step
    around = [0, 1, step // 2 - 1, step // 2, step // 2 + 1, step - 1, -1, -(step // 2), 3 * step // 2]
    words = (bases[:, None] + np.array(around)).ravel()
    special = [0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    special += list(bits([65504, 65519.99, 65520, 65536, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-14]))
    words = np.concatenate([words, special]).astype(np.uint32) & np.uint32(0x7FFFFFFF)
    both: Array = np.concatenate([words, words | np.uint32(0x80000000)])
    return both


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_to_float_against_torch(emulated: ModuleType, kind: str) -> None:
    """Every pattern of 16 bits; NaN stays what it is but for being quiet."""
    torch = pytest.importorskip("torch")
    words = np.arange(2**16, dtype=np.uint32)
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    expected = torch.from_numpy(words.astype(np.uint16).view(np.int16)).view(dtype).float().numpy()
    found = floats(convert(emulated, f"to_float {kind}", words))
    nan = np.isnan(expected)
    assert nan.any()
    assert (np.isnan(found) == nan).all()
    assert (bits(found)[~nan] == bits(expected)[~nan]).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_from_float_against_torch(emulated: ModuleType, kind: str) -> None:
    torch = pytest.importorskip("torch")
    words = hard_floats(10 if kind == "f16" else 7)
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    expected = torch.from_numpy(floats(words)).to(dtype).view(torch.int16).numpy().view(np.uint16)
    found = convert(emulated, f"from_float {kind}", words)
    nan = np.isnan(floats(words))
    assert nan.any()
    assert (found[nan] == 0x7FFF).all()  # cvt has one NaN for these types
    assert (found[~nan] == expected[~nan]).all()
    back = floats(convert(emulated, f"to_float {kind}", found))
    assert (np.isnan(back) == nan).all()


def test_conversions_by_hand(emulated: ModuleType) -> None:
    """Without torch: ties to even, subnormals, overflow, both zeros."""
    tie = 2.0**-11
    f16 = [(1, 0x3C00), (1 + tie, 0x3C00), (1 + 3 * tie, 0x3C02), (65519.9, 0x7BFF), (65520, 0x7C00), (-65520, 0xFC00)]
    f16 += [(2.0**-24, 1), (2.0**-25, 0), (1.5 * 2.0**-24, 2), (-0.0, 0x8000), (2.0**-14, 0x400), (np.inf, 0x7C00)]
    bf16 = [(1, 0x3F80), (1 + 2.0**-8, 0x3F80), (1 + 3 * 2.0**-8, 0x3F82), (3.4e38, 0x7F80), (-0.0, 0x8000)]
    for kind, table in (("f16", f16), ("bf16", bf16)):
        found = convert(emulated, f"from_float {kind}", bits([x for x, _ in table]))
        assert found.tolist() == [y for _, y in table]
    words = hard_floats(10)
    out = emulated.run("float", words[:, None])
    assert (out[:, :2] == words[:, None]).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pack_has_the_first_number_low(emulated: ModuleType, kind: str) -> None:
    words = hard_floats(10 if kind == "f16" else 7)
    other = np.random.default_rng(13).permutation(words)
    low, high = (convert(emulated, f"from_float {kind}", x) for x in (words, other))
    assert (convert(emulated, f"pack {kind}", words, other) == (low | high << 16)).all()
    one, two = bits([1.0, 2.0])[:, None]
    assert convert(emulated, f"pack {kind}", one, two)[0] == word(1, kind) | word(2, kind) << 16


def test_to_tf32_rounds_ties_away(emulated: ModuleType) -> None:
    words = hard_floats(10)
    with np.errstate(invalid="ignore"):
        x = floats(words).astype(np.float64)
    found = floats(convert(emulated, "to_tf32", words))
    nan = np.isnan(x)
    assert np.isnan(found[nan]).all()
    finite = np.isfinite(x)
    unit = np.ldexp(1.0, np.maximum(np.frexp(x[finite])[1] - 1, -126) - 10)
    expected = np.copysign(np.floor(np.abs(x[finite]) / unit + 0.5) * unit, x[finite])
    with np.errstate(over="ignore"):
        assert (bits(found[finite]) == bits(expected.astype(np.float32))).all()
    infinite = np.isinf(x)
    assert (found[infinite] == x[infinite]).all()


def test_exp2_and_log2(emulated: ModuleType) -> None:
    """Within the error that the manual allows the instructions; special values as in its tables."""
    x = np.random.default_rng(15).uniform(-125, 127, 20000).astype(np.float32)
    found = floats(convert(emulated, "exp2_fast", bits(x))).astype(np.float64)
    assert (np.abs(found / np.exp2(x.astype(np.float64)) - 1) < 2.0**-22).all()
    y = np.exp2(x)
    found = floats(convert(emulated, "log2_fast", bits(y))).astype(np.float64)
    assert np.abs(found - np.log2(y.astype(np.float64))).max() < 2.0**-17
    inf, nan, subnormal = np.inf, np.nan, 2.0**-127
    table = [(-inf, 0), (-127, 0), (-149, 0), (0, 1), (-0.0, 1), (subnormal, 1), (-126, 2.0**-126), (128, inf)]
    table += [(inf, inf), (nan, nan), (10, 1024)]
    found = floats(convert(emulated, "exp2_fast", bits([a for a, _ in table])))
    np.testing.assert_array_equal(found, np.array([b for _, b in table], np.float32))
    table = [(-inf, nan), (-1, nan), (0, -inf), (-0.0, -inf), (subnormal, -inf), (-subnormal, -inf), (inf, inf)]
    table += [(nan, nan), (2.0**-126, -126), (8, 3)]
    found = floats(convert(emulated, "log2_fast", bits([a for a, _ in table])))
    np.testing.assert_array_equal(found, np.array([b for _, b in table], np.float32))


def steps(emulated: ModuleType, *program: tuple[int, str, int, int]) -> list[list[int]]:
    """What the first byte of each piece of 16 is at each look; the source is 1, 2, 3, ... by piece."""
    memory = b"".join(bytes([i + 1]) * 16 for i in range(4))
    kinds = emulated.Do.__members__
    looks = emulated.copies(memory, 64, [(lane, int(kinds[what]), a, b) for lane, what, a, b in program])
    for look in looks:
        assert all(look[i] == look[i - i % 16] for i in range(64))
    return [[look[i] for i in range(0, 64, 16)] for look in looks]


POISON = 255


def test_copies_land_when_waited_for(emulated: ModuleType) -> None:
    """By commit groups, the last n of which may be pending; poison until then."""
    look = (0, "LOOK", 0, 0)
    seen = steps(
        emulated,
        *[look, (0, "COPY", 0, 0), (0, "COMMIT", 0, 0), (0, "COPY", 16, 16), (0, "COPY", 32, 32), (0, "COMMIT", 0, 0)],
        *[(0, "COPY", 48, 48), look, (0, "WAIT", 2, 0), look, (0, "WAIT", 1, 0), look, (0, "WAIT", 0, 0), look],
        *[(0, "COMMIT", 0, 0), (0, "WAIT", 1, 0), look, (0, "WAIT", 0, 0), look],
    )
    nothing = [POISON] * 4
    assert seen == [
        *[nothing, nothing, nothing, [1, *nothing[1:]], [1, 2, 3, POISON]],  # what is not committed is not waited for
        *[[1, 2, 3, POISON], [1, 2, 3, 4]],
    ]


def test_copies_that_are_not_present_are_zeros(emulated: ModuleType) -> None:
    """Which land like the others; nothing is read, wherever the source points to."""
    look = (0, "LOOK", 0, 0)
    far = 1 << 60
    seen = steps(
        emulated,
        *[(0, "ZERO", 16, far), (0, "COPY", 32, 0), (0, "COMMIT", 0, 0), look, (0, "WAIT", 0, 0), look],
    )
    assert seen == [[POISON] * 4, [POISON, 0, 1, POISON]]


def test_copies_are_a_threads_own(emulated: ModuleType) -> None:
    """Neither another thread's commit nor its wait moves them; one that is issued again is poison again."""
    look = (0, "LOOK", 0, 0)
    seen = steps(
        emulated,
        *[(0, "COPY", 0, 16), (1, "COMMIT", 0, 0), (1, "WAIT", 0, 0), look, (0, "COMMIT", 0, 0), (1, "WAIT", 0, 0)],
        *[look, (0, "WAIT", 0, 0), look, (1, "COPY", 0, 32), look, (1, "COMMIT", 0, 0), (1, "WAIT", 0, 0), look],
    )
    assert [at[0] for at in seen] == [POISON, POISON, 2, POISON, 3]


def test_nothing_lands_after_the_threads_end(emulated: ModuleType) -> None:
    """Not in the next launch either."""
    steps(emulated, (0, "COPY", 0, 0), (0, "COMMIT", 0, 0))
    assert steps(emulated, (0, "WAIT", 0, 0), (0, "LOOK", 0, 0)) == [[POISON] * 4]


def test_grid_is_folded(emulated: ModuleType) -> None:
    most = 2**31 - 1
    assert emulated.fold(1) == (1, 1)
    assert emulated.fold(most) == (most, 1)
    assert emulated.fold(0) == emulated.fold(-1) == emulated.fold(most * 65535 + 1) == (0, 0)
    assert emulated.fold(most * 65535) == (most, 65535)
    for blocks in (most + 1, 2 * most, 2 * most + 1, 2**40 + 7, most * 65535 - 12345):
        x, y = emulated.fold(blocks)
        assert 1 <= x <= most
        assert 1 <= y <= 65535
        assert blocks <= x * y < blocks + y
    assert [block for _, block in emulated.blocks(5)] == [*range(5)]
    emulated.set_max_grid_x(3)
    assert [block for _, block in emulated.blocks(7)] == [*range(9)]


def test_launch_refuses_what_a_device_refuses(emulated: ModuleType) -> None:
    assert emulated.launch(1, 1024, 227 * 1024) is None
    assert emulated.launch(0, 0, 1 << 40) is None  # no blocks: nothing happens
    for blocks, threads in ((1, 1025), (1, 0), (1, -32), (-1, 32), (2**47, 32)):
        assert emulated.launch(blocks, threads, 0) == "invalid configuration argument"
    assert emulated.launch(1, 32, 227 * 1024 + 1) == "invalid argument"


def test_schedules_do_what_they_say(emulated: ModuleType) -> None:
    def order(name: str) -> list[tuple[int, int]]:
        emulated.set_schedule(SCHEDULES.index(name))
        lines: list[tuple[int, int]] = emulated.order(96)
        assert sorted(lines) == [(i, thread) for i in range(3) for thread in range(96)]
        return lines

    assert tuple(emulated.schedules()) == SCHEDULES
    first = {name: [thread for i, thread in order(name) if i == 0] for name in SCHEDULES}
    for name in ("forward", "warp-greedy forward"):
        assert first[name] == [*range(96)]
    for name in ("reverse", "warp-greedy reverse"):
        assert first[name] == [*reversed(range(96))]
    for name in ("random", "warp-greedy random"):
        assert first[name] not in (first["forward"], first["reverse"])
        assert order(name) == order(name)  # by the seed
        emulated.set_seed(2)
        assert [thread for i, thread in order(name) if i == 0] != first[name]
        emulated.set_seed(1)
    # A greedy schedule ends one warp before the next begins. The round-robin ones let no warp get ahead by two.
    for name in GREEDY:
        warps = [thread // 32 for _, thread in order(name)]
        assert sum(a != b for a, b in itertools.pairwise(warps)) == 2
    for name in ("forward", "reverse"):
        done = [0] * 3
        for i, thread in order(name):
            done[thread // 32] = max(done[thread // 32], i)
            assert max(done) - min(done) <= 1


@pytest.mark.parametrize("value", [*SCHEDULES, "4", "sideways"])
def test_schedule_from_the_environment(value: str, tmp_path: Path) -> None:
    if SANITIZED:
        pytest.skip("a process of its own, without the sanitizers' libraries")
    code = "import compiled; print(compiled.emulated().schedule())"
    command = [sys.executable, "-c", code]
    env = {**os.environ, "VISATTN_SCHEDULE": value, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    if value == "sideways":
        assert "VISATTN_SCHEDULE is sideways" in done.stderr
    else:
        assert done.stdout.strip() == str(SCHEDULES.index(value) if value in SCHEDULES else value), done.stderr


FAULTS = {
    "barrier_exit": r"divergence: .*sync_block \(module.cpp:\d+\).*has exited",
    "barrier_apart": r"divergence: .*sync_block \(module.cpp:\d+\), warp \d lane \d+ at sync_block \(module.cpp:\d+\)",
    "barrier_kind": r"divergence: the block waits at sync_block(_or)? .* at sync_block(_or)? ",
    "barrier_and_mma": r"divergence: .*(mma_k16 .*lane 3 at sync_block|sync_block .* at mma_k16|lane 3 waits.*exited)",
    "shuffle_skipped": r"divergence: warp 1 waits at (shuffle .*lane 3 at sync_warp|sync_warp .* at shuffle)",
    "shuffle_exit": r"divergence: warp 1 .*waits at shuffle .*, warp 1 lane 3 has exited",
    "shuffle_uneven": r"divergence: warp 1 .*waits at shuffle_xor .*has exited",
    "ldmatrix_unaligned": r"ldmatrix \(module.cpp:\d+\) of warp 1 lane 3: the row is not aligned to 16 bytes",
    "ldmatrix_outside": r"ldmatrix_transposed .* of warp 1 lane 3: the row lies outside of shared memory",
    "ldmatrix_global": r"ldmatrix .*: the row lies outside of shared memory",
    "copy_to_unaligned": r"copy_async .*: the destination is not aligned to 16 bytes",
    "copy_from_unaligned": r"copy_async .*: the source is not aligned to 16 bytes",
    "copy_outside": r"copy_async .*: the destination lies outside of shared memory",
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_reported(scheduled: ModuleType, name: str) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^the emulator: {FAULTS[name]}.*, in block 0$"):
            scheduled.fault(name)
    # and the next launch begins anew
    assert (scheduled.run("any", np.ones((96, 1), np.uint32), 96)[:, :2] == 1).all()


@pytest.mark.parametrize("name", ["write_beyond", "write_before"])
def test_writes_around_shared_memory(scheduled: ModuleType, name: str) -> None:
    if SANITIZED:
        pytest.skip("it ends the process: test_sanitizers_find")
    with pytest.raises(RuntimeError, match="a thread wrote beyond the shared memory, in block 0"):
        scheduled.fault(name)


def test_reads_of_what_is_not_there(scheduled: ModuleType) -> None:
    """Memory that nobody has written, or not yet, reads as NaN."""
    poison = 0xFFFFFFFF
    assert scheduled.fault("read_unwritten") == [poison] * 64
    assert scheduled.fault("read_before_wait") == [poison] * 64
    assert scheduled.fault("read_before_barrier").count(poison) == 32
    if not SANITIZED:
        assert scheduled.fault("read_beyond") == [0] * 63 + [poison]


def test_fibers_of_the_c_library() -> None:
    """The switch of CPUs other than x86-64."""
    if SANITIZED:
        pytest.skip("one build with sanitizers is enough")
    portable = compiled.emulated("-DVISATTN_UCONTEXT")
    for schedule in range(len(SCHEDULES)):
        portable.set_schedule(schedule)
        test_mma(portable, "mma_fp32")
        test_ldmatrix(portable)
        test_faults_are_reported(portable, "barrier_exit")
        test_missing_barrier_on_reuse(portable)


def test_missing_barrier_on_reuse(scheduled: ModuleType) -> None:
    right = [100 * stage + (thread ^ 32) for stage in range(4) for thread in range(64)]
    assert scheduled.reuse(4, True) == right
    if SCHEDULES[scheduled.schedule()] in GREEDY:
        for seed in range(20):
            scheduled.set_seed(seed)
            assert scheduled.reuse(4, False) != right


def sanitized_environment(tmp_path: Path) -> dict[str, str]:
    """For a process that loads the sanitized module."""
    if SANITIZED:
        pytest.skip("under the sanitizers already")
    environment = building.sanitized_environment(tmp_path)
    compiled.build_emulated(*SANITIZE)  # here, where the compiler is not under the sanitizer itself
    return environment


@pytest.mark.long
def test_sanitizers_are_silent(tmp_path: Path) -> None:
    """This file once more, but for what needs torch or nvcc."""
    environment = sanitized_environment(tmp_path)
    pytest_here = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", __file__]
    text = run(*pytest_here, "-k", "not torch and not nvcc and not sanitizers", cwd=ROOT, **environment)
    assert re.search(r"\d{3,} passed", text), text


@pytest.mark.parametrize("name", ["write_beyond", "write_before", "read_beyond", "copy_from_beyond"])
def test_sanitizers_find(name: str, tmp_path: Path) -> None:
    """What lies outside of shared memory and of a tensor, with the line that asks for it."""
    environment = sanitized_environment(tmp_path)
    code = f"import test_emulator; test_emulator.build().fault({name!r})"
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
    assert re.search(rf"in .*{name}.*module\.cpp:\d+", done.stderr), done.stderr


KERNEL = """
#include "cuda/prims.h"

using namespace visattn::cuda;

struct Args {
  const uint16_t* in;
  float* out;
  int64_t blocks;
};

template <class T>
VISATTN_KERNEL(128, 1)
every_primitive(const Args args) {
  if (block() >= args.blocks) return;
  char* const row = shared_memory() + 16 * thread();
  copy_async(row, args.in + 8 * thread(), block() + thread() < args.blocks);
  copy_commit();
  copy_wait<0>();
  copy_wait<1>();
  sync_block();
  float d[4] = {to_float(from_float<float>(1.0f)), 0, 0, as_float(as_bits(1.0f))};
  uint32_t a[4], b[4];
  ldmatrix(a, row);
  ldmatrix_transposed(b, row);
  mma_k16<T>(d, a, b[0], b[1]);
  mma_k8<T>(d, a[0], a[1], b[2]);
  mma_tf32(d, a, to_tf32(d[0]), to_tf32(d[1]));
  mma_fp32(d, a, b[0], b[1]);
  d[0] += shuffle_xor(d[0], 1) + shuffle(d[1], 3) + float(shuffle(lane(), warp())) + float(shuffle_xor(a[0], 2));
  if (warp_any(d[0] > 1) || sync_block_or(d[1] > 2)) d[2] = exp2_fast(d[2]) + log2_fast(d[3]);
  sync_warp();
  d[3] += to_float(from_float<T>(d[1])) + as_float(pack<T>(d[0], d[1]));
  for (int i = 0; i < 4; ++i) args.out[(block() * 128 + thread()) * 4 + i] = d[i];
}

const char* start(const Args& args, size_t shared, void* stream) {
  if (const char* const error = launch(every_primitive<Half>, args, args.blocks, 128, shared, stream)) return error;
  return launch(every_primitive<BFloat16>, args, args.blocks, 128, shared, stream);
}
"""

INSTRUCTIONS = (
    "cp.async.cg.shared.global [%r",
    "cp.async.commit_group;",
    "cp.async.wait_group 0;",
    "cp.async.wait_group 1;",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    "fma.rn.f32",
    "shfl.sync.idx.b32",
    "shfl.sync.bfly.b32",
    "vote.sync.any.pred",
    "bar.sync",
    "bar.warp.sync",
    "cvt.f32.f16",
    "cvt.rn.f16.f32",
    "cvt.rn.bf16.f32",
    "cvt.rn.f16x2.f32",
    "cvt.rn.bf16x2.f32",
    "cvt.rna.tf32.f32",
    "ex2.approx.ftz.f32",
    "lg2.approx.ftz.f32",
)


@pytest.mark.parametrize("architecture", ["80", "90a", "120a"])
def test_nvcc_compiles_every_primitive(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("there is no nvcc")
    names = re.findall(r"^(?:VISATTN_DEVICE|inline) \S+ (\w+)\(", (ROOT / "csrc/cuda/prims.h").read_text(), re.M)
    internal = {"shared_address", "fold", "allow_most_shared"}
    assert len(set(names)) > 20
    assert [name for name in names if name not in internal and not re.search(rf"\b{name}\b", KERNEL)] == []
    source = tmp_path / "every.cu"
    source.write_text(KERNEL)
    warnings = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"]
    target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    done = subprocess.run(
        [nvcc, "-std=c++17", *warnings, *target, f"-I{ROOT / 'csrc'}", "--keep", "-c", str(source), "-o", "every.o"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr + done.stdout
    assert re.search(r"\b0 bytes spill stores", done.stderr)
    (assembly,) = tmp_path.glob("*.ptx")
    text = assembly.read_text()
    assert [name for name in INSTRUCTIONS if name not in text] == []
    assert re.search(r"bar(rier)?\.(cta\.)?red\.(or|popc)", text)
