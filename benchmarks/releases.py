"""torch's releases: what builds against each, links, imports and passes; no GPU is needed.

`headers` reads a release's headers alone out of its wheel, a few hundred kilobytes. `environment` installs a release
whole, gigabytes, into an environment of its own under `build/torch`, which is kept.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.parse
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.results import FOLDER, write_whole
from benchmarks.sources import copy_source, first_errors

RELEASES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
"""The releases that the library supports, the oldest first."""

FILE = FOLDER / "releases.json"
"""The record that docs/installing.md shows."""

PLACE = ROOT / "build" / "torch"

STABLE = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/", "torch/headeronly/")
"""The headers of torch that the binding sees: its stable interface."""

# A machine's own limit on torch's version is for what it installs, not for what is looked at here.
_ANY_RELEASE = {"PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

TOOLS = ("setuptools", "wheel", "ninja", "numpy", "pytest", "pytest-xdist", "hypothesis", "expecttest", "typer", "rich",
         "matplotlib", "pillow", "scikit-learn")  # fmt: skip
"""What an environment has beside torch, in the versions of requirements.txt."""

NVCC = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
"""The package index's CUDA compiler, and what it needs."""

WIDTHS = "8/8"
"""The D/Dv of the CUDA kernels that are compiled here: the fewest files of which each pass has one."""


class UnreachableError(RuntimeError):
    """A release can't be had, because there is no network, say."""


def headers(release: str) -> Path:
    """The include folder of a release, with the headers that the binding needs.

    Raises:
        UnreachableError: the release's wheel can't be read.
    """
    folder = PLACE / "headers" / release
    done = folder / "complete"
    if not done.exists():
        with _wheel(release) as wheel:
            for name in wheel.namelist():
                if name.startswith(tuple(f"torch/include/{part}" for part in STABLE)):
                    wheel.extract(name, folder)
        done.touch()
    return folder / "torch" / "include"


def _wheel(release: str) -> zipfile.ZipFile:
    """A release's wheel, of which what is read is fetched."""
    from remotezip import RemoteIOError, RemoteZip

    url = _url(release)
    try:
        if url.startswith("file:"):
            return zipfile.ZipFile(urllib.parse.unquote(urllib.parse.urlparse(url).path))
        found: zipfile.ZipFile = RemoteZip(url)
        return found
    except (OSError, RemoteIOError) as error:
        raise UnreachableError(f"torch {release} can't be read: {error}") from error


def _url(release: str) -> str:
    """Where pip would fetch a release from."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--report", "-", f"torch=={release}"]
    done = subprocess.run(command, env={**os.environ, **_ANY_RELEASE}, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise UnreachableError(f"torch {release} can't be had: {lines[-1]}")
    return str(json.loads(done.stdout)["install"][0]["download_info"]["url"])


def pinned(names: Sequence[str]) -> list[str]:
    """Names with the versions of requirements.txt, where it has them."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    known = {line.partition("==")[0]: line for line in lines if "==" in line}
    return [known.get(name, name) for name in names]


def environment(release: str) -> Path:
    """The Python of an environment with a release of torch, as the package index has it.

    Raises:
        UnreachableError: it can't be installed.
    """
    folder = PLACE / release
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], folder.parent)
        # By itself first: were it left to pip, it would come with what another package asks for.
        for packages in ([f"torch=={release}"], pinned(TOOLS)):
            command = [str(python), "-m", "pip", "install", "-q", *packages]
            ended = _run(command, ROOT, **_ANY_RELEASE)
            if ended.returncode != 0:
                raise UnreachableError(f"torch {release} can't be installed: {_last(ended)}")
        done.touch()
    return python


