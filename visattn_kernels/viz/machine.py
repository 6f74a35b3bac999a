"""What this machine has: versions, instruction sets, backends, and what is missing."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from visattn_cli import EXTRA
from visattn_kernels import backends
from visattn_kernels.backends import parts
from visattn_kernels.version import __version__

LIBRARIES = ("triton", "numpy")
"""What the library itself uses beside torch, where it is there."""

VIZ_LIBRARIES = ("typer", "rich", "matplotlib", "pillow", "scikit-learn")
"""The extra `[viz]`, by the names that pip knows."""

# The ones that matrix kernels care about, as Linux names them, x86 first.
_INSTRUCTION_SETS = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "amx_int8"),
    *("asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2", "sme"),
)


def facts() -> dict[str, Any]:
    """All that `visattn info` says, in the form that `--json` prints: the keys stay, and None is what is not there."""
    return {
        "visattn_kernels": __version__,
        "python": platform.python_version(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "libraries": {name: _version(name) for name in LIBRARIES + VIZ_LIBRARIES},
        "processor": _processor(),
        "cuda_kernels": _cuda_kernels(),
        "backends": {
            backend.name: {"available": not reasons, "about": backend.about, "reasons": reasons}
            for backend, reasons in ((backend, backend.unavailable()) for backend in backends.REGISTRY)
        },
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts for a person, with what could be there and is not."""
    torch_, processor, kernels = facts["torch"], facts["processor"], facts["cuda_kernels"]
    architectures = " ".join(kernels["architectures"])
    sections = {
        "Versions": {
            "visattn_kernels": facts["visattn_kernels"],
            "python": facts["python"],
            "torch": torch_["version"],
            **{name: version or "not installed" for name, version in facts["libraries"].items()},
        },
        "Processor": {
            "model": processor["model"],
            "has": " ".join(processor["instruction_sets"]) or "unknown: this system does not list its instruction sets",
            "torch uses": processor["torch_uses"],
            "engine uses": processor["engine_uses"] or f"nothing: {processor['engine_reason']}",
            "threads": f"{processor['threads']} of {processor['usable_cores']} usable cores",
        },
        "CUDA": {
            "torch's": torch_["cuda"] or "none: this torch was built without it",
            "our kernels": f"compiled for {architectures}" if architectures else kernels["reason"],
        },
        "Backends": {
            name: f"available: {backend['about']}"
            if backend["available"]
            else f"not available: {'; '.join(backend['reasons'])}"
            for name, backend in facts["backends"].items()
        },
        "Missing": _missing(facts) or {"nothing": "everything is installed"},
    }
    return "\n".join(
        line
        for heading, lines in sections.items()
        for line in (heading, *(f"  {label:<16}{text}" for label, text in lines.items()))
    )


def _version(name: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    """The processor, its instruction sets and who uses which, and threads."""
    model, flags = _cpuinfo()
    uses, reason = None, "; ".join(backends.cpu.unavailable())
    if not reason:
        try:
            uses = backends.cpu.isa()
        except RuntimeError as error:  # one was asked for that this processor lacks
            reason = str(error)
    return {
        "model": model or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "engine_uses": uses,
        "engine_reason": reason,
        "threads": torch.get_num_threads(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _cuda_kernels() -> dict[str, Any]:
    """What the CUDA kernels were compiled for, machine code (sm_) and PTX (compute_), or why they were not built."""
    if failure := parts.failure(parts.CUDA):
        return {"architectures": [], "reason": failure}
    return {"architectures": re.findall(r"code=(\w+)", parts.built_cuda()[0]), "reason": ""}


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


def _missing(facts: dict[str, Any]) -> dict[str, str]:
    """What could be there and is not, and how to get it."""
    missing = {}
    if not facts["backends"]["cpu"]["available"]:
        missing["C++ engine"] = "; ".join(facts["backends"]["cpu"]["reasons"])
    if absent := [name for name in VIZ_LIBRARIES if facts["libraries"][name] is None]:
        missing["pictures"] = f"{', '.join(absent)}: {EXTRA}"
    if not torch.cuda.is_available():
        missing["GPU"] = "torch sees none; everything runs on the processor"
    return missing
