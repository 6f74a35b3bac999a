"""What this machine has: versions, instruction sets, backends, and what is missing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from visattn_kernels import backends
from visattn_kernels.cli import EXTRA
from visattn_kernels.version import __version__

LIBRARIES = ("torch", "triton", "numpy")
"""What the library itself uses."""

VIZ_LIBRARIES = ("typer", "rich", "matplotlib", "pillow", "scikit-learn")
"""The extra `[viz]`, by the names that pip knows."""

# The ones that matrix kernels care about, as Linux names them, x86 first.
_INSTRUCTION_SETS = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "amx_int8"),
    *("asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2", "sme"),
)

Section = tuple[str, list[tuple[str, str]]]
"""A heading and its lines, each a label and a text."""


def describe() -> list[Section]:
    """All that `visattn info` says."""
    installed = {name: _version(name) for name in LIBRARIES + VIZ_LIBRARIES}
    versions = [("visattn_kernels", __version__), ("python", platform.python_version())]
    versions += [(name, installed[name] or "not installed") for name in LIBRARIES + VIZ_LIBRARIES]
    reasons = {backend.name: backend.unavailable() for backend in backends.REGISTRY}
    available = [
        (backend.name, f"not available: {'; '.join(reasons[backend.name])}")
        if reasons[backend.name]
        else (backend.name, f"available: {backend.about}")
        for backend in backends.REGISTRY
    ]
    sections = [("Versions", versions), ("Processor", _processor(reasons["cpu"])), ("Backends", available)]
    missing = _missing(installed, reasons["cpu"])
    return [*sections, ("Missing", missing or [("nothing", "everything is installed")])]


def _version(name: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor(engine_reasons: list[str]) -> list[tuple[str, str]]:
    """The processor, its instruction sets and who uses which, and threads."""
    model, flags = _cpuinfo()
    found = " ".join(name for name in _INSTRUCTION_SETS if name in flags)
    try:
        engine = "nothing: it is not available" if engine_reasons else backends.cpu.isa()
    except RuntimeError as error:  # one was asked for that this processor lacks
        engine = str(error)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        ("model", model or platform.processor() or platform.machine()),
        ("has", found or "unknown: this system does not list its instruction sets"),
        ("torch uses", torch.backends.cpu.get_cpu_capability()),
        ("engine uses", engine),
        ("threads", f"{torch.get_num_threads()} of {usable} usable cores"),
    ]


def _cpuinfo() -> tuple[str, set[str]]:
    """Model and flags of the first core, from Linux's /proc/cpuinfo; empty elsewhere."""
    model, flags = "", set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return model, flags
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() == "model name":
            model = model or value.strip()
        elif name.strip().lower() in ("flags", "features"):
            flags = flags or set(value.split())
    return model, flags


def _missing(installed: dict[str, str | None], engine_reasons: list[str]) -> list[tuple[str, str]]:
    """What could be there and is not, and how to get it."""
    lines = []
    if engine_reasons:
        lines.append(("C++ engine", "; ".join(engine_reasons)))
    absent = [name for name in VIZ_LIBRARIES if installed[name] is None]
    if absent:
        lines.append(("pictures", f"{', '.join(absent)}: {EXTRA}"))
    if not torch.cuda.is_available():
        lines.append(("GPU", "torch sees none; everything runs on the processor"))
    return lines
