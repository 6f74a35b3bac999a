"""The build of the CUDA kernels, as far as it goes without a GPU.

What setup.py would do beside a torch with CUDA, kernels of each kind by nvcc, the binding against any torch's headers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from building import ROOT, copy_source, run

from benchmarks import cells, table
from visattn_kernels import Global, Neighborhood, Row, Window, backends
from visattn_kernels.backends import cuda, parts
from visattn_kernels.backends.cells import CELLS, NUMBERS, PASSES, kinds, sources
from visattn_kernels.patterns import Pattern, Size
from visattn_kernels.problem import Problem

NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")


def test_the_files_name_every_cell_once() -> None:
    named = [
        (match[1], match[2], int(d), int(dv), kind)
        for name, text in sources().items()
        for match in [re.match(r"(\w+?)_(\w+?)_", name)]
        if match
        for d, dv, kind in re.findall(r"X\((\d+), (\d+), (\w+)\)", text)
    ]
    expected = [
        (numbers, which, d, dv, kind)
        for numbers in NUMBERS
        for which in PASSES
        if which != "delta"
        for d, dv, listed in CELLS
        for kind in kinds(numbers, listed)
    ]
    expected += [(numbers, "delta", 0, 0, "kPlain") for numbers in NUMBERS]
    assert sorted(named) == sorted(expected)


WITH_CUDA = """
import runpy, sys
import ninja
import torch
import torch.utils.cpp_extension as build
torch.version.cuda = "13.0"
paths = build.library_paths()
build.library_paths = lambda *args, **more: [*paths, {tools!r}]
ninja.BIN_DIR = {tools!r}
sys.argv = ["setup.py", "-q", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""


@NVCC
@pytest.mark.parametrize("archs", ["8.0;9.0a+PTX", None])
def test_beside_a_torch_with_cuda_it_is_built(tmp_path: Path, archs: str | None) -> None:
    """To the point where torch's CUDA libraries would be linked, which are not here; of the kernels one is compiled."""
    source = copy_source(tmp_path / "source")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "libtorch_cuda.so").touch()
    (tools / "ninja").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tools / "ninja").chmod(0o755)
    environment = {"MAX_JOBS": "3"} | (
        {"TORCH_CUDA_ARCH_LIST": archs, "VISATTN_CUDA_WIDTHS": "8/8;32/32"} if archs else {}
    )
    run(sys.executable, "-c", WITH_CUDA.format(tools=str(tools)), cwd=source, **environment)
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:3] == ["-j", "3", "-f"]
    manifest = source / asked[3]
    text = manifest.read_text()
    few = [cell for cell in CELLS if cell[:2] in ((8, 8), (32, 32))]
    assert set(re.findall(r"(\w+)\.cu\.o: cuda", text)) == set(sources(few) if archs else sources())
    engine, kernels = (line for line in text.splitlines() if ": link " in line)
    assert "_C." in engine.partition(":")[0]
    assert "_cuda." in kernels.partition(":")[0]
    assert "cuda_" not in engine.partition(":")[2]  # the engine needs nothing that a torch without CUDA lacks
    for name in ("csrc_binding_cuda_module.cpp.o", "csrc_binding_cuda_ops.cpp.o", "cells.cpp.o"):
        assert name in kernels
    of_engine, of_kernels = re.findall("  libraries = (.*)", text)
    assert "-ltorch_cuda" not in of_engine
    assert "-ltorch_cuda" in of_kernels
    (folder,) = re.findall(r"-L(\S+) -lcudart_static", of_kernels)
    assert (Path(folder) / "libcudart_static.a").is_file()
    found = set(re.findall(r"-gencode arch=(\w+),code=(\w+)", text))
    if archs:
        assert found == {("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_90a", "compute_90a")}
    else:
        assert {("compute_80", "sm_80"), ("compute_90", "sm_90")} <= found
    (target,) = re.findall(r"build (\S*/float16_delta_0_0\.cu\.o)", text)
    (tools / "ninja").unlink()
    run("ninja", "-f", str(manifest), target, cwd=source)
    assert (source / target).stat().st_size > 1000


def test_a_launcher_before_the_compiler_is_not_for_nvcc() -> None:
    code = (
        "import runpy, setuptools; setuptools.setup = lambda **_: None; "
        "f = runpy.run_path('setup.py')['host_compiler']; print(f('g++'), f('ccache g++ -m64 -g'), sep='\\n')"
    )
    told = run(sys.executable, "-c", code, cwd=ROOT).splitlines()
    assert told == ["-ccbin g++", "-ccbin g++ -Xcompiler -m64,-g"]


