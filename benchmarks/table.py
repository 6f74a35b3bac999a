"""Tables for the documents, made from results files: never typed.

A document holds `<!-- benchmarks:NAME -->` and `<!-- /benchmarks:NAME -->`; what stands between them is replaced by
the table of `benchmarks/results/NAME.json`. In place of `NAME`, `NAME:all` gives every provider and pass, and
`NAME:float32` (or another dtype) the rows of one dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import cells, gpu_record, products, releases
from benchmarks.results import FOLDER, Cell, Entry, Report, load, write_whole

_BLOCK = re.compile(r"(<!-- benchmarks:(?P<name>[\w.-]+(?::\w+)?) -->\n).*?(<!-- /benchmarks:(?P=name) -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- benchmarks:([\w.-]+(?::\w+)?) -->")

_DTYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
_PASSES = {"forward": "forward", "backward": "backward", "both": "fwd + bwd"}


def milliseconds(seconds: float) -> str:
    """Three figures, as a person reads them."""
    return figures(seconds * 1e3)


def figures(x: float) -> str:
    """A number with three figures, without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.3f}"


def megabytes(count: int | None) -> str:
    """Bytes as megabytes; a dash where they were not measured."""
    return "–" if count is None else figures(count / 1e6) if count >= 1e5 else "< 0.1"


def percent(x: float) -> str:
    """A share."""
    return f"{100 * x:.0f}%"


def _median(entry: Entry | None) -> str:
    return "–" if entry is None or entry.times is None else milliseconds(entry.times.median)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table; the first `left` columns are aligned to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _ours(cell: Cell) -> Entry | None:
    """Our fastest entry, a refused one if there is no other."""
    return cell.ours or next((entry for entry in cell.entries if entry.ours and entry.times), None)


def compact(report: Report, dtype: str = "") -> str:
    """One row for each workload, dtype (or that one) and pass, forward and training step: ours and the best peer."""
    notes: list[str] = []
    rows = []
    for cell in report.cells:
        if cell.which == "backward" or dtype not in ("", cell.dtype):
            continue
        ours, peer, naive = _ours(cell), cell.best_peer, cell.entry("naive")
        naive = None if naive is None or naive.status == "absent" else naive
        ratio = cell.ratio(ours) if ours and ours.status == "measured" else None
        marks = "".join(_note(notes, note) for note in _refusals(cell, ours))
        rows.append(
            [
                f"`{cell.workload}`",
                _DTYPES.get(cell.dtype, cell.dtype),
                _PASSES[cell.which],
                _median(ours),
                f"{_median(peer)} {peer.name}" if peer else "none",
                (f"**{figures(ratio)}×**" if ratio is not None else "–") + marks,
                _median(naive),
                f"{megabytes(ours.peak_bytes if ours else None)} / {megabytes(peer.peak_bytes if peer else None)}",
                f"{percent(cell.floor / ours.times.median)} {cell.binds}" if ours and ours.times else "–",
            ]
        )
    header = [
        "workload", "dtype", "pass", "ours, ms", "best peer, ms", "ratio", "naive, ms", "MB, ours / peer",
        "of the floor",
    ]  # fmt: skip
    parts = [caption(report), _rows(header, rows, 3)]
    return "\n\n".join([*parts, "<br>".join(notes)] if notes else parts)


def _refusals(cell: Cell, ours: Entry | None) -> list[str]:
    """What a reader must know of a cell whose best time is refused, ours or a peer's."""
    notes = []
    best = cell.best_peer.times if cell.best_peer else None
    for entry in cell.entries:
        if entry.status != "refused" or entry.times is None:
            continue
        if not entry.ours and best is not None and entry.times.median >= best.median:
            continue
        times = f"{milliseconds(entry.times.median)} ms"
        if not entry.ours and ours and ours.times:
            times += f", {figures(entry.times.median / ours.times.median)} times ours"
        notes.append(f"{entry.name} is refused by the tolerance policy ({entry.reason}); it took {times}.")
    return notes


def _note(notes: list[str], text: str) -> str:
    """Add a footnote; its mark."""
    notes.append(f"<sup>{len(notes) + 1}</sup> {text}")
    return f" <sup>{len(notes)}</sup>"


