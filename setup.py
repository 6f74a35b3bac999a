"""Build of the compiled parts by ninja.

`visattn_kernels._C` is the CPU engine; `visattn_kernels._cuda`, where torch has CUDA and there is a toolkit, the CUDA
kernels. Each loads without the other. Where there is no C++ compiler, the pure package is installed, and says so.

The engine's source is compiled once per instruction set, each with its own flags, which is why the build is spelled out
here. Paths are relative to the build's folder, so that objects may go along with a copy of the sources.

    VISATTN_NO_EXT=1      build pure Python: the reference still serves
    VISATTN_SANITIZE=1    build with AddressSanitizer and UndefinedBehaviorSanitizer, for tests
    VISATTN_EMULATE_AVX512=1
                          build the AVX-512 engines on csrc/emulator/avx512, plain C++ in place of the instructions, and
                          offer them on any CPU with AVX2: for tests, and slow
    VISATTN_NO_CUDA=1     leave the CUDA kernels out
    VISATTN_CUDA_WIDTHS   the D/Dv whose CUDA kernels are compiled, such as "64/64;128/128"; all, unless given
    TORCH_CUDA_ARCH_LIST  what they are compiled for, in every form that torch takes, such as "8.0;9.0+PTX", "Hopper" or
                          "native"; unless given, all of setup_cuda.ARCHS that nvcc knows, whether or not there is a GPU
    CUDA_HOME             the CUDA toolkit; unless given, the one of the nvcc on PATH, or of the package index's nvcc
    CXX                   the C++ compiler (g++ or clang++)
    MAX_JOBS              how many files are compiled at once; as many as there are processors, unless given
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # a build by pip does not look here

from setup_cuda import BuildError, Toolkit, find_nvcc, find_toolkit, gencode  # noqa: E402

AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"-mavx512f -mavx512bw -mavx512vl -mavx512dq {AVX2}"
ISA_FLAGS = {
    "plain": "",
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
}
# Of vectors that it has to take apart, -O3 makes minutes of work.
EMULATED = f"-O1 {AVX2} -Icsrc/emulator/avx512"
EMULATED_FLAGS = {
    "avx512": EMULATED,
    "avx512_bf16": f"{EMULATED} -DVISATTN_EMULATE_AVX512_BF16",
}
# What this CPU must have to run an instruction set, as Linux calls it.
NEEDS = {"avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512_bf16"}
X86 = platform.machine().lower() in ("x86_64", "amd64")

# GCC warns of the undefined operand of its own AVX-512 intrinsics, and of vectors wider than the baseline's registers.
WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-unknown-warning-option"
COMMON = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast {WARNINGS}"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
SANITIZED = f"{SANITIZE} -fno-omit-frame-pointer -g1 -O1"  # of debugging, an error's line is all that is wanted
EMULATE = "-DVISATTN_EMULATE_AVX512"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10's stable ABI
PYTHON_TARGET = "-DPy_LIMITED_API=0x030a0000"

CUDA_COMMON = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"
CELLS = runpy.run_path(str(ROOT / "visattn_kernels/backends/cells.py"))


def compiler() -> str:
    """The C++ compiler; empty if there is none."""
    if asked := os.environ.get("CXX", "").strip():
        try:
            found = shutil.which(shlex.split(asked)[0])
        except ValueError:  # a quotation that does not end
            found = None
        if found is None:
            raise BuildError(f"expected CXX to name a C++ compiler, but got CXX={asked}")
        return asked
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")


def ninja() -> str:
    """The program ninja: of the Python package, which may lie beside a Python that isn't on PATH, else on PATH.

    The package's first, so that every build of an environment is by the same one: another takes no log of its over.
    """
    places = [None, sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    if find_spec("ninja") is not None:
        import ninja as package

        places.insert(0, package.BIN_DIR)
    found = next((program for place in places if (program := shutil.which("ninja", path=place))), None)
    if found is None:
        raise BuildError("building needs ninja, which is not installed (pip install ninja)")
    return found


def jobs() -> list[str]:
    """What tells ninja how many files to compile at once."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked and not re.fullmatch("0*[1-9][0-9]*", asked):
        raise BuildError(f"expected MAX_JOBS to be a whole number from 1 up, but got MAX_JOBS={asked}")
    return ["-j", asked] if asked else []


