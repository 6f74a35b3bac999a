"""The engine's inner product against torch's micro-kernel, and the table of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.ceilings import build_and_run
from benchmarks.machine import commit, hardware, versions
from benchmarks.results import FOLDER, write_whole

SOURCE = Path(__file__).with_name("products.cpp")
RESULTS = FOLDER / "products.json"

FLAGS = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mavx512bf16"
"""What `setup.py` compiles the engine with, so that the same code is measured: tuning flags change it."""

COLUMNS = ("float32", "float32_brgemm", "bfloat16", "bfloat16_brgemm")
"""What is measured at each tile size, GFLOP/s on one thread."""


def measure() -> dict[str, Any]:
    """Measure, and write the record.

    Raises:
        RuntimeError: the program does not build or run here.
    """
    rows = build_and_run(SOURCE, flags=FLAGS, with_torch=True)
    if rows is None:
        raise RuntimeError("products.cpp needs a C++ compiler, torch's headers and a CPU with AVX-512 and bfloat16")
    head, dirty = commit()
    found = {"hardware": hardware(), "versions": versions(), "commit": head, "dirty": dirty, "products": rows}
    write_whole(RESULTS, json.dumps(found, indent=1) + "\n")
    return found


def table() -> str:
    """The record as Markdown."""
    rows = json.loads(RESULTS.read_text())["products"]
    lines = ["| rows × depth | fp32: ours | brgemm | bf16: ours | brgemm |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        numbers = " | ".join(f"{row[column]:.0f}" for column in COLUMNS)
        lines.append(f"| {row['rows']} × {row['depth']} | {numbers} |")
    return "\n".join(lines)
