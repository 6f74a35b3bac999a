"""The AVX-512 engines on a CPU without AVX-512, and the emulation itself against the definitions of the instructions.

The values below are worked out by hand from Intel's Software Developer's Manual, volume 2. They are held against the
emulation everywhere, and on a CPU that has the instructions against those too, which there also meet the emulation on
random bits.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import random
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from building import ROOT, copy_source, pytest_on, run

FOLDER = ROOT / "csrc" / "emulator" / "avx512"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
FLAGS = {
    "emulation": [*AVX2, f"-I{FOLDER}", "-DVISATTN_EMULATE_AVX512_BF16"],
    "instructions": [*AVX2, *(f"-mavx512{name}" for name in ("f", "bw", "vl", "dq", "bf16"))],
}

pytestmark = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="not an x86-64 CPU")


class Primitives:
    """The intrinsics by name, compiled on the emulation or on the instructions."""

    def __init__(self, kind: str, folder: Path) -> None:
        target = folder / f"{kind}.so"
        compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *FLAGS[kind]]
        run(*compiler, str(FOLDER / "primitives.cpp"), "-o", str(target), cwd=folder)
        self.library = ctypes.CDLL(str(target))

    def call(
        self,
        name: str,
        a: bytes | int = b"",
        b: bytes | int = b"",
        c: bytes = b"",
        mask: int = 0,
        out: int | None = None,
    ) -> bytes:
        """The 64 bytes at `out` afterwards, which were 0xee; operands are bytes or addresses."""
        space = ctypes.create_string_buffer(b"\xee" * 64 * 5, 64 * 5)
        base = ctypes.addressof(space) + -ctypes.addressof(space) % 64
        at = []
        for i, x in enumerate((a, b, c)):
            if isinstance(x, bytes):
                ctypes.memmove(base + 64 * i, x, len(x))
                x = base + 64 * i
            at.append(ctypes.c_void_p(x))
        out = base + 64 * 3 if out is None else out
        getattr(self.library, f"run{name}")(*at, ctypes.c_uint32(mask), ctypes.c_void_p(out))
        return ctypes.string_at(out, 64) if out == base + 64 * 3 else b""


def missing(emulation: Primitives, name: str) -> str:
    """What this CPU lacks of an instruction, if anything."""
    bf16 = name.endswith(("pbh", "bf16_ps"))
    has = emulation.library.supports_avx512_bf16() if bf16 else emulation.library.supports_avx512()
    return "" if has else f"this CPU has no AVX-512{' with bfloat16' if bf16 else ''}"


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Primitives:
    return Primitives("emulation", tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Primitives:
    return Primitives("instructions", tmp_path_factory.mktemp("instructions"))


@pytest.fixture(params=["emulation", "instructions"])
def of(request: pytest.FixtureRequest, emulation: Primitives) -> Callable[[str], Primitives]:
    """The primitives to hold to the definition; skips what this CPU has not."""
    primitives = request.getfixturevalue(request.param)

    def choose(name: str) -> Primitives:
        if request.param == "instructions" and missing(emulation, name):
            pytest.skip(missing(emulation, name))
        return primitives

    return choose


NAN = None  # any NaN
ONE, TWO, INF, MINUS = 0x3F800000, 0x40000000, 0x7F800000, 0x80000000
QUIET, SIGNALING, INDEFINITE = 0x7FC00001, 0x7F800001, 0xFFC00000

LANES: dict[str, tuple[str, list[tuple[int | None, ...]]]] = {
    # The second operand if either is a NaN, or if both are zeros.
    "_mm512_max_ps": (
        "III",
        [
            *[(ONE, TWO, TWO), (TWO, ONE, TWO), (ONE | MINUS, TWO | MINUS, ONE | MINUS)],
            *[(QUIET, ONE, ONE), (ONE, QUIET, QUIET), (ONE, SIGNALING, SIGNALING), (QUIET, SIGNALING, SIGNALING)],
            *[(0, MINUS, MINUS), (MINUS, 0, 0), (INF, ONE, INF), (INF | MINUS, ONE, ONE), (1, 0, 1)],
        ],
    ),
    "_mm512_max_pd": (
        "QQQ",
        [
            *[(1 << 62, 1 << 61, 1 << 62), (1 << 61, 1 << 62, 1 << 62), (0, 1 << 63, 1 << 63), (1 << 63, 0, 0)],
            *[(0x7FF8 << 48, 1, 1), (1, 0x7FF0000000000001, 0x7FF0000000000001)],
        ],
    ),
    # To the nearest integer, ties to even; zeros keep the sign.
    "_mm512_roundscale_ps": (
        "II",
        [
            *[(0x3F000000, 0), (0x3FC00000, TWO), (0x40200000, TWO)],  # 0.5, 1.5, 2.5
            *[(0xBF000000, MINUS), (0xBFC00000, TWO | MINUS), (0x3EFFFFFF, 0), (0x3F000001, ONE)],
            *[(0x4AFFFFFF, 0x4B000000), (0x4B000001, 0x4B000001)],  # 2^23 - 1/2, 2^23 + 1
            *[(1, 0), (MINUS | 1, MINUS), (MINUS, MINUS), (INF, INF), (INF | MINUS, INF | MINUS)],
            *[(SIGNALING, QUIET), (QUIET, QUIET)],
        ],
    ),
    # Less that integer; +0 for integers, either zero, and infinities.
    "_mm512_reduce_ps": (
        "II",
        [
            *[(0x3F000000, 0x3F000000), (0x3FC00000, 0xBF000000), (0x40200000, 0x3F000000)],
            *[(0xBF000000, 0xBF000000), (0x40500000, 0x3E800000), (0xC0300000, 0x3E800000)],  # 3.25, -2.75
            *[(ONE, 0), (ONE | MINUS, 0), (MINUS, 0), (0x4E800000, 0), (1, 1), (MINUS | 1, MINUS | 1)],
            *[(INF, 0), (INF | MINUS, 0), (SIGNALING, QUIET), (QUIET, QUIET)],
        ],
    ),
    # a * 2^floor(b), rounded once; the special cases of the manual's table.
    "_mm512_scalef_ps": (
        "III",
        [
            *[(ONE, 0x40400000, 0x41000000), (0x3FC00000, 0x4039999A, 0x40C00000)],  # 1 * 2^3, 1.5 * 2^floor(2.9)
            *[(ONE, 0xBF000000, 0x3F000000), (ONE, MINUS | 1, 0x3F000000), (ONE, 0, ONE), (ONE, MINUS, ONE)],
            *[(ONE, 0xC3150000, 1), (ONE, 0xC3160000, 0), (0x3F800001, 0xC3160000, 1)],  # 2^-149, 2^-150
            *[(0x3FC00000, 0xC3150000, 2), (0x40200000, 0xC3150000, 2), (1, 0x43150000, ONE)],  # 1.5, 2.5 tie to even
            *[(ONE, 0x43000000, INF), (ONE | MINUS, 0x43000000, INF | MINUS)],  # 2^128
            *[(0x00800000, 0x437E0000, 0x7F800000), (0x00800000, 0x437D0000, 0x7F000000)],  # 2^-126 by 254 and 253
            *[(ONE, 0x447A0000, INF), (ONE | MINUS, 0xC47A0000, MINUS), (1, 0x7F7FFFFF, INF), (0, 0x7F7FFFFF, 0)],
            *[(INF, 0x40400000, INF), (INF, INF, INF), (INF, INF | MINUS, INDEFINITE), (0, INF, INDEFINITE)],
            *[(MINUS, INF | MINUS, MINUS), (MINUS, TWO, MINUS), (TWO, INF, INF), (TWO | MINUS, INF | MINUS, MINUS)],
            *[(QUIET, INF, INF), (QUIET, INF | MINUS, 0), (QUIET, ONE, QUIET), (QUIET, 0x7FC00002, QUIET)],
            *[(SIGNALING, INF, QUIET), (SIGNALING, INF | MINUS, QUIET), (SIGNALING, ONE, QUIET)],
            *[(ONE, QUIET, QUIET), (ONE, SIGNALING, QUIET), (INF, QUIET, QUIET), (0, SIGNALING, QUIET)],
        ],
    ),
    "_mm512_or_si512": ("III", [(0x00FF00FF, 0x0F0F0F0F, 0x0FFF0FFF), (0, 0, 0), (MINUS, 1, MINUS | 1)]),
    "_mm512_cvtepu16_epi32": ("HI", [(0xFFFF, 0xFFFF), (0x8000, 0x8000), (1, 1), (0, 0)]),
    # Half denormals are kept; a NaN is made quiet.
    "_mm512_cvtph_ps": (
        "HI",
        [
            *[(0x3C00, ONE), (0xC000, TWO | MINUS), (0x0001, 0x33800000), (0x03FF, 0x387FC000), (0x7BFF, 0x477FE000)],
            *[(0x8000, MINUS), (0xFC00, INF | MINUS), (0x7C01, 0x7FC02000), (0x7E00, 0x7FC00000)],
        ],
    ),
    "_mm512_cvtps_ph": (
        "IH",
        [
            *[(ONE, 0x3C00), (0x3F801000, 0x3C00), (0x3F803000, 0x3C02), (0x3F801001, 0x3C01)],  # ties to even
            *[(0x477FEFFF, 0x7BFF), (0x477FF000, 0x7C00), (0x33000000, 0), (0x33000001, 1), (0x33C00000, 2)],
            *[(MINUS | 1, 0x8000), (INF | MINUS, 0xFC00), (SIGNALING, 0x7E00), (0x7FC02000, 0x7E01)],
        ],
    ),
    # Ties to even; denormals to zero; a NaN is cut off and made quiet.
    "_mm512_cvtneps_pbh": (
        "IH",
        [
            *[(ONE, 0x3F80), (0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81), (0x3F807FFF, 0x3F80)],
            *[(0x7F7FFFFF, 0x7F80), (0xFF7FFFFF, 0xFF80), (INF, 0x7F80), (INF | MINUS, 0xFF80), (MINUS, 0x8000)],
            *[(1, 0), (0x807FFFFF, 0x8000), (0x00800000, 0x0080), (0x00FFFFFF, 0x0100)],
            *[(SIGNALING, 0x7FC0), (0xFFC12345, 0xFFC1), (0xFFBFFFFF, 0xFFFF)],
        ],
    ),
    # (c + a1 b1) + a0 b0: the sum first, then pairs with the odd element in the upper half.
    "_mm512_dpbf16_ps": (
        "IIII",
        [
            (ONE, 0x40404000, 0x40003F00, 0x41000000),  # 1 + 3 * 2 + 2 * 0.5
            (ONE, 0xBF803980, 0x3F803900, 0x33000000),  # (1 - 1) + 2^-25: in the other order 0
            (ONE, 0x39803980, 0x39803980, ONE),  # (1 + 2^-24) + 2^-24, each a tie: at once 1 + 2^-23
            (ONE | 1, 0x39800000, 0x39800000, ONE | 2),  # the tie that goes up
            (1, 0, 0, 0),  # denormals in the sum
            (MINUS | 1, 0x80008000, 0x3F803F80, MINUS),  # and their sign
            (ONE, 0x00010000, 0x7F000000, ONE),  # denormal factors: 2^-133 * 2^127 is 0
            (ONE, 0x7F000000, 0x00010000, ONE),
            (0, 0x20000000, 0x1F800000, 0),  # 2^-127 flushed
            (0, 0x0000A000, 0x00001F80, MINUS),  # -2^-127
            (0, 0x20002000, 0x1F801F80, 0),  # after each addition: not 2^-126
            (0, 0x20000000, 0x20000000, 0x00800000),  # 2^-126 stays
            (0x00800000, 0x9A000000, 0x1A000000, 0),  # 2^-126 - 2^-150 needs no rounding: tiny
            (0x00800000, 0x9A000000, 0x19800000, 0x00800000),  # 2^-126 - 2^-151 rounds to 2^-126
            (0, 0x7F7F0000, 0x40000000, INF),  # overflow
            (INF, 0x3F803F80, 0x3F803F80, INF),
            (INF, 0xFF800000, 0x3F800000, NAN),  # inf - inf
            (ONE, 0x7F800000, 0, NAN),  # inf * 0
            (ONE, 0x7F800000, 0x00010000, NAN),  # of a denormal too
            (QUIET, 0x3F803F80, 0x3F803F80, NAN),
            (ONE, 0x00007FC1, 0x3F803F80, NAN),
        ],
    ),
}
"""What acts lane by lane: the lanes' types by struct's letters, then operands and result."""

FIRST, SECOND = range(16), range(16, 32)
WORDS = struct.pack("16I", *FIRST), struct.pack("16I", *SECOND)
LONGS = struct.pack("8Q", *range(8)), struct.pack("8Q", *range(8, 16))
SHORTS = struct.pack("32H", *range(100, 132))
HOLE = 0xEEEEEEEE  # memory that nobody wrote

WHOLE: dict[str, list[tuple[tuple[bytes, ...], int, str, list[int]]]] = {
    "_mm512_unpacklo_ps": [(WORDS, 0, "I", [0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29])],
    "_mm512_unpackhi_ps": [(WORDS, 0, "I", [2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31])],
    "_mm512_unpacklo_pd": [(LONGS, 0, "Q", [0, 8, 2, 10, 4, 12, 6, 14])],
    "_mm512_unpackhi_pd": [(LONGS, 0, "Q", [1, 9, 3, 11, 5, 13, 7, 15])],
    "_mm512_cmp_ps_mask": [  # unequal or not comparable; zeros are equal
        (
            (
                struct.pack("16I", *[ONE, ONE, QUIET, ONE, QUIET, 0, MINUS, INF] * 2),
                struct.pack("16I", *[ONE, TWO, ONE, SIGNALING, QUIET, MINUS, 1, INF] * 2),
            ),
            0,
            "H",
            [0b0101111001011110],
        )
    ],
    "_mm512_shuffle_f32x4": [
        (WORDS, 0x88, "I", [*range(4), *range(8, 12), *range(16, 20), *range(24, 28)]),
        (WORDS, 0xDD, "I", [*range(4, 8), *range(12, 16), *range(20, 24), *range(28, 32)]),
        (WORDS, 0x1B, "I", [*range(12, 16), *range(8, 12), *range(20, 24), *range(16, 20)]),
    ],
    "_mm512_permutexvar_epi16": [
        ((struct.pack("32H", *range(31, -1, -1)), SHORTS), 0, "H", list(range(131, 99, -1))),
        ((struct.pack("32H", *[32 * i + i % 2 for i in range(32)]), SHORTS), 0, "H", [100, 101] * 16),
    ],
    "_mm512_i32gather_ps": [((struct.pack("16I", *[15, 0, 7, 7] * 4), WORDS[1]), 0, "I", [31, 16, 23, 23] * 4)],
    "_mm512_slli_epi32": [
        ((struct.pack("16I", *[0x12345678, 0xFFFFFFFF] * 8),), 16, "I", [0x56780000, 0xFFFF0000] * 8),
        (WORDS, 0, "I", list(FIRST)),
        (WORDS, 32, "I", [0] * 16),
    ],
    "_mm512_set1_epi32": [((struct.pack("I", 0xDEADBEEF),), 0, "I", [0xDEADBEEF] * 16)],
    "_mm512_setzero_ps": [((), 0, "I", [0] * 16)],
    "_mm512_cvtne2ps_pbh": [
        (
            (struct.pack("16I", *[x << 23 for x in SECOND]), struct.pack("16I", *[x << 23 for x in FIRST])),
            0,
            "H",
            [x << 7 for x in range(32)],
        )
    ],
    "_mm512_load_si512": [(WORDS, 0, "I", list(FIRST))],
    "_mm512_loadu_ps": [(WORDS, 0, "I", list(FIRST))],
    "_mm512_storeu_si512": [(WORDS, 0, "I", list(FIRST))],
    "_mm512_maskz_loadu_ps": [
        (WORDS[1:], 0xFFFF, "I", list(SECOND)),
        (WORDS[1:], 0x8005, "I", [16, 0, 18, *[0] * 12, 31]),
    ],
    "_mm512_maskz_loadu_epi16": [((SHORTS,), 0x80010002, "H", [0, 101, *[0] * 14, 116, *[0] * 14, 131])],
    "_mm256_maskz_loadu_epi16": [((SHORTS,), 0x8005, "H", [100, 0, 102, *[0] * 12, 115])],
    "_mm512_mask_storeu_ps": [(WORDS[1:], 0x8005, "I", [16, HOLE, 18, *[HOLE] * 12, 31])],
    "_mm512_mask_storeu_epi32": [(WORDS[1:], 0x8005, "I", [16, HOLE, 18, *[HOLE] * 12, 31])],
    "_mm256_mask_storeu_epi16": [((SHORTS,), 0x8005, "H", [100, 0xEEEE, 102, *[0xEEEE] * 12, 115])],
}
"""What moves lanes: operands, mask (or control, or count), and the result by lanes of a type."""


def same(expected: int | None, got: int) -> bool:
    return got & ~MINUS > INF if expected is NAN else got == expected


@pytest.mark.parametrize("name", LANES)
def test_lane_by_lane(of, name: str) -> None:
    letters, rows = LANES[name]
    primitives = of(name)
    lanes = min(64 // struct.calcsize(letter) for letter in letters)
    for shift in range(2):  # in other lanes as well
        for first in range(0, len(rows), lanes):
            some = [rows[(first + i + shift) % len(rows)] for i in range(lanes)]
            operands = list(zip(*some, strict=True))[:-1]
            packed = [struct.pack(f"{lanes}{letter}", *x) for letter, x in zip(letters, operands, strict=False)]
            size = lanes * struct.calcsize(letters[-1])
            got = struct.unpack(f"{lanes}{letters[-1]}", primitives.call(name, *packed)[:size])
            for row, result in zip(some, got, strict=True):
                text = ", ".join(f"{x:#x}" for x in row[:-1])
                assert same(row[-1], result), f"{name}({text}) = {result:#x}, expected {row[-1] or 0:#x}"


@pytest.mark.parametrize("name", WHOLE)
def test_whole_register(of, name: str) -> None:
    for operands, mask, letter, expected in WHOLE[name]:
        got = of(name).call(name, *operands, mask=mask)
        size = len(expected) * struct.calcsize(letter)
        assert list(struct.unpack(f"{len(expected)}{letter}", got[:size])) == expected
        if "store" in name:
            assert got[size:] == b"\xee" * (64 - size)


@pytest.mark.parametrize("name", [name for name in WHOLE if "mask_" in name or "maskz_" in name])
def test_lanes_left_out_are_not_touched(of, name: str) -> None:
    """The first lanes at the end of a page, the others on one that may not be touched."""
    width = 2 if "epi16" in name else 4
    lanes = (32 if "256" in name else 64) // width
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
    try:
        for n in range(lanes):
            where, mask = start + page - n * width, (1 << n) - 1
            data = bytes(range(1, 1 + n * width))
            if "load" in name:
                ctypes.memmove(where, data, len(data))
                assert of(name).call(name, where, mask=mask)[: lanes * width] == data.ljust(lanes * width, b"\0")
            else:
                of(name).call(name, data, mask=mask, out=where)
                assert ctypes.string_at(where, len(data)) == data
    finally:
        protect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


def test_gather_takes_negative_indices(of) -> None:
    name = "_mm512_i32gather_ps"
    memory = ctypes.create_string_buffer(b"".join(WORDS), 128)
    index = struct.pack("16i", *range(-16, 0))
    assert of(name).call(name, index, ctypes.addressof(memory) + 64) == WORDS[0]


@pytest.mark.parametrize("name", [*LANES, *WHOLE])
def test_random_bits(name: str, emulation: Primitives, request: pytest.FixtureRequest) -> None:
    """The emulation and the instruction agree, on numbers of every kind."""
    if missing(emulation, name):
        pytest.skip(missing(emulation, name))
    instructions = request.getfixturevalue("instructions")
    rng = random.Random(name)

    def operand() -> bytes:
        kind = rng.randrange(4)
        if kind == 0:
            return rng.randbytes(64)
        if kind == 1:  # near one another, so that sums cancel and round
            return struct.pack("16f", *[rng.gauss(0, 1) for _ in range(16)])
        if kind == 2:  # exponents near the least, and powers for scalef
            return struct.pack("16f", *[rng.uniform(-300, 300) * 2.0 ** -rng.choice((0, 63, 126)) for _ in range(16)])
        return struct.pack(
            "16I", *[rng.choice((0, 1, ONE, INF, QUIET, SIGNALING)) | rng.choice((0, MINUS)) for _ in FIRST]
        )

    for _ in range(3000):
        a, b, c, mask = operand(), operand(), operand(), rng.getrandbits(32)
        if name == "_mm512_i32gather_ps":
            a = struct.pack("16I", *[rng.randrange(16) for _ in range(16)])
        first, second = (x.call(name, a, b, c, mask=mask) for x in (emulation, instructions))
        if name == "_mm512_dpbf16_ps":
            first, second = (
                struct.pack("16I", *[QUIET if same(NAN, x) else x for x in struct.unpack("16I", y)])
                for y in (first, second)
            )
        assert first == second, f"{name}({a.hex()}, {b.hex()}, {c.hex()}, {mask:#x})"


def test_every_intrinsic_of_the_engine_is_here() -> None:
    """Emulated, and held to its definition; and nothing that the engine has no use for."""
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cpu").glob("*.h"))
    used = set(re.findall(r"\b_mm512_\w+|\b_mm256_maskz?_\w+", text))
    emulated = set(re.findall(r"#define (_mm\w+)", (FOLDER / "immintrin.h").read_text()))
    assert used == emulated
    assert used == {*LANES, *WHOLE}


@pytest.mark.full
@pytest.mark.long
def test_engine(emulation: Primitives, tmp_path: Path) -> None:
    """The engine's whole table of cases, on the emulated instructions that this CPU has not."""
    if not missing(emulation, "_mm512_dpbf16_ps"):
        pytest.skip("this CPU has AVX-512 with bfloat16: test_cpu_engine.py runs the instructions themselves")
    select = "avx512" if missing(emulation, "_mm512_max_ps") else "avx512_bf16"
    source = copy_source(tmp_path / "source")
    environment = {"VISATTN_EMULATE_AVX512": "1", "PYTHONPATH": str(source)}
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=source, **environment)
    code = (
        "import visattn_kernels._C as c; print(c.__file__); from visattn_kernels.backends import cpu; print(cpu.isa())"
    )
    text = run(
        sys.executable, "-c", f"import torch; {code}", cwd=tmp_path, VISATTN_CPU_ISA="avx512_bf16", **environment
    )
    assert str(source) in text
    assert "avx512_bf16" in text
    text = run(
        *pytest_on(source), str(ROOT / "tests" / "test_cpu_engine.py"), "-k", select, cwd=tmp_path, **environment
    )
    assert re.search(r"\d{4,} passed", text), text
