"""The command line, `python -m benchmarks`: run, table, plot, compare, list, ceilings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import (
    ceilings,
    cells,
    compare,
    compiled,
    gpu,
    gpu_record,
    plot,
    products,
    providers,
    releases,
    table,
    workloads,
)
from benchmarks.cases import PASSES, Case, Pass
from benchmarks.machine import ROOT
from benchmarks.measure import Budget, summary
from benchmarks.results import FOLDER, Cell, load
from benchmarks.runner import Listener, Plan
from benchmarks.runner import run as run_plan
from visattn_kernels.backends.cells import sources

app = typer.Typer(
    help="Named workloads, providers side by side, verified and interleaved; results as JSON, tables made from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

Names = list[str]
"""An option that may be repeated, and each time be several names with commas between them."""


def _split(values: Names | None) -> list[str]:
    return [name for value in values or [] for name in value.split(",") if name]


def _fail(message: object) -> typer.Exit:
    """Say what is wrong; raise the result."""
    err.print(f"[bold red]error:[/] {message}", highlight=False)
    return typer.Exit(2)


def _pick(values: Names | None, table: Any, what: str) -> list[Any]:
    """The rows of a table by name, all of them where no name is given."""
    names, known = _split(values), {row.name: row for row in table}
    for name in names:
        if name not in known:
            raise _fail(f"there is no {what} {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else list(table)


def _passes(values: Names | None) -> list[Pass]:
    for name in _split(values):
        if name not in PASSES:
            raise _fail(f"there is no pass {name!r}; there are {', '.join(PASSES)}")
    return [which for which in PASSES if which in _split(values)] or list(PASSES)


def _dtypes(values: Names | None) -> list[str] | None:
    for name in _split(values):
        if name not in ("float32", "bfloat16", "float16", "float64"):
            raise _fail(f"there is no dtype {name!r}; there are float32, bfloat16, float16, float64")
    return _split(values) or None


def _device(device: str) -> str:
    if device not in ("cpu", "cuda"):
        raise _fail(f"--device must be cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise _fail("torch finds no CUDA device here")
    return device


Workloads = Annotated[Names | None, typer.Option("--workload", "-w", help="Names; all by default. See `list`.")]
Providers = Annotated[Names | None, typer.Option("--provider", "-p", help="Names; all by default. See `list`.")]
PassOption = Annotated[Names | None, typer.Option("--pass", help="forward, backward, both; all three by default.")]
Dtypes = Annotated[
    Names | None, typer.Option("--dtype", help="float32, bfloat16, ...; each workload's own by default.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads that torch may use; its default otherwise.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Seconds = Annotated[float, typer.Option(min=0, help="Time for each provider and cell.")]
Results = Annotated[list[Path] | None, typer.Option("--results", help="Results files.")]


@app.command()
def run(
    workload: Workloads = None,
    provider: Providers = None,
    which: PassOption = None,
    dtype: Dtypes = None,
    threads: Threads = None,
    seconds: Seconds = 2.0,
    repeats: Annotated[int | None, typer.Option(min=1, help="Exactly so many samples, whatever they take.")] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="Results file. A run of everything writes one anyway.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small workloads, few samples, no memory, no compiler.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each in a process of its own.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the cells that the results file already has.")] = False,
    device: Device = "cpu",
    stop_after: Annotated[float | None, typer.Option(help="Seconds after which no cell begins.")] = None,
) -> None:
    """Measure. Options may be repeated, or be given names with commas between them.

    A run of everything writes benchmarks/results/DEVICE.json; any other writes only where --out says.
    """
    device = _device(device)
    chosen = _pick(workload, workloads.WORKLOADS, "workload")
    asked = _pick(provider, providers.PROVIDERS, "provider")
    if quick:
        chosen = [one for one in chosen if one.quick or workload]
        asked = [one for one in asked if not one.slow_start or provider]
    budget = Budget(0.2, 3, 20) if quick else Budget(seconds)
    if repeats is not None:
        budget = Budget(0, repeats, repeats, patience=float("inf"))
    if to is None and not (workload or provider or which or dtype or quick):
        to = FOLDER / f"{device}.json"
    if resume and to is None:
        raise _fail("--resume needs --out, the results file to go on with")
    plan = Plan(
        chosen,
        asked,
        _passes(which),
        _dtypes(dtype),
        device,
        threads or torch.get_num_threads(),
        budget,
        memory and not quick,
        to,
        resume,
        stop_after,
    )
    _check_target(to)
    load = os.getloadavg()[0]
    if load > 0.5:
        # Not even ratios hold then: peers whose threads wait for each other suffer most.
        err.print(f"[yellow]the load average is {load:.1f}: other programs run too; measure again when it is quiet[/]")
    try:
        with _Screen() as screen:
            report = run_plan(plan, screen)
    except KeyboardInterrupt:
        err.print(f"interrupted; {f'what was measured is in {to}, --resume goes on' if to else 'nothing was written'}")
        raise typer.Exit(130) from None
    except (ValueError, FileNotFoundError) as error:
        raise _fail(error) from error
    if not report.cells:
        raise _fail(f"nothing to run: no chosen workload runs on {device} in these dtypes")
    if to:
        out.print(f"{len(report.cells)} cells in {to}{'' if report.complete else '; not all, --resume goes on'}")


def _check_target(to: Path | None) -> None:
    """Fail now rather than after an hour of measuring."""
    if to is None:
        return
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        probe = to.parent / f".{to.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _fail(f"cannot write {to}: {error.strerror}") from error


class _Screen(Listener):
    """Shows a run: a bar on the terminal, and a line for each cell."""

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self.all = self.progress.add_task("ceilings", total=None)
        self.now = self.progress.add_task("", total=None)

    def __enter__(self) -> _Screen:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def begin(self, cells: int) -> None:
        self.progress.update(self.all, total=cells)

    def cell(self, case: Case, which: Pass) -> None:
        self.progress.update(self.all, description=f"{case.workload.name} {case.dtype_name} {which}")

    def step(self, text: str, done: int, count: int) -> None:
        self.progress.update(self.now, description=text, completed=done, total=count)

    def done(self, cell: Cell) -> None:
        self.progress.advance(self.all)
        err.print(_cell_text(cell), highlight=False)


def _cell_text(cell: Cell) -> str:
    """One line on a cell: everyone's median, fastest first, and the ratio."""
    timed = sorted(
        (entry.times.median, f"{entry.name} {table.milliseconds(entry.times.median)}", entry.status)
        for entry in cell.entries
        if entry.times is not None
    )
    names = ", ".join(f"{text} (refused)" if status == "refused" else text for _, text, status in timed)
    ratio = cell.ratio(cell.ours) if cell.ours else None
    lead = "" if ratio is None else f"[bold]{table.figures(ratio)}x[/] "
    return f"{cell.workload} {cell.dtype} {cell.which}: {lead}ms: {names or 'nobody'}"