def toolkit(python: Path, cuda: str) -> dict[str, str]:
    """What the environment of a CUDA build has: CUDA_HOME, of the machine or of the package index.

    Args:
        python: of `environment`.
        cuda: the version of CUDA that its torch was built with, such as "13.0".
    """
    if os.environ.get("CUDA_HOME"):
        return {}
    major, minor = cuda.split(".")
    home = next((python.parents[1] / "lib").glob("python3*/site-packages")) / "nvidia" / f"cu{major}"
    if not (home / "bin" / "nvcc").is_file():
        wanted = [f"{name}=={major}.{minor}.*" for name in NVCC[:3]] + list(NVCC[3:4])
        ended = _run([str(python), "-m", "pip", "install", "-q", *wanted], ROOT, **_ANY_RELEASE)
        if ended.returncode != 0:
            raise UnreachableError(f"nvcc {cuda} can't be installed: {_last(ended)}")
    return {"CUDA_HOME": str(home)}


def _run(command: Sequence[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    cwd.mkdir(parents=True, exist_ok=True)
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def _last(ended: subprocess.CompletedProcess[str]) -> str:
    lines = (ended.stdout + ended.stderr).strip().splitlines()
    return lines[-1] if lines else "no output"


@dataclass
class Step:
    """One thing that was tried with a release.

    Attributes:
        passed: whether it did what it should.
        text: what it came to, for a table.
    """

    passed: bool
    text: str


@dataclass
class Row:
    """A release and what was tried with it, by name."""

    release: str
    torch: str
    cuda: str
    steps: dict[str, Step] = field(default_factory=dict)


LOOK = """
import json, torch, visattn_kernels as v
from visattn_kernels import ops
from visattn_kernels.backends import cuda
names = [f"{backend}_{which}" for backend, listed in ops.FAMILIES.items() for which in listed]
for name in [*names, *(f"cuda_launch_{which}" for which in ops.FAMILIES["cuda"])]:
    getattr(torch.ops.visattn, name).default
key = torch._C._dispatch_has_kernel_for_dispatch_key
q = torch.rand(1, 4, 4, 1, 8)
v.attention(q, q, q, backend="cpu")
print(json.dumps({"cuda": [reason for reason in cuda.unavailable()], "explain": v.explain(q, q, q),
                  "launch": key("visattn::cuda_launch_forward", "CUDA"), "file": v.__file__}))
"""
"""What is asked of a build, in a process of its own."""


def tried(release: str, cuda: bool, tests: bool, say: Callable[[str], None] = print) -> Row:
    """Build against a release, import, and run what it has tests for.

    Args:
        release: of `RELEASES`.
        cuda: build the CUDA part too, with a few kernels, and link it.
        tests: run the operators' tests and those of `torch.compile` and `torch.export`.
        say: told what is done.
    """
    say(f"torch {release}: installing")
    python = environment(release)
    about = _run([str(python), "-c", "import torch; print(torch.__version__, torch.version.cuda)"], ROOT)
    version, with_cuda = about.stdout.split()
    row = Row(release, version, "" if with_cuda == "None" else with_cuda)
    source = copy_source(PLACE / f"{release}-source")
    say(f"torch {release}: the CPU engine")
    row.steps["cpu"], seen = _built(python, source, {"VISATTN_NO_CUDA": "1"})
    if row.steps["cpu"].passed and not any("VISATTN_NO_CUDA=1 was set" in reason for reason in seen["cuda"]):
        row.steps["cpu"] = Step(False, f"the reason for no CUDA is {seen['cuda']}")
    if tests and row.steps["cpu"].passed:
        for name, words in (("operators", "not compile and not export"), ("compile", "compile or export")):
            say(f"torch {release}: tests of {name}")
            row.steps[name] = _tested(python, source, words)
    if cuda and row.cuda:
        say(f"torch {release}: the CUDA part")
        row.steps["cuda"] = _linked(python, source, row.cuda)
    return row


def _built(python: Path, source: Path, environment: dict[str, str]) -> tuple[Step, dict[str, Any]]:
    """Build in place, import and ask; whether that went well, and the answers."""
    for old in (source / "visattn_kernels").glob("*.so"):
        old.unlink()
    ended = _run([str(python), "setup.py", "-q", "build_ext", "--inplace"], source, **environment)
    if ended.returncode != 0:
        return Step(False, f"does not build: {first_errors(ended.stdout + ended.stderr)}"), {}
    ended = _run([str(python), "-c", LOOK], source)
    if ended.returncode != 0:
        return Step(False, f"does not run: {_last(ended)}"), {}
    seen: dict[str, Any] = json.loads(ended.stdout)
    inside = Path(seen["file"]).is_relative_to(source)
    return Step(inside, "builds, imports, runs" if inside else f"another package was imported: {seen['file']}"), seen


def _linked(python: Path, source: Path, cuda: str) -> Step:
    """Build the CUDA part with a few kernels, link, import, and collect the GPU's tests."""
    settings = {"TORCH_CUDA_ARCH_LIST": "9.0", "VISATTN_CUDA_WIDTHS": WIDTHS, **toolkit(python, cuda)}
    step, seen = _built(python, source, settings)
    if not step.passed:
        return step
    if not seen["launch"] or seen["cuda"] not in ([], ["torch sees no NVIDIA GPU"]):
        return Step(False, f"the CUDA part does not load: {seen['cuda']}")
    told = _run([str(python), "-m", "visattn_kernels", "info"], source)
    if told.returncode != 0 or "sm_90" not in told.stdout:
        return Step(False, f"info does not tell of the kernels: {_last(told)}")
    tests = [str(ROOT / "tests" / "gpu"), "--collect-only", "-c", str(ROOT / "pyproject.toml")]
    collected = _run(
        [str(python), "-m", "pytest", "-p", "no:cacheprovider", "-p", "gpu.schedule", *tests],
        source,
        PYTHONPATH=os.pathsep.join([str(source), str(ROOT), str(ROOT / "tests")]),
        VISATTN_COLLECT_GPU="1",
    )
    count = re.search(r"(\d+) tests collected", collected.stdout)
    if not count:
        return Step(False, f"the GPU's tests are not collected: {_last(collected)}")
    return Step(True, f"builds, links, imports; {count[1]} GPU tests collected")


def _tested(python: Path, source: Path, words: str) -> Step:
    """Run the operators' tests of this checkout on a build."""
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-o", f"pythonpath={source}", "-W", "default"]
    tests = [str(ROOT / "tests" / "test_ops.py"), "-k", words]
    path = os.pathsep.join([str(source), str(ROOT), str(ROOT / "tests")])
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", *tests, *config]
    ended = _run(command, source, PYTHONPATH=path, VISATTN_TIER="test")
    counts = re.search(r"(?m)^.*\b\d+ (?:passed|failed).*$", ended.stdout)
    text = re.sub(r" in [\d.]+s.*|=+ ?| ?=+", "", counts[0]).strip() if counts else _last(ended)
    return Step(ended.returncode == 0, re.sub(r", \d+ warnings?", "", text))


def write(new_rows: Sequence[Row], path: Path = FILE) -> None:
    """Write rows in the place of those of the same releases."""
    old = {row["release"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for row in new_rows:
        new = asdict(row)
        new["steps"] = old.get(row.release, {}).get("steps", {}) | new["steps"]
        old[row.release] = new
    listed = [old[release] for release in RELEASES if release in old]
    write_whole(path, json.dumps({"rows": listed}, indent=1) + "\n")


COLUMNS = {"cpu": "CPU engine", "operators": "operators' tests", "compile": "`torch.compile`, `torch.export`",
           "cuda": f"CUDA part ({WIDTHS} alone, compute capability 9.0)"}  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """The record."""
    found: list[dict[str, Any]] = json.loads(FILE.read_text())["rows"]
    return found


def summary() -> str:
    """The table of the record."""
    lines = [["torch", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    for row in rows():
        steps = [row["steps"].get(name) for name in COLUMNS]
        told = [
            "not tried" if step is None else step["text"] if step["passed"] else f"**fails:** {step['text']}"
            for step in steps
        ]
        lines.append([row["torch"], *told])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
