"""`python -m p2pcollab.daemon`: one device's daemon.

Reads one line of options (JSON) from standard input. Writes one line when its API is up or when it cannot
start, and a last one if it ends with an error, both JSON. Its log goes to standard error.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import psutil
import structlog

from ..errors import ExitCode, P2PCollabError
from .error_fields import error_to_fields, first_within
from .node import Node
from .options import DaemonOptions
from .store import Store
from .watchdog import Watchdog

log = structlog.get_logger()


def main() -> int:
    """Run until told to leave; the exit code."""
    _log_to_stderr()
    try:
        options = DaemonOptions.parse(sys.stdin.buffer.readline())
        store = Store.open(options.state)
    except P2PCollabError as error:
        return _refuse(error)
    try:
        node = Node(options, store, started=_process_started())
        asyncio.run(_live(node, options.attached))
        return ExitCode.OK
    except BaseException as error:
        return _refuse(_shown(error))
    finally:
        store.close()


async def _live(node: Node, attached: bool) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, node.leave)
    if attached:
        threading.Thread(target=_leave_at_end_of_input, args=(loop, node.leave), daemon=True).start()
    watchdog = Watchdog(os.environ, os.getpid())

    def ready(port: int) -> None:
        _say({"ok": True, "pid": os.getpid(), "port": port})
        watchdog.ready()

    living = asyncio.create_task(watchdog.keep())
    try:
        await node.run(ready, leaving=watchdog.leaving)
    finally:
        living.cancel()


def _leave_at_end_of_input(loop: asyncio.AbstractEventLoop, leave: Any) -> None:
    # Not through sys.stdin: a thread that blocks in its lock makes the interpreter abort at its end.
    while os.read(0, 4096):
        pass
    with suppress(RuntimeError):  # the loop has ended already
        loop.call_soon_threadsafe(leave)


def _process_started() -> float:
    """When this process was started, on the clock of `time.monotonic`."""
    created: float = psutil.Process().create_time()
    return time.monotonic() - (time.time() - created)


def _refuse(error: P2PCollabError) -> int:
    log.error("ended", what=error.what, fix=error.fix)
    _say({"ok": False, **error_to_fields(error), "exit_code": int(error.exit_code)})
    return int(error.exit_code)


def _shown(error: BaseException) -> P2PCollabError:
    """The error to show: the first of ours in a group of them; whatever else happened is a bug of ours."""
    ours = first_within(error, P2PCollabError)
    if ours is not None:
        return ours
    log.error("internal error", exc_info=error)
    return P2PCollabError(
        f"internal error: {type(error).__name__}: {error}", "please report it with the daemon's log"
    )


def _say(fields: dict[str, Any]) -> None:
    with suppress(BrokenPipeError, ValueError):
        print(json.dumps(fields), flush=True)


class _Log(io.StringIO):
    """Standard error: a file on a disk that may be full, which must not end the daemon."""

    def write(self, text: str) -> int:
        """Write it, or drop it."""
        with suppress(OSError):
            os.write(2, text.encode(errors="replace"))
        return len(text)


def _log_to_stderr() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(_Log()),
    )


if __name__ == "__main__":
    sys.exit(main())
