"""Several real daemons on this machine: how the demo, the tests and the fault scripts run them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil

from ..errors import NotRunningError, P2PCollabError
from .api_client import ApiClient
from .launcher import Launched, launch
from .model_file import ModelFile
from .network_namespace import call_in_network_of
from .p2pd import P2PD_MARK, end_stale_p2pd

T = TypeVar("T")

_POLL_S = 0.1


class LocalDevice:
    """One daemon of a fleet. `options` are `DaemonOptions` fields; `state` is its folder."""

    def __init__(
        self, name: str, state: Path, options: Mapping[str, Any], prefix: Sequence[str] = ()
    ) -> None:
        """
        Args:
            prefix: put before every command, e.g. to run it in a network namespace.
        """
        self.name = name
        self.prefix = tuple(prefix)
        self.state = state
        self.options = {"interface": "127.0.0.1", **options, "state": str(state), "nickname": name}
        self.launched: Launched | None = None

    def start(self, **changes: Any) -> LocalDevice:
        """Start the daemon (again); `changes` replace options."""
        self.options.update(changes)
        self.launched = launch({**self.options, "attached": True}, prefix=self.prefix)
        return self

    def ask(self, question: Callable[[ApiClient], T]) -> T:
        """Ask the daemon's API, wherever it runs.

        Raises:
            P2PCollabError: it does not answer, or refuses.
        """

        def ask() -> T:
            with ApiClient(self.state) as client:
                return question(client)

        if not self.prefix or self.launched is None:
            return ask()
        try:
            # The API listens on the loopback interface of the device's own network.
            return call_in_network_of(self.launched.pid, ask)
        except OSError as error:
            raise NotRunningError(f"{self.name} cannot be asked: {error.strerror}") from error

    def assemble(self) -> ModelFile:
        """The global model from this device."""
        return self.ask(lambda client: client.assemble())

    @property
    def running(self) -> bool:
        """Whether the daemon's process lives."""
        return self.launched is not None and self.launched.process.poll() is None

    def status(self) -> dict[str, Any] | None:
        """The daemon's status, or None while it cannot answer."""
        # Also one that does not answer in time: where many daemons share a core, that is a matter of waiting.
        with suppress(P2PCollabError):
            return self.ask(lambda client: client.status())
        return None

    def processes(self) -> dict[str, psutil.Process]:
        """The device's processes by part: `daemon`, `trainer`, `p2pd`."""
        if self.launched is None or not self.running:
            return {}
        found = {"daemon": psutil.Process(self.launched.pid)}
        for child in found["daemon"].children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                command = " ".join(child.cmdline())
                if "p2pd" in child.name():
                    found["p2pd"] = child
                elif "trainer_process" in command:
                    found["trainer"] = child
        return found

    def kill(self, part: str = "daemon") -> None:
        """SIGKILL one part of the device."""
        process = self.processes().get(part)
        if process is None:
            raise P2PCollabError(f"{self.name} has no process {part!r} to kill")
        process.kill()
        if part == "daemon":
            assert self.launched is not None
            self.launched.process.wait()

    def ask_to_leave(self) -> None:
        """Begin to leave: the end of its standard input tells an attached daemon so."""
        if self.launched is not None and self.launched.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.launched.process.stdin.close()

    def leave(self, timeout_s: float = 30.0) -> int:
        """Ask the daemon to leave; its exit code. Killed when it has not ended in time."""
        if self.launched is None:
            return 0
        process = self.launched.process
        self.ask_to_leave()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


class Fleet:
    """Devices that are all gone when the block ends, however it ends."""

    def __init__(self) -> None:
        self.devices: list[LocalDevice] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for device in self.devices:
            device.ask_to_leave()
        for device in self.devices:
            device.leave()
            # What a killed daemon leaves is cleared away by its next life. There is none.
            end_stale_p2pd(device.state / P2PD_MARK)

    def add(self, name: str, state: Path, *, prefix: Sequence[str] = (), **options: Any) -> LocalDevice:
        """A device that is not started yet; `options` are `DaemonOptions` fields."""
        device = LocalDevice(name, state, options, prefix)
        self.devices.append(device)
        return device

    def statuses(self) -> dict[str, dict[str, Any] | None]:
        """Status by device name."""
        return {device.name: device.status() for device in self.devices}


def settled(devices: Iterable[LocalDevice]) -> bool:
    """Whether all these devices say that the run is complete, and hold the same ledger.

    The last contributions are on their way when the first device knows that the run is complete.
    """
    digests = set()
    for device in devices:
        status = device.status()
        if status is None or not status["complete"]:
            return False
        digests.add(status["ledger"]["digest"])
    return len(digests) == 1


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> float:
    """Poll a condition that other processes make true; the seconds that it took.

    Raises:
        P2PCollabError: it did not become true in time.
    """
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise P2PCollabError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(_POLL_S)
    return time.monotonic() - start
