"""A real daemon tells its supervisor that it is ready, lives and leaves; one that hangs is ended."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import digits_runs as runs
import pytest

from p2pcollab.daemon.fleet import Fleet
from p2pcollab.daemon.service_files import Service
from p2pcollab.daemon.watchdog import SELF_WATCH_VARIABLE, Watchdog


def _listening(path: str) -> socket.socket:
    heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    heard.bind("\0" + path[1:] if path.startswith("@") else path)
    heard.settimeout(runs.DEADLINE_S)
    return heard


def test_supervisor_hears_that_the_daemon_is_ready_lives_and_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _listening(str(tmp_path / "notify")) as heard, Fleet() as fleet:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "3000000")
        device = fleet.add("supervised", tmp_path / "supervised")
        runs.create(device, runs.digits_spec("watchdog", epochs=1))
        assert device.launched is not None
        said: list[str] = []
        # The first sign of life may come before the API is up.
        while not any("READY=1" in text for text in said) or said.count("WATCHDOG=1") < 3:
            said.append(heard.recv(4096).decode())
        assert f"READY=1\nMAINPID={device.launched.pid}" in said
        # Its children are not what is supervised.
        for process in runs.parts(device).values():
            if process.pid != device.launched.pid:
                assert "NOTIFY_SOCKET" not in process.environ()
        device.ask_to_leave()
        while "STOPPING=1" not in said:
            said.append(heard.recv(4096).decode())


def test_watchdog_of_another_process_is_not_answered(tmp_path: Path) -> None:
    with _listening("@p2pcollab-" + tmp_path.name) as heard:
        environment = {"NOTIFY_SOCKET": "@p2pcollab-" + tmp_path.name, "WATCHDOG_USEC": "10", "OTHER": "kept"}
        watchdog = Watchdog({**environment, "WATCHDOG_PID": "1"}, os.getpid())
        asyncio.run(asyncio.wait_for(watchdog.keep(), 10))  # ends at once: nobody waits for it
        watchdog.ready()
        assert heard.recv(4096).decode().startswith("READY=1")
        watched = dict(environment)
        Watchdog(watched, os.getpid())
        assert watched == {"OTHER": "kept"}


def test_supervisor_that_is_gone_does_not_disturb(tmp_path: Path) -> None:
    Watchdog({"NOTIFY_SOCKET": str(tmp_path / "nobody")}, os.getpid()).ready()


_HANGS = """
import asyncio, os, threading
from p2pcollab.daemon.service_files import Service
from p2pcollab.daemon.watchdog import Watchdog

async def live():
    living = asyncio.create_task(Watchdog(os.environ, os.getpid()).keep())
    await asyncio.sleep(0)
    while True:
        threading.Event().wait()  # the event loop does not turn

asyncio.run(live())
"""


def test_daemon_whose_event_loop_hangs_ends_itself_and_says_where(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HANGS],
        env={**os.environ, SELF_WATCH_VARIABLE: "5"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=runs.DEADLINE_S,
    )
    assert done.returncode == 1
    assert "in live" in done.stderr


def test_daemon_starts_from_the_file_that_a_service_gives_it(tmp_path: Path) -> None:
    with Fleet() as fleet:
        first = fleet.add("first", tmp_path / "state")
        runs.create(first, runs.digits_spec("service", epochs=1))
        runs.eventually(lambda: runs.known(first), "the run to be set up")
        assert first.leave(runs.DEADLINE_S) == 0
        service = Service(name="p2pcollab", python=Path(sys.executable), state=tmp_path / "state")
        service.options_file.write_bytes(service.options)
        with service.options_file.open("rb") as options:
            daemon = subprocess.Popen(
                service.command, stdin=options, stdout=subprocess.PIPE, cwd=service.state, text=True
            )
        try:
            assert daemon.stdout is not None
            assert json.loads(daemon.stdout.readline())["ok"]
        finally:
            daemon.terminate()
            assert daemon.wait(runs.DEADLINE_S) == 0
