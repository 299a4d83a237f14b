"""Starting a daemon as a process of its own, and hearing how that went.

The options travel on the child's standard input, not on its command line: the join code must not be readable
in the list of processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import P2PCollabError, StorageError
from .error_fields import error_from_fields

LOG_NAME = "daemon.log"
_FIRST_LINE_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class Launched:
    """A daemon whose API is up."""

    process: subprocess.Popen[bytes]
    pid: int
    port: int


def launch(options: Mapping[str, Any], *, prefix: Sequence[str] = ()) -> Launched:
    """Start a daemon and wait until its API answers or it says why not.

    With `attached` in the options the caller must keep `process.stdin` open: when it ends, the daemon leaves.

    Args:
        prefix: put before the command, e.g. to run it in a network namespace.

    Raises:
        StorageError: the state folder cannot be used.
        P2PCollabError: the daemon refused: the error that it ended with.
    """
    state = Path(options["state"])
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = (state / LOG_NAME).open("ab")
    except OSError as error:
        raise StorageError(
            f"the state folder {state} cannot be used: {error.strerror}", "choose another with --state"
        ) from error
    with log:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "p2pcollab.daemon"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # Python puts the working folder first on its path: a checkout's must not hide what is installed.
            cwd=state,
            # A Ctrl-C in the terminal is the foreground's to translate into a clean leave.
            start_new_session=True,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(dict(options), default=str).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it ended already; its reason, if any, is on its standard output
    if not options.get("attached"):
        process.stdin.close()
    reply = _parse(process.stdout.readline(_FIRST_LINE_BYTES_MAX))
    if reply is None:
        process.wait()
        raise P2PCollabError(
            f"the daemon ended before it was ready (exit code {process.returncode})",
            f"its log is {state / LOG_NAME}",
        )
    if not reply.get("ok"):
        process.wait()
        raise error_from_fields(reply)
    return Launched(process=process, pid=int(reply["pid"]), port=int(reply["port"]))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None
