"""Building and installing where things are missing, old or elsewhere: it works, or one line says what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch
from building import ROOT, copy_source, run

import setup_cuda
from benchmarks import releases
from visattn_kernels.backends import parts

needs_engine = pytest.mark.skipif(bool(parts.failure(parts.ENGINE)), reason=parts.failure(parts.ENGINE))

PIP = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation")

USE = """
import torch, visattn_kernels as v
q = torch.rand(1, 5, 7, 2, 8)
out = v.attention(q, q, q, backend="cpu")
assert torch.allclose(out, v.attention(q, q, q, backend="reference"), atol=1e-6)
print(v.__file__, v.explain())
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_source(tmp_path / "source")


def refused(command: list[str], cwd: Path, **environment: str) -> str:
    """The last line of a command that must fail, without a traceback."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def only(folder: Path, *programs: str) -> str:
    """A PATH with some programs alone."""
    folder.mkdir()
    for name in programs:
        (folder / name).symlink_to(str(shutil.which(name)))
    return str(folder)


def installed(target: Path) -> dict[str, str]:
    """The environment of a Python that has a package installed in `target`, and nothing of this checkout."""
    return {"PYTHONPATH": os.pathsep.join([str(target), sysconfig.get_path("purelib")])}


BUILD = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]


# What is distributed.


@needs_engine
def test_the_source_distribution_builds(source: Path, tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "-q", "sdist", cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    kept = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert kept <= {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}
    shutil.copytree(source / "build", unpacked / "build")  # what is compiled already
    target = tmp_path / "target"
    run(sys.executable, *PIP, "--target", str(target), str(unpacked), cwd=tmp_path)
    text = run(sys.executable, "-S", "-c", USE, cwd=tmp_path, **installed(target))
    assert str(target) in text


@needs_engine
def test_setuptools_65_installs_it(source: Path, tmp_path: Path) -> None:
    """What a new environment of Python 3.10 or 3.11 has."""
    old, target = tmp_path / "old", tmp_path / "target"
    run(sys.executable, "-m", "pip", "install", "-q", "--target", str(old), "setuptools==65.5.0", cwd=tmp_path)
    path = os.pathsep.join([str(old), sysconfig.get_path("purelib")])
    assert run(sys.executable, "-c", "import setuptools; print(setuptools.__version__)", cwd=tmp_path, PYTHONPATH=path)
    run(sys.executable, *PIP, "--target", str(target), str(source), cwd=tmp_path, PYTHONPATH=path)
    assert str(target) in run(sys.executable, "-S", "-c", USE, cwd=tmp_path, **installed(target))
    (about,) = target.glob("visattn_kernels-*.dist-info")
    assert "License: MIT" in (about / "METADATA").read_text()


@pytest.mark.full
@needs_engine
def test_with_isolation_it_builds(tmp_path: Path) -> None:
    """As pip does it by itself: in an environment that it makes for the build, here with this torch."""
    limit, target = tmp_path / "limit.txt", tmp_path / "target"
    limit.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    source = copy_source(tmp_path / "source")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(source)]
    run(*command, cwd=tmp_path, PIP_CONSTRAINT=str(limit))
    assert str(target) in run(sys.executable, "-S", "-c", USE, cwd=tmp_path, **installed(target))


# What a build lacks.


def test_without_a_compiler_it_is_pure(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    command = [sys.executable, *PIP[:3], "-v", *PIP[4:], "--target", str(target), str(source)]
    environment = {**os.environ, "PATH": only(tmp_path / "bin", "sh", "uname"), "CXX": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    text = done.stdout
    assert "visattn: there is no C++ compiler, so that pure Python is installed: the reference serves" in text
    assert not list(target.rglob("*.so"))
    explained = "import visattn_kernels; print(visattn_kernels.explain())"
    text = run(sys.executable, "-S", "-c", explained, cwd=tmp_path, **installed(target))
    assert "no C++ compiler at install time" in text


@needs_engine
def test_ninja_of_an_environment_that_is_not_activated(source: Path, tmp_path: Path) -> None:
    path = only(tmp_path / "bin", "sh", "c++", "ld", "as")
    run(*BUILD, cwd=source, PATH=path)
    assert (source / "visattn_kernels" / "_C.abi3.so").exists()


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"CXX": "no-such-compiler"}, "visattn: expected CXX to name a C++ compiler, but got CXX=no-such-compiler"),
        ({"CXX": "'g++"}, "visattn: expected CXX to name a C++ compiler, but got CXX='g++"),
        ({"MAX_JOBS": "²"}, "visattn: expected MAX_JOBS to be a whole number from 1 up, but got MAX_JOBS=²"),
        ({"MAX_JOBS": "0"}, "visattn: expected MAX_JOBS to be a whole number from 1 up, but got MAX_JOBS=0"),
        ({"MAX_JOBS": "two"}, "visattn: expected MAX_JOBS to be a whole number from 1 up, but got MAX_JOBS=two"),
    ],
)
def test_a_setting_that_is_wrong_is_one_line(source: Path, environment: dict[str, str], line: str) -> None:
    assert refused(BUILD, source, **environment) == line


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("sys.modules['torch'] = None", "visattn: building needs torch 2.10 or later in the environment that builds"),
        (
            "class Broken:\n"
            "    def find_spec(self, name, *rest):\n"
            "        if name == 'torch': raise OSError('libtorch.so: not found')\n"
            "sys.meta_path.insert(0, Broken())",
            "visattn: building needs torch 2.10 or later in the environment that builds, but importing it says: lib",
        ),
        (
            "import torch; torch.__version__ = '2.9.1'",
            "visattn: building needs torch 2.10 or later, but got torch 2.9.1",
        ),
        (
            "shutil.which = lambda *a, **k: 'c++' if a[0] == 'c++' else None; sys.modules['ninja'] = None; "
            "importlib.util.find_spec = lambda *a: None",
            "visattn: building needs ninja, which is not installed (pip install ninja)",
        ),
    ],
)
def test_what_is_missing_is_one_line(source: Path, what: str, line: str) -> None:
    code = f"import importlib.util, runpy, shutil, sys\n{what}\nsys.argv = {BUILD[1:]}\nrunpy.run_path('setup.py')"
    assert refused([sys.executable, "-c", code], source).startswith(line)


def test_a_source_that_does_not_compile_is_one_line_after_the_compiler(source: Path) -> None:
    (source / "csrc" / "cpu" / "dispatch.cpp").write_text("#error something is wrong\n")
    line = refused(BUILD, source)
    assert line == "visattn: the compiled part does not build; the compiler's messages stand above"


# One part without the other.


@needs_engine
def test_a_cuda_part_without_its_torch_is_a_reason(source: Path, tmp_path: Path) -> None:
    """Built beside a torch with CUDA and imported beside one without: libtorch_cuda.so is not there."""
    package = source / "visattn_kernels"
    shutil.copy(ROOT / "visattn_kernels" / "_C.abi3.so", package)
    (tmp_path / "stub.c").write_text("void torch_cuda_stub(void) {}\n")
    (tmp_path / "part.c").write_text("void torch_cuda_stub(void); void use(void) { torch_cuda_stub(); }\n")
    run("cc", "-shared", "-fPIC", "stub.c", "-o", "libtorch_cuda.so", cwd=tmp_path)
    run("cc", "-shared", "-fPIC", "part.c", "-L.", "-ltorch_cuda", "-o", str(package / "_cuda.abi3.so"), cwd=tmp_path)
    (tmp_path / "libtorch_cuda.so").unlink()
    text = run(sys.executable, "-S", "-c", USE, cwd=tmp_path, **installed(source))
    assert re.search(r"^\S*visattn_kernels/__init__.py cpu +yes", text, re.M)
    assert re.search(r"^cuda +no: the extension visattn_kernels._cuda does not load: libtorch_cuda.so", text, re.M)


@needs_engine
def test_a_part_of_older_sources_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    parts.failure.cache_clear()
    monkeypatch.setitem(parts._ASKED, parts.ENGINE, "what_it_has_not")
    assert parts.failure(parts.ENGINE) == f"the extension {parts.ENGINE} was built from older sources; build it again"
    assert "older sources" in parts.failure(parts.CUDA) or not parts.failure(parts.CUDA)
    parts.failure.cache_clear()


@needs_engine
def test_a_cuda_part_of_an_earlier_build_is_no_part_of_this_one(source: Path) -> None:
    package = source / "visattn_kernels"
    built = next((source / "build").glob("temp*")).name.replace("temp", "lib", 1)
    places = [package, source / "build" / built / "visattn_kernels"]
    for folder in places:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_cuda.abi3.so").touch()
    run(*BUILD, cwd=source, VISATTN_NO_CUDA="1")
    assert not [path for folder in places for path in folder.glob("_cuda*")]
    assert (package / "_C.abi3.so").exists()


def test_wheel_is_asked_for_where_setuptools_is_old(source: Path) -> None:
    code = (
        "import importlib.util as u, runpy, sys\nfound = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if 'wheel' in name else found(name, *a)\n"
        "sys.argv = ['setup.py', 'bdist_wheel']\nrunpy.run_path('setup.py')"
    )
    line = refused([sys.executable, "-c", code], source)
    assert (
        line == "visattn: building needs wheel beside this setuptools (pip install wheel, or setuptools 70.1 or later)"
    )


@needs_engine
def test_a_broken_engine_is_a_reason(source: Path, tmp_path: Path) -> None:
    (source / "visattn_kernels" / "_C.abi3.so").write_text("no library")
    code = "import visattn_kernels as v; print(v.explain())"
    text = run(sys.executable, "-S", "-c", code, cwd=tmp_path, **installed(source))
    assert re.search(r"^cpu +no: the extension visattn_kernels._C does not load: ", text, re.M)
    assert re.search(r"^reference +yes", text, re.M)


# torch's releases.


@pytest.mark.parametrize(
    "release",
    [
        pytest.param(
            release, marks=[] if release in (releases.RELEASES[0], releases.RELEASES[-1]) else pytest.mark.full
        )
        for release in releases.RELEASES
    ],
)
def test_the_binding_compiles_against(release: str, tmp_path: Path) -> None:
    """Headers alone: with and without CUDA, as the flags of the build have it."""
    try:
        include = releases.headers(release)
    except releases.UnreachableError as error:
        pytest.skip(str(error))
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-fsyntax-only", f"-isystem{include}"]
    for name in ("cpu_ops", "cuda_ops"):
        run(os.environ.get("CXX", "c++"), *flags, str(ROOT / "csrc" / "binding" / f"{name}.cpp"), cwd=tmp_path)


def test_the_oldest_release_is_the_one_that_is_asked_for() -> None:
    oldest = ".".join(releases.RELEASES[0].split(".")[:2])
    text = (ROOT / "pyproject.toml").read_text()
    assert f'dependencies = ["torch>={oldest}"]' in text
    number = "0x{:02x}{:02x}".format(*map(int, oldest.split(".")))
    assert f"-DTORCH_TARGET_VERSION={number}000000000000" in (ROOT / "setup.py").read_text()


def test_the_record_is_of_every_release() -> None:
    rows = releases.rows()
    assert [row["release"] for row in rows] == list(releases.RELEASES)
    for row in rows:
        for name, step in row["steps"].items():
            assert step["passed"], f"torch {row['release']}, {name}: {step['text']}"


# The CUDA toolkit.


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit of CUDA 13.0 that compiles nothing, and a torch's library folder beside it."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "cuda"
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a", "torch/libtorch_cuda.so"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "bin" / "nvcc").write_text(
        '#!/bin/sh\ncase "$1" in\n--version) echo "Cuda compilation tools, release 13.0, V13.0.88";;\n'
        f'--dryrun) echo "#$ TOP={home}/bin/.." >&2;;\n'
        "--list-gpu-arch) printf 'compute_%s\\n' 75 80 86 90 100 120;;\nesac\n"
    )
    (home / "bin" / "nvcc").chmod(0o755)
    return home


def find(home: Path, torch_cuda: str = "13.2") -> setup_cuda.Toolkit:
    nvcc = setup_cuda.find_nvcc()
    assert nvcc is not None
    return setup_cuda.find_toolkit(nvcc, torch_cuda, [str(home / "torch")])


def test_a_wrapper_on_the_path_leads_to_its_toolkit(toolkit: Path, tmp_path: Path, monkeypatch) -> None:
    wrappers = tmp_path / "wrappers"
    wrappers.mkdir()
    (wrappers / "nvcc").write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    (wrappers / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrappers}{os.pathsep}{os.environ['PATH']}")
    found = find(toolkit)
    assert found.nvcc == wrappers / "nvcc"
    assert found.home == toolkit
    assert found.libraries == toolkit / "lib64"
    assert found.release == "13.0"


def test_the_home_that_is_named_comes_first(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    (toolkit / "lib64").rename(toolkit / "lib")  # as the package index lays it out
    assert find(toolkit).libraries == toolkit / "lib"
    monkeypatch.setenv("CUDA_HOME", str(toolkit / "lib"))
    with pytest.raises(
        SystemExit, match=r"expected CUDA_HOME to be a CUDA toolkit with bin/nvcc, but got CUDA_HOME=.*lib"
    ):
        setup_cuda.find_nvcc()


@pytest.mark.parametrize("name", ["cuda_runtime.h", "libcudart_static.a", "libtorch_cuda.so"])
def test_what_the_link_needs_is_looked_for_first(toolkit: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    next(toolkit.rglob(name)).unlink()
    with pytest.raises(
        SystemExit, match=rf"^visattn: expected {name}, which the CUDA kernels need, in one of .*VISATTN_NO"
    ):
        find(toolkit)


def test_another_major_version_is_refused(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    with pytest.raises(SystemExit, match=r"got CUDA 13\.0 \(.*\) beside a torch built with CUDA 12\.8"):
        find(toolkit, "12.8")


def gencode(toolkit: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None) -> set[str]:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    return set(re.findall(r"code=(\w+)", setup_cuda.gencode(find(toolkit), asked)))


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("9.0", "sm_90"),
        ("8.0;9.0a+PTX", "sm_80 sm_90a compute_90a"),
        ("8.0 9.0,12.0", "sm_80 sm_90 sm_120"),
        ("Hopper", "sm_90 compute_90"),
        ("Ampere;9.0", "sm_80 sm_86 compute_86 sm_90"),
        ("Turing;Hopper", "sm_90 compute_90"),  # the kernels need 8.0
        ("9.0;9.0+PTX", "sm_90 compute_90"),
        (None, "sm_80 sm_90 sm_100 sm_120 compute_120"),
        ("native", "sm_90 sm_120 compute_120"),  # GPUs of 9.0 and of 12.1, which this nvcc does not know
    ],
)
def test_architectures_in_every_form(toolkit: Path, asked: str | None, wanted: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (12, 1))[device])
    assert gencode(toolkit, monkeypatch, asked) == set(wanted.split())


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            "sm_90",
            r"to be 'native', or such as '8\.0;9\.0\+PTX' or 'Ampere;Hopper', but got TORCH_CUDA_ARCH_LIST='sm_90'",
        ),
        ("Ampere+Tegra", r"that nvcc 13\.0 compiles for \(.*\), but got 8\.7 of TORCH_CUDA_ARCH_LIST='Ampere\+Tegra'"),
        ("7.5", r"an architecture from 8\.0 up, but got TORCH_CUDA_ARCH_LIST='7\.5'"),
        ("native", "a GPU that torch sees for TORCH_CUDA_ARCH_LIST=native, but there is none"),
    ],
)
def test_architectures_that_are_refused(toolkit: Path, asked: str, told: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match=told):
        gencode(toolkit, monkeypatch, asked)
