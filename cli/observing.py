"""Commands that also work where no daemon runs: with a join code they ask the run's devices themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NotRunningError
from .options import join_code

if TYPE_CHECKING:
    from ..daemon.options import DaemonOptions


def daemon_or_code(folder: Path, code: str | None) -> str | None:
    """None when this device's daemon is to be asked; else the join code to look for the run with.

    A code that was given on the command line goes before the daemon, which may be in another run; one from
    the environment only stands in where none runs.

    Raises:
        NotRunningError: no daemon, and no code.
        UsageError: the code is not one.
    """
    from ..daemon.api_client import find_daemon

    if code is not None:
        return join_code(code)
    try:
        find_daemon(folder)
    except NotRunningError as error:
        known = join_code(None)
        if known is None:
            raise NotRunningError(error.what, f"{error.fix}, or give a join code with --code") from error
        return known
    return None


def observer_options(
    folder: Path, code: str, interface: str | None, peers: list[str] | None
) -> DaemonOptions:
    """How an observer takes part: it has no data and trains nothing."""
    from ..daemon.options import DaemonOptions

    return DaemonOptions(mode="join", state=folder, code=code, interface=interface, peers=tuple(peers or ()))
