"""The build of the CUDA kernels, as far as it goes without a GPU.

What setup.py would do beside a torch with CUDA, kernels of each kind by nvcc, the binding against any torch's headers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension as torch_build
from building import ROOT, copy_source, run

from benchmarks import cells, table
from visattn_kernels import Global
from visattn_kernels.backends import cuda
from visattn_kernels.backends.cells import CELLS, NUMBERS, PASSES, kinds, sources
from visattn_kernels.patterns import Size
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


def test_the_binding_compiles_against_any_torch(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    includes = [f"-isystem{path}" for path in torch_build.include_paths()]
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    run(compiler, *flags, "-fsyntax-only", *includes, str(ROOT / "csrc/binding/cuda_ops.cpp"), cwd=tmp_path)


WITH_CUDA = """
import runpy, sys
import torch
import torch.utils.cpp_extension as build
torch.version.cuda = "13.0"
build.CUDA_HOME = {home!r}
sys.argv = ["setup.py", "-q", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""


@NVCC
@pytest.mark.parametrize("archs", ["8.0;9.0a+PTX", None])
def test_beside_a_torch_with_cuda_it_is_built(tmp_path: Path, archs: str | None) -> None:
    """To the point where torch's CUDA libraries would be linked, which are not here; of the kernels one is compiled."""
    source = copy_source(tmp_path / "source")
    home = Path(str(shutil.which("nvcc"))).resolve().parents[1]
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ninja").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tools / "ninja").chmod(0o755)
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"} | (
        {"TORCH_CUDA_ARCH_LIST": archs} if archs else {}
    )
    run(sys.executable, "-c", WITH_CUDA.format(home=str(home)), cwd=source, **environment)
    manifest = source / (tmp_path / "asked").read_text().split()[1]
    text = manifest.read_text()
    for name in sources():
        assert f"{name}.cu.o: cuda" in text
    for flag in ("-ltorch_cuda", "-lcudart_static", "csrc/binding/cuda_ops.cpp.o", "cells.cpp.o"):
        assert flag.replace("csrc/binding/", "csrc_binding_") in text
    found = set(re.findall(r"-gencode arch=(\w+),code=(\w+)", text))
    if archs:
        assert found == {("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_90a", "compute_90a")}
    else:
        assert {("compute_80", "sm_80"), ("compute_90", "sm_90")} <= found
    (target,) = re.findall(r"build (\S*/float16_delta_0_0\.cu\.o)", text)
    (tools / "ninja").unlink()
    run("ninja", "-f", str(manifest), target, cwd=source)
    assert (source / target).stat().st_size > 1000


def test_no_cuda_is_said_with_its_reason() -> None:
    import visattn_kernels._C

    built, reason = visattn_kernels._C.cuda()
    assert built == (reason == "")
    text = run(sys.executable, "-m", "visattn_kernels", "info", cwd=ROOT)
    assert built or f"the CUDA kernels were not built: {reason}" in " ".join(text.split())


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
    if extension and cuda.cpu.unavailable():
        pytest.skip("there is no extension")
    monkeypatch.setattr(cuda, "_no_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    if not extension:
        monkeypatch.setattr(cuda.cpu, "_failure", "the extension visattn_kernels._C was not built")
        monkeypatch.setitem(sys.modules, "visattn_kernels._C", None)  # importing it raises
    elif cuda._not_built() == "":
        pytest.skip("the kernels were built")
    grid = Size(4, 4)
    plain = Problem("cuda", torch.float16, 1, grid, grid, 1, 1, 8, 8, 1.0, Global())
    assert cuda.unsupported(plain) == []
    (reason,) = cuda.unavailable()
    assert "not built" in reason
