"""What the measurements were made on: hardware, versions, commit, and how much memory is free."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.sources import ROOT as ROOT
from visattn_kernels.version import __version__

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16")


def _fields(path: str) -> dict[str, str]:
    """The `name: value` lines of a file of /proc; the first of each name."""
    fields: dict[str, str] = {}
    try:
        text = Path(path).read_text()
    except OSError:
        return fields
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def free_memory(device: str) -> int:
    """Bytes that could be allocated on a device now."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    available = _fields("/proc/meminfo").get("MemAvailable", "0 kB")
    return int(available.split()[0]) * 1024


def hardware() -> dict[str, Any]:
    """Processor, instruction sets, memory, and the GPU if there is one."""
    cpu = _fields("/proc/cpuinfo")
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    memory = _fields("/proc/meminfo").get("MemTotal", "0 kB")
    found: dict[str, Any] = {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "memory_bytes": int(memory.split()[0]) * 1024,
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
    return found


def versions() -> dict[str, str | None]:
    """Versions of everything whose speed is reported; None for what is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "visattn_kernels": __version__,
    }
    for package in ("triton", "natten"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def nvidia_smi(*arguments: str) -> str | None:
    """Output of nvidia-smi; None where there is none, or it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def driver() -> str | None:
    """The version of the NVIDIA driver."""
    found = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository; None if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> tuple[str | None, bool]:
    """The commit of the working tree, None before the first one, and whether the tree differs from it.

    Result files and pictures made of them don't count as a difference: they change while a benchmark runs. Where files
    lie without their repository, VISATTN_COMMIT can tell: a commit's name, with "-dirty" after it if they differ.
    """
    told = os.environ.get("VISATTN_COMMIT")
    if told and _git("rev-parse", "--git-dir") is None:
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    head = _git("rev-parse", "--verify", "--quiet", "HEAD")
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs", ":!README.md")
    return head, bool(status)


def sources() -> str:
    """A digest of the package's and the engine's files, built ones included: what was measured, committed or not."""
    digest = hashlib.sha256()
    for folder in ("visattn_kernels", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
