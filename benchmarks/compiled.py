"""Ahead-of-time compilation of the Triton kernels of every workload, and what they take of a GPU; no GPU is needed.

The launches are made of meta tensors by the code that makes them of real ones, and compiled as Triton would at their
first call: the same specialisation of strides, the same options.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import FOLDER
from benchmarks.workloads import Workload
from visattn_kernels.terms import TERM_TENSORS, scales, tensors_of
from visattn_kernels.triton import launch

FILE = FOLDER / "compiled.json"
"""The record that docs/triton.md shows."""

STACK = 128
"""Bytes of a thread's registers that may be spilled: 32 of its 255."""

CAPABILITIES = (80, 90, 100, 120)
"""The compute capabilities that are compiled for."""

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a program may have, by compute capability."""

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
POINTERS[torch.int32] = "*i32"


def call_of(workload: Workload, dtype: torch.dtype, capability: int) -> launch.Call:
    """The call of a workload on a GPU, of meta tensors."""
    heads = workload.heads_on("cuda")

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, d, dv = workload.batch("cuda"), workload.head_dim, workload.value_dim
    q, k = make(batch, *workload.queries, heads, d), make(batch, *workload.keys, heads, d)
    v = make(batch, *workload.keys, heads, dv)
    shapes = workload.term_shapes(heads)
    terms = [spec.build(*(make(*shape) for shape in of)) for spec, of in zip(workload.terms, shapes, strict=True)]
    tensors = {name: x for name, x in zip(TERM_TENSORS, tensors_of(terms), strict=True) if x is not None}
    reach = workload.pattern.reach(workload.queries, workload.keys)
    pattern = tuple(workload.pattern.encode())
    return launch.Call(q, k, v, tensors, pattern, reach, (workload.factor, *scales(terms)), capability)


def launches_of(call: launch.Call) -> list[launch.Launch]:
    """Every launch of a forward and of a backward with all gradients."""
    forward, out, lse = launch.forward(call)
    needs = ["q", "k", "v", *call.terms]
    backward, _ = launch.backward(call, torch.empty_like(out), torch.empty_like(lse), out, lse, needs)
    return [*forward, *backward]


def reading_launches_of(call: launch.Call) -> list[launch.Launch]:
    """Every launch of `attention_map` of a few points and of `attention_received`."""
    call = replace(call, v=None, terms={name: x for name, x in call.terms.items() if "value" not in name})
    points = torch.empty((5, 2), dtype=torch.int64, device="meta")
    return [*launch.rows(call, points)[0], *launch.received(call)[0]]


def _signature(kernel: Any, args: Sequence[Any]) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and attributes of arguments, as Triton finds them at a call."""
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    aligned = [["tt.divisibility", 16]]

    # Inside a tuple Triton specialises numbers whether or not the parameter is to be.
    def type_of(x: Any, path: tuple[int, ...], specialise: bool = True) -> Any:
        if isinstance(x, tuple):
            found = [type_of(one, (*path, i)) for i, one in enumerate(x)]
            return type(x)(*found) if hasattr(x, "_fields") else tuple(found)
        if x is None or (specialise and isinstance(x, int) and x == 1):
            constants[path] = x
            return "constexpr"
        if isinstance(x, torch.Tensor):
            attributes[path] = aligned
            return POINTERS[x.dtype]
        if isinstance(x, float):
            return "fp32"
        if specialise and x % 16 == 0:
            attributes[path] = aligned
        return "i32" if -(2**31) <= x < 2**31 else "i64"

    types: dict[str, Any] = {}
    for i, (parameter, x) in enumerate(zip(kernel.params, args, strict=True)):
        if parameter.is_constexpr:
            constants[(i,)] = x
            types[parameter.name] = "constexpr"
        else:
            types[parameter.name] = type_of(x, (i,), not parameter.do_not_specialize)
    return types, constants, attributes


