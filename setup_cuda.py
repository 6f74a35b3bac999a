"""What the build of the CUDA kernels needs of a machine: the toolkit that nvcc belongs to, and what to compile for.

setup.py asks it before anything is compiled, so that what would fail at the end of a long build fails at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARCHS = "8.0;9.0;10.0;12.0+PTX"
"""What is compiled for unless TORCH_CUDA_ARCH_LIST says otherwise, as far as nvcc knows it."""

LEAST = 8
"""The least major compute capability whose instructions the kernels use."""

# Longer names first, since shorter ones are parts of them.
GENERATIONS = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
"""The names that TORCH_CUDA_ARCH_LIST takes, as torch reads them."""


WAYS_OUT = "CUDA_HOME names another toolkit, and VISATTN_NO_CUDA=1 leaves the CUDA kernels out"


class BuildError(SystemExit):
    """What stops a build, as one line."""

    def __init__(self, line: str) -> None:
        super().__init__(f"visattn: {line}")


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit.

    Attributes:
        home: its folder, where nvcc itself says that it lies.
        nvcc: the compiler as it is called, which may be a wrapper.
        release: its version, such as "13.0".
        libraries: the folder of libcudart_static.a.
    """

    home: Path
    nvcc: Path
    release: str
    libraries: Path

    def architectures(self) -> set[str]:
        """What its nvcc compiles for, such as "90"; of the variants, such as "90a", it does not tell."""
        return set(re.findall(r"compute_(\w+)", _output(self.nvcc, "--list-gpu-arch")))


def _output(nvcc: Path, *options: str) -> str:
    try:
        done = subprocess.run([str(nvcc), *options], capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"expected an nvcc that runs, but got {nvcc}: {error.strerror}") from None
    return done.stdout + done.stderr


def find_nvcc() -> Path | None:
    """The nvcc of CUDA_HOME (or CUDA_PATH), on PATH, where toolkits are installed, or of the package index."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise BuildError(f"expected {name} to be a CUDA toolkit with bin/nvcc, but got {name}={home}")
            return nvcc
    if found := shutil.which("nvcc"):
        return Path(found)
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [Path("/usr/local/cuda"), *sorted(packages.glob("cu[0-9]*"), reverse=True), packages / "cuda_nvcc"]
    return next((home / "bin" / "nvcc" for home in places if (home / "bin" / "nvcc").is_file()), None)


def find_toolkit(nvcc: Path, torch_cuda: str, torch_libraries: list[str]) -> Toolkit:
    """The toolkit of an nvcc, with all that compiling and linking need.

    Args:
        nvcc: the compiler, or a wrapper of it.
        torch_cuda: the version of CUDA that torch was built with.
        torch_libraries: where torch's own libraries are.

    Raises:
        BuildError: something is missing, or the toolkit's major version is not torch's.
    """
    release = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    # nvcc tells where it lies itself, whatever wraps it, in the steps that it would take for a file.
    top = re.search(r"^#\$ TOP=(.*)$", _output(nvcc, "--dryrun", "-c", "none.cu"), re.M)
    if release is None or top is None:
        raise BuildError(f"expected an nvcc that tells its version and its place, but got {nvcc}")
    if release[1].split(".")[0] != torch_cuda.split(".")[0]:
        raise BuildError(
            f"expected a CUDA toolkit of torch's major version, but got CUDA {release[1]} ({nvcc}) beside a torch "
            f"built with CUDA {torch_cuda}. {WAYS_OUT}"
        )
    home = Path(top[1].strip()).resolve()
    headers = [home / "include", *sorted(home.glob("targets/*/include"))]
    libraries = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))]
    needed = {
        "cuda_runtime.h": headers,
        "libcudart_static.a": libraries,
        "libtorch_cuda.so": [Path(path) for path in torch_libraries],
    }
    for name, folders in needed.items():
        if not any((folder / name).is_file() for folder in folders):
            raise BuildError(
                f"expected {name}, which the CUDA kernels need, in one of {', '.join(map(str, folders))}, but it is "
                f"not there (nvcc is {nvcc}). {WAYS_OUT}"
            )
    found = next(folder for folder in libraries if (folder / "libcudart_static.a").is_file())
    return Toolkit(home, nvcc, release[1], found)


def gencode(toolkit: Toolkit, asked: str | None) -> str:
    """Nvcc's flags for the architectures that are compiled for.

    Args:
        toolkit: whose nvcc compiles.
        asked: the value of TORCH_CUDA_ARCH_LIST, in all the forms that torch takes; None for `ARCHS`, of which what
            nvcc does not know is left out. PTX of the last one is added then.

    Raises:
        BuildError: it names something else, what nvcc does not know, or nothing that the kernels run on.
    """
    known = toolkit.architectures()
    chosen: dict[str, bool] = {}  # by number: whether with PTX
    for arch in _listed(asked, known):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if not match:
            raise BuildError(
                "expected TORCH_CUDA_ARCH_LIST to be 'native', or such as '8.0;9.0+PTX' or 'Ampere;Hopper', "
                f"but got TORCH_CUDA_ARCH_LIST={asked!r}"
            )
        major, minor, feature, ptx = match.groups(default="")
        number = f"{major}{minor}{feature}"
        if int(major) < LEAST:
            print(f"visattn: no CUDA kernels for {arch}, which lacks their instructions", flush=True)
        elif f"{major}{minor}" in known:
            chosen[number] = chosen.get(number, False) or bool(ptx)
        elif asked:
            raise BuildError(
                f"expected an architecture that nvcc {toolkit.release} compiles for ({', '.join(sorted(known))}), "
                f"but got {arch} of TORCH_CUDA_ARCH_LIST={asked!r}"
            )
    if not chosen:
        raise BuildError(f"expected an architecture from {LEAST}.0 up, but got TORCH_CUDA_ARCH_LIST={asked!r}")
    if not asked:
        chosen[next(reversed(chosen))] = True
    return " ".join(_flags(chosen))


def _listed(asked: str | None, known: set[str]) -> list[str]:
    """The architectures of a list, such as "9.0" and "8.6+PTX"."""
    text = (asked or ARCHS).strip()
    if text.lower() == "native":
        return _native(known)
    for name, numbers in GENERATIONS.items():
        text = text.replace(name, numbers)
    return [arch for arch in re.split(r"[;, ]+", text) if arch]


def _native(known: set[str]) -> list[str]:
    """Those of the GPUs that are here; of one newer than nvcc, the newest that nvcc knows, with PTX."""
    import torch

    found = []
    newest = max(divmod(int(number), 10) for number in known if number.isdigit())
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        found.append(f"{newest[0]}.{newest[1]}+PTX" if capability > newest else f"{capability[0]}.{capability[1]}")
    if not found:
        raise BuildError("expected a GPU that torch sees for TORCH_CUDA_ARCH_LIST=native, but there is none")
    return found


def _flags(chosen: dict[str, bool]) -> Iterator[str]:
    for number, ptx in chosen.items():
        yield f"-gencode arch=compute_{number},code=sm_{number}"
        if ptx:
            yield f"-gencode arch=compute_{number},code=compute_{number}"
