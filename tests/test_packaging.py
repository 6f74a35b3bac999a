"""What is installed: with and without the compiled part, under sanitizers, after fork; what its symbols are."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path

import pytest
from building import ROOT, copy_source, pytest_on, run, sanitized_environment

from visattn_kernels.backends import cpu

needs_engine = pytest.mark.skipif(bool(cpu.unavailable()), reason="; ".join(cpu.unavailable()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs."""
    return copy_source(tmp_path / "source")


def test_pure_python_install(source: Path, tmp_path: Path) -> None:
    """VISATTN_NO_EXT=1: it imports, the reference serves, and it says what is missing."""
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    run(*pip, str(source), cwd=tmp_path, VISATTN_NO_EXT="1")
    assert not list(target.rglob("*.so"))
    assert (target / "visattn_kernels" / "py.typed").exists()
    code = (
        "import torch, warnings, visattn_kernels as va; print(va.__file__)\n"
        "warnings.simplefilter('ignore')\n"
        "q = torch.ones(1, 2, 2, 1, 2, requires_grad=True)\n"
        "va.attention(q, q, q).sum().backward(); print(va.explain(q, q, q))\n"
        "try: va.attention(q, q, q, backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    # -S: an editable install of this checkout would lend its extension
    python, path = (sys.executable, "-S"), os.pathsep.join([str(target), sysconfig.get_path("purelib")])
    text = run(*python, "-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert str(target) in text
    assert re.search(r"^cpu +no: the extension visattn_kernels._C was not built", text, re.M)
    assert re.search(r"^reference +yes, taken", text, re.M)
    assert "It cannot: the extension visattn_kernels._C was not built" in text
    info = run(*python, "-m", "visattn_kernels", "info", cwd=tmp_path, PYTHONPATH=path)
    assert "was not built" in " ".join(info.split())


@needs_engine
def test_wheel_serves_every_python_from_3_10(source: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run(*pip, "-w", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = run(sys.executable, "-m", "zipfile", "-l", str(wheel), cwd=tmp_path)
    assert "visattn_kernels/_C.abi3.so" in names
    assert "tests/" not in names
    assert "csrc/" not in names


@pytest.mark.long
@needs_engine
def test_sanitizers_are_silent(source: Path, tmp_path: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer over the engine and its checks, random raw calls included."""
    environment = {**sanitized_environment(tmp_path), "PYTHONPATH": str(source)}
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=source, VISATTN_SANITIZE="1")
    maps = run(
        sys.executable, "-c", "import torch, visattn_kernels; print(open('/proc/self/maps').read())",
        cwd=tmp_path, **environment,
    )  # fmt: skip
    assert str(source / "visattn_kernels" / "_C.abi3.so") in maps
    select = "(forward_and_backward or map_and_received) and (float32 or bfloat16)"
    tests = [str(ROOT / "tests" / name) for name in ("test_fuzz.py", "test_cpu_engine.py")]
    select = f"fuzz or raw or random or ({select})"
    text = run(*pytest_on(source), "-x", *tests, "-k", select, cwd=tmp_path, **environment)
    assert re.search(r"\d{3,} passed", text), text


@needs_engine
def test_isa_objects_share_no_symbol() -> None:
    """A function compiled for AVX-512 must not be what the linker keeps for every CPU: its name carries the set."""
    objects = sorted((ROOT / "build").glob("temp*/release/csrc_cpu_isa_*.o"))
    if not objects:
        pytest.skip("no objects of an in-place build here")
    for path in objects:
        isa = re.fullmatch(r"csrc_cpu_isa_(\w+)\.cpp\.o", path.name)
        assert isa
        for line in run("nm", "--defined-only", "-C", str(path), cwd=ROOT).splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            if kind in "TWV":
                assert f"::{isa[1]}::" in name, f"{path.name}: {name}"


@needs_engine
def test_exports_nothing_but_its_init_function() -> None:
    import visattn_kernels._C

    names = run("nm", "-D", "--defined-only", visattn_kernels._C.__file__, cwd=ROOT)
    functions = [line.split()[2] for line in names.splitlines() if line.split()[1] == "T"]
    assert functions == ["PyInit__C"]


def test_import_is_light() -> None:
    """Importing the package adds our modules to those of torch and no others; its use does not load the compiler."""
    code = """
import sys, torch
def new():
    return sorted(name for name in set(sys.modules) - before if name.split(".")[0] != "visattn_kernels")
before = set(sys.modules)
import visattn_kernels as va
print("the package", *new())
import visattn_kernels.nn
print("its modules", *new())
x = torch.rand(1, 8, 4, 4)
out = va.nn.SAGANAttention(8)(x)
out.sum().backward()
q = va.heads_last(x, 2)
va.attention_map(q, q, [(0, 0)], va.Neighborhood(3)), va.explain(q, q, q)
print("their use", *[name for name in new() if name in ("torch._dynamo", "torch._inductor", "sympy", "triton")])
"""
    said = run(sys.executable, "-W", "ignore", "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT))
    assert said.splitlines() == ["the package", "its modules", "their use"]


@needs_engine
def test_runs_in_a_forked_child() -> None:
    code = """
import os, torch, visattn_kernels as va
q = torch.rand(1, 8, 8, 2, 4)
expected = va.attention(q, q, q, backend="cpu")
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as data loader workers do
    os._exit(0 if torch.equal(va.attention(q, q, q, backend="cpu"), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    run(sys.executable, "-c", code, cwd=ROOT)
