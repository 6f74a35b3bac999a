"""Builds beside the checkout's own: copies of what one needs, and what went wrong in it; without torch."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""


def copy_source(to: Path) -> Path:
    """A copy of what a build needs, with the objects of this checkout's own build, if there are any.

    ninja decides what of them is out of date; what a build has compiled already with the same flags it takes as it is.
    """
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for built in (ROOT / "build").glob("temp*"):
        shutil.copytree(built, to / "build" / built.name, dirs_exist_ok=True)
    for name in ("csrc", "visattn_kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore, dirs_exist_ok=True)
    for name in (
        "setup.py",
        "setup_cuda.py",
        "visattn_cli.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, to)
    return to


def first_errors(text: str, most: int = 3) -> str:
    """The first lines of a build's output that are errors, on one line; the last line if none is."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|undefined reference|cannot find|^visattn: ", line)]
    return " | ".join(dict.fromkeys(errors[:most])) or (lines[-1] if lines else "no output")
