"""The hosts of a scenario: where each daemon keeps its things, what is done to it, and what it answers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import scenario as sc
from lab import Lab, faketime_library

from p2pcollab.daemon.fleet import Fleet, LocalDevice
from p2pcollab.errors import P2PCollabError


class Hosts:
    """By number, from 1."""

    def __init__(
        self,
        scenario: sc.Scenario,
        moments: tuple[sc.Moment, ...],
        lab: Lab,
        fleet: Fleet,
        folder: Path,
        stack: contextlib.ExitStack,
    ) -> None:
        """
        Args:
            stack: undoes at the end what was done to the system.
        """
        self._scenario = scenario
        self._moments = moments
        self._lab = lab
        self._fleet = fleet
        self._folder = folder
        self._stack = stack
        #: Those whose daemon is stopped, and cannot be asked.
        self._stopped: set[int] = set()

    def add_all(self) -> None:
        """Prepare a daemon on each, which does not run yet."""
        for number, host in enumerate(self._lab.hosts, start=1):
            self._fleet.add(
                f"host-{number}",
                self._state_folder(number),
                prefix=self._prefix(number),
                interface=host.address,
                data="digits",
                share=f"{number}/{self._scenario.hosts}",
                threads=1,
                budget=self._scenario.budget,
            )

    def kill_all(self) -> None:
        """SIGKILL all daemons with all that is theirs."""
        for device in self._fleet.devices:
            if device.launched is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(device.launched.process.pid, signal.SIGKILL)
                device.launched.process.wait()

    # What is done to one

    def harm(self, step: sc.Step, number: int, *, ends: bool) -> None:
        """Do what a step says, or undo it where the step ends.

        Raises:
            P2PCollabError, OSError, psutil.Error, RuntimeError: it cannot be done.
        """
        lab, host = self._lab, self._lab.hosts[number - 1]
        match step:
            case sc.Cut(way="both") if not ends:
                lab.cut(host)
            case sc.Cut(way="deaf") if not ends:
                lab.deafen(host)
            case sc.Cut(way="mute") if not ends:
                lab.mute(host)
            case sc.Cut() | sc.Heal():
                lab.heal(host)
            case sc.Kill():
                self._restart(number) if ends else self._kill(number, step.part)
            case sc.Start():
                self._restart(number)
            case sc.Stop():
                self._pause(number, step.part, go_on=ends)
            case sc.Slow():
                lab.limit_cpu(host, None if ends else step.cores)
            case sc.Loss():
                lab.lose(host, 0.0 if ends else step.share)
            case sc.Skew():
                self._clock(number).write_text(f"{0 if ends else step.seconds:+}")
            case sc.FillDisk():
                self._empty_disk(number) if ends else self._fill_disk(number)
            case sc.Bandwidth():
                lab.limit_bandwidth(host, 0 if ends else step.kbit_s)
            case sc.Delay():
                lab.delay(host, *((0.0, 0.0) if ends else (step.ms, step.jitter_ms)))
            case _:
                raise AssertionError(f"nobody performs {step}")

    @contextlib.contextmanager
    def standstill(self) -> Iterator[None]:
        """Nobody makes anything new."""
        trainers = [t for d in self.reachable().values() if (t := d.processes().get("trainer")) is not None]
        for trainer in trainers:
            trainer.suspend()
        try:
            yield
        finally:
            for trainer in trainers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    trainer.resume()

    def _kill(self, number: int, part: str) -> None:
        device = self._device(number)
        if part != "device":
            device.kill(part)
            return
        assert device.launched is not None
        os.killpg(device.launched.process.pid, signal.SIGKILL)
        device.launched.process.wait()

    def _restart(self, number: int) -> None:
        device = self._device(number)
        if not device.running:
            device.start(mode="resume", code=None, spec=None, secret_hex=None)

    def _pause(self, number: int, part: str, *, go_on: bool) -> None:
        processes = self._device(number).processes()
        chosen = list(processes.values()) if part == "device" else [processes[part]]
        for process in chosen:
            process.resume() if go_on else process.suspend()
        if part in ("device", "daemon"):
            (self._stopped.discard if go_on else self._stopped.add)(number)

    def _fill_disk(self, number: int) -> None:
        with contextlib.suppress(OSError), self._ballast(number).open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def _empty_disk(self, number: int) -> None:
        self._ballast(number).unlink(missing_ok=True)

    # What they answer

    def reachable(self) -> Mapping[int, LocalDevice]:
        """Those that run and are not stopped."""
        return {
            number: device
            for number, device in enumerate(self._fleet.devices, start=1)
            if device.running and number not in self._stopped
        }

    def ask(self, question: Callable[[LocalDevice], Any]) -> dict[int, Any]:
        """The answers of all that are reachable, asked at once."""
        devices = self.reachable()
        with ThreadPoolExecutor(max(1, len(devices))) as pool:
            return dict(zip(devices, pool.map(question, devices.values()), strict=True))

    def statuses(self) -> dict[int, dict[str, Any]]:
        """Of all that can answer."""

        def status(device: LocalDevice) -> dict[str, Any] | None:
            with contextlib.suppress(P2PCollabError):
                return device.status()
            return None

        return {number: answer for number, answer in self.ask(status).items() if answer is not None}

    # Where they keep their things

    def _device(self, number: int) -> LocalDevice:
        return self._fleet.devices[number - 1]

    def _meets(self, number: int, kind: type[sc.Step]) -> bool:
        return any(isinstance(m.step, kind) and number in m.hosts for m in self._moments)

    def _state_folder(self, number: int) -> Path:
        """The state folder; on a small disk of its own where it will be filled."""
        folder = self._folder / f"host-{number}"
        folder.mkdir()
        if not self._meets(number, sc.FillDisk):
            return folder
        size = f"size={self._scenario.disk_mb}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
        self._stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=False)
        return folder / "state"

    def _ballast(self, number: int) -> Path:
        return self._folder / f"host-{number}" / "ballast"

    def _clock(self, number: int) -> Path:
        return self._folder / f"clock-{number}"

    def _prefix(self, number: int) -> tuple[str, ...]:
        host = self._lab.hosts[number - 1]
        if not self._meets(number, sc.Skew):
            return host.prefix
        library, clock = faketime_library(), self._clock(number)
        clock.write_text("+0")
        return (
            *(*host.prefix, "env", f"LD_PRELOAD={library}", f"FAKETIME_TIMESTAMP_FILE={clock}"),
            *("FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1"),
        )
