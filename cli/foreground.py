"""Following a daemon from the terminal: live on a terminal, lines in a log, JSON lines for a script."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..errors import NotRunningError, P2PCollabError
from .output import console, print_json_line, say

if TYPE_CHECKING:
    from ..daemon.api_client import ApiClient
    from ..daemon.launcher import Launched

Json = Mapping[str, Any]
"""What the API answers; `Any` because it comes from outside."""

_TICK_S: Final = 0.05
_EVENTS_SHOWN: Final = 20
#: Without a terminal: how often a line says how far things are, when nothing happens.
_LOG_EVERY_S: Final = 10.0
#: Phases of a daemon that looks for its run, and those in which it may still find its own input wanting.
_LOOKING: Final = ("discovering", "fetching-spec")
_PREPARING: Final = (*_LOOKING, "starting", "joining", "loading", "measuring")
_LOOKING_S: Final = 20.0
_POLL_S: Final = 0.2
_LEAVING: Final = "leaving: finishing this step, saying good-bye … (Ctrl-C again to force)"


class Interrupts:
    """Counts Ctrl-C and SIGTERM instead of dying of them, for as long as the block lasts."""

    def __init__(self) -> None:
        self.count = 0
        self._slept_on = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1

    def pause(self, seconds: float, ended: Callable[[], bool] = lambda: False) -> None:
        """Sleep, but not past an interrupt that came since the last pause, nor past what is waited for."""
        # In slices: a handler that sets a threading.Event can deadlock with the wait that it interrupts.
        end = time.monotonic() + seconds
        while self.count == self._slept_on and not ended() and (left := end - time.monotonic()) > 0:
            time.sleep(min(_TICK_S, left))
        self._slept_on = self.count


class Screen(Protocol):
    """Where a followed daemon is shown."""

    interval_s: float

    def show(self, status: Json, news: list[Json], message: str) -> None:
        """Show the newest status, and events that were not shown before."""

    def close(self) -> None:
        """Nothing more comes."""


class LiveScreen:
    """A view that is drawn anew in place."""

    interval_s = 0.25

    def __init__(self) -> None:
        from rich.live import Live

        self._console = console()
        self._events: deque[Json] = deque(maxlen=_EVENTS_SHOWN)
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def show(self, status: Json, news: list[Json], message: str) -> None:
        from .view_live import live_view

        self._events.extend(news)
        size = self._console.size
        view = live_view(
            status, list(self._events), width=size.width, height=size.height - 1, message=message
        )
        self._live.update(view, refresh=True)

    def close(self) -> None:
        self._live.stop()


class LogScreen:
    """One line per event, and one now and then that says how far things are."""

    interval_s = 1.0

    def __init__(self) -> None:
        self._due = 0.0
        self._message = ""

    def show(self, status: Json, news: list[Json], message: str) -> None:
        from . import format as fmt
        from .view_live import log_line

        for event in news:
            say(f"{fmt.clock(event.get('time'))} {fmt.plain(event.get('text') or event.get('kind') or '')}")
        now = time.monotonic()
        if status and now >= self._due:
            say(f"{fmt.clock(time.time())} {log_line(status)}")
            self._due = now + _LOG_EVERY_S
        if message and message != self._message:
            say(message)
        self._message = message

    def close(self) -> None:
        pass


class JsonScreen:
    """One status a second, one line each."""

    interval_s = 1.0

    def show(self, status: Json, news: list[Json], message: str) -> None:  # noqa: ARG002 - the port's shape
        if status:
            print_json_line(status)

    def close(self) -> None:
        pass


def choose_screen(as_json: bool) -> Screen:
    """What suits standard output."""
    if as_json:
        return JsonScreen()
    return LiveScreen() if sys.stdout.isatty() else LogScreen()


class _Feed:
    """Status and events of a daemon, each event once."""

    def __init__(self, client: ApiClient, since: float) -> None:
        self._client = client
        self._since = since
        self._last_id = 0
        self.status: Json = {}

    def poll(self) -> list[Json]:
        """Refresh the status; the events that are new."""
        self.status = self._client.status()
        page = self._client.events(after=self._last_id)
        missed = page.missed(self._last_id) if self._last_id else 0
        if page.events:
            self._last_id = int(page.events[-1]["id"])
        news: list[Json] = [event for event in page.events if event["time"] >= self._since]
        if missed:
            news.insert(0, {"time": None, "kind": "gap", "text": f"{missed} earlier events were not kept"})
        return news


def watch(client: ApiClient, screen: Screen) -> None:
    """Show a daemon until Ctrl-C.

    Raises:
        NotRunningError: it has gone.
    """
    feed = _Feed(client, since=time.time() - 600.0)
    try:
        with Interrupts() as interrupts:
            while not interrupts.count:
                news = feed.poll()
                screen.show(feed.status, news, "")
                interrupts.pause(screen.interval_s)
    finally:
        screen.close()


def await_prepared(launched: Launched, client: ApiClient) -> None:
    """Wait until a detached daemon takes part, so that its own bad input is told here and not in its log.

    One that finds no device of the run goes on looking; that is not waited for longer than `_LOOKING_S`.

    Raises:
        P2PCollabError: why it ended instead.
    """
    deadline = time.monotonic() + _LOOKING_S
    with Interrupts() as interrupts:
        while not interrupts.count and launched.process.poll() is None:
            phase = None
            with suppress(P2PCollabError):
                phase = client.status().get("phase")
            if phase not in (None, *_PREPARING) or (phase in _LOOKING and time.monotonic() > deadline):
                return
            interrupts.pause(_POLL_S)
    if launched.process.poll() is not None:
        raise end_reason(launched)


def attend(launched: Launched, client: ApiClient, screen: Screen) -> None:
    """Show the daemon that this command has started until it ends; the first Ctrl-C makes it leave.

    Raises:
        P2PCollabError: why the daemon ended, when it did not end because it was told to.
        KeyboardInterrupt: it was forced to end.
    """
    process = launched.process
    feed = _Feed(client, since=client.address.started - 1.0)
    message = ""
    try:
        with Interrupts() as interrupts:
            while process.poll() is None:
                if interrupts.count > 1:
                    _kill_group(process.pid)
                    process.wait()
                    raise KeyboardInterrupt
                if interrupts.count and not message:
                    message = _LEAVING
                    _ask_to_leave(launched, client)
                news: list[Json] = []
                with suppress(P2PCollabError):
                    news = feed.poll()
                screen.show(feed.status, news, message)
                interrupts.pause(screen.interval_s, lambda: process.poll() is not None)
    finally:
        screen.close()
        if process.poll() is None and process.stdin is not None:
            process.stdin.close()
    if process.returncode != 0:
        raise end_reason(launched)


def _ask_to_leave(launched: Launched, client: ApiClient) -> None:
    """By its API, and by the end of its standard input, in case the API does not answer."""
    with suppress(P2PCollabError):
        client.leave()
    if launched.process.stdin is not None:
        launched.process.stdin.close()


def _kill_group(pid: int) -> None:
    """The daemon leads a process group of its own: the trainer and p2pd go with it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def end_reason(launched: Launched) -> P2PCollabError:
    """Why a daemon has ended: the last line that it wrote on standard output says so, if it could."""
    from ..daemon.error_fields import error_from_fields

    lines = launched.process.stdout.read().splitlines() if launched.process.stdout else []
    for line in reversed(lines):
        with suppress(ValueError):
            fields = json.loads(line)
            if isinstance(fields, dict) and fields.get("ok") is False:
                return error_from_fields(fields)
    code = launched.process.returncode
    how = f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code}"
    return NotRunningError(f"the daemon {how}", "its log may say why: `p2pcollab paths` names it")
