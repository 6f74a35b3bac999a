"""The record of the CPU backend: the C++ engine of `csrc/cpu`, where it was built."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from visattn_kernels.problem import Problem

MAX_CHANNELS = 65536
"""The widest head that the engine takes, as in csrc/binding/check.h."""

ABOUT = "C++ engine: tiled, multi-threaded, SIMD chosen at run time"


def _load() -> str:
    """Load the extension; the reason if that fails, else an empty string."""
    if find_spec("visattn_kernels._C") is None:
        root = Path(__file__).parents[2]
        if (root / "csrc").is_dir():
            sources = f"in {root}, whose sources Python takes before an installed package"
            return f"the extension visattn_kernels._C was not built {sources}; `make build` there builds it"
        return "the extension visattn_kernels._C was not built (VISATTN_NO_EXT=1, or no C++ compiler at install time)"
    try:
        import visattn_kernels._C  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: operators that torch refuses to register
        return f"the extension visattn_kernels._C does not load: {error}"
    return ""


_failure = _load()


def unavailable() -> list[str]:
    """Why the engine cannot run on this machine."""
    return [_failure] if _failure else []


def unsupported(problem: Problem) -> list[str]:
    """Why the engine cannot run `problem`."""
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"the tensors are on {problem.device}, not on the CPU")
    if max(problem.head_dim, problem.value_dim) > MAX_CHANNELS:
        reasons.append(f"D and Dv may be at most {MAX_CHANNELS}, since scratch memory grows with them")
    return reasons


def isa() -> str:
    """The instruction set that the engine uses on this machine, such as "avx512_bf16".

    Raises:
        RuntimeError: VISATTN_CPU_ISA names none that can run here.
    """
    import visattn_kernels._C

    return str(visattn_kernels._C.isa())
