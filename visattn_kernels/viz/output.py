"""Files written whole or not at all, PNG or PDF by the name's ending."""

from __future__ import annotations

import io
import os
import secrets
import shutil
import stat
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
    check_place(path)
    if source is not None and path.exists() and _readable(source) and path.samefile(source):
        raise expected("--output to be another file than the picture read", "--output", path, InputError)
    return Target(path)


def check_place(path: Path, argument: str = "--output") -> None:
    """Refuse, before any work, a place where `Target.write` could not put a file afterwards.

    Args:
        path: the file that is to be written.
        argument: what names it.
    """
    try:
        place = path.resolve()
        if not place.parent.is_dir():
            raise expected(f"{argument} in a directory that exists", argument, path, InputError)
        found = _status(place)
        if found is not None:
            if not stat.S_ISREG(found.st_mode):
                raise expected(f"{argument} to be a regular file", argument, path, InputError)
            if not os.access(place, os.W_OK) or not _replaceable(found, place.parent.stat()):
                raise expected(f"{argument} to be a file that may be written", argument, path, InputError)
        # Permissions, read-only and full disks: only trying tells.
        probe = _scratch(place)
        try:
            probe.write_bytes(b"visattn")
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a letter that no name may have
        raise _unwritable(path, error, argument) from error


def _status(place: Path) -> os.stat_result | None:
    """What a file is, or None where there is none; raises OSError where there can be none, as of too long a name."""
    try:
        return place.stat()
    except FileNotFoundError:
        return None


def _replaceable(file: os.stat_result, folder: os.stat_result) -> bool:
    """Whether another file may take its place: not of another user in a shared folder, such as /tmp, nor if mounted."""
    mine = not hasattr(os, "geteuid") or os.geteuid() in (0, file.st_uid, folder.st_uid)
    return (mine or not folder.st_mode & stat.S_ISVTX) and file.st_dev == folder.st_dev


def _readable(source: Path) -> bool:
    """Whether there is a file of a name, which may be no name at all."""
    try:
        return source.exists()
    except (OSError, ValueError):
        return False


def _scratch(place: Path) -> Path:
    """A name beside `place` that nobody else has."""
    return place.with_name(f".visattn-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _unwritable(path: Path, error: Exception, argument: str = "--output") -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return expected(f"{argument} to be a file that can be written", argument, path, InputError, f"{reason}.")


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
