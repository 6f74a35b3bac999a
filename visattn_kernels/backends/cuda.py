"""The record of the CUDA backend: the kernels of `csrc/cuda`, compiled for the cells of `backends.cells`.

What is not listed there answers with a reason, and Triton runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

import torch

from visattn_kernels.backends import parts
from visattn_kernels.backends.cells import CELLS, KINDS, kinds
from visattn_kernels.dynamo import constant
from visattn_kernels.ops import FAMILIES, implement
from visattn_kernels.patterns import Column, CrissCross, Global, Neighborhood, Pattern, Row
from visattn_kernels.problem import Problem, tf32_products
from visattn_kernels.triton.cut import parts_of, sides_of
from visattn_kernels.triton.structs import NEAR

ABOUT = "CUDA kernels: mma.sync, one pass over a tile's keys, compiled for the widths that models use"

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

MOST = 2**30
"""Where 32-bit indices of a box of positions end, as `kMost` of csrc/cuda/plan.h."""

emulate = False
"""Whether CPU tensors are taken, for kernels that run in csrc/emulator: a tool of the tests."""


def unavailable() -> list[str]:
    """Why the kernels cannot run on this machine."""
    if emulate:
        return []
    return [reason for reason in (_not_built(), _no_gpu()) if reason]


@constant
def _not_built() -> str:
    """Why the kernels are not there, or nothing."""
    return parts.failure(parts.CUDA)


def has_code(gencode: str, capability: tuple[int, int]) -> bool:
    """Whether what nvcc was told, such as "arch=compute_80,code=sm_80", makes code that a GPU of a capability runs.

    Machine code runs on the same major number from its own minor one up, that of a variant (90a) on its own alone; PTX
    is compiled for whatever comes after it, if of no variant.
    """
    for kind, digits, variant in re.findall(r"code=(sm|compute)_(\d+)([af]?)", gencode):
        made = divmod(int(digits), 10)
        later = made <= capability and (kind == "compute" or made[0] == capability[0])
        if made == capability or (later and not variant):
            return True
    return False


@constant
def _no_gpu() -> str:
    """Why torch has no GPU for them, or nothing."""
    return "" if torch.cuda.is_available() else "torch sees no NVIDIA GPU"


@constant
def _too_old() -> str:
    """Why the current GPU cannot, or nothing; asked of tensors on a GPU alone, since the question starts CUDA."""
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, not 8.0 or more"
    if _not_built():
        return ""  # which is reason enough, and there is no extension to ask
    text, _ = parts.built_cuda()
    return (
        ""
        if has_code(text, (major, minor))
        else f"they were not compiled for compute capability {major}.{minor}: {text}"
    )


@constant
def _widths() -> tuple[tuple[int, int], ...]:
    """D and Dv of the kernels that were compiled; where none were, of all that can be."""
    if emulate or _not_built():
        return tuple((d, dv) for d, dv, _ in CELLS)
    return parts.built_cuda()[1]


def kind_of(pattern: Pattern, terms: Collection[str]) -> str:
    """The least kind of kernel that a pattern and terms (their names) need, as csrc/cuda/choose.cpp has it."""
    if {"RelativeQuery", "RelativeKey", "RelativeValue"} & set(terms):
        return "kVectors"
    if terms:
        return "kBias"
    near = isinstance(pattern, (Neighborhood, CrissCross)) or (isinstance(pattern, (Row, Column)) and pattern.span)
    return "kMasked" if near else "kPlain"


def unsupported(problem: Problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    reasons = []
    device = "cpu" if emulate else "cuda"
    if problem.device != device:
        reasons.append(f"the tensors are on {problem.device}, not on {'the CPU' if emulate else 'a GPU'}")
    elif device == "cuda" and not _no_gpu():
        reasons += [reason for reason in (_too_old(),) if reason]
    if problem.dtype not in DTYPES:
        names = ", ".join(DTYPES.values())
        reasons.append(f"the dtype is {str(problem.dtype).removeprefix('torch.')}, not one of {names}")
        return reasons
    if problem.value_dim == 0:
        return [*reasons, "its kernels do not read the map; those of Triton do"]
    if max(problem.queries.height * problem.queries.width, problem.keys.height * problem.keys.width) >= MOST:
        reasons.append(f"a map may have fewer than {MOST} positions")
    if isinstance(problem.pattern, Neighborhood) and problem.pattern.border == "zero":
        height, width = problem.pattern.encode()[1:3]
        if (height + 64) * (width + 64) >= MOST:
            reasons.append(f'with border="zero" a kernel may have fewer than {MOST} positions, with those of a block')
    kind = kind_of(problem.pattern, problem.terms)
    built = _widths()
    listed = {(d, dv): kinds(DTYPES[problem.dtype], named) for d, dv, named in CELLS if (d, dv) in built}
    widths = (problem.head_dim, problem.value_dim)
    if widths not in listed:
        pairs = ", ".join(f"{d}/{dv}" for d, dv in listed)
        reasons.append(f"D and Dv are {widths[0]}/{widths[1]}, not one of {pairs}")
    elif max(KINDS.index(other) for other in listed[widths]) < KINDS.index(kind):
        what = {
            "kVectors": "relative vector terms",
            "kBias": "RelativeBias or KeyBias",
            "kMasked": "pairs left out by a pattern",
        }
        reasons.append(f"no kernel of D {widths[0]} and Dv {widths[1]} has {what[kind]}")
    if not reasons and (emulate or not _no_gpu()):  # without a GPU there is nothing to ask for its memory
        needed = max(shared_bytes(problem, which) for which in ("forward", "queries", "keys"))
        if needed > _most_shared():
            there = _most_shared()
            reasons.append(f"its blocks would need {needed} bytes of shared memory, of {there} that there are")
    return reasons


def yields(problem: Problem) -> str:
    """Why Triton is asked before these kernels: where their machine code, counted, costs more than Triton's."""
    if isinstance(problem.pattern, Global) or kind_of(problem.pattern, problem.terms) == "kVectors":
        return "Triton's kernels are taken before them for Global and for relative vectors, as they cost less by count"
    return ""


SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""KB of shared memory that a block may have, by compute capability; of another, as its neighbour below."""


@constant
def _most_shared() -> int:
    """Bytes of shared memory of a block on the current GPU."""
    if emulate:
        return 227 * 1024
    major, minor = torch.cuda.get_device_capability()
    return 1024 * SHARED[max(known for known in SHARED if known <= 10 * major + minor)]


def shared_bytes(problem: Problem, which: str) -> int:
    """What a block of a pass has of shared memory at most, with every gradient wanted.

    `cut_of` and `lay_out` of csrc/cuda/plan.h say what each piece is for.

    Args:
        problem: one that has a cell.
        which: "forward", "queries" or "keys".
    """
    of_keys, backward = which == "keys", which != "forward"
    d, dv, number = problem.head_dim, problem.value_dim, problem.dtype.itemsize
    slots, pad = (128 if backward and d + dv > 64 else 256) // (2 * number), 16 // number
    pattern, (queries, keys) = problem.pattern, (problem.queries, problem.keys)
    reach = pattern.reach(queries, keys)
    most = 0
    for part in range(parts_of(tuple(pattern.encode()))):
        y, x = sides_of(tuple(pattern.encode()), part, queries, keys, reach)
        h, w = (side.longest(side.keys if of_keys else side.queries) for side in (y, x))
        if NEAR in (y.kind, x.kind):
            own_h = 1 if h == 1 else 8 if w > 1 else 64
            own = (own_h, 64 // own_h)
        else:
            own = (min(h, 64), min(w, 64) if h == 1 else w)
        far = [side.longest(side.queries if of_keys else side.keys) for side in (y, x)]
        for axis, side in enumerate((y, x)):
            if side.kind == NEAR:
                inside = of_keys or getattr(pattern, "border", "mask") != "zero"
                reached = own[axis] - 1 + (2 if of_keys else 1) * side.size
                far[axis] = min(reached, far[axis]) if inside else reached
        stage = slots * (d + dv + 2 * pad) * number + slots * 8 + (2 if of_keys else 1) * slots * 4
        total = 512 + 512 + 64 * (d + pad + (dv + pad if backward else 0)) * number + 2 * stage
        staged = False
        if "RelativeBias" in problem.terms:
            staged = which == "queries"
            total += _rounded((2 * reach[0] - 1) * (2 * reach[1] - 1) * 4) * (2 if staged else 1)
        for term, width in (("RelativeQuery", d), ("RelativeKey", d), ("RelativeValue", dv)):
            if term not in problem.terms:
                continue
            near, value = of_keys == (term == "RelativeKey"), term == "RelativeValue"
            if not value or backward:
                across = sum(far if near else own) | 1
                total += _rounded((64 if near else slots) * across * 4)
                if not near:
                    rows = sum(-(-(a + b - 1) // slots) * slots for a, b in zip(own, far, strict=True))
                    total += _rounded(rows * (width + pad) * number)
            if near and (value or backward):
                total += _rounded(64 * (sum(far) | 1) * 4)
                staged = True
        most = max(most, total + (_rounded(64 * (slots + 1) * 4) if staged else 0))
    return most


def _rounded(size: int) -> int:
    return -(-size // 16) * 16


def _kernel(which: str) -> Callable[..., Any]:
    """An operator's function: the launch, with torch's setting for products of float32."""

    def run(*args: Any) -> Any:
        if not emulate and (reason := _not_built()):
            raise RuntimeError(f"visattn: expected the CUDA kernels for visattn::cuda_{which}, but {reason}")
        launch = getattr(torch.ops.visattn, f"cuda_launch_{which}").default
        return launch(*args, tf32_products())

    return run


implement("cuda", {which: _kernel(which) for which in FAMILIES["cuda"]}, ("CPU", "CUDA"))
