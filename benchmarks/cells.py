"""The CUDA kernels compiled by nvcc, cell by cell, and what they take of a GPU; none is needed.

The files are those that setup.py compiles (`visattn_kernels.backends.cells`), each for one architecture at a time, with
ptxas's account of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, write_whole
from visattn_kernels.backends.cells import sources

FILE = FOLDER / "cells.json"
"""The record that docs/cuda.md shows."""

ARCHS = ("80", "90a", "100", "120")
"""What is compiled for."""

SPILLS = 96
"""Bytes of a thread's registers that may be spilled, in the kernels of `SPILLING` alone."""

SPILLING = {("keys", 80, 80, "kVectors"), ("keys", 128, 128, "kMasked")}
"""Pass, D, Dv and kind of the kernels whose accumulators alone are near the 255 registers of a thread."""

FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v")

CSRC = Path(__file__).parent.parent / "csrc"

CACHE = Path(__file__).parent.parent / "build" / "cells"


def nvcc() -> str:
    """The compiler.

    Raises:
        RuntimeError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if not found:
        raise RuntimeError("there is no nvcc on PATH or in CUDA_HOME/bin")
    return found


def rows(
    archs: Sequence[str] = ARCHS,
    names: Iterable[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    jobs: int | None = None,
) -> list[dict[str, Any]]:
    """Compile files, each for each architecture; one row a kernel.

    What was compiled from the same sources before is not compiled again: a run that was interrupted goes on.

    Args:
        archs: compute capabilities as nvcc writes them.
        names: of the files, such as "float16_forward_8_8"; all otherwise.
        progress: told what is compiled.
        jobs: at once; as many as there are processors otherwise.

    Raises:
        RuntimeError: one does not compile, or there is no nvcc.
    """
    compiler, texts = nvcc(), sources()
    chosen = list(texts) if names is None else list(names)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs or usable) as pool:

        def one(name: str, arch: str) -> list[dict[str, Any]]:
            known = CACHE / f"{_digest(compiler, texts[name], arch)}.json"
            if not known.exists():
                progress(f"{name} for {arch}")
                write_whole(known, json.dumps(_compile(compiler, Path(folder), name, texts[name], arch)))
            found: list[dict[str, Any]] = json.loads(known.read_text())
            return found

        done = [pool.submit(one, name, arch) for name in chosen for arch in archs]
        try:
            return [row for one_done in done for row in one_done.result()]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _digest(compiler: str, text: str, arch: str) -> str:
    """Of all that a compilation depends on."""
    digest = hashlib.sha256("\0".join((compiler, _version(compiler), *FLAGS, text, arch)).encode())
    for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h"), *CSRC.glob("cuda/*.cuh")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _version(compiler: str) -> str:
    """The release of nvcc."""
    text = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"V([\d.]+)", text)
    return release[1] if release else text


def _compile(compiler: str, folder: Path, name: str, text: str, arch: str) -> list[dict[str, Any]]:
    """The rows of one file for one architecture."""
    source, target = folder / f"{name}-{arch}.cu", folder / f"{name}-{arch}.o"
    source.write_text(text)
    begun = time.perf_counter()
    command = [compiler, *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{CSRC}"]
    done = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
    if done.returncode != 0 or "warning" in done.stderr:
        raise RuntimeError(f"{' '.join(command)} {name}\n{done.stdout}{done.stderr}")
    seconds, size = time.perf_counter() - begun, target.stat().st_size
    numbers, which = name.split("_")[:2]
    found = []
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.S,
    )
    kinds = ("kPlain", "kMasked", "kBias", "kVectors")
    for symbol, stack, stores, loads, registers in pattern.findall(done.stderr):
        cell = re.search(r"Li(\d+)ELi(\d+)ELNS0_4KindE(\d)E", symbol)
        d, dv, kind = (int(cell[1]), int(cell[2]), kinds[int(cell[3])]) if cell else (0, 0, "kPlain")
        found.append(
            {
                "numbers": numbers,
                "pass": which,
                "d": d,
                "dv": dv,
                "kind": kind,
                "arch": arch,
                "registers": int(registers),
                "stack": int(stack),
                "spill_stores": int(stores),
                "spill_loads": int(loads),
            }
        )
    expected = text.count("X(")
    if len(found) != expected:
        raise RuntimeError(f"{name} for {arch}: ptxas told of {len(found)} kernels, of {expected}\n{done.stderr}")
    for row in found:
        row |= {"file_seconds": round(seconds, 1), "file_bytes": size, "file_kernels": len(found)}
    return found


def faults(row: dict[str, Any]) -> list[str]:
    """How a row breaks the limits; an empty list if it does not."""
    spilled = row["spill_stores"]
    allowed = SPILLS if (row["pass"], row["d"], row["dv"], row["kind"]) in SPILLING else 0
    return [f"{spilled} bytes spilled, of {allowed}"] if spilled > allowed else []


def write(found: list[dict[str, Any]], to: Path) -> None:
    """Write rows, whole or not at all."""
    write_whole(to, json.dumps({"nvcc": _version(nvcc()), "rows": found}, indent=1) + "\n")


def table(found: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown: registers, and spilled bytes, for each architecture; then seconds and bytes of all."""
    archs = sorted({row["arch"] for row in found}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    cells: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in found:
        width = f"{row['d']}/{row['dv']}" if row["d"] else "any"
        key: tuple[str, ...] = (width, row["kind"].removeprefix("k").lower(), row["numbers"], row["pass"])
        cells.setdefault(key, {})[row["arch"]] = row
    order = sorted(cells, key=lambda key: ([int(n) for n in key[0].split("/")] if key[0] != "any" else [0], key[1:]))
    lines = [
        f"| D/Dv | kind | dtype | pass | {' | '.join(f'sm_{arch}' for arch in archs)} |",
        f"| --- | --- | --- | --- |{' --- |' * len(archs)}",
    ]
    for name in order:
        shown = []
        for arch in archs:
            cell = cells[name].get(arch)
            spilled = f", {cell['spill_stores']} B spilled" if cell and cell["spill_stores"] else ""
            shown.append(f"{cell['registers']}{spilled}" if cell else "–")
        lines.append(f"| {' | '.join((*name, *shown))} |")
    totals = []
    for arch in archs:
        files = {(row["numbers"], row["pass"], row["d"], row["dv"]): row for row in found if row["arch"] == arch}
        seconds = sum(row["file_seconds"] for row in files.values())
        size = sum(row["file_bytes"] for row in files.values())
        totals.append(f"{seconds / 60:.0f} min, {size / 2**20:.1f} MB")
    return "\n".join([*lines, f"| all | | | | {' | '.join(totals)} |"])


def summary() -> str:
    """The record as Markdown."""
    if not FILE.exists():
        return "There is no record yet."
    record = json.loads(FILE.read_text())
    note = (
        "registers of a thread, and bytes of them that are spilled. Last, the minutes of all files one after the other "
        "(they are compiled one a core, here beside other work), and the bytes of their objects."
    )
    return f"nvcc {record['nvcc']}: {note}\n\n{table(record['rows'])}"
