"""Files written whole or not at all, PNG or PDF by the name's ending."""

from __future__ import annotations

import io
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visattn_kernels.errors import expected
from visattn_kernels.viz.exits import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".pdf")
"""What a file may end in."""

DPI = 150
"""Dots per inch of a PNG, and of the pixels inside a PDF."""


@dataclass(frozen=True)
class Target:
    """A file to be written, checked by `check_target`."""

    path: Path

    @property
    def is_pdf(self) -> bool:
        """Whether it is to be a document of pages rather than one picture."""
        return self.path.suffix.lower() == ".pdf"

    def write(self, content: bytes) -> None:
        """Write the file whole or not at all: beside it first, then in its place."""
        # A link stays a link, and what it points at is replaced.
        place = self.path.resolve()
        scratch = _scratch(place)
        try:
            scratch.write_bytes(content)
            if place.exists():
                shutil.copymode(place, scratch)
            scratch.replace(place)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        finally:
            scratch.unlink(missing_ok=True)


def check_target(name: str, source: Path | None) -> Target:
    """Refuse, before any work, a file that could not be written afterwards.

    Args:
        name: the file asked for.
        source: the picture that is read, which must not be overwritten.
    """
    path = Path(name)
    if path.suffix.lower() not in ENDINGS:
        raise expected(f"--output to end in {' or '.join(ENDINGS)}", "--output", name or "''", InputError)
    try:
        place = path.resolve()
        if not place.parent.is_dir():
            raise expected("--output in a directory that exists", "--output", path, InputError)
        if place.exists():
            if not place.is_file():
                raise expected("--output to be a regular file", "--output", path, InputError)
            if source is not None and source.exists() and place.samefile(source):
                raise expected("--output to be another file than the picture read", "--output", path, InputError)
            if not os.access(place, os.W_OK):
                raise expected("--output to be a file that may be written", "--output", path, InputError)
        # Permissions, read-only and full disks: only trying tells.
        probe = _scratch(place)
        try:
            probe.write_bytes(b"visattn")
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise _unwritable(path, error) from error
    return Target(path)


def _scratch(place: Path) -> Path:
    """A name beside `place` that nobody else has."""
    return place.with_name(f".visattn-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _unwritable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return expected("--output to be a file that can be written", "--output", path, InputError, f"{reason}.")


def png_bytes(figure: Figure) -> bytes:
    """One figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def pdf_bytes(figures: Sequence[Figure], title: str) -> bytes:
    """Figures as the pages of a PDF; the same figures give the same bytes."""
    from matplotlib.backends.backend_pdf import PdfPages

    buffer = io.BytesIO()
    with PdfPages(buffer, metadata={"Title": title, "Creator": "visattn", "CreationDate": None}) as pages:
        for figure in figures:
            pages.savefig(figure, dpi=DPI)
    return buffer.getvalue()
