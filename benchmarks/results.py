"""What a run leaves behind: cells of providers with every sample, on what, of which commit. One JSON file, whole.

Medians, rates and ratios are derived from the samples; they stand in the file for whoever reads it by other means,
and are ignored when it is loaded.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from benchmarks.cases import Pass
from benchmarks.machine import ROOT
from benchmarks.measure import Summary, summary

SCHEMA = 1
FOLDER = ROOT / "benchmarks" / "results"

Status = Literal["measured", "refused", "absent"]
"""Refused: it ran, but its result fails the tolerance policy. Absent: it could not run, for a reason that is given."""


@dataclass
class Entry:
    """A provider in a cell.

    Attributes:
        name: the provider.
        ours: whether it is this library.
        status: what became of it.
        reason: why it is refused or absent.
        samples: seconds, in the order in which they were taken.
        peak_bytes: above the inputs; a backward is counted with its forward. None where it was not measured.
        checks: errors over tolerances, by result.
    """

    name: str
    ours: bool
    status: Status
    reason: str = ""
    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def times(self) -> Summary | None:
        """Median and percentiles; None without samples."""
        return summary(self.samples) if self.samples else None


@dataclass
class Cell:
    """One pass of one workload in one dtype, with everyone who was asked to do it."""

    workload: str
    dtype: str
    which: Pass
    batch: int
    heads: int
    about: dict[str, Any]
    flops: float
    bytes: float
    exps: float
    floor: float
    binds: str
    entries: list[Entry] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        """What a cell is found by."""
        return self.workload, self.dtype, self.which

    def entry(self, name: str) -> Entry | None:
        """A provider's entry."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def _fastest(self, ours: bool) -> Entry | None:
        ranked = [
            (entry.times.median, entry.name, entry)
            for entry in self.entries
            if entry.ours == ours and entry.status == "measured" and entry.times is not None
        ]
        return min(ranked)[2] if ranked else None

    @property
    def ours(self) -> Entry | None:
        """The fastest of our backends that passed."""
        return self._fastest(True)

    @property
    def best_peer(self) -> Entry | None:
        """The fastest of the others that passed."""
        return self._fastest(False)

    def ratio(self, entry: Entry) -> float | None:
        """The best peer's time over a provider's."""
        peer = self.best_peer
        if entry.times is None or peer is None or peer.times is None:
            return None
        return peer.times.median / entry.times.median

    def plain(self) -> dict[str, Any]:
        """As plain values, with what is derived."""
        found = asdict(self)
        found["best_peer"] = self.best_peer.name if self.best_peer else None
        for entry, values in zip(self.entries, found["entries"], strict=True):
            if entry.times is not None:
                median = entry.times.median
                values["derived"] = {
                    **asdict(entry.times),
                    "flops_per_second": self.flops / median,
                    "bytes_per_second": self.bytes / median,
                    "ratio_to_best_peer": self.ratio(entry) if entry.status == "measured" else None,
                    "share_of_floor": self.floor / median,
                }
        return found


@dataclass
class Report:
    """A run.

    Attributes:
        name: of the file, and of the blocks in the documents made from it.
        complete: whether every cell that was asked for is there.
        started, finished: ISO 8601, UTC.
        device: "cpu" or "cuda".
        threads: that torch, and so every provider, may use.
        commit: None before the first.
        dirty: whether the working tree differed from it.
        sources: digest of the package's and the engine's files, built ones included.
        hardware, versions, ceilings, settings: as the modules of those names describe them.
        cells: in the order in which they were measured.
    """

    name: str
    device: str
    threads: int
    started: str
    finished: str | None = None
    complete: bool = False
    commit: str | None = None
    dirty: bool = False
    sources: str = ""
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    schema: int = SCHEMA

    def find(self, workload: str, dtype: str, which: str) -> Cell | None:
        """A cell by its key."""
        return next((cell for cell in self.cells if cell.key == (workload, dtype, which)), None)

    def put(self, cell: Cell) -> None:
        """Add a cell, in place of an older one with the same key."""
        for i, old in enumerate(self.cells):
            if old.key == cell.key:
                self.cells[i] = cell
                return
        self.cells.append(cell)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "cells"}
        plain["cells"] = [cell.plain() for cell in self.cells]
        write_whole(path, json.dumps(plain, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> Report:
    """Read a results file.

    Raises:
        ValueError: it is no results file of this schema.
        OSError: it cannot be read.
    """
    try:
        plain = json.loads(path.read_text())
        if plain["schema"] != SCHEMA:
            raise ValueError(f"{path} has schema {plain['schema']}, not {SCHEMA}")
        cells = [_cell(values) for values in plain.pop("cells")]
        return Report(cells=cells, **plain)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no results file: {error}") from error


def _cell(plain: dict[str, Any]) -> Cell:
    entries = [Entry(**_known(Entry, values)) for values in plain["entries"]]
    return Cell(**{**_known(Cell, plain), "entries": entries})


def _known(kind: type[Entry] | type[Cell], plain: dict[str, Any]) -> dict[str, Any]:
    """The values that are stored, without those that are derived."""
    names = {one.name for one in fields(kind)}
    return {name: value for name, value in plain.items() if name in names}


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
        Path(name).chmod(0o644)  # mkstemp's 0600 is for secrets
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
