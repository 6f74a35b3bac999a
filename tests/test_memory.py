"""Memory grows with the number of positions N, not with N squared: the point of the library."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from visattn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))

MB = 2**20

# Peak resident memory above what is resident once the inputs exist and the engine has run, in a process of its own.
PROBE = """
import json, resource, sys, torch, visattn_kernels as va
case = json.loads(sys.argv[1])
torch.set_num_threads(2)
small = torch.zeros(1, 4, 4, 1, 4, requires_grad=True)
va.attention(small, small, small).sum().backward()
shape = lambda n, d: (case["batch"], n[0], n[1], case["heads"], d)
q = torch.rand(shape(case["queries"], case["d"])).requires_grad_(case["backward"])
k = torch.rand(shape(case["keys"], case["d"])).requires_grad_(case["backward"])
v = torch.rand(shape(case["keys"], case["dv"])).requires_grad_(case["backward"])
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the peak starts anew
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
before = resident()
if case["what"] == "attention":
    out = va.attention(q, k, v, scale=1.0, backend="cpu")
    if case["backward"]:
        out.sum().backward()
elif case["what"] == "map":
    va.attention_map(q, k, [(0, 0), (1, 1)], backend="cpu")
else:
    va.attention_received(q, k, backend="cpu")
print((peak() - before) * 1024)
"""


def peak(what="attention", queries=(64, 64), keys=(64, 64), d=8, dv=8, heads=1, batch=1, backward=False) -> int:
    """Bytes above the inputs."""
    case = {"what": what, "queries": queries, "keys": keys, "d": d, "dv": dv, "heads": heads, "batch": batch}
    command = [sys.executable, "-c", PROBE, json.dumps({**case, "backward": backward})]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_the_photograph_takes_less_than_100_mb() -> None:
    """320x213 colours: the map alone would take 18.6 GB."""
    assert peak(queries=(213, 320), keys=(213, 320), d=3, dv=3) < 100 * MB


@pytest.mark.parametrize("backward", [False, True])
def test_grows_with_n(backward: bool) -> None:
    """From 128x128 to 256x128 positions the map would grow from 1 GB to 4 GB."""
    results = 8 * 4 * 128 * 128 * (4 if backward else 1)  # out, and three gradients
    small = peak(queries=(128, 128), keys=(128, 128), backward=backward)
    large = peak(queries=(256, 128), keys=(256, 128), backward=backward)
    assert small < results + 16 * MB
    assert large < 2 * results + 16 * MB
    assert large - small < 2 * results + 4 * MB


def test_wide_heads_in_the_backward() -> None:
    """64x64 positions of 512 channels: 8 MB a tensor, where a map is 64 MB."""
    assert peak(d=512, dv=512, backward=True) < 5 * 8 * MB + 32 * MB


@pytest.mark.parametrize("what", ["map", "received"])
def test_reading_the_map(what: str) -> None:
    """Two rows or one sum per key of a map of 1 GB."""
    assert peak(what, queries=(128, 128), keys=(128, 128)) < 16 * MB


# The same for a workload of the benchmark in fp32, above its tensors and its results.
WORKLOAD = """
import sys, torch, visattn_kernels as va
from benchmarks.cases import Case, make_inputs
from benchmarks.providers import Bench, find
from benchmarks.workloads import WORKLOADS
torch.set_num_threads(2)
small = torch.zeros(1, 4, 4, 1, 4, requires_grad=True)
va.attention(small, small, small).sum().backward()
workload = next(w for w in WORKLOADS if w.name == sys.argv[1])
case = Case(workload, "float32", "cpu")
bench = Bench(find("visattn-cpu"), case, "both", make_inputs(case))
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
def above():
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    bench.once()
    return status("VmHWM") - before
results = bench.grad.nbytes + 4 * bench.grad[..., 0].numel() + sum(leaf.nbytes for leaf in bench.leaves)
print(above() - results)
"""

LOCAL = ["swin-b-s1", "nat-b-s1", "sasa-s1", "maxvit-grid", "axial-65-row", "axial-65-column", "axial-129-row"]
LOCAL += ["axial-129-column", "ccnet-97", "sam-h-global", "sam-h-window"]


@pytest.mark.parametrize("name", LOCAL)
def test_workloads_take_little_above_their_results(name: str) -> None:
    """Forward and backward within 64 MB of inputs and results: no unfolded, padded, rolled or permuted copy."""
    command = [sys.executable, "-c", WORKLOAD, name]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(result.stdout) < 64 * MB
