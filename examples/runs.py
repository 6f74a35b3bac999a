"""What the examples share: folders of runs that can be interrupted, progress, pictures, and two models side by side."""

from __future__ import annotations

import io
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from benchmarks.machine import hardware
from benchmarks.peak import peak_of
from visattn_cli import printable
from visattn_kernels.backends import cpu
from visattn_kernels.errors import expected
from visattn_kernels.viz.app import UsageError
from visattn_kernels.viz.exits import InputError
from visattn_kernels.viz.output import Target, check_place

Step = Callable[[], object]


class Run:
    """A folder with the checkpoint of a training run, which goes on from there when it is started again.

    Args:
        folder: made if it is not there.
        example: name of the example.
        settings: what the run must have been begun with to go on.
        fresh: begin anew, whatever is there.

    Raises:
        ValueError: the folder cannot be made, or has a run of other settings or of another example, or a file in the
            checkpoint's place that is none.
    """

    def __init__(self, folder: Path, example: str, settings: Mapping[str, Any], fresh: bool) -> None:
        self.folder = folder_of(folder)
        self.settings = {"example": example, **settings}
        self.file = folder / "checkpoint.pt"
        self.state: dict[str, Any] | None = None
        if self.file.exists() and not fresh:
            kept = self._kept()
            for name, value in self.settings.items():
                if kept["settings"].get(name) != value:
                    rule = f"{name}={kept['settings'].get(name)}, with which the run in {folder} was begun"
                    what = name if name == "example" else f"--{name}"
                    raise expected(rule, what, value, ValueError, "--fresh begins anew, --output elsewhere.")
            self.state = kept["state"]
        check_place(self.file)

    def _kept(self) -> dict[str, Any]:
        """What the checkpoint holds."""
        rule, hint = "a checkpoint that an example wrote", "--fresh begins anew, --output elsewhere."
        try:
            kept = torch.load(self.file, weights_only=True)
        except OSError as error:
            raise expected("a file to read", "the checkpoint", self.file, ValueError, f"{error.strerror}.") from error
        except Exception as error:  # torch.load raises whatever the bytes lead it to
            raise expected(rule, "the file", self.file, ValueError, hint) from error
        if not isinstance(kept, dict) or set(kept) != {"settings", "state"} or "random" not in kept["state"]:
            raise expected(rule, "the file", self.file, ValueError, hint)
        return kept

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the checkpoint, whole or not at all; random numbers go on where they were."""
        content = io.BytesIO()
        torch.save({"settings": self.settings, "state": {**state, "random": torch.get_rng_state()}}, content)
        Target(self.file).write(content.getvalue())

    def picture(self, name: str, image: Image.Image) -> Path:
        """Write a picture as PNG, whole or not at all."""
        content = io.BytesIO()
        image.save(content, format="png", optimize=True)
        path = self.folder / f"{name}.png"
        Target(path).write(content.getvalue())
        return path


def folder_of(path: Path, *names: str) -> Path:
    """Make a folder if it is not there; refuse one where files of these names could not be written afterwards."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a letter that no name may have
        reason = getattr(error, "strerror", None) or str(error)
        raise expected("a folder, or a place for one", "--output", path, ValueError, f"{reason}.") from error
    for name in names:
        check_place(path / name)
    return path


def not_below(done: int, asked: int, option: str) -> None:
    """Refuse an option that asks for less than the run has done already."""
    if asked < done:
        rule = f"{option} of {done} or more, as many as the run has done"
        raise expected(rule, option, asked, ValueError, "--fresh begins anew, --output elsewhere.")


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar on stderr; the function given counts one on and takes numbers to show, such as losses."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done)

        def one(**numbers: float) -> None:
            told = " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            bar.update(task, advance=1, description=f"{what} {told}".strip())

        yield one


SEEDS = 2**31 - 1
"""The largest seed."""


def seed(number: int) -> None:
    """The same run for the same number."""
    torch.manual_seed(number)
    np.random.seed(number)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Scikit-learn's 1797 handwritten digits (Tensor[N, 1, 8, 8], from 0 to 1), and which they are (Tensor[N])."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target)


TRAINING = 1437
"""How many of the digits train; the others, of other hands, are for validation."""


