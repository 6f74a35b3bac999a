"""Build of the compiled part, visattn_kernels._C, by ninja: the CPU engine, and the CUDA kernels where torch has CUDA.

The engine's source is compiled once per instruction set, each with its own flags, which is why the build is spelled out
here. Paths are relative to the build's folder, so that objects may go along with a copy of the sources, and what a
variant of the build compiles like any other has the flags of any other. Environment variables:

    VISATTN_NO_EXT=1      build pure Python: the reference still serves
    VISATTN_SANITIZE=1    build with AddressSanitizer and UndefinedBehaviorSanitizer, for tests
    VISATTN_EMULATE_AVX512=1
                          build the AVX-512 engines on csrc/emulator/avx512, plain C++ in place of the instructions, and
                          offer them on any CPU with AVX2: for tests, and slow
    VISATTN_NO_CUDA=1     leave the CUDA kernels out
    TORCH_CUDA_ARCH_LIST  what they are compiled for, such as "8.0;9.0+PTX"; unless given, all of CUDA_ARCHS that nvcc
                          knows. Whether there is a GPU is never asked
    CXX                   the C++ compiler (g++ or clang++)
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

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

CUDA_ARCHS = "8.0;9.0;10.0;12.0+PTX"
CUDA_COMMON = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"
CELLS = runpy.run_path(str(ROOT / "visattn_kernels/backends/cells.py"))


def no_cuda() -> str:
    """Why the CUDA kernels are not built, or nothing."""
    import torch
    import torch.utils.cpp_extension as torch_build

    if os.environ.get("VISATTN_NO_CUDA") == "1":
        return "VISATTN_NO_CUDA=1 was set"
    if torch.version.cuda is None:
        return f"the torch that it was built against ({torch.__version__}) has no CUDA"
    if torch_build.CUDA_HOME is None:
        return "there was no CUDA toolkit: no nvcc on PATH, and CUDA_HOME was not set"
    return ""


def cuda_files() -> dict[str, str]:
    """The generated files of the CUDA kernels, by name."""
    files = CELLS["sources"]()
    return {**{f"{name}.cu": text for name, text in files.items()}, "cells.cpp": CELLS["table"](files)}


def nvcc() -> str:
    """The CUDA compiler."""
    import torch.utils.cpp_extension as torch_build

    return str(Path(str(torch_build.CUDA_HOME)) / "bin" / "nvcc")


def gencode() -> str:
    """Nvcc's flags for the architectures that are compiled for; PTX for the last, unless it was asked otherwise."""
    if no_cuda():
        return ""
    known = subprocess.run([nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    flags = []
    for arch in re.split(r"[;, ]+", (asked or CUDA_ARCHS).strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if not match:
            raise RuntimeError(f"expected TORCH_CUDA_ARCH_LIST to be such as '8.0;9.0+PTX', but got {asked!r}")
        major, minor, feature, ptx = match.groups(default="")
        number = f"{major}{minor}{feature}"
        if int(major) < 8:
            print(f"visattn: no CUDA kernels for {arch}, which lacks their instructions", flush=True)
            continue
        if not asked and f"compute_{number}" not in known.split():
            continue
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        flags += [f"-gencode arch=compute_{number},code=compute_{number}"] if ptx else []
    if flags and not asked and "code=compute" not in flags[-1]:  # nvcc does not know the last of the list
        number = flags[-1].rpartition("_")[2]
        flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    if not flags:
        raise RuntimeError(f"expected an architecture from 8.0 up, but got TORCH_CUDA_ARCH_LIST={asked!r}")
    return " ".join(flags)


def quoted(text: str) -> str:
    """A macro's value that is a string, on a command line in a build.ninja."""
    return "'\"" + re.sub(r"[^\w .,:;()=+-]", "", text) + "\"'"


def sources(isa_flags: dict[str, str]) -> dict[str, str]:
    """Every source of the extension with its own flags."""
    import torch.utils.cpp_extension as torch_build

    includes = " ".join(f"-isystem {path}" for path in torch_build.include_paths())
    binding = f"{TORCH_TARGET} {includes}"
    python = f"{PYTHON_TARGET} -isystem {sysconfig.get_path('include')}"
    cuda = f"-DVISATTN_NO_CUDA={quoted(no_cuda())} -DVISATTN_GENCODE={quoted(gencode())}"
    isas = isa_flags if X86 else {"plain": ""}
    return {
        "csrc/binding/module.cpp": f"{python} {cuda}",
        "csrc/binding/cpu_ops.cpp": binding,
        **({} if no_cuda() else {"csrc/binding/cuda_ops.cpp": binding, "csrc/cuda/choose.cpp": ""}),
        "csrc/cpu/dispatch.cpp": "",
        **{f"csrc/cpu/isa_{isa}.cpp": flags for isa, flags in isas.items()},
    }


def runs_here(source: str) -> bool:
    """Whether this CPU can run what is compiled from a source; where that is not known, yes."""
    info = Path("/proc/cpuinfo")
    needs = next((needs for isa, needs in NEEDS.items() if source == f"csrc/cpu/isa_{isa}.cpp"), None)
    return needs is None or not info.exists() or needs in info.read_text().split()


class NinjaBuild(build_ext):  # type: ignore[misc]
    """Write a build.ninja with a dependency file per object, and run it."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension where setuptools wants it."""
        import torch.utils.cpp_extension as torch_build

        sanitize = os.environ.get("VISATTN_SANITIZE") == "1"
        emulate = os.environ.get("VISATTN_EMULATE_AVX512") == "1"
        kind = ("sanitize" if sanitize else "release") + ("-emulate" if emulate else "")
        temporary = Path(os.path.relpath(self.build_temp, ROOT))
        target = os.path.relpath(self.get_ext_fullpath(ext.name), ROOT)
        for folder in (ROOT / temporary / kind, ROOT / temporary / "release", (ROOT / target).parent):
            folder.mkdir(parents=True, exist_ok=True)
        libraries = " ".join(f"-L{path}" for path in torch_build.library_paths()) + " -ltorch_cpu -lc10"
        lines = [
            "ninja_required_version = 1.5",
            f"builddir = {temporary}",
            f"cxx = {os.environ.get('CXX', 'c++')}",
            "rule compile",
            f"  command = $cxx -MD -MF $out.d {COMMON} $flags -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            f"  command = $cxx -shared {SANITIZE if sanitize else ''} $in $libraries -o $out",
        ]
        objects = []
        release = sources(ISA_FLAGS)
        for source, flags in sources(ISA_FLAGS | (EMULATED_FLAGS if emulate else {})).items():
            if emulate and source == "csrc/cpu/dispatch.cpp":
                flags = f"{EMULATE} {flags}"
            # What this CPU cannot run, the sanitizers cannot watch: it is only linked, and compiled in seconds.
            if sanitize:
                flags = f"{SANITIZED if emulate or runs_here(source) else '-O0'} {flags}"
            obj = str(temporary / ("release" if flags == release[source] else kind) / f"{source.replace('/', '_')}.o")
            objects.append(obj)
            lines += [f"build {obj}: compile {source}", f"  flags = {flags}"]
        if not no_cuda():
            toolkit = Path(str(torch_build.CUDA_HOME))
            lines += [
                "rule cuda",
                f"  command = {nvcc()} -MD -MF $out.d {CUDA_COMMON} {gencode()} -Icsrc -c $in -o $out",
                "  deps = gcc",
                "  depfile = $out.d",
            ]
            places = " ".join(f"-L{path}" for path in (toolkit / "lib64", toolkit / "lib") if path.exists())
            libraries += f" -ltorch_cuda {places} -lcudart_static -ldl -lrt -lpthread"
            for name, text in cuda_files().items():
                generated = temporary / "release" / name
                if not (ROOT / generated).exists() or (ROOT / generated).read_text() != text:
                    (ROOT / generated).write_text(text)  # a new time would have ninja compile it again
                objects.append(f"{generated}.o")
                rule = "cuda" if name.endswith(".cu") else "compile"
                lines += [f"build {objects[-1]}: {rule} {generated}", "  flags = -Icsrc"]
        lines += [f"build {target}: link {' '.join(objects)}", f"  libraries = {libraries}", f"default {target}", ""]
        manifest = temporary / kind / "build.ninja"
        (ROOT / manifest).write_text("\n".join(lines))
        verbose = ["-v"] if self.verbose and os.environ.get("VISATTN_VERBOSE") else []
        subprocess.run(["ninja", "-f", str(manifest), *verbose], cwd=ROOT, check=True)


without_extension = os.environ.get("VISATTN_NO_EXT") == "1"
setup(
    ext_modules=[] if without_extension else [Extension("visattn_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": NinjaBuild},
    options={} if without_extension else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
