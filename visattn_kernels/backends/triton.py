"""The record of the Triton backend: the kernels of `visattn_kernels.triton`, on NVIDIA GPUs.

Triton is imported at the first call. Where TRITON_INTERPRET=1 was set before that and `interpret` is set here, kernels
run in its interpreter, on CPU tensors: a tool of the tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from visattn_kernels.dynamo import constant
from visattn_kernels.ops import SCHEMAS, implement
from visattn_kernels.patterns import Neighborhood
from visattn_kernels.problem import Problem

ABOUT = "Triton kernels: tiled, every pattern and term, compiled at first use"

MAX_CHANNELS = 512
"""The widest head: more does not fit the registers of a program."""

MAX_KERNEL = 2**30
"""The largest kernel with border="zero", whose indices are 32-bit numbers."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

interpret = False
"""Whether CPU tensors are taken and run in Triton's interpreter."""


def unavailable() -> list[str]:
    """Why the kernels cannot run on this machine."""
    reasons = missing()
    if not interpret:
        reasons = reasons + [reason for reason in (_no_gpu(),) if reason]
    elif os.environ.get("TRITON_INTERPRET") != "1":
        reasons = [*reasons, "TRITON_INTERPRET=1 is not set"]
    return reasons


_MISSING = [] if find_spec("triton") is not None else ["Triton is not installed (pip install triton)"]


def missing() -> list[str]:
    """Why there is no Triton."""
    return _MISSING


@constant
def _no_gpu() -> str:
    """Why torch has no GPU for them, or nothing."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm, and the kernels are tuned for NVIDIA GPUs"
    return "" if torch.cuda.is_available() else "torch sees no NVIDIA GPU"


@constant
def _too_old() -> str:
    """Why the current GPU cannot, or nothing; asked of tensors on a GPU alone, since the question starts CUDA."""
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"the GPU has compute capability {major}.{minor}, not 8.0 or more"


def unsupported(problem: Problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    reasons = []
    device = "cpu" if interpret else "cuda"
    if problem.device != device:
        reasons.append(f"the tensors are on {problem.device}, not on {'the CPU' if interpret else 'a GPU'}")
    elif device == "cuda" and not _no_gpu():
        reasons += [reason for reason in (_too_old(),) if reason]
    if problem.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        reasons.append(f"the dtype is {str(problem.dtype).removeprefix('torch.')}, not one of {names}")
    if interpret and problem.dtype == torch.bfloat16:
        reasons.append("the interpreter computes bfloat16 wrongly")
    if max(problem.head_dim, problem.value_dim) > MAX_CHANNELS:
        reasons.append(f"D and Dv may be at most {MAX_CHANNELS}")
    pattern = problem.pattern
    if isinstance(pattern, Neighborhood) and pattern.border == "zero" and max(pattern.encode()[1:3]) > MAX_KERNEL:
        reasons.append(f'kernel_size may be at most {MAX_KERNEL} with border="zero"')
    return reasons


def _kernel(which: str) -> Callable[..., Any]:
    """An operator's function, which imports Triton when it is called."""

    def run(*args: Any) -> Any:
        from visattn_kernels.triton.operators import OPERATORS

        return OPERATORS[which](*args)

    return run


implement("triton", {which: _kernel(which) for which in SCHEMAS}, ("CPU", "CUDA"))
