"""The instruction sets of the CPU engine, those that this machine has among them."""

from __future__ import annotations

import os

import pytest

from visattn_kernels.backends import cpu

ISAS = ("plain", "avx2", "avx512", "avx512_bf16")


def _here(isa: str) -> bool:
    """Whether the engine runs an instruction set here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "VISATTN_CPU_ISA", isa)
        try:
            return cpu.isa() == isa
        except RuntimeError:
            return False


HERE = () if cpu.unavailable() else tuple(filter(_here, ISAS))
ABSENT = () if cpu.unavailable() else tuple(isa for isa in ISAS if isa not in HERE)
