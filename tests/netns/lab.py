"""Hosts in network namespaces on one machine: each has its own address on a LAN, and can be cut off from it.

All traffic stays inside namespaces that the lab made itself: the switch is a namespace of its own too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from types import TracebackType


def why_not() -> str | None:
    """Why the lab cannot be built here; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program `ip` (package iproute2) is not installed"
    probe = subprocess.run(["ip", "netns", "add", "p2pc-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"this kernel lets nobody make a network namespace: {probe.stderr.strip()}"
    _ip("netns", "del", "p2pc-probe")
    return None


@dataclass(frozen=True, slots=True)
class Host:
    """A host of the lab."""

    namespace: str
    address: str
    #: Name of the switch's end of the host's cable.
    cable: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to run it on this host."""
        return ("ip", "netns", "exec", self.namespace)


class Lab:
    """`hosts` hosts on one switch; everything is gone when the block ends."""

    def __init__(self, hosts: int) -> None:
        self._tag = f"p2pc-{os.getpid()}"
        self._switch = f"{self._tag}-sw"
        self.hosts = tuple(
            Host(namespace=f"{self._tag}-h{n}", address=f"10.77.0.{n}", cable=f"port{n}")
            for n in range(1, hosts + 1)
        )

    def __enter__(self) -> Lab:
        _ip("netns", "add", self._switch)
        for bridge in ("lan", "away"):
            self._on_switch("link", "add", bridge, "type", "bridge")
            self._on_switch("link", "set", bridge, "up")
        for host in self.hosts:
            _ip("netns", "add", host.namespace)
            self._on_switch(
                "link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.namespace
            )
            self._on_switch("link", "set", host.cable, "master", "lan", "up")
            for command in (
                ("link", "set", "lo", "up"),
                ("addr", "add", f"{host.address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
            ):
                _ip("-n", host.namespace, *command)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for namespace in (*(host.namespace for host in self.hosts), self._switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)

    def cut(self, host: Host) -> None:
        """Move the host's cable to a switch of its own: its link stays up, nobody hears it."""
        self._on_switch("link", "set", host.cable, "master", "away")

    def heal(self, host: Host) -> None:
        """Put the cable back."""
        self._on_switch("link", "set", host.cable, "master", "lan")

    def _on_switch(self, *command: str) -> None:
        _ip("-n", self._switch, *command)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
