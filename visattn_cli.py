"""The command `visattn`: its entry point, and what of it needs no more than the library itself.

It stands beside the package, since whatever is imported from inside that comes after torch, which takes seconds: the
version and the help need none of it, and a Ctrl-C in these seconds is to end like any other.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import runpy
import signal
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

ABOUT = "Attention over every pixel of a picture, with no stored map."

PICTURES = {
    "attend": "the self-attention of a picture",
    "map": "where one position of a picture looks",
    "patterns": "which keys a query sees in each pattern",
}
"""The commands of visattn_kernels.viz.app, which need the extra below."""

EXTRA = "pip install 'visattn_kernels[viz]'"
"""What installs everything that the command needs beyond the library."""

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""

INTERRUPTION = "visattn: interrupted, nothing was written"
"""What is said then."""

_interrupted = False
_careful = 0


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 something is missing or full, 2 bad input, 130 interrupted."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)  # not where it is ignored, as under nohup
    # A terminal that lacks × or ᵖ shows a question mark rather than a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            status = run(sys.argv[1:])
        except SystemExit as end:  # of argparse: the help, the version, or a refusal
            status = int(end.code or 0)
        sys.stdout.flush()
        _ignore()
    except OSError as error:  # the output of this process is full or gone
        print(f"visattn: {printable(str(error))}", file=sys.stderr)
        # Python writes what is left of it when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        _ignore()
        print(INTERRUPTION, file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run the command line, and return its exit code or raise SystemExit with it."""
    # torch warns where there is no numpy, of which we have words of our own.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    if arguments and arguments[0] in PICTURES:
        return _draw(arguments)
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.command != "info":
        parser.print_help()
        return 0
    # Here, since it imports torch.
    from visattn_kernels.viz import machine

    facts = machine.facts()
    print(json.dumps(facts, indent=2) if asked.json else machine.describe(facts))
    return 0


def _draw(arguments: Sequence[str]) -> int:
    """Run a command that draws, where what it needs is installed."""
    try:
        from visattn_kernels.viz.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "click", "rich"):
            raise
        print(f"visattn: {arguments[0]} needs {error.name}, which is not installed. Use {EXTRA}", file=sys.stderr)
        return 1
    return int(app(list(arguments), prog_name="visattn", standalone_mode=False) or 0)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        self.exit(2, f"visattn: {printable(message)}. See {self.prog} --help\n")


def _parser() -> _Parser:
    """The command line without what draws, of which it knows the names."""
    epilog = f"Those that draw need more than the library: {EXTRA}. visattn COMMAND --help tells what each takes."
    parser = _Parser("visattn", description=ABOUT, epilog=epilog, allow_abbrev=False)
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    about = "versions, instruction sets, backends, and the reason for each that is not available"
    info = commands.add_parser("info", help=about, description=f"{about.capitalize()}.", allow_abbrev=False)
    info.add_argument("--json", action="store_true", help="the same as JSON")
    for name, about in PICTURES.items():
        commands.add_parser(name, help=about)
    return parser


class _Version(argparse.Action):
    """Print the version and leave."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and leave")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Read it from its file: the package would import torch first."""
        package = find_spec("visattn_kernels")
        assert package is not None
        assert package.submodule_search_locations is not None
        (folder,) = package.submodule_search_locations
        print(runpy.run_path(str(Path(folder) / "version.py"))["__version__"])
        parser.exit()


def printable(text: str) -> str:
    """Text of others, such as a file's name, as one line of letters: what is none is escaped, as Python escapes it.

    Bytes that the locale did not know are letters where they are UTF-8. Joiners stay, which scripts are written with.
    """
    known = re.sub("[\udc80-\udcff]+", _decoded, text)
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in "\u200c\u200d"
        else letter
        for letter in known
    )


def _decoded(bytes_: re.Match[str]) -> str:
    return bytes_[0].encode("ascii", "surrogateescape").decode("utf-8", "backslashreplace")


def _interrupt(*_: Any) -> None:
    """End at once on Ctrl-C, or where a careful block must be left first, raise KeyboardInterrupt.

    An exception that comes out of nowhere does not reach us from everywhere: raised while a library of C++ starts, it
    was lost, printed as a traceback, or brought the process down.
    """
    global _interrupted
    _interrupted = True
    if _careful:
        raise KeyboardInterrupt
    os.write(2, f"{INTERRUPTION}\n".encode())
    os._exit(INTERRUPTED)


@contextmanager
def careful() -> Iterator[None]:
    """A block with something to undo, such as a hidden cursor or a file of its own: Ctrl-C raises KeyboardInterrupt."""
    global _careful
    _careful += 1
    try:
        yield
    except Exception as error:
        if _interrupted:  # and this is what has become of it
            raise KeyboardInterrupt from error
        raise
    finally:
        _careful -= 1
    if _interrupted:  # and what was raised has been lost
        raise KeyboardInterrupt


def settle() -> None:
    """End here if an interrupt was lost, and take none from here on: what is said to be done is then what was done."""
    _ignore()
    if _interrupted:
        raise KeyboardInterrupt


def _ignore() -> None:
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