def pixels(images: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Images (Tensor[N, 1 or 3, H, W]) from [low, high] to bytes (Tensor[N, H, W, 3])."""
    scaled = ((images.detach().float() - low) / (high - low)).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def heat(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Rows of a map (Tensor[N, h, w]) as bytes (Tensor[N, H, W, 3]), dark to bright, each up to its own maximum."""
    from matplotlib import colormaps

    maps = maps.detach().float()
    scaled = maps / maps.flatten(1).amax(1).clamp_min(1e-30)[:, None, None]
    big = torch.nn.functional.interpolate(scaled[:, None], size, mode="nearest")[:, 0]
    return torch.from_numpy(colormaps["inferno"](big.numpy())[..., :3] * 255).round().to(torch.uint8)


def overlay(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Pictures (Tensor[N, H, W, 3], bytes), dimmed, under rows of a map (Tensor[N, h, w]) as heat."""
    return (0.4 * images + 0.6 * heat(maps, (images.shape[1], images.shape[2]))).round().to(torch.uint8)


def sheet(rows: Sequence[torch.Tensor], scale: int = 1, gap: int = 2) -> Image.Image:
    """Rows of pictures (each Tensor[N, H, W, 3], bytes), white between them."""
    lines = []
    for row in rows:
        framed = [np.pad(x.numpy(), ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for x in row]
        lines.append(np.concatenate(framed, axis=1))
    width = max(line.shape[1] for line in lines)
    filled = [np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in lines]
    image = Image.fromarray(np.concatenate(filled, axis=0))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Cost:
    """Median seconds of a step, and bytes above what was there before, at its peak."""

    seconds: float
    peak: int


def compare(steps: Mapping[str, tuple[Callable[..., Step], tuple[Any, ...]]], repeats: int) -> dict[str, Cost]:
    """Time steps turn by turn, after one of each to warm up; the peak of each in a process of its own.

    Args:
        steps: by name, a function of a module that makes the step, and its arguments, which are pickled.
        repeats: steps of each that are timed.
    """
    for reason in cpu.unavailable():
        raise expected("the compiled engine, which is compared", "backend", "reference", ValueError, reason)
    made = {name: make(*args) for name, (make, args) in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    with progress("comparing", (repeats + 1) * len(made) + len(made)) as one:
        for turn in range(repeats + 1):
            for name, step in made.items():
                begun = time.perf_counter()
                step()
                if turn:
                    seconds[name].append(time.perf_counter() - begun)
                one()
        peaks = {}
        for name, (make, args) in steps.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                peaks[name] = pool.submit(_peak, make, args, torch.get_num_threads()).result()
            one()
    return {name: Cost(statistics.median(seconds[name]), peaks[name]) for name in made}


def _peak(make: Callable[..., Step], args: tuple[Any, ...], threads: int) -> int:
    """Runs in the child. The first step makes what later ones find: threads, gradients, an optimizer's state."""
    torch.set_num_threads(threads)
    step = make(*args)
    step()
    return peak_of(step)


def report(
    folder: Path, title: str, steps: Mapping[str, tuple[Callable[..., Step], tuple[Any, ...]]], repeats: int
) -> None:
    """Compare steps, print the table, and write it to `compare.md` in the folder; the first is what ratios are of."""
    folder_of(folder, "compare.md")
    costs = compare(steps, repeats)
    first = next(iter(costs.values()))
    rows = [
        (
            name,
            f"{cost.seconds * 1e3:.0f}",
            f"{first.seconds / cost.seconds:.2f}×",
            f"{cost.peak / 2**20:.0f}",
            f"{first.peak / max(cost.peak, 1):.1f}×",
        )
        for name, cost in costs.items()
    ]
    write_table(folder / "compare.md", measured(title, repeats), HEAD, rows)


def measured(title: str, repeats: int) -> str:
    """The title of a table, with how and on what its times were taken."""
    cpu = hardware()["cpu"]
    return f"{title}; median of {repeats}; {cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


HEAD = ("attention", "ms", "quicker", "peak MB", "smaller")


def write_table(path: Path, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, and write it as Markdown, whole or not at all."""
    shown = Table(title=Text(printable(title)))  # a processor's name is no markup
    for name in head:
        shown.add_column(name, justify="left" if name == head[0] else "right")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    text = f"{title}.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    Target(path).write(text.encode())


def say_written(path: Path) -> None:
    """Say where a file was written."""
    typer.echo(printable(str(path)))


def command(main: Callable[..., None]) -> None:
    """Run a function as a command; what it refuses is one line and exit code 2, an interruption one line and 130."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        status = app(standalone_mode=False)
    except UsageError as error:
        message, status = f"{error.format_message()} See --help.", error.exit_code
    except (ValueError, InputError) as error:
        if not str(error).startswith("visattn: "):
            raise
        message, status = str(error), InputError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        message, status = (
            "interrupted; a run goes on from its last checkpoint, if it has one and there is no --fresh",
            130,
        )
    else:
        sys.exit(status)
    typer.echo(printable(message), err=True)
    sys.exit(status)
