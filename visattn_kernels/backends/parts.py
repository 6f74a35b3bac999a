"""The compiled parts of the package. Each is loaded by itself: what stands against one is no reason against another."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ENGINE = "visattn_kernels._C"
"""The CPU engine."""

CUDA = "visattn_kernels._cuda"
"""The CUDA kernels, which need libtorch_cuda.so."""

_ASKED = {ENGINE: "no_cuda", CUDA: "built"}
"""What each part is asked of its build."""


@cache
def failure(part: str) -> str:
    """Load a part, once; why it can't be used, or nothing."""
    if find_spec(part) is None:
        if part == CUDA:
            return failure(ENGINE) or f"the CUDA kernels were not built: {_no_cuda()}"
        root = Path(__file__).parents[2]
        if (root / "csrc").is_dir():
            sources = f"in {root}, whose sources Python takes before an installed package"
            return f"the extension {part} was not built {sources}; `make build` there builds it"
        return f"the extension {part} was not built (VISATTN_NO_EXT=1, or no C++ compiler at install time)"
    try:
        if not hasattr(import_module(part), _ASKED[part]):
            return f"the extension {part} was built from older sources; build it again"
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: operators that torch refuses to register
        return f"the extension {part} does not load: {error}"
    return ""


def _no_cuda() -> str:
    """Why the build left the CUDA kernels out."""
    return str(import_module(ENGINE).no_cuda()) or f"they were once, but {CUDA} is not there now"


def selected_isa() -> str:
    """What the engine says of the instruction set that it uses."""
    return str(import_module(ENGINE).isa())


def built_cuda() -> tuple[str, tuple[tuple[int, int], ...]]:
    """What nvcc was told of architectures, and the D and Dv that were compiled."""
    gencode, widths = import_module(CUDA).built()
    return gencode, tuple((int(d), int(dv)) for d, dv in (pair.split("/") for pair in widths.split(";")))