def everything(report: Report) -> str:
    """Every provider of every cell, the absent ones with their reasons."""
    rows = []
    never = _absent_throughout(report)
    for cell in report.cells:
        head = [f"`{cell.workload}`", _DTYPES.get(cell.dtype, cell.dtype), _PASSES[cell.which]]
        for entry in cell.entries:
            if entry.name in never:
                continue
            times, reason = entry.times, entry.reason.replace("|", "\\|")
            if times is None:
                rows.append([*head, entry.name, *["–"] * 7, f"{entry.status}: {reason}"])
                continue
            ratio = cell.ratio(entry) if entry.status == "measured" else None
            rows.append(
                [
                    *head,
                    entry.name,
                    milliseconds(times.median),
                    f"{milliseconds(times.p20)} – {milliseconds(times.p80)}",
                    figures(cell.flops / times.median / 1e9),
                    figures(cell.bytes / times.median / 1e9),
                    megabytes(entry.peak_bytes),
                    f"{figures(ratio)}×" if ratio is not None else "–",
                    f"{percent(cell.floor / times.median)} {cell.binds}",
                    f"refused: {reason}" if entry.status == "refused" else "",
                ]
            )
    header = [
        "workload", "dtype", "pass", "provider", "median, ms", "p20 – p80, ms", "GFLOP/s", "GB/s", "peak, MB",
        "ratio", "of the floor", "",
    ]  # fmt: skip
    parts = [caption(report), _rows(header, rows, 4)]
    if never:
        parts.append(f"Absent throughout: {'; '.join(f'{name} ({reason})' for name, reason in never.items())}.")
    return "\n\n".join(parts)


def _absent_throughout(report: Report) -> dict[str, str]:
    """Providers that are absent from every cell for one and the same reason, and the reason."""
    reasons: dict[str, set[str]] = {}
    for cell in report.cells:
        for entry in cell.entries:
            reasons.setdefault(entry.name, set()).add(entry.reason if entry.status == "absent" else "")
    return {name: min(found) for name, found in reasons.items() if len(found) == 1 and "" not in found}


def caption(report: Report) -> str:
    """On what the numbers were measured, and what they mean."""
    hardware, gpu = report.hardware, report.hardware.get("gpu")
    flags = ", ".join(
        flag for flag in hardware.get("flags", []) if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    )
    where = (
        f"{gpu['name']}"
        if report.device == "cuda" and gpu
        else f"{hardware.get('cpu')} ({flags}), {report.threads} threads"
    )
    commit = (report.commit or "before the first commit")[:12] + (" with changes" if report.dirty else "")
    state = "" if report.complete else " **This run is incomplete.**"
    return (
        f"{where}; torch {report.versions.get('torch')}; {commit}; {report.started[:10]}. Medians. "
        "Ratio: the best peer's time over ours. Memory: peak above the inputs. Floor: the time that arithmetic, "
        f"memory or exp alone would take.{state}"
    )


def render(name: str, find: Callable[[str], Report]) -> str:
    """The body of a block.

    Args:
        name: of the block, such as "cpu", "cpu:all" or "cpu:float32".
        find: gives the report of a name.
    """
    if name == products.RESULTS.stem:
        return products.table()
    if name == cells.FILE.stem:
        return cells.summary()
    if name == releases.FILE.stem:
        return releases.summary()
    if name == gpu_record.RECORD.stem:
        return gpu_record.summary()
    stem, _, kind = name.partition(":")
    if kind not in ("", "all", *_DTYPES):
        raise ValueError(f"<!-- benchmarks:{name} --> must end in :all or a dtype ({', '.join(_DTYPES)}), if anything")
    return everything(find(stem)) if kind == "all" else compact(find(stem), kind)


def finder(paths: Sequence[Path]) -> Callable[[str], Report]:
    """Find reports by name among the given files, else in `benchmarks/results`."""
    given = {path.stem: path for path in paths}

    def find(name: str) -> Report:
        path = given.get(name, FOLDER / f"{name}.json")
        if not path.exists():
            raise ValueError(f"there are no results {path}; make them with: python -m benchmarks run --out {path}")
        return load(path)

    return find


def updated(text: str, find: Callable[[str], Report]) -> str:
    """A document with its blocks made anew.

    Raises:
        ValueError: the document has no block, or one that is not closed, or of which there are no results.
    """
    names, blocks = _MARKER.findall(text), [match["name"] for match in _BLOCK.finditer(text)]
    if not names:
        raise ValueError("there is no <!-- benchmarks:NAME --> in it")
    unclosed = [name for name in names if name not in blocks]
    if unclosed:
        raise ValueError(f"<!-- benchmarks:{unclosed[0]} --> is not closed by <!-- /benchmarks:{unclosed[0]} -->")
    return _BLOCK.sub(lambda match: f"{match[1]}{render(match['name'], find)}\n{match[3]}", text)


def update(path: Path, find: Callable[[str], Report], check: bool = False) -> bool:
    """Make a document's blocks anew; whether they differ from what it has. With `check`, nothing is written."""
    text = path.read_text()
    try:
        new = updated(text, find)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if new != text and not check:
        write_whole(path, new)
    return new != text
