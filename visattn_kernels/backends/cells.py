"""The one table of the CUDA kernels that are compiled, and the files that compile them.

setup.py reads it too, so that it imports nothing of the package.

A cell is a kernel for a dtype, D, Dv and a kind: what it can add to scores and values, each with all that the one
before it has. A call takes the least kind that it needs and that is listed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

KINDS = ("kPlain", "kMasked", "kBias", "kVectors")
"""Nothing; pairs that the pattern leaves out; RelativeBias and KeyBias; every term."""

CELLS = (
    # 16-bit kernels of every kind that is named; float32 and TF32 have the last one
    (8, 8, ("kPlain", "kMasked", "kVectors")),  # SASA
    (8, 32, ("kPlain",)),  # SAGAN
    (16, 32, ("kPlain", "kVectors")),  # Axial-DeepLab
    (32, 32, ("kPlain", "kMasked", "kBias")),  # Swin, NAT, MaxViT
    (32, 128, ("kPlain",)),  # SAGAN, wide
    (64, 64, ("kPlain", "kMasked", "kBias", "kVectors")),  # ViT; ViTDet and SAM, base and large
    (80, 80, ("kPlain", "kVectors")),  # SAM, huge
    (128, 128, ("kPlain", "kMasked")),
)
"""D, Dv and kinds, as the workloads pair them."""

NUMBERS = {"float32": "float", "tf32": "Tf32", "bfloat16": "BFloat16", "float16": "Half"}
"""What products are made of, and the C++ type of it."""

PASSES = {"forward": "kForward", "queries": "kQueries", "keys": "kKeys", "delta": "kDelta"}


def kinds(numbers: str, named: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds that are compiled, of those named for D and Dv."""
    return named[-1:] if numbers in ("float32", "tf32") else named


Cell = tuple[int, int, tuple[str, ...]]


def sources(cells: Sequence[Cell] = CELLS, numbers: Collection[str] = tuple(NUMBERS)) -> dict[str, str]:
    """The CUDA files to be compiled, by name without a suffix: one for each dtype, pass, D and Dv.

    Args:
        cells: of which.
        numbers: in which dtypes.
    """
    files = {}
    for dtype, name, d, dv in _files(cells, numbers):
        listed = [kind for e, ev, named in cells if (e, ev) == (d, dv) for kind in kinds(dtype, named)] or ["kPlain"]
        stem = f"{dtype}_{name}_{d}_{dv}"
        files[stem] = (
            f"#define VISATTN_ELEMENT {NUMBERS[dtype]}\n#define VISATTN_PASS {PASSES[name]}\n"
            f"#define VISATTN_CELLS {' '.join(f'X({d}, {dv}, {kind})' for kind in listed)}\n"
            f'#define VISATTN_TABLE cells_{stem}\n#include "cuda/instantiate.cuh"\n'
        )
    return files


def _files(cells: Sequence[Cell], numbers: Collection[str]) -> Iterator[tuple[str, str, int, int]]:
    """Dtype, pass, D and Dv of each file; delta is for any D and Dv."""
    for dtype in numbers:
        for name in PASSES:
            for d, dv in [(0, 0)] if name == "delta" else [cell[:2] for cell in cells]:
                yield dtype, name, d, dv


def table(files: Collection[str]) -> str:
    """The C++ file that lists the functions of the files of `sources`, by dtype and pass."""
    lines = ['#include "cuda/cuda.h"', "", "namespace visattn::cuda {", ""]
    lines += [f"const Entry* cells_{name}();" for name in files]
    lines += ["", "const CellTable* cells(Numbers numbers, Pass pass) {"]
    rows = []
    for dtype in NUMBERS:
        for which in PASSES:
            mine = [f"cells_{name}" for name in files if name.startswith(f"{dtype}_{which}_")]
            lines.append(f"  static const CellTable {dtype}_{which}[] = {{{', '.join([*mine, 'nullptr'])}}};")
        rows.append(f"{{{', '.join(f'{dtype}_{which}' for which in PASSES)}}}")
    lines += [f"  static const CellTable* const all[{len(NUMBERS)}][{len(PASSES)}] = {{{', '.join(rows)}}};"]
    return "\n".join([*lines, "  return all[int(numbers)][int(pass)];", "}", "", "}  // namespace visattn::cuda", ""])
