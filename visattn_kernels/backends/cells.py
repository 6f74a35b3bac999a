"""The one table of the CUDA kernels that are compiled, and the files that compile them.

setup.py reads it too, so that it imports nothing.

A cell is a kernel for a dtype, D, Dv and a kind: what it can add to scores and values, each with all that the one
before it has. A call takes the least kind that it needs and that is listed.
"""

from __future__ import annotations

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


def sources(cells: tuple[tuple[int, int, tuple[str, ...]], ...] = CELLS) -> dict[str, str]:
    """The files to be compiled, by name without a suffix: one for each dtype and pass."""
    files = {}
    for numbers, element in NUMBERS.items():
        for name, which in PASSES.items():
            listed = [(d, dv, kind) for d, dv, named in cells for kind in kinds(numbers, named)]
            if name == "delta":  # any D and Dv
                listed = [(0, 0, "kPlain")]
            entries = " ".join(f"X({d}, {dv}, {kind})" for d, dv, kind in listed)
            files[f"{numbers}_{name}"] = (
                f"#define VISATTN_ELEMENT {element}\n#define VISATTN_PASS {which}\n"
                f"#define VISATTN_CELLS {entries}\n#define VISATTN_TABLE cells_{numbers}_{name}\n"
                '#include "cuda/instantiate.cuh"\n'
            )
    return files
