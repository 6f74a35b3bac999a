"""What `make gpu` leaves behind: what ran on which GPU, passed, failed, was skipped, is left. One JSON file, whole.

The block `<!-- benchmarks:gpu -->` of a document is made from it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.machine import ROOT
from benchmarks.results import FOLDER, write_whole

RECORD = FOLDER / "gpu.json"
SCHEMA = 1

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
"""What compute-sanitizer can look for."""

EMPTY = "No GPU has run this yet."
"""The summary where there is no record."""


@dataclass
class Outcome:
    """What became of a test, or of a tool.

    Attributes:
        state: "passed", "failed", "skipped" (a tool: it cannot run here), or "unfinished": it was cut off while it ran.
        seconds: how long it took.
        message: the head of a failure's message, or the reason of a skip.
    """

    state: str
    seconds: float = 0.0
    message: str = ""


@dataclass
class Record:
    """Everything that ran of one state of the code on one machine, in one call of `make gpu` or several.

    Attributes:
        commit, dirty: as `machine.commit` has them, when it began.
        sources: digest of the code and of the tests, as `digest` makes it.
        hardware, versions: as `machine` has them; hardware has the GPU's driver too.
        started, finished: ISO 8601, UTC.
        seconds: of all calls together.
        calls: how many.
        collected: every test of the tier, in the order in which they run.
        tests: what became of those that began.
        sanitizer: what became of each tool that began.
        engine: whether the compiled part, with the CUDA kernels, builds with this torch.
        benchmark: {"cells", "of", "refused", "state", "message"}; empty before it began.
    """

    commit: str | None
    dirty: bool
    sources: str
    hardware: dict[str, Any]
    versions: dict[str, Any]
    started: str
    finished: str = ""
    seconds: float = 0.0
    calls: int = 0
    collected: list[str] = field(default_factory=list)
    tests: dict[str, Outcome] = field(default_factory=dict)
    sanitizer: dict[str, Outcome] = field(default_factory=dict)
    engine: Outcome | None = None
    benchmark: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def is_of(self, other: Record) -> bool:
        """Whether another record is of the same code, versions and kind of GPU: one goes on where the other stopped."""

        def kind(record: Record) -> tuple[Any, ...]:
            gpu = record.hardware.get("gpu") or {}
            return record.sources, record.versions, gpu.get("name"), gpu.get("capability")

        return kind(self) == kind(other)

    def having(self, state: str) -> dict[str, Outcome]:
        """The tests of a state."""
        return {name: outcome for name, outcome in self.tests.items() if outcome.state == state}

    @property
    def left(self) -> list[str]:
        """The tests that have neither passed nor failed nor been skipped."""
        done = {name for name, outcome in self.tests.items() if outcome.state != "unfinished"}
        return [name for name in self.collected if name not in done]

    @property
    def tools_left(self) -> list[str]:
        """The tools that have neither passed nor failed, and can run here."""
        return [tool for tool in TOOLS if tool not in self.sanitizer or self.sanitizer[tool].state == "unfinished"]

    @property
    def failures(self) -> list[str]:
        """One line for everything that failed."""
        lines = [f"the compiled part: {self.engine.message}"] if self.engine and self.engine.state == "failed" else []
        lines += [f"{name}: {one.message}" for name, one in self.having("failed").items()]
        lines += [
            f"compute-sanitizer {tool}: {one.message}" for tool, one in self.sanitizer.items() if one.state == "failed"
        ]
        lines += [f"benchmark, refused: {text}" for text in self.benchmark.get("refused", [])]
        if self.benchmark.get("state") == "failed":
            lines.append(f"benchmark: {self.benchmark.get('message', '')}")
        return lines

    @property
    def remaining(self) -> list[str]:
        """One line for every part that is not done."""
        lines = ["the compiled part"] if self.engine is None or self.engine.state == "unfinished" else []
        if not self.collected:
            lines.append("every test: none was collected")
        elif self.left:
            lines.append(f"{len(self.left)} of {len(self.collected)} tests")
        if self.tools_left:
            lines.append(f"compute-sanitizer {', '.join(self.tools_left)}")
        cells, of = self.benchmark.get("cells", 0), self.benchmark.get("of", 0)
        if not of or cells < of:
            lines.append(f"{of - cells} of {of} cells of the benchmark" if of else "the benchmark")
        return lines

    def absorb(self, lines: Iterable[str]) -> None:
        """Take in a log of `tests/gpu/schedule.py`. Of two ends of a test the first failed one counts."""
        ended: set[str] = set()
        for text in lines:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # cut off while it was written
            if line["event"] == "start":
                if line["id"] not in ended:
                    self.tests[line["id"]] = Outcome("unfinished", 0.0, "cut off while it ran")
            elif not (line["id"] in ended and self.tests[line["id"]].state == "failed"):
                ended.add(line["id"])
                self.tests[line["id"]] = Outcome(line["outcome"], line["seconds"], line["message"])

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        self.finished = now()
        write_whole(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")


def now() -> str:
    """The time, as it is recorded."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: it is none of this schema.
        OSError: it cannot be read.
    """
    try:
        plain = json.loads(path.read_text())
        if plain["schema"] != SCHEMA:
            raise ValueError(f"{path} has schema {plain['schema']}, not {SCHEMA}")
        for name in ("tests", "sanitizer"):
            plain[name] = {key: Outcome(**values) for key, values in plain[name].items()}
        plain["engine"] = Outcome(**plain["engine"]) if plain["engine"] else None
        return Record(**plain)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no record of a GPU: {error}") from error


def digest() -> str:
    """A digest of what decides a result: the package's and the kernels' sources, and the tier's."""
    found = hashlib.sha256()
    paths = [
        *(ROOT / "visattn_kernels").rglob("*.py"),
        *(path for path in (ROOT / "csrc").rglob("*") if path.is_file()),
        *(ROOT / "tests" / "gpu").glob("*.py"),
        *(ROOT / "tests" / f"{name}.py" for name in ("cases", "conftest", "tolerance")),
    ]
    for path in sorted(paths):
        found.update(str(path.relative_to(ROOT)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def begin() -> Record:
    """A new record of this code on this machine."""
    commit, dirty = machine.commit()
    hardware = machine.hardware()
    if hardware["gpu"]:
        hardware["gpu"] |= {"driver": machine.driver()}
    return Record(commit, dirty, digest(), hardware, machine.versions(), now())


def summary(path: Path = RECORD) -> str:
    """The record as Markdown, for a document."""
    return render(load(path)) if path.exists() else EMPTY


def render(record: Record) -> str:
    """A caption, a table, what failed and why, what was skipped and why, what is left."""
    parts = [caption(record), _table(record)]
    if record.failures:
        parts.append("Failed:\n\n" + "\n".join(f"- `{_plain(text)}`" for text in _first(record.failures, 20)))
    skipped = Counter(outcome.message for outcome in record.having("skipped").values())
    if skipped:
        parts.append("Skipped: " + "; ".join(f"{text} ({count})" for text, count in sorted(skipped.items())) + ".")
    parts.append(f"Left to run: {'; '.join(record.remaining)}." if record.remaining else "Nothing is left to run.")
    return "\n\n".join(parts)


def caption(record: Record) -> str:
    """On what, of which commit, when."""
    gpu = record.hardware.get("gpu") or {}
    commit = (record.commit or "no commit known")[:12] + (" with changes" if record.dirty else "")
    versions = record.versions
    return (
        f"{gpu.get('name')} (compute capability {gpu.get('capability')}, driver {gpu.get('driver')}); "
        f"torch {versions.get('torch')}, Triton {versions.get('triton')}; {commit}, sources {record.sources}; "
        f"{record.started[:10]}; {record.calls} calls, {record.seconds:.0f} s."
    )


def _table(record: Record) -> str:
    """One row for each file of tests, each tool, and the benchmark."""
    states = ("passed", "failed", "skipped")
    left = set(record.left)
    lines = ["| what | passed | failed | skipped | left |", "| --- | ---: | ---: | ---: | ---: |"]
    names = {*record.collected, *record.tests}
    for file in sorted({name.partition("::")[0] for name in names}):
        mine = [name for name in names if name.partition("::")[0] == file]
        counts = Counter(record.tests[name].state for name in mine if name in record.tests and name not in left)
        numbers = [*(counts[state] for state in states), sum(name in left for name in mine)]
        lines.append(f"| `{file}` | {' | '.join(map(str, numbers))} |")
    for tool in TOOLS:
        state = record.sanitizer[tool].state if tool in record.sanitizer else ""
        numbers = [*(int(state == one) for one in states), int(tool in record.tools_left)]
        lines.append(f"| compute-sanitizer {tool} | {' | '.join(map(str, numbers))} |")
    cells, of = record.benchmark.get("cells", 0), record.benchmark.get("of", 0)
    refused = len(record.benchmark.get("refused", []))
    lines.append(f"| benchmark, cells (failed: ours refused) | {cells - refused} | {refused} | 0 | {of - cells} |")
    return "\n".join(lines)


def _first(texts: list[str], count: int) -> list[str]:
    rest = len(texts) - count
    return texts if rest <= 0 else [*texts[:count], f"and {rest} more"]


def _plain(text: str) -> str:
    """A message inside backticks, on one line of a list."""
    return text.replace("`", "'").replace("\n", " ")


def gpu_seen() -> bool:
    """Whether torch sees an NVIDIA GPU."""
    return torch.cuda.is_available() and torch.version.hip is None
