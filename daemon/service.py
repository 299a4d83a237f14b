"""Having this system start the daemon by itself, and start it again when it fails or hangs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, Protocol

from ..errors import P2PCollabError, UsageError
from ..files import write_atomic
from .service_files import Service, launchd_plist, systemd_unit

_ANSWER_S: Final = 60.0


class Manager(Protocol):
    """What starts services here."""

    #: For people.
    name: str

    def file_of(self, service: Service) -> Path:
        """Where the service is described."""

    def contents(self, service: Service) -> bytes:
        """Its description."""

    def check(self) -> None:
        """See whether the manager is there.

        Raises:
            P2PCollabError: it is not.
        """

    def start(self, service: Service) -> None:
        """Start the service now and from now on."""

    def stop(self, service: Service) -> None:
        """Stop the service, and start it no more."""

    def active(self, service: Service) -> bool:
        """Whether it runs."""


class Systemd:
    """The user's own systemd: no root is needed."""

    name = "systemd"

    def file_of(self, service: Service) -> Path:
        """Where the service is described."""
        config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
        return Path(config).expanduser() / "systemd" / "user" / f"{service.name}.service"

    def contents(self, service: Service) -> bytes:
        """Its unit file."""
        return systemd_unit(service).encode()

    def check(self) -> None:
        """See whether a user's systemd answers."""
        if shutil.which("systemctl") is None:
            raise P2PCollabError("there is no systemd on this system", _BY_HAND)
        answer = _run("systemctl", "--user", "show-environment")
        if answer.returncode:
            reason = answer.stderr.strip().splitlines()[:1] or ["it gives no reason"]
            raise P2PCollabError(f"this user's systemd does not answer: {reason[0]}", _BY_HAND)

    def start(self, service: Service) -> None:
        """Start the service now and from now on."""
        self._order("daemon-reload")
        self._order("enable", "--now", f"{service.name}.service")

    def stop(self, service: Service) -> None:
        """Stop the service, and start it no more."""
        self._order("disable", "--now", f"{service.name}.service")

    def active(self, service: Service) -> bool:
        """Whether it runs."""
        if shutil.which("systemctl") is None:
            return False
        return _run("systemctl", "--user", "is-active", "--quiet", f"{service.name}.service").returncode == 0

    def _order(self, *words: str) -> None:
        _order("systemctl", "--user", *words)


class Launchd:
    """The user's agents on macOS."""

    name = "launchd"

    def file_of(self, service: Service) -> Path:
        """Where the service is described."""
        return Path("~/Library/LaunchAgents").expanduser() / f"{service.label}.plist"

    def contents(self, service: Service) -> bytes:
        """Its property list."""
        return launchd_plist(service)

    def check(self) -> None:
        """See whether launchctl is there."""
        if shutil.which("launchctl") is None:
            raise P2PCollabError("there is no launchd on this system", _BY_HAND)

    def start(self, service: Service) -> None:
        """Start the service now and from now on."""
        _order("launchctl", "bootstrap", self._domain, str(self.file_of(service)))

    def stop(self, service: Service) -> None:
        """Stop the service, and start it no more."""
        _order("launchctl", "bootout", f"{self._domain}/{service.label}")

    def active(self, service: Service) -> bool:
        """Whether it runs."""
        if shutil.which("launchctl") is None:
            return False
        return _run("launchctl", "print", f"{self._domain}/{service.label}").returncode == 0

    @property
    def _domain(self) -> str:
        return f"gui/{os.getuid()}"


_BY_HAND: Final = (
    "print the file with `p2pcollab service install --print`, and give it to what starts services here"
)


def manager_here() -> Manager:
    """What starts services on this system."""
    return Launchd() if sys.platform == "darwin" else Systemd()


def install(service: Service, manager: Manager) -> Path:
    """Have the service started now, and whenever the user's session begins; the file that says so.

    Raises:
        UsageError: the state folder holds no run to go on with.
        StorageError: a file was not written.
        P2PCollabError: the manager is not there, or refuses.
    """
    if not any(service.state.glob("runs/*/spec.json")):
        raise UsageError(
            f"the state folder {service.state} holds no run yet",
            "join one first: `p2pcollab join --code P2P-…`",
        )
    manager.check()
    path = manager.file_of(service)
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True)
    write_atomic(service.options_file, service.options, mode=0o600)
    write_atomic(path, manager.contents(service))
    manager.start(service)
    return path


def uninstall(service: Service, manager: Manager) -> Path:
    """Stop the service and forget it; the file that is gone. The run and its state stay.

    Raises:
        UsageError: it is not installed.
        P2PCollabError: the manager is not there, or refuses.
    """
    path = manager.file_of(service)
    if not path.exists():
        raise UsageError(f"no service {service.name!r} is installed: there is no {path}")
    manager.check()
    manager.stop(service)
    path.unlink()
    service.options_file.unlink(missing_ok=True)
    return path


def status(service: Service, manager: Manager) -> dict[str, Any]:
    """Whether the service is installed and runs."""
    path = manager.file_of(service)
    return {
        "name": service.name,
        "manager": manager.name,
        "file": str(path),
        "installed": path.exists(),
        "active": path.exists() and manager.active(service),
    }


def _order(*command: str) -> None:
    done = _run(*command)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise P2PCollabError(f"`{' '.join(command)}` failed: {reason[0] if reason else 'without a reason'}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_S)
    except subprocess.TimeoutExpired as error:
        raise P2PCollabError(f"`{' '.join(command)}` did not answer in {_ANSWER_S:.0f} s") from error
