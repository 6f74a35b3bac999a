"""The Triton kernels of every workload, compiled ahead of time for four architectures: known without a GPU are
that they compile, what they take, and that every offset has 64 bits.

Compilation runs in processes of its own, since kernels here are those of the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compiled
from benchmarks.machine import ROOT
from benchmarks.workloads import WORKLOADS
from visattn_kernels.backends import triton

pytestmark = pytest.mark.skipif(bool(triton.missing()), reason="; ".join(triton.missing()))


def compile_all(tmp_path: Path, *options: str) -> list[dict]:
    """The rows of `python -m benchmarks compiled`."""
    record = tmp_path / "compiled.json"
    command = [sys.executable, "-m", "benchmarks", "compiled", "--out", str(record), *options]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(record.read_text())["rows"]


@pytest.mark.long
@pytest.mark.singly
@pytest.mark.parametrize("name", [workload.name for workload in WORKLOADS])
@pytest.mark.parametrize("capability", compiled.CAPABILITIES)
def test_compiles_within_the_limits(name: str, capability: int, tmp_path: Path) -> None:
    rows = compile_all(tmp_path, "-w", name, "--no-careful", "--capability", str(capability))
    assert {row["capability"] for row in rows} == {capability}
    assert {row["kernel"] for row in rows} == {
        "attention_forward_kernel",
        "attention_delta_kernel",
        "attention_backward_dq_kernel",
        "attention_backward_dkdv_kernel",
    }
    for row in rows:
        where = f"{row['kernel']} for {row['capability']}: {row['registers']} registers"
        assert not compiled.faults(row), f"{where}: {'; '.join(compiled.faults(row))}"


@pytest.mark.parametrize("name", ["nat-b-s1", "axial-65-row"])
def test_careful_launches_compile(name: str, tmp_path: Path) -> None:
    rows = [row for row in compile_all(tmp_path, "-w", name, "--capability", "90") if row["careful"]]
    assert {row["kernel"] for row in rows} == {
        "attention_forward_kernel",
        "attention_backward_dq_kernel",
        "attention_backward_dkdv_kernel",
    }
    for row in rows:
        assert not compiled.faults(row), f"{row['kernel']}: {'; '.join(compiled.faults(row))}"


@pytest.mark.singly
@pytest.mark.parametrize("name", ["nat-b-s1", "ccnet-97"])
@pytest.mark.parametrize("capability", compiled.CAPABILITIES)
def test_reading_the_map_compiles(name: str, capability: int, tmp_path: Path) -> None:
    rows = compile_all(tmp_path, "-w", name, "--reading", "--no-careful", "--capability", str(capability))
    kernels = {row["kernel"] for row in rows}
    assert kernels == {"attention_forward_kernel", "attention_map_kernel", "attention_backward_dkdv_kernel"}
    for row in rows:
        assert not compiled.faults(row), f"{row['kernel']}: {'; '.join(compiled.faults(row))}"


WIDE = """
import torch
from benchmarks import compiled
from benchmarks.workloads import find
from visattn_kernels.triton import launch
launch.NARROW = 0
for name in ("swin-b-s1", "ccnet-97"):
    call = compiled.call_of(find(name), torch.bfloat16, 90)
    for one in (*compiled.launches_of(call), *compiled.reading_launches_of(call)):
        if not getattr(one.args[-1], "careful", False):
            assert not compiled.narrow_offsets(compiled.compile_launch(one, 90).asm["ttir"]), one.kernel
"""


def test_counting_in_64_bits_compiles() -> None:
    """More programs than 32 bits count: no GPU has the memory to need it soon, and it shall compile all the same."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", WIDE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_limits_can_be_broken() -> None:
    row = {"capability": 120, "shared": 0, "stack": 0, "careful": False, "narrow_offsets": []}
    assert compiled.faults(row) == []
    assert compiled.faults({**row, "shared": 99 * 1024 + 1}) == ["101377 bytes of shared memory, of 101376"]
    assert compiled.faults({**row, "stack": 129}) == ["129 bytes spilled, of 128"]
    assert compiled.faults({**row, "stack": 129, "careful": True}) == []
    narrow = "    %3 = tt.addptr %1, %2 : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#loc3)"
    wide = "    %3 = tt.addptr %1, %2 : tensor<64x16x!tt.ptr<bf16>>, tensor<64x16xi64> loc(#loc3)"
    assert compiled.narrow_offsets(f"{wide}\n{narrow}\n%4 = tt.addptr %0, %x : !tt.ptr<i32>, i64") == [narrow.strip()]
    assert compiled.faults({**row, "narrow_offsets": [narrow.strip()]}) != []


def test_the_document_shows_the_record() -> None:
    rows = json.loads(compiled.FILE.read_text())["rows"]
    assert compiled.table(rows) in (ROOT / "docs" / "triton.md").read_text()
    assert {row["workload"] for row in rows} <= {workload.name for workload in WORKLOADS}
    assert not [row for row in rows if compiled.faults(row)]