@app.command("gpu")
def gpu_command(
    engine: Annotated[float, typer.Option(min=0, help="Seconds to build the compiled part.")] = gpu.Budgets().engine,
    tests: Annotated[float, typer.Option(min=0, help="Seconds for the tests.")] = gpu.Budgets().tests,
    sanitizer: Annotated[float, typer.Option(min=0, help="Seconds for compute-sanitizer.")] = gpu.Budgets().sanitizer,
    benchmark: Annotated[float, typer.Option(min=0, help="Seconds for the benchmark.")] = gpu.Budgets().benchmark,
    workers: Annotated[int, typer.Option(min=1, help="Processes for the tests.")] = min(16, os.cpu_count() or 1),
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever has passed before.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Run nothing: print what would run, in order.")] = False,
) -> None:
    """On a machine with an NVIDIA GPU: the GPU tier of the tests, compute-sanitizer, the benchmark.

    0 seconds leave a part out. What has passed is not run again: call it until it says that nothing is left. The record
    is benchmarks/results/gpu.json. A copy of it and of the logs goes to the folder that the variable OUT names, if any.
    """
    if plan:
        _print_plan(gpu.Budgets(engine, tests, sanitizer, benchmark), workers)
        return
    if not gpu_record.gpu_seen():
        raise _fail("make gpu needs an NVIDIA GPU, and torch finds none here. Nothing was run, nothing was written.")
    print(gpu.about_the_machine(), flush=True)
    record = gpu.resumed(fresh=fresh)
    driver = gpu.Driver(
        record, gpu.Budgets(engine, tests, sanitizer, benchmark), workers, say=lambda text: print(text, flush=True)
    )
    passed = driver.everything()
    print(f"\n{gpu_record.render(record)}", flush=True)
    if not passed:
        raise typer.Exit(1)


