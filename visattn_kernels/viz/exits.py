"""The exceptions that end the command with one line instead of a traceback."""

from __future__ import annotations

from visattn_cli import EXTRA


class InputError(Exception):
    """Input that the command does not take; the message is the line to print. Exit code 2."""

    exit_code = 2


class MissingError(InputError):
    """A library that is not installed. Exit code 1."""

    exit_code = 1

    def __init__(self, library: str, what: str) -> None:
        super().__init__(f"visattn: {what} needs {library}, which is not installed. Use {EXTRA}")
