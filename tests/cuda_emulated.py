"""The CUDA backend on the emulator: the same operators and kernels, compiled for the CPU, and which cases they take."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension as torch_build
from building import ROOT
from cases import Case, fitted
from compiled import stamped

from visattn_kernels.backends import cuda
from visattn_kernels.backends.cells import CELLS, sources, table

SCHEDULES = range(6)
FLAGS = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-maybe-uninitialized "
    "-DVISATTN_EMULATED -DTORCH_TARGET_VERSION=0x020a000000000000"
)
SANITIZED = os.environ.get("VISATTN_SANITIZE") == "1"
"""Whether this process has AddressSanitizer, and builds with it: fewer widths, since such builds are slow."""
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"

WIDTHS: dict[str, list[tuple[int, int]]] = {
    "float16": [(d, dv) for d, dv, _ in CELLS],
    "float32": [(d, dv) for d, dv, _ in CELLS],
    "bfloat16": [(8, 8), (16, 32)],
    "tf32": [(8, 8), (16, 32)],
}
"""D and Dv that are compiled for the emulator: what differs between dtypes does not between all of the widths."""
NARROW: dict[str, list[tuple[int, int]]] = {
    "float16": [(8, 8), (16, 32)],
    "float32": [(8, 8)],
    "bfloat16": [],
    "tf32": [],
}
"""Those of a sanitized build."""
if SANITIZED:
    WIDTHS = NARROW


def build(
    csrc: Path = ROOT / "csrc", widths: dict[str, list[tuple[int, int]]] = WIDTHS, sanitize: bool = SANITIZED
) -> Path:
    """The library that registers the operators for CPU tensors, from `build/tests` if the same one is there."""
    compiler = os.environ.get("CXX", "c++")
    if not (shutil.which(compiler) and shutil.which("ninja")):
        pytest.skip(f"there is no C++ compiler {compiler}, or no ninja")
    includes = " ".join(f"-isystem {path}" for path in torch_build.include_paths())
    libraries = " ".join(f"-L{path}" for path in torch_build.library_paths()) + " -ltorch_cpu -lc10"
    flags = SANITIZE if sanitize else ""
    texts: dict[str, str] = {}
    for numbers, listed in widths.items():
        texts |= sources([cell for cell in CELLS if cell[:2] in listed], [numbers])
    texts["cells"] = table(texts)
    headers = sorted(path for part in ("", "cuda", "emulator", "binding") for path in (csrc / part).glob("*.*"))
    key = [compiler, FLAGS, flags, torch.__version__, *texts.values()]

    def make(folder: Path) -> Path:
        lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            f"  command = {compiler} {FLAGS} {flags} {includes} -I{csrc} -MD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            f"  command = {compiler} -shared {flags} $in {libraries} -o $out",
        ]
        inputs = [csrc / "cuda/choose.cpp", csrc / "binding/cuda_ops.cpp", csrc / "emulator/control.cpp"]
        for name, text in texts.items():
            inputs.append(folder / f"{name}.cpp")
            inputs[-1].write_text(text)
        objects = [folder / f"{path.stem}.o" for path in inputs]
        lines += [f"build {obj}: compile {path}" for path, obj in zip(inputs, objects, strict=True)]
        target = folder / "emulated.so"
        lines += [f"build {target}: link {' '.join(map(str, objects))}", f"default {target}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        done = subprocess.run(["ninja", "-C", str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:]
        return target

    return stamped("cuda", key, headers, make)


@cache
def load(library: Path) -> None:
    """Load the library into this process."""
    torch.ops.load_library(library)


def control(schedule: int = 0, max_grid_x: int = 0) -> None:
    """Set the emulator's schedule, and the widest grid before it folds (0: as on a GPU)."""
    torch.ops.visattn_emulator.control(schedule, max_grid_x)


def taken(cases: Iterable[Case], numbers: str | None = None) -> list[Case]:
    """The cases that the kernels take, with widths of cells that are compiled here, in turn."""
    found: dict[Case, None] = {}
    for turn, case in enumerate(cases):
        among = WIDTHS[numbers or cuda.DTYPES[case.dtype]]
        if (fit := fitted(case, turn, numbers, among)) is not None:
            found[fit] = None
    return list(found)
