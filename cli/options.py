"""Options that several commands share, each defined once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ..errors import UsageError
from ..name_lists import split_names

if TYPE_CHECKING:
    from ..grouping import Groups

_DATA: Final = "Data"
_TRAINING: Final = "What this device trains"
_NETWORK: Final = "Network"
_CODE_VARIABLE: Final = "P2PCOLLAB_CODE"
_SPEECH: Final = "speech-commands:"
#: A thousand class names of full length.
_GROUPS_CHARS_MAX: Final = 100_000

State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="DIR",
        envvar="P2PCOLLAB_STATE",
        show_default=False,
        help="State folder of this device; by default where `p2pcollab paths` says.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Code = Annotated[
    str | None,
    typer.Option(
        "--code",
        metavar="CODE",
        show_default=False,
        help=f"Join code; `-` reads it from standard input. ${_CODE_VARIABLE} does too, unseen by `ps`.",
    ),
]

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        rich_help_panel=_DATA,
        show_default=False,
        help="A folder with one folder of images or audio clips per class, `speech-commands:DIR`, "
        "`torchvision:NAME`, or `digits`.",
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="DIR",
        rich_help_panel=_DATA,
        show_default=False,
        help="Where torchvision keeps its data sets.",
    ),
]
Download = Annotated[
    bool, typer.Option("--download", rich_help_panel=_DATA, help="Let torchvision download what is missing.")
]
ShareOption = Annotated[
    str | None,
    typer.Option(
        "--share",
        metavar="I/N",
        rich_help_panel=_DATA,
        show_default=False,
        help="Use only the I-th of N equal parts of the training data, for example 2/5.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        metavar="N",
        rich_help_panel=_DATA,
        show_default=False,
        help="Use at most N training examples, before they are divided.",
    ),
]

Prefer = Annotated[
    list[str] | None,
    typer.Option(
        "--prefer",
        metavar="CLASS,…",
        rich_help_panel=_TRAINING,
        show_default=False,
        help="Classes that this device would rather train.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="CLASS,…",
        rich_help_panel=_TRAINING,
        show_default=False,
        help="Train the tasks of these classes only (and the stem).",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        min=0.01,
        max=1.0,
        metavar="0.01..1",
        rich_help_panel=_TRAINING,
        show_default=False,
        help="Share of this machine that training may use; all of it by default.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=256,
        metavar="N",
        rich_help_panel=_TRAINING,
        show_default=False,
        help="Threads of the trainer; by default what the budget allows.",
    ),
]
Replicate = Annotated[
    str,
    typer.Option(
        "--replicate",
        metavar="quota|all",
        rich_help_panel=_TRAINING,
        help="Keep this device's share of the model, or all of it.",
    ),
]

Interface = Annotated[
    str | None,
    typer.Option(
        "--interface",
        metavar="NAME|ADDRESS",
        rich_help_panel=_NETWORK,
        show_default=False,
        help="Network interface; chosen and named when not given.",
    ),
]
Port = Annotated[
    int,
    typer.Option(
        "--port",
        min=0,
        max=65535,
        rich_help_panel=_NETWORK,
        help="Port that peers connect to; 0 takes a free one.",
    ),
]
Peer = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        metavar="ADDRESS",
        rich_help_panel=_NETWORK,
        show_default=False,
        help="Address of a device of the run, where it is not found by itself. May be repeated.",
    ),
]
Nickname = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        rich_help_panel=_NETWORK,
        show_default=False,
        help="This device's name for people; the host's by default.",
    ),
]
Detach = Annotated[
    bool,
    typer.Option("--detach", "-d", help="Return once the daemon runs; `watch` and `leave` find it."),
]


def join_code(given: str | None) -> str | None:
    """The join code from the option, standard input or the environment; None when there is none.

    Raises:
        UsageError: it is not a join code.
    """
    text = given if given is not None else os.environ.get(_CODE_VARIABLE) or None
    if text == "-":
        text = sys.stdin.readline()
    if text is None:
        return None
    from ..run import JoinCode

    return str(JoinCode.parse(text))


def class_names(option: str, values: Sequence[str] | None) -> tuple[str, ...]:
    """Classes from an option that may be repeated and may name several, separated as in CSV.

    Raises:
        UsageError: a value cannot be read.
    """
    names = (name.strip() for value in values or () for name in split_names(value, option))
    return tuple(dict.fromkeys(name for name in names if name))


def data_source(given: str | None) -> str | None:
    """A data source that means the same in the daemon, whose working folder is another.

    Raises:
        UsageError: it is a path with nothing there.
    """
    if given is None or given == "digits" or given.startswith("torchvision:"):
        return given
    scheme = _SPEECH if given.startswith(_SPEECH) else ""
    place = given[len(scheme) :]
    path = Path(place).expanduser().absolute()
    if not place or not path.exists():
        fix = "give a folder with one folder of images or clips per class, `torchvision:NAME`, or `digits`"
        raise UsageError(f"--data: there is no folder {place or given}", fix)
    return f"{scheme}{path}"


def folder(given: Path | None) -> Path | None:
    """A folder as an absolute path."""
    return None if given is None else given.expanduser().absolute()


def class_groups(path: Path, classes: Sequence[str]) -> Groups:
    """The tasks that a person wrote into a file.

    Raises:
        UsageError: the file is not text, or names what the data do not have.
    """
    from ..grouping import parse_groups

    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_GROUPS_CHARS_MAX + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--groups: {path} cannot be read as text: {error}") from error
    if len(text) > _GROUPS_CHARS_MAX:
        raise UsageError(f"--groups: {path} is longer than any run's groups can be")
    return parse_groups(text, classes)
