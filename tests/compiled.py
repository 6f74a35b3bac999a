"""Builds the C++ that is there for tests alone, once, however many processes of a test run ask for it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


def geometry(csrc: Path = ROOT / "csrc") -> ModuleType:
    """The module `geometry` of a tree of sources."""
    binding = csrc / "binding" / "geometry.cpp"
    return compiled("geometry", binding, [binding, csrc / "pattern.h", csrc / "terms.h"])


def emulated(*flags: str) -> ModuleType:
    """The module `emulated`: the CUDA kernels' primitives on the CPU."""
    return loaded(build_emulated(*flags))


def build_emulated(*flags: str) -> Path:
    """The file of `emulated`; a sanitized one is built in another process than it is loaded in."""
    csrc = ROOT / "csrc"
    inputs = [*sorted((csrc / "emulator").glob("*.*")), csrc / "cuda" / "prims.h"]
    return built("emulated", csrc / "emulator" / "module.cpp", inputs, "-O2", *flags)


def compiled(name: str, source: Path, inputs: list[Path]) -> ModuleType:
    """A pybind11 module, from `build/tests` if it has been built from the same inputs before."""
    return loaded(built(name, source, inputs))


def built(name: str, source: Path, inputs: list[Path], *flags: str) -> Path:
    """See `compiled`."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        pytest.skip(f"there is no C++ compiler {compiler}")
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    command = [compiler, *FLAGS, *flags, *includes]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")

    def make(folder: Path) -> Path:
        target = folder / f"{name}{suffix}"
        done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
        return target

    return stamped(name, [pybind11.__version__, suffix, *command], inputs, make)


def stamped(name: str, key: Iterable[str], inputs: Iterable[Path], make: Callable[[Path], Path]) -> Path:
    """What `make(folder)` builds, from a folder of `build/tests` if it has been built from the same before."""
    digest = hashlib.sha256("\0".join(key).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "tests" / f"{name}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, and when the process dies
        done = folder / "done"  # named last, so that what is half built is built again
        if not done.exists():
            part = folder / "done.part"
            part.write_text(str(make(folder)))
            part.replace(done)
        return Path(done.read_text())


def loaded(target: Path) -> ModuleType:
    """The module in a file that `built` has made."""
    # Under a name of its own: pybind11 would return the other one of two modules of the same name.
    name = target.name.split(".")[0]
    spec = importlib.util.spec_from_file_location(f"{target.parent.name}.{name}", target)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
