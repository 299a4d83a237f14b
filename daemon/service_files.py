"""The files by which a system starts the daemon by itself: a systemd user unit, or a launchd agent."""

from __future__ import annotations

import json
import plistlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import ExitCode, UsageError
from .launcher import LOG_NAME
from .watchdog import SELF_WATCH_VARIABLE

#: A daemon whose event loop hangs for so long is started anew: ten times what the slowest step of it takes.
WATCHDOG_S: Final = 60
#: After a failure; a port or a disk may need a moment.
RESTART_S: Final = 5
#: Imports on a small device take half a minute.
_START_S: Final = 180
#: A daemon that leaves takes up to 12 s, and its trainer ends a step.
_STOP_S: Final = 40
#: What a restart does not make better.
_LASTING: Final = (ExitCode.USAGE, ExitCode.INCOMPATIBLE, ExitCode.NOT_AUTHORISED)
_LABEL: Final = "org.p2pcollab"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A daemon that is to run by itself."""

    #: Of the unit, without its ending.
    name: str
    #: The interpreter that has p2pcollab.
    python: Path
    #: State folder; it goes on with the run there.
    state: Path

    def __post_init__(self) -> None:
        if not self.name or not all(part.isalnum() and part.isascii() for part in self.name.split("-")):
            raise UsageError(
                f"{self.name!r} is no name for a service", "use letters, digits and hyphens between them"
            )
        for path in (self.python, self.state):
            if not str(path).isprintable():
                raise UsageError(f"the path {str(path)!r} cannot be written into a unit file")
        if set("'\"\\") & set(str(self.python)):
            # systemd takes no program of such a name, however it is quoted.
            raise UsageError(
                f"systemd starts no program in {self.python.parent}", "install p2pcollab in a plain path"
            )

    @property
    def command(self) -> tuple[str, ...]:
        """What is started."""
        return (str(self.python), "-m", "p2pcollab.daemon")

    @property
    def options_file(self) -> Path:
        """The daemon's standard input: its options."""
        return self.state / f"{self.name}.service.json"

    @property
    def options(self) -> bytes:
        """The options' line. The run, its data and how this device takes part are what was given before."""
        return json.dumps({"mode": "resume", "state": str(self.state)}).encode() + b"\n"

    @property
    def log(self) -> Path:
        """The daemon's log."""
        return self.state / LOG_NAME

    @property
    def label(self) -> str:
        """launchd's name for it."""
        return f"{_LABEL}.{self.name}"


def systemd_unit(service: Service) -> str:
    """The unit file."""
    lasting = " ".join(str(int(code)) for code in _LASTING)
    return f"""\
[Unit]
Description=p2pcollab: train one model together with the devices of this network
StartLimitIntervalSec=600
StartLimitBurst=20

[Service]
Type=notify
ExecStart={_quoted(service.command[0])} {" ".join(service.command[1:])}
StandardInput=file:{_plain(service.options_file)}
StandardOutput=journal
StandardError=append:{_plain(service.log)}
WorkingDirectory={_plain(service.state)}
WatchdogSec={WATCHDOG_S}
Restart=on-failure
RestartSec={RESTART_S}
RestartPreventExitStatus={lasting}
TimeoutStartSec={_START_S}
TimeoutStopSec={_STOP_S}
KillMode=mixed

[Install]
WantedBy=default.target
"""


def launchd_plist(service: Service) -> bytes:
    """The agent's property list. launchd has no watchdog, so the daemon watches itself."""
    agent: dict[str, Any] = {
        "Label": service.label,
        "ProgramArguments": list(service.command),
        "StandardInPath": str(service.options_file),
        "StandardOutPath": str(service.log),
        "StandardErrorPath": str(service.log),
        "WorkingDirectory": str(service.state),
        "EnvironmentVariables": {SELF_WATCH_VARIABLE: str(WATCHDOG_S)},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": max(10, RESTART_S),
        "ExitTimeOut": _STOP_S,
        "ProcessType": "Background",
    }
    return plistlib.dumps(agent, sort_keys=False)


def _plain(path: Path) -> str:
    """A path as the whole rest of a line: only % has a meaning there."""
    return str(path).replace("%", "%%")


def _quoted(word: str) -> str:
    """The program of a command line: % stands for specifiers there, and $ for nothing but itself."""
    return f'"{word.replace("%", "%%")}"'
