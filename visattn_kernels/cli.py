"""The command `visattn`: its entry point, and the line it prints where its libraries are missing."""

from __future__ import annotations

import io
import sys
from typing import NoReturn

EXTRA = "pip install 'visattn_kernels[viz]'"
"""What installs everything that the command needs beyond the library."""


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 something is not installed, 2 bad input, 130 interrupted.

    The application is imported here, so that the line below can be printed by a library installed alone.
    """
    try:
        from visattn_kernels.viz.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "click", "rich"):
            raise
        sys.exit(f"visattn: the command needs {error.name}, which is not installed. Use {EXTRA}")
    # A terminal that lacks × or ᵖ shows a question mark rather than a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    app(prog_name="visattn")
    sys.exit(0)