def check_torch() -> None:
    """Raise unless there is a torch to build against."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of torch's own is not there
        raise BuildError(
            f"building needs torch 2.10 or later in the environment that builds, but importing it says: {error}. "
            "Install torch first and use --no-build-isolation; VISATTN_NO_EXT=1 installs pure Python without it"
        ) from None
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release and (int(release[1]), int(release[2])) < (2, 10):
        raise BuildError(f"building needs torch 2.10 or later, but got torch {torch.__version__}")


def no_cuda() -> str:
    """Why the CUDA kernels are not built, or nothing."""
    import torch

    if os.environ.get("VISATTN_NO_CUDA") == "1":
        return "VISATTN_NO_CUDA=1 was set"
    if torch.version.cuda is None:
        return f"the torch that it was built against ({torch.__version__}) has no CUDA"
    if find_nvcc() is None:
        return "there was no CUDA toolkit: no nvcc on PATH, and CUDA_HOME was not set"
    return ""


@cache
def toolkit() -> Toolkit:
    """The CUDA toolkit, where `no_cuda` has no reason."""
    import torch
    import torch.utils.cpp_extension as torch_build

    nvcc = find_nvcc()
    assert nvcc is not None
    return find_toolkit(nvcc, str(torch.version.cuda), list(torch_build.library_paths()))


def cuda_cells() -> list[tuple[int, int, tuple[str, ...]]]:
    """The cells of `visattn_kernels/backends/cells.py` that VISATTN_CUDA_WIDTHS asks for."""
    cells, asked = list(CELLS["CELLS"]), os.environ.get("VISATTN_CUDA_WIDTHS")
    if not asked:
        return cells
    widths = [pair for pair in re.split(r"[;, ]+", asked) if pair]
    listed = {f"{d}/{dv}": (d, dv, named) for d, dv, named in cells}
    for pair in widths:
        if pair not in listed:
            raise BuildError(
                f"expected VISATTN_CUDA_WIDTHS to be of {';'.join(listed)}, but got VISATTN_CUDA_WIDTHS={asked}"
            )
    return [listed[pair] for pair in dict.fromkeys(widths)]


def cuda_files() -> dict[str, str]:
    """The generated files of the CUDA kernels, by name."""
    files = CELLS["sources"](cuda_cells())
    return {**{f"{name}.cu": text for name, text in files.items()}, "cells.cpp": CELLS["table"](files)}


def quoted(text: str) -> str:
    """A macro's value that is a string, on a command line in a build.ninja."""
    return "'\"" + re.sub(r"[^\w .,:;()=+/-]", "", text) + "\"'"


def sources(isa_flags: dict[str, str]) -> dict[str, str]:
    """Every source of the CPU engine with its own flags."""
    binding, python = binding_flags()
    isas = isa_flags if X86 else {"plain": ""}
    return {
        "csrc/binding/module.cpp": f"{python} -DVISATTN_NO_CUDA={quoted(no_cuda())}",
        "csrc/binding/cpu_ops.cpp": binding,
        "csrc/cpu/dispatch.cpp": "",
        **{f"csrc/cpu/isa_{isa}.cpp": flags for isa, flags in isas.items()},
    }


def cuda_sources() -> dict[str, str]:
    """Every source of the CUDA part that a C++ compiler compiles, with its own flags."""
    binding, python = binding_flags()
    widths = ";".join(f"{d}/{dv}" for d, dv, _ in cuda_cells())
    built = f"-DVISATTN_GENCODE={quoted(cuda_flags())} -DVISATTN_WIDTHS={quoted(widths)}"
    return {
        "csrc/binding/cuda_module.cpp": f"{python} {built}",
        "csrc/binding/cuda_ops.cpp": binding,
        "csrc/cuda/choose.cpp": "",
    }


def binding_flags() -> tuple[str, str]:
    """Flags of what sees torch, and of what sees Python."""
    import torch.utils.cpp_extension as torch_build

    includes = " ".join(f"-isystem {path}" for path in torch_build.include_paths())
    return f"{TORCH_TARGET} {includes}", f"{PYTHON_TARGET} -isystem {sysconfig.get_path('include')}"


@cache
def cuda_flags() -> str:
    """Nvcc's flags for the architectures that are compiled for."""
    return gencode(toolkit(), os.environ.get("TORCH_CUDA_ARCH_LIST"))


def runs_here(source: str) -> bool:
    """Whether this CPU can run what is compiled from a source; where that is not known, yes."""
    info = Path("/proc/cpuinfo")
    needs = next((needs for isa, needs in NEEDS.items() if source == f"csrc/cpu/isa_{isa}.cpp"), None)
    return needs is None or not info.exists() or needs in info.read_text().split()