def test_no_cuda_is_said_with_its_reason() -> None:
    if failure := parts.failure(parts.ENGINE):
        pytest.skip(failure)
    reason = import_module(parts.ENGINE).no_cuda()
    text = run(sys.executable, "-m", "visattn_kernels", "info", cwd=ROOT)
    assert not reason or f"the CUDA kernels were not built: {reason}" in " ".join(text.split())


@NVCC
def test_nvcc_compiles_a_kernel_of_each_kind(tmp_path: Path) -> None:
    """The narrowest; `make cuda-check` compiles all of them, for all architectures, and its record is held below."""
    record = tmp_path / "cells.json"
    files = ["float16_keys_8_8", "tf32_forward_8_8", "bfloat16_queries_32_32"]
    command = [sys.executable, "-m", "benchmarks", "cells", "--arch", "90a", "--out", str(record)]
    run(*command, *(word for name in files for word in ("--file", name)), cwd=ROOT)
    rows = json.loads(record.read_text())["rows"]
    assert {row["kind"] for row in rows} == {"kPlain", "kMasked", "kBias", "kVectors"}
    for row in rows:
        assert cells.faults(row) == []
        assert 0 < row["registers"] <= 255


def test_the_record_is_of_these_cells_and_within_the_limits() -> None:
    if not cells.FILE.exists():
        pytest.skip("no record was made yet: make cuda-check")
    rows = json.loads(cells.FILE.read_text())["rows"]
    assert {row["arch"] for row in rows} == set(cells.ARCHS)
    seen = sorted({(row["numbers"], row["pass"], row["d"], row["dv"], row["kind"]) for row in rows})
    assert len(seen) == sum(text.count("X(") for text in sources().values())
    for row in rows:
        assert cells.faults(row) == [], row
    assert not table.update(ROOT / "docs" / "cuda.md", table.finder([]), check=True)


def test_a_file_that_is_not_there_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks", "cells", "--file", "float16_forward_9_9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "float16_forward_9_9" in done.stderr + done.stdout


@pytest.mark.parametrize("extension", [True, False])
def test_a_gpu_without_these_kernels_is_left_to_triton(extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU, but an extension without CUDA, or none: reasons, and nothing that raises."""
    if extension and parts.failure(parts.ENGINE):
        pytest.skip("there is no extension")
    monkeypatch.setattr(cuda, "_no_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    if not extension:
        monkeypatch.setattr(parts, "failure", lambda part: "the extension visattn_kernels._C was not built")
    elif cuda._not_built() == "":
        pytest.skip("the kernels were built")
    assert cuda.unsupported(problem(Global())) == []
    (reason,) = cuda.unavailable()
    assert "not built" in reason
    with pytest.raises(RuntimeError, match=r"visattn: expected the CUDA kernels for .*, but .*not built"):
        cuda._kernel("forward")()


def problem(pattern: Pattern, *terms: str, width: int = 8) -> Problem:
    """A problem on a GPU."""
    grid = Size(14, 14)
    return Problem("cuda", torch.float16, 1, grid, grid, 1, 1, width, width, 1.0, pattern, terms)


def test_widths_that_were_not_compiled_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_no_gpu", lambda: "")
    monkeypatch.setattr(cuda, "_too_old", lambda: "")
    monkeypatch.setattr(cuda, "_most_shared", lambda: 227 * 1024)
    monkeypatch.setattr(cuda, "_not_built", lambda: "")
    monkeypatch.setattr(parts, "built_cuda", lambda: ("arch=compute_90,code=sm_90", ((8, 8),)))
    assert cuda.unsupported(problem(Global())) == []
    assert cuda.unsupported(problem(Global(), width=64)) == ["D and Dv are 64/64, not one of 8/8"]


def test_triton_comes_first_where_its_count_is_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        backend = next(backend for backend in backends.REGISTRY if backend.name == name)
        able = replace(backend, unavailable=list, unsupported=lambda problem: [])
        registry = tuple(able if other is backend else other for other in backends.REGISTRY)
        monkeypatch.setattr(backends, "REGISTRY", registry)
    window, rows = Window(7), Row()
    wanted = {
        "triton": [problem(Global()), problem(rows, "RelativeQuery"), problem(window, "RelativeValue", "RelativeBias")],
        "cuda": [problem(window), problem(rows), problem(window, "RelativeBias"), problem(Neighborhood(7), "KeyBias")],
    }
    for name, problems in wanted.items():
        for one in problems:
            assert backends.choose(one, "auto") == name, one.describe()
            assert backends.choose(one, "cuda") == "cuda"
