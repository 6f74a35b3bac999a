"""Ceilings of the machine, and the floor that they set for a case: no implementation can be faster.

On a CPU they are measured in the run that uses them: by `ceilings.cpp`, where a C++ compiler is found, and by
torch's own large products and copies; the higher number counts. On a GPU they are the H200's, as stated constants.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Pass

SOURCE = Path(__file__).with_name("ceilings.cpp")
EXPS_PER_THREAD = 18e9
"""Of a degree-5 exp2 in AVX-512, stated where there is no compiler to measure it."""

H200_BYTES, H200_EXPS = 4.3e12, 3.7e12
H200_FLOPS = {"bfloat16": 790e12, "float16": 790e12, "float32": 67e12, "float64": 67e12}
"""One H200: copy, the special-function units, and the matrix units (float32: the data sheet's, without TF32)."""


@dataclass(frozen=True)
class Ceilings:
    """Rates that nothing on this machine exceeds.

    Attributes:
        flops: per second, by dtype.
        bytes: moved per second, reads and writes.
        exps: exponentials per second.
        sources: every number that they were taken from.
    """

    flops: dict[str, float]
    bytes: float
    exps: float
    sources: dict[str, Any]

    def floor(self, case: Case, which: Pass) -> Floor:
        """The least time of a pass of a case."""
        if which == "both":
            forward, backward = self.floor(case, "forward"), self.floor(case, "backward")
            longest = max(forward, backward, key=lambda floor: floor.seconds)
            return Floor(forward.seconds + backward.seconds, longest.binds)
        cost = case.cost(which)
        times = {
            "arithmetic": cost.flops / self.flops[case.dtype_name],
            "memory": cost.bytes / self.bytes,
            "exp": cost.exps / self.exps,
        }
        binds = max(times, key=lambda name: times[name])
        return Floor(times[binds], binds)

    def plain(self) -> dict[str, Any]:
        """As plain values, for a results file."""
        return asdict(self)


@dataclass(frozen=True)
class Floor:
    """The least time of a pass, and which ceiling sets it."""

    seconds: float
    binds: str


def measure(device: str, threads: int) -> Ceilings:
    """The ceilings of a device with so many threads."""
    if device == "cuda":
        return Ceilings(H200_FLOPS, H200_BYTES, H200_EXPS, {"stated for one H200": True})
    sources: dict[str, Any] = {
        "torch": {
            "float32": _product(torch.float32),
            "bfloat16": _product(torch.bfloat16),
            "copy": _copy(),
        }
    }
    program = run_program(threads)
    sources["ceilings.cpp"] = program
    library = sources["torch"]
    flops = {name: library[name] for name in ("float32", "bfloat16")}
    exps = EXPS_PER_THREAD * threads
    if program is not None:
        flops["float32"] = max(flops["float32"], program["fma"])
        flops["bfloat16"] = max(flops["bfloat16"], program["dot"])
        exps = program["exp2"]
    flops["bfloat16"] = max(flops["bfloat16"], flops["float32"])  # it can be widened
    flops["float16"] = flops["float32"]  # half precision is widened: no CPU here multiplies it faster
    flops["float64"] = flops["float32"] / 2
    return Ceilings(flops, library["copy"], exps, sources)


def _best(call: Any, seconds: float = 0.4) -> float:
    """The shortest of several calls."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _product(dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product; of a small one where the large would take seconds."""
    best = 0.0
    for size in (256, 2048):
        operations = 2 * size**3
        if best == 0 or operations / best < 1:
            a, b = torch.randn(2, size, size).to(dtype)
            out = torch.empty_like(a)
            best = max(best, operations / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)))
    return best


def _copy(count: int = 2**26) -> float:
    """Bytes per second of a large copy, read and written."""
    source, target = torch.ones(count), torch.ones(count)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


@cache
def run_program(threads: int) -> dict[str, Any] | None:
    """What `ceilings.cpp` prints; None without a compiler, or where it does not build."""
    found = build_and_run(SOURCE, str(threads))
    assert found is None or isinstance(found, dict)
    return found


def build_and_run(source: Path, *arguments: str, flags: str = "-march=native", with_torch: bool = False) -> Any:
    """Build a program for this CPU and read the JSON that it prints; None if it does not build or run.

    Args:
        source: a C++ file.
        arguments: of the program.
        flags: the instruction set to compile for.
        with_torch: link torch's libraries.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    command = [compiler, "-std=c++20", "-O3", *flags.split(), "-ffp-contract=fast", "-pthread", "-w", str(source)]
    if with_torch:
        torch_root = Path(torch.__file__).parent
        lib = torch_root / "lib"
        command += [f"-I{torch_root / 'include'}", f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        try:
            subprocess.run([*command, "-o", str(program)], check=True, capture_output=True, text=True)
            done = subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError:
            return None
    return json.loads(done.stdout)