class NinjaBuild(build_ext):  # type: ignore[misc]
    """Write a build.ninja with a dependency file per object, and run it."""

    extensions: list[Extension]

    def run(self) -> None:
        """Leave the CUDA part out where it can't be built; it was listed before torch was looked for."""
        if self.extensions:
            check_torch()
            if no_cuda():
                self.extensions = [ext for ext in self.extensions if ext.name != CUDA]
                # One of an earlier build is not to be taken for a part of this one.
                stale = Path(*CUDA.split(".")).with_suffix(".abi3.so")
                for folder in (Path(self.build_lib), *([ROOT] if self.inplace else [])):
                    (folder / stale).unlink(missing_ok=True)
        super().run()

    def build_extensions(self) -> None:
        """Build the extensions where setuptools wants them, both by one run of ninja."""
        self.sanitize = os.environ.get("VISATTN_SANITIZE") == "1"
        emulate = os.environ.get("VISATTN_EMULATE_AVX512") == "1"
        kind = ("sanitize" if self.sanitize else "release") + ("-emulate" if emulate else "")
        self.folder = Path(os.path.relpath(self.build_temp, ROOT))
        targets = {ext.name: os.path.relpath(self.get_ext_fullpath(ext.name), ROOT) for ext in self.extensions}
        for folder in (self.folder / kind, self.folder / "release", *(Path(path).parent for path in targets.values())):
            (ROOT / folder).mkdir(parents=True, exist_ok=True)
        lines = [
            "ninja_required_version = 1.5",
            f"builddir = {self.folder}",
            f"cxx = {compiler()}",
            "rule compile",
            f"  command = $cxx -MD -MF $out.d {COMMON} $flags -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            f"  command = $cxx -shared {SANITIZE if self.sanitize else ''} $in $libraries -o $out",
        ]
        for name, target in targets.items():
            compiled, objects, libraries = self.cuda() if name == CUDA else self.engine(kind, emulate)
            lines += [*compiled, f"build {target}: link {' '.join(objects)}", f"  libraries = {libraries}"]
        manifest = self.folder / kind / "build.ninja"
        (ROOT / manifest).write_text("\n".join([*lines, f"default {' '.join(targets.values())}", ""]))
        verbose = ["-v"] if self.verbose and os.environ.get("VISATTN_VERBOSE") else []
        done = subprocess.run([ninja(), *jobs(), "-f", str(manifest), *verbose], cwd=ROOT)
        if done.returncode != 0:
            raise BuildError("the compiled part does not build; the compiler's messages stand above")

    def engine(self, kind: str, emulate: bool) -> tuple[list[str], list[str], str]:
        """What compiles the CPU engine: lines for ninja, objects, and what they are linked with."""
        lines, objects, release = [], [], sources(ISA_FLAGS)
        for source, flags in sources(ISA_FLAGS | (EMULATED_FLAGS if emulate else {})).items():
            if emulate and source == "csrc/cpu/dispatch.cpp":
                flags = f"{EMULATE} {flags}"
            # What this CPU cannot run, the sanitizers cannot watch: it is only linked, and compiled in seconds.
            if self.sanitize:
                flags = f"{SANITIZED if emulate or runs_here(source) else '-O0'} {flags}"
            place = "release" if flags == release[source] else kind
            objects.append(str(self.folder / place / f"{source.replace('/', '_')}.o"))
            lines += [f"build {objects[-1]}: compile {source}", f"  flags = {flags}"]
        return lines, objects, linked("-ltorch_cpu -lc10")

    def cuda(self) -> tuple[list[str], list[str], str]:
        """What compiles the CUDA part: lines for ninja, objects, and what they are linked with."""
        host = f"{host_compiler(compiler())} " if os.environ.get("CXX", "").strip() else ""
        lines = [
            "rule cuda",
            f"  command = {toolkit().nvcc} {host}-MD -MF $out.d {CUDA_COMMON} {cuda_flags()} -Icsrc -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
        ]
        objects = []
        for source, flags in cuda_sources().items():
            objects.append(str(self.folder / "release" / f"{source.replace('/', '_')}.o"))
            lines += [f"build {objects[-1]}: compile {source}", f"  flags = {flags}"]
        for name, text in cuda_files().items():
            generated = self.folder / "release" / name
            if not (ROOT / generated).exists() or (ROOT / generated).read_text() != text:
                (ROOT / generated).write_text(text)  # a new time would have ninja compile it again
            objects.append(f"{generated}.o")
            rule = "cuda" if name.endswith(".cu") else "compile"
            lines += [f"build {objects[-1]}: {rule} {generated}", "  flags = -Icsrc"]
        runtime = f"-L{toolkit().libraries} -lcudart_static -ldl -lrt -lpthread"
        return lines, objects, linked(f"-ltorch_cuda -ltorch_cpu -lc10 {runtime}")


def host_compiler(asked: str) -> str:
    """Nvcc's options for a compiler of C++ with options, which a launcher may stand before."""
    words = [word for word in shlex.split(asked) if Path(word).name not in ("ccache", "sccache", "distcc")]
    return f"-ccbin {words[0]}" + (f" -Xcompiler {','.join(words[1:])}" if words[1:] else "")


def linked(libraries: str) -> str:
    """What a part is linked with: torch's own libraries are found where torch was imported from."""
    import torch.utils.cpp_extension as torch_build

    return f"{' '.join(f'-L{path}' for path in torch_build.library_paths())} {libraries}"


ENGINE, CUDA = "visattn_kernels._C", "visattn_kernels._cuda"


def parts() -> list[str]:
    """The compiled parts that are built, as far as that is known without torch."""
    if os.environ.get("VISATTN_NO_EXT") == "1":
        return []
    if "bdist_wheel" in sys.argv and not (find_spec("setuptools.command.bdist_wheel") or find_spec("wheel")):
        raise BuildError("building needs wheel beside this setuptools (pip install wheel, or setuptools 70.1 or later)")
    if not compiler():
        print("visattn: there is no C++ compiler, so that pure Python is installed: the reference serves", flush=True)
        return []
    return [ENGINE, CUDA]


listed = parts()
setup(
    license="MIT",
    ext_modules=[Extension(name, sources=[], py_limited_api=True) for name in listed],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if listed else {},
)
