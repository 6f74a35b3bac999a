"""The commands that draw: what they take, what they print, and how they end."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from visattn_cli import INTERRUPTED, INTERRUPTION, careful, printable, settle
from visattn_kernels import backends
from visattn_kernels.errors import expected
from visattn_kernels.viz import compute
from visattn_kernels.viz.exits import InputError, MissingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from visattn_kernels.viz.images import Picture
    from visattn_kernels.viz.output import Target

# typer has a click of its own, or takes the installed one, by its version; this class it has of either.
UsageError: type[typer.BadParameter] = typer.BadParameter.__base__  # type: ignore[assignment]
"""What typer raises of options that it does not take."""

MAX_POINTS = 64
"""The most points of one `visattn map`: what a sheet holds."""

SPREAD = 4.0
"""The standard size of the logits of `visattn map`. At 1 a heat map is nearly flat, at 10 a few pixels take all."""


class OneLineErrors(TyperGroup):
    """The group of commands; whatever ends one early is one line on stderr and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, turning typer's own complaints (an unknown option, say) into one line too."""
        try:
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except UsageError as error:
            where = error.ctx.command_path if error.ctx else "visattn"
            typer.echo(f"visattn: {printable(error.format_message())} See {where} --help", err=True)
            status = error.exit_code
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` names."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(printable(str(error)), err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            typer.echo(INTERRUPTION, err=True)
            raise typer.Exit(INTERRUPTED) from interrupt


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ImageArgument = Annotated[
    Path | None,
    # readable=False: typer would check it, in words of its own.
    typer.Argument(
        metavar="[IMAGE]",
        readable=False,
        help="A picture; without one, a photograph that ships with scikit-learn.",
    ),
]
OutputOption = Annotated[
    # Not a Path, which makes "." of nothing.
    str, typer.Option("--output", "-o", metavar="FILE", help="A .png or .pdf file.")
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="WxH",
        help="Resize the picture to this width and height. By default a sample is halved, and a picture of yours "
        "is shrunk to 100,000 pixels if it has more: the time grows with the square of their number.",
    ),
]
SampleOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Which photograph, without IMAGE: china (the default) or flower.")
]
BackendOption = Annotated[
    str, typer.Option(metavar="NAME", help=f"What computes it, one of {', '.join(backends.NAMES)}.")
]


@app.callback()
def visattn() -> None:
    """The commands that draw."""


@app.command()
def attend(
    image: ImageArgument = None,
    output: OutputOption = "attend.png",
    power: Annotated[
        str, typer.Option(metavar="P", help="Exponent of the fourth figure, attentionᵖ × picture; more than 0.")
    ] = "5",
    size: SizeOption = None,
    sample: SampleOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Weightless self-attention of a picture: q = k = v = its colours in [0, 1], no scale.

    IMAGE is a picture in any common format; without it, a photograph that ships with scikit-learn is taken. Draws
    the picture, its attention, attention × picture and attentionᵖ × picture, each whole and by its red, green and
    blue channels: one sheet as a PNG, four pages as a PDF.
    """
    exponent = _positive(power, "--power")
    target, picture = _prepare(image, output, size, sample)
    figures = _drawing("figures")
    taken, manner = _taken_backend(picture, backend)
    with _progress(picture.positions) as advance, compute.Meter() as meter:
        attended = compute.self_attention(picture.colours, backend=taken, advance=advance)
    _print_costs(picture, manner, meter)
    naive = _bytes(compute.naive_bytes(picture.positions))
    _print(f"{naive}: {compute.NAIVE_COPIES} maps of N×N float32, the logits and their softmax", label="naive code")
    caption = f"{_source(picture)}, N = {picture.positions:,}: q = k = v = its colours, no scale"
    with _drawing_status():
        parts = figures.quartets(picture.colours, attended, exponent)
        pages = figures.attend_pages(parts, caption) if target.is_pdf else [figures.attend_sheet(parts, caption)]
        _write(target, pages, f"Self-attention of {picture.name}")
    _print(str(target.path), label="wrote")


@app.command("map")
def attention_map(
    image: ImageArgument = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="Y,X",
            help="A point, row first, counted from 0 at the top left of the picture as resized. May be repeated.",
        ),
    ] = None,
    output: OutputOption = "map.png",
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help=f"Factor of q·k; more than 0. Raw colours without a scale give a nearly flat row. By default "
            f"{SPREAD:g} divided by the mean square of the centred colours, so that logits are about {SPREAD:g} in "
            "size whatever the picture; a larger scale looks at fewer pixels.",
        ),
    ] = None,
    size: SizeOption = None,
    sample: SampleOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Where a pixel looks: exact rows of the attention map, q = k = the colours minus their mean.

    IMAGE is a picture in any common format; without it, a photograph that ships with scikit-learn is taken. Draws,
    for each point, the picture with the point marked and its row as a heat map: one sheet as a PNG, a page a point
    as a PDF. A weight of 1 on the heat map's scale is that of uniform attention.
    """
    factor = None if scale is None else _positive(scale, "--scale")
    points = _points(at or [])
    target, picture = _prepare(image, output, size, sample)
    _check_inside(points, picture)
    figures = _drawing("figures")
    taken, manner = _taken_backend(picture, backend)
    factor = factor or compute.natural_scale(picture.colours, SPREAD)
    with compute.Meter() as meter:
        rows = compute.colour_rows(picture.colours, points, scale=factor, backend=taken)
    _print_costs(picture, manner, meter)
    _print(f"{factor:.4g}", label="scale")
    for (y, x), row in zip(points, rows, strict=True):
        weights = row.flatten().sort(descending=True).values
        half = int((weights.double().cumsum(0) < 0.5).sum()) + 1
        _print(
            f"half of the weight on {half:,} of {picture.positions:,} positions, "
            f"at most {float(weights[0]) * picture.positions:.3g} times the uniform weight",
            label=f"at {y},{x}",
        )
    caption = f"{_source(picture)}: softmax of scale · (colour − mean)·(colour − mean), scale {factor:.3g}"
    with _drawing_status():
        maps = [figures.HeatMap(point, row) for point, row in zip(points, rows, strict=True)]
        if target.is_pdf:
            pages = figures.map_pages(picture.colours, maps, caption)
        else:
            pages = [figures.map_sheet(picture.colours, maps, caption)]
        _write(target, pages, f"Attention in {picture.name}")
    _print(str(target.path), label="wrote")


@app.command()
def patterns(output: OutputOption = "patterns.png") -> None:
    """Which keys a query sees: a small map for each pattern, drawn from the library's own masks."""
    target: Target = _drawing("output").check_target(output, None)
    gallery = _drawing("gallery")
    with _drawing_status():
        _write(target, [gallery.sheet()], "Patterns")
    _print(str(target.path), label="wrote")


def _prepare(image: Path | None, output: str, size: str | None, sample: str | None) -> tuple[Target, Picture]:
    """Check the output and read the picture, all that can fail for want of a file."""
    wanted = None if size is None else _size(size)
    if image is not None and sample is not None:
        raise expected("either IMAGE or --sample", "IMAGE", f"{image} and --sample={sample}", InputError)
    images, files = _drawing("images"), _drawing("output")
    target: Target = files.check_target(output, image)
    picture: Picture = (
        images.load_sample(sample or images.SAMPLES[0], wanted) if image is None else images.load_file(image, wanted)
    )
    return target, picture


def _drawing(module: str) -> ModuleType:
    """A module of this package that is imported when it is needed, since it takes its time, and may lack a library."""
    try:
        return import_module(f"visattn_kernels.viz.{module}")
    except ModuleNotFoundError as error:
        raise MissingError(error.name or module, "drawing") from error


def _taken_backend(picture: Picture, backend: str) -> tuple[str, str]:
    """The backend that will run, and how for a person; says so where it is a slow one."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            taken = compute.taken_backend(picture.positions, backend)
            instructions = f"{backends.cpu.isa()}, " if taken == "cpu" else ""
        except (ValueError, RuntimeError) as error:
            raise InputError(str(error).replace("got backend=", "got --backend=")) from error
    for note in notes:
        typer.echo(str(note.message), err=True)
    return taken, f"{taken}, {instructions}{torch.get_num_threads()} threads"


def _positive(text: str, argument: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise expected(f"{argument} to be a number above 0", argument, text, InputError)
    return value


def _size(text: str) -> tuple[int, int]:
    """Width and height of `WxH`."""
    from visattn_kernels.viz.images import MAX_POSITIONS

    match = re.fullmatch(r"([0-9]{1,9})[x×X]([0-9]{1,9})", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if width < 1 or height < 1:
        raise expected("--size to be WxH, two integers above 0 such as 320x213", "--size", text, InputError)
    if width * height > MAX_POSITIONS:
        raise expected(f"--size of at most {MAX_POSITIONS:,} pixels", "--size", text, InputError)
    return width, height


def _points(texts: Sequence[str]) -> list[tuple[int, int]]:
    """The points of every `--at Y,X`."""
    if not texts or len(texts) > MAX_POINTS:
        rule = f"from 1 to {MAX_POINTS} points, each as --at Y,X"
        raise expected(rule, "--at", f"{len(texts)} points" if texts else "nothing", InputError)
    points = []
    for text in texts:
        match = re.fullmatch(r"\s*(-?[0-9]{1,9})\s*,\s*(-?[0-9]{1,9})\s*", text)
        if not match:
            raise expected("--at to be Y,X, two integers such as 106,160", "--at", text, InputError)
        points.append((int(match[1]), int(match[2])))
    return points


def _check_inside(points: Sequence[tuple[int, int]], picture: Picture) -> None:
    """Refuse a point outside the picture."""
    width, height = picture.size
    for y, x in points:
        if not (0 <= y < height and 0 <= x < width):
            rule = f"--at Y,X with 0 <= Y < {height} and 0 <= X < {width} in this picture of {width}×{height}"
            raise expected(rule, "--at", f"{y},{x}", InputError)


@contextmanager
def _progress(positions: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal, nothing elsewhere; gives the function that advances it."""
    if not sys.stdout.isatty():
        yield None
        return
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with careful(), Progress(*columns, console=Console(), transient=True) as progress:
        task = progress.add_task("attention", total=positions)
        yield lambda done: progress.advance(task, done)


@contextmanager
def _drawing_status() -> Iterator[None]:
    """A sign of life on a terminal while the figures are drawn."""
    if not sys.stdout.isatty():
        yield
        return
    with careful(), Console().status("drawing"):
        yield


def _write(target: Target, pages: Sequence[Figure], title: str) -> None:
    """Draw the figures into the file."""
    from visattn_kernels.viz.output import pdf_bytes, png_bytes

    content = pdf_bytes(pages, title) if target.is_pdf else png_bytes(pages[0])
    settle()
    target.write(content)


def _print_costs(picture: Picture, manner: str, meter: compute.Meter) -> None:
    """What was computed, and what it took."""
    _print(_source(picture), label="picture")
    _print(f"{picture.positions:,} positions", label="N = H·W")
    _print(manner, label="backend")
    _print(f"{meter.seconds:.3g} s", label="time")
    peak = "unknown" if meter.peak_bytes is None else _bytes(meter.peak_bytes)
    _print(f"{peak}: {meter.method}", label="memory")


def _source(picture: Picture) -> str:
    """The picture's name and size."""
    width, height = picture.size
    stored = "" if picture.stored == picture.size else f" (resized from {picture.stored[0]}×{picture.stored[1]})"
    return f"{picture.name}, {width}×{height}{stored}"


def _bytes(count: int) -> str:
    """A size for a person, in decimal units."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.1f} MB"


def _print(text: str, *, label: str) -> None:
    """One line, its label in bold where colours show."""
    line = Text.assemble((label.ljust(11), "bold"), printable(text))
    Console(soft_wrap=True, highlight=False).print(line)