def _print_plan(budgets: gpu.Budgets, workers: int) -> None:
    """What `gpu` would do."""
    names = gpu.collect()
    print(f"compiled part, at most {budgets.engine:.0f} s, unless it is built: {' '.join(gpu.ENGINE_COMMAND)}")
    print(f"\ntests, at most {budgets.tests:.0f} s, {workers} processes, in this order ({len(names)}):")
    print("\n".join(names))
    print(f"\ncompute-sanitizer, at most {budgets.sanitizer:.0f} s: {gpu.find_sanitizer() or 'not installed'}")
    print("\n".join(gpu_record.TOOLS))
    cells = [(case, which) for case, which in Plan(gpu.ordered(), device="cuda").cells()]
    print(f"\nbenchmark, at most {budgets.benchmark:.0f} s, in this order ({len(cells)}):")
    print("\n".join(f"{case.workload.name} {case.dtype_name} {which}" for case, which in cells))
    print(f"\nat most {budgets.total:.0f} s in all")


@app.command("table")
def table_command(
    results: Results = None,
    update: Annotated[list[Path] | None, typer.Option("--update", help="Documents whose blocks are replaced.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a block is out of date.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Print every provider and pass.")] = False,
) -> None:
    """Make the documents' tables from results files, or print them.

    A block between <!-- benchmarks:NAME --> and <!-- /benchmarks:NAME --> is made from results/NAME.json.
    """
    paths = results or sorted(FOLDER.glob("*.json"))
    try:
        if check or update:
            _documents(update or [ROOT / "README.md"], results or [], check)
            return
        if not paths:
            raise _fail(f"there are no results in {FOLDER}; make some with: python -m benchmarks run")
        for path in paths:
            report = load(path)
            print(f"{table.everything(report) if every else table.compact(report)}\n")
    except (ValueError, OSError) as error:
        raise _fail(error) from error


def _documents(documents: list[Path], results: list[Path], check: bool) -> None:
    """Update or check documents."""
    find = table.finder(results)
    differ = [document for document in documents if table.update(document, find, check)]
    for document in documents:
        state = "up to date" if document not in differ else "out of date" if check else "updated"
        out.print(f"{document}: {state}")
    if check and differ:
        raise _fail(f"update with: python -m benchmarks table --update {' --update '.join(str(one) for one in differ)}")


@app.command("plot")
def plot_command(
    results: Results = None,
    to: Annotated[Path | None, typer.Option("--out", help="Picture; docs/benchmarks-NAME.png by default.")] = None,
) -> None:
    """Draw the ratios of a results file as a bar chart."""
    paths = results or sorted(FOLDER.glob("*.json"))
    if to and len(paths) > 1:
        raise _fail("--out is one picture, so --results must be one file")
    if not paths:
        raise _fail(f"there are no results in {FOLDER}")
    try:
        for path in paths:
            report = load(path)
            target = to or ROOT / "docs" / f"benchmarks-{report.name}.png"
            plot.draw(report, target)
            out.print(f"{target}")
    except (ValueError, OSError) as error:
        raise _fail(error) from error


