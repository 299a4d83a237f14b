"""The `p2pcollab` command: every error becomes one line and an exit code, never a traceback.

Only typer is imported here. Rich, httpx, pydantic models, numpy and torch come in where a command needs them:
`--help` and `status` must feel instant on a small device.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ..errors import ExitCode, P2PCollabError
from . import demo_command, model_commands, run_commands, service_commands, show_commands
from .output import error_line, note, print_error, say, state_folder

#: Newer releases of typer bring a click of their own, older ones use the package: this is the right one.
_ClickException: Final[type[Exception]] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
)

app = typer.Typer(
    name="p2pcollab",
    help="Train one model together on the devices you already own, with no server.",
    epilog=(
        "Exit codes: 0 ok, 1 error, 2 usage, 3 daemon not running, 4 no peers, 5 incomplete model, "
        "6 incompatible version, 7 not authorised, 130 interrupted."
    ),
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        say(f"p2pcollab {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


run_commands.register(app)
service_commands.register(app)
show_commands.register(app)
model_commands.register(app)
demo_command.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        # A class named in Greek must not end the program on a terminal that knows only ASCII.
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    debug = os.environ.get("P2PCOLLAB_DEBUG") == "1"
    if not debug:
        # PyTorch's and hivemind's remarks to programmers are none of the user's business.
        warnings.simplefilter("ignore", FutureWarning)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Our reader has gone (`| head`). The interpreter flushes once more when it ends: to nowhere.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.ERROR
    except (KeyboardInterrupt, typer.Abort):
        note("interrupted")
        return ExitCode.INTERRUPTED
    except P2PCollabError as error:
        if debug:
            traceback.print_exc()
        print_error(error)
        return error.exit_code
    except _ClickException as error:
        return _usage_error(error)
    except Exception as error:
        if debug:
            raise
        return _internal_error(error)


def _run(words: list[str]) -> int:
    try:
        result = typer.main.get_command(app).main(args=words, prog_name="p2pcollab", standalone_mode=False)
    except SystemExit as end:
        result = end.code
    return result if isinstance(result, int) else ExitCode.OK


def _usage_error(error: Any) -> int:
    """Click's complaint in our form. `Any`: the class depends on the release of typer."""
    message = error.format_message().strip().rstrip(".")
    message = message[:1].lower() + message[1:]
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "p2pcollab"
    error_line(f"error: {message}; see `{command} --help`")
    return ExitCode.USAGE


def _internal_error(error: Exception) -> int:
    """An error of ours: the traceback goes to a file that can be sent, one line to the terminal."""
    details = "".join(traceback.format_exception(error))
    log = _write_details(details)
    where = f"details in {log}" if log else "run again with P2PCOLLAB_DEBUG=1 for details"
    error_line(f"internal error: {type(error).__name__}: {error}; please report it, {where}")
    return ExitCode.ERROR


def _write_details(details: str) -> Path | None:
    chosen = os.environ.get("P2PCOLLAB_STATE")
    for folder in (state_folder(Path(chosen) if chosen else None), Path(tempfile.gettempdir())):
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / f"cli-error-{os.getpid()}.log"
            path.write_text(details, encoding="utf-8")
            return path
    return None
