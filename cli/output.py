"""Where the command line writes: JSON or pages on standard output, notes and errors on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import P2PCollabError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: Width of pages where no terminal says how wide it is: wide enough for every column, fits a text file.
_WIDTH_WITHOUT_TERMINAL: Final = 120


def console() -> Console:
    """Standard output as Rich sees it."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _WIDTH_WITHOUT_TERMINAL
    return Console(width=width, highlight=False, emoji=False)


def show(page: RenderableType) -> None:
    """Print something drawn by a view."""
    console().print(page)


def say(text: str = "") -> None:
    """Print a line as it is: never wrapped, so that what is meant to be copied stays whole."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A remark beside the result: on standard error, so that standard output stays what was asked for."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def print_json(value: Mapping[str, Any] | list[Any]) -> None:
    """A whole document."""
    say(json.dumps(value, indent=2))


def print_json_line(value: Mapping[str, Any]) -> None:
    """One line of a stream of documents."""
    say(json.dumps(value))


def print_error(error: P2PCollabError) -> None:
    """What happened and what to do, on one line."""
    error_line(f"error: {error}")


def error_line(text: str) -> None:
    """One line on standard error, red on a terminal."""
    line = " ".join(text.split())
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        line = f"\x1b[31m{line}\x1b[0m"
    note(line)


def state_folder(state: Path | None) -> Path:
    """The state folder that a command works with, as an absolute path."""
    if state is None:
        from ..daemon.store import default_state_folder

        return default_state_folder()
    return state.expanduser().absolute()