@app.command("compare")
def compare_command(
    base: Annotated[str, typer.Option(help="The revision to compare this working tree with.")],
    workload: Workloads = None,
    which: PassOption = None,
    dtype: Dtypes = None,
    threads: Threads = None,
    seconds: Seconds = 0.5,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 5,
    backend: Annotated[str, typer.Option(help="Which of our backends.")] = "cpu",
    device: Device = "cpu",
) -> None:
    """Compare this working tree, as it is built, with a revision, in alternating processes."""
    device = _device(device)
    _pick([f"visattn-{backend}"], providers.PROVIDERS, "provider")
    chosen = _pick(workload, workloads.WORKLOADS, "workload")
    if not workload:
        chosen = [one for one in chosen if one.quick]
    task = compare.Task(
        tuple(one.name for one in chosen),
        tuple(_passes(which)),
        tuple(_dtypes(dtype) or ()),
        backend,
        device,
        threads or torch.get_num_threads(),
        Budget(seconds, 3),
        rounds,
    )
    try:
        with err.status("") as status:
            before, now = compare.compare(base, task, lambda text: status.update(text))
    except RuntimeError as error:
        raise _fail(error) from error
    shown = _table("case", f"{base}, ms (p20–p80)", "this tree, ms (p20–p80)", "speed-up")
    for key, samples in now.items():
        sides = [summary(before[key]), summary(samples)]
        texts = [" – ".join(table.milliseconds(x) for x in (one.p20, one.p80)) for one in sides]
        medians = [table.milliseconds(one.median) for one in sides]
        cells = [f"{median} ({text})" for median, text in zip(medians, texts, strict=True)]
        shown.add_row(key, *cells, f"{table.figures(sides[0].median / sides[1].median)}x")
    out.print(shown)


