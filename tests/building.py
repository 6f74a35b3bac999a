"""Commands and builds, for the tests that need more than this process and the extension in place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sources import copy_source as copy_source

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command; its output, or a failure that shows it."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def pytest_on(source: Path) -> list[str]:
    """The command that runs this checkout's tests on another copy's package."""
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", f"pythonpath={source}", *config]


def sanitized_environment(folder: Path) -> dict[str, str]:
    """What the environment of a process that loads a sanitized library has, or a skip."""
    compiler = os.environ.get("CXX", "c++")
    # The sanitizer must find the C++ runtime at its start, or it cannot intercept exceptions.
    names = ("libasan.so", "libstdc++.so")
    found = [run(compiler, f"-print-file-name={name}", cwd=folder).strip() for name in names]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip(f"{compiler} lacks one of {names}")
    options = "detect_leaks=0:allocator_may_return_null=1"
    return {"VISATTN_SANITIZE": "1", "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options}