def compile_launch(one: launch.Launch, capability: int) -> Any:
    """The compiled kernel of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from visattn_kernels.triton.kernels import KERNELS

    kernel = KERNELS[one.kernel]
    source = ASTSource(kernel, *_signature(kernel, one.args))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options(one))


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread, bytes of its stack (where registers are spilled to), shared memory of a program.

    Raises:
        RuntimeError: the tool that reads a cubin says nothing.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [os.fspath(tool), "--dump-resource-usage", os.fspath(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise RuntimeError(f"{tool} tells no registers: {text!r}")
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": int(compiled.metadata.shared)}


def narrow_offsets(ttir: str) -> list[str]:
    """Additions to pointers whose offsets are not 64-bit; none may be, but where a table begins in a share."""
    narrow = re.compile(r"(tensor<[\dx]*i(8|16|32)>|!tt\.ptr<\w+>, i(8|16|32))\s*(loc|$)")
    return [
        line.strip()
        for line in ttir.splitlines()
        if "tt.addptr" in line and narrow.search(line) and "%partials" not in line
    ]


def rows(
    workloads: Sequence[Workload],
    capabilities: Sequence[int] = CAPABILITIES,
    careful: bool = True,
    reading: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Compile every launch of workloads; one row for each, equal kernels once.

    Args:
        workloads: which.
        capabilities: for which.
        careful: whether launches that compute anew what NaN reached are among them.
        reading: those of `attention_map` and `attention_received` instead of a forward's and a backward's.
        progress: told what is compiled.
    """
    seen: set[Any] = set()
    for workload in workloads:
        dtype = getattr(torch, workload.dtypes("cuda")[0])
        for capability in capabilities:
            launches = reading_launches_of if reading else launches_of
            for one in launches(call_of(workload, dtype, capability)):
                config = one.args[-1]
                is_careful = bool(getattr(config, "careful", False))
                if is_careful and not careful:
                    continue
                key = (capability, dtype, one.kernel, config, one.warps, one.stages, workload.terms)
                if key in seen:
                    continue
                seen.add(key)
                progress(f"{workload.name} {one.kernel} for {capability}")
                begun = time.perf_counter()
                compiled = compile_launch(one, capability)
                yield {
                    "workload": workload.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "capability": capability,
                    "kernel": one.kernel,
                    "careful": is_careful,
                    "queries": [config.qy, config.qx] if hasattr(config, "qy") else None,
                    "keys": [config.ky, config.kx] if hasattr(config, "ky") else None,
                    "warps": one.warps,
                    "stages": one.stages,
                    **resources(compiled),
                    "narrow_offsets": narrow_offsets(compiled.asm["ttir"]),
                    "seconds": round(time.perf_counter() - begun, 2),
                }


def faults(row: dict[str, Any]) -> list[str]:
    """How a row breaks the limits; an empty list if it does not."""
    found = []
    if row["shared"] > SHARED[row["capability"]]:
        found.append(f"{row['shared']} bytes of shared memory, of {SHARED[row['capability']]}")
    if row["stack"] > STACK and not row["careful"]:
        found.append(f"{row['stack']} bytes spilled, of {STACK}")
    found += [f"an offset of less than 64 bits: {line}" for line in row["narrow_offsets"]]
    return found


def write(found: list[dict[str, Any]], to: Path) -> None:
    """Write rows, whole or not at all."""
    import triton

    to.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"triton": triton.__version__, "torch": torch.__version__, "rows": found}, indent=1)
    part = to.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(to)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown: registers, spilled bytes and KB of shared memory for each compute capability."""
    order = sorted({row["capability"] for row in found})
    cells: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for row in found:
        name = row["kernel"].removeprefix("attention_").removesuffix("_kernel") + (
            " (careful)" if row["careful"] else ""
        )
        cells.setdefault((row["workload"], row["dtype"], name), {})[row["capability"]] = row
    heads = [f"{capability // 10}.{capability % 10}" for capability in order]
    lines = [
        f"| workload | dtype | kernel | {' | '.join(heads)} |",
        f"| --- | --- | --- | {' | '.join(['---'] * len(heads))} |",
    ]
    for key, rows_by in cells.items():
        lines.append(f"| {' | '.join(key)} | {' | '.join(_cell(rows_by.get(capability)) for capability in order)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    box = ""
    if row["queries"]:
        (qy, qx), (ky, kx) = row["queries"], row["keys"]
        box = f"{qy}×{qx} · {ky}×{kx}, "
    spilled = f", {row['stack']} B spilled" if row["stack"] else ""
    return f"{box}{row['warps']} warps: {row['registers']} registers, {row['shared'] / 1024:.0f} KB{spilled}"