@app.command("list")
def list_command(
    workload: Annotated[str | None, typer.Option("--workload", "-w", help="Who can run this one, and why not.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Print the workloads and the providers, and why any is absent."""
    if workload:
        (chosen,) = _pick([workload], workloads.WORKLOADS, "workload")
        what = ", ".join([repr(chosen.pattern), *chosen.term_names])
        out.print(f"{chosen.name}: {chosen.about}\n{what}", highlight=False)
        shown = _table("provider", "dtype", "pass", "")
        for dtype in chosen.dtypes(_device(device)):
            for which in PASSES:
                for provider in providers.PROVIDERS:
                    reasons = provider.reasons(Case(chosen, dtype, device), which)
                    shown.add_row(provider.name, dtype, which, escape("; ".join(reasons)) or "[green]yes[/]")
        out.print(shown)
        return
    shown = _table("workload", "queries", "keys", "heads", "D/Dv", "GPU", "CPU", "pattern and terms")
    for one in workloads.WORKLOADS:
        grids = [f"{grid.height}×{grid.width}" for grid in (one.queries, one.keys)]
        batches = [str(one.batch(where) or "–") for where in ("cuda", "cpu")]
        widths = f"{one.head_dim}/{one.value_dim}"
        what = ", ".join([type(one.pattern).__name__, *(term.name for term in one.terms)])
        shown.add_row(one.name, *grids, str(one.heads), widths, *batches, what)
    out.print(shown)
    shown = _table("provider", "on cpu", "on cuda", "")
    has_cuda = torch.cuda.is_available()
    for provider in providers.PROVIDERS:
        cuda = provider.unavailable("cuda") if has_cuda else ["no CUDA device"]
        states = [escape("; ".join(reasons)) or "[green]yes[/]" for reasons in (provider.unavailable("cpu"), cuda)]
        shown.add_row(provider.name, *states, provider.about)
    out.print(shown)


def _table(*columns: str) -> Table:
    """A table that stays readable at 80 columns: columns wrap but for the first, and none of it is cut off."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        shown.add_column(column, no_wrap=i == 0)
    return shown


@app.command("ceilings")
def ceilings_command(
    threads: Threads = None,
) -> None:
    """Measure this CPU's ceilings: multiply-adds, bfloat16 products, exponentials, copies."""
    count = threads or torch.get_num_threads()
    limits = ceilings.measure("cpu", count)
    shown = _table("ceiling", f"{count} threads", "a thread")
    for name, rate, unit in (
        ("float32 arithmetic", limits.flops["float32"], "GFLOP/s"),
        ("bfloat16 arithmetic", limits.flops["bfloat16"], "GFLOP/s"),
        ("exp", limits.exps, "Gexp/s"),
        ("copy, read and written", limits.bytes, "GB/s"),
    ):
        shown.add_row(name, f"{rate / 1e9:.1f} {unit}", f"{rate / count / 1e9:.1f} {unit}")
    out.print(shown)


@app.command("compiled")
def compiled_command(
    workload: Workloads = None,
    capability: Annotated[
        list[int] | None, typer.Option(help="Compute capabilities; 80, 90, 100, 120 otherwise.")
    ] = None,
    careful: Annotated[bool, typer.Option(help="Also the launches that compute anew what NaN reached.")] = True,
    reading: Annotated[
        bool, typer.Option("--reading", help="What attention_map and attention_received launch, instead.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option("--out", help="Where to; results/compiled.json if all were compiled.")
    ] = None,
) -> None:
    """Compile the Triton kernels of the workloads ahead of time, and tell what they take; no GPU is needed."""
    chosen = _pick(workload, workloads.WORKLOADS, "workload")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise _fail("TRITON_INTERPRET=1 is set, so that kernels are not compiled")
    if to is None and not workload and not capability and not reading and careful:
        to = compiled.FILE
    with err.status("") as status:
        try:
            found = list(compiled.rows(chosen, capability or compiled.CAPABILITIES, careful, reading, status.update))
        except ImportError as error:
            raise _fail(error) from error
    if to is not None:
        compiled.write(found, to)
    print(compiled.table(found))


@app.command("cells")
def cells_command(
    arch: Annotated[
        list[str] | None, typer.Option(help="Architectures such as 90a; 80, 90a, 100, 120 otherwise.")
    ] = None,
    file: Annotated[list[str] | None, typer.Option(help="Files such as float16_forward_8_8; all otherwise.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Where to; results/cells.json if all were compiled.")] = None,
) -> None:
    """Compile the CUDA kernels with nvcc, and tell what they take; no GPU is needed."""
    unknown = sorted(set(file or ()) - set(sources()))
    if unknown:
        rule = "--file to be a cell's, <dtype>_<pass>_<D>_<Dv> as in visattn_kernels/backends/cells.py"
        raise _fail(f"visattn: expected {rule}, but got --file={unknown[0]}")
    if to is None and not arch and not file:
        to = cells.FILE
    with err.status("") as status:
        try:
            found = cells.rows(arch or cells.ARCHS, file, status.update)
        except RuntimeError as error:
            raise _fail(error) from error
    if to is not None:
        cells.write(found, to)
    print(cells.table(found))
    broken = [f"{row['numbers']}_{row['pass']} {row['d']}/{row['dv']} {row['kind']} sm_{row['arch']}: {fault}"
              for row in found for fault in cells.faults(row)]  # fmt: skip
    if broken:
        raise _fail("\n".join(broken))


@app.command("products")
def products_command() -> None:
    """Measure the engine's inner product against torch's micro-kernel at tile sizes; writes results/products.json."""
    try:
        found = products.measure()
    except RuntimeError as error:
        raise _fail(error) from error
    shown = _table("rows × depth", *products.COLUMNS)
    for row in found["products"]:
        shown.add_row(f"{row['rows']}×{row['depth']}", *(f"{row[column]:.0f}" for column in products.COLUMNS))
    out.print(shown)


@app.command("releases")
def releases_command(
    release: Annotated[list[str] | None, typer.Option(help="Releases such as 2.11.0; all otherwise.")] = None,
    cuda: Annotated[bool, typer.Option(help="Build and link the CUDA part too.")] = False,
    tests: Annotated[bool, typer.Option(help="Run the operators' tests.")] = True,
) -> None:
    """Build against torch's releases, each in its own environment in build/torch; writes results/releases.json."""
    unknown = sorted(set(release or ()) - set(releases.RELEASES))
    if unknown:
        rule = f"--release to be of {', '.join(releases.RELEASES)}"
        raise _fail(f"visattn: expected {rule}, but got --release={unknown[0]}")
    failed = []
    for one in release or releases.RELEASES:
        try:
            row = releases.tried(one, cuda, tests, lambda text: err.print(text, highlight=False))
        except releases.UnreachableError as error:
            raise _fail(error) from error
        releases.write([row])
        for name, step in row.steps.items():
            print(f"torch {one}: {name}: {'' if step.passed else 'FAILS: '}{step.text}")
            failed += [] if step.passed else [f"{one} {name}"]
    if failed:
        raise _fail(f"fails: {', '.join(failed)}")
