"""Hosts in network namespaces on one machine: each has an address on a LAN, and can be harmed in many ways.

All traffic stays inside namespaces that the lab made itself: the switch is a namespace of its own too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import psutil

#: Names of all that a lab makes; its process id follows.
_TAG: Final = "p2pc-"
_CGROUPS: Final = Path("/sys/fs/cgroup")
_PERIOD_US: Final = 100_000
#: Debian's package of each program.
_PACKAGES: Final = {"ip": "iproute2", "tc": "iproute2", "iptables": "iptables", "ethtool": "ethtool"}
_FAKETIME: Final = "faketime/libfaketimeMT.so.1"


def why_not(programs: Iterable[str] = ("ip",)) -> str | None:
    """Why the lab cannot be built here with these programs; None if it can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root: run it with sudo"
    for program in programs:
        if shutil.which(program) is None:
            return f"the program `{program}` is missing: apt-get install {_PACKAGES[program]}"
    # A name of this process's: two that probe at once must not find each other's.
    name = f"{_TAG}{os.getpid()}-probe"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"this kernel lets nobody make a network namespace: {probe.stderr.strip()}"
    _run("ip", "netns", "del", name)
    return None


def faketime_library() -> Path | None:
    """The library that gives a program a wrong clock (Debian: libfaketime)."""
    for folder in sorted(Path("/usr/lib").glob("*-linux-gnu*")):
        if (folder / _FAKETIME).exists():
            return folder / _FAKETIME
    return None


def cpu_controller() -> Path | None:
    """Where groups with a CPU quota are made: cgroup v1's `cpu`, or the root of v2; None: nowhere."""
    if (_CGROUPS / "cpu" / "cpu.cfs_quota_us").exists() or (_CGROUPS / "cpu" / "cgroup.procs").exists():
        return _CGROUPS / "cpu"
    controllers = _CGROUPS / "cgroup.controllers"
    if controllers.exists() and "cpu" in controllers.read_text().split():
        return _CGROUPS
    return None


@dataclass(frozen=True, slots=True)
class Host:
    """A host of the lab."""

    namespace: str
    address: str
    #: Name of the switch's end of the host's cable.
    cable: str
    #: Its processes' group; None where there is no CPU controller.
    cgroup: Path | None = None

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to run it on this host."""
        inside = ("ip", "netns", "exec", self.namespace)
        if self.cgroup is None:
            return inside
        # Before the namespace is entered: `ip netns exec` mounts a /sys of its own.
        return ("/bin/sh", "-c", f'echo 0 >{self.cgroup}/cgroup.procs && exec "$@"', "sh", *inside)


class Lab:
    """`hosts` hosts on one switch; everything is gone when the block ends."""

    def __init__(self, hosts: int, *, relayed: Iterable[int] = (), quotas: bool = False) -> None:
        """
        Args:
            relayed: numbers of the hosts whose cable gets a relay in it, for `delay`.
            quotas: put each host's processes into a group whose CPU time `slow` can limit.
        """
        self._tag = f"{_TAG}{os.getpid()}"
        self._switch = f"{self._tag}-sw"
        self._relayed = frozenset(relayed)
        self._relays: dict[str, subprocess.Popen[str]] = {}
        controller = cpu_controller() if quotas else None
        self.hosts = tuple(
            Host(
                namespace=f"{self._tag}-h{n}",
                address=f"10.77.0.{n}",
                cable=f"port{n}",
                cgroup=controller / f"{self._tag}-h{n}" if controller else None,
            )
            for n in range(1, hosts + 1)
        )

    def __enter__(self) -> Lab:
        remove_leftovers()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _build(self) -> None:
        _run("ip", "netns", "add", self._switch)
        for bridge in ("lan", "away"):
            self._on_switch("ip", "link", "add", bridge, "type", "bridge")
            self._on_switch("ip", "link", "set", bridge, "up")
        for number, host in enumerate(self.hosts, start=1):
            if host.cgroup is not None:
                host.cgroup.mkdir()
            _run("ip", "netns", "add", host.namespace)
            end = f"{host.cable}r" if number in self._relayed else host.cable
            self._on_switch("ip", *_pair(end, "eth0"), "netns", host.namespace)
            if number in self._relayed:
                self._insert_relay(host, end)
            self._on_switch("ip", "link", "set", end, "up")
            self._on_switch("ip", "link", "set", host.cable, "master", "lan", "up")
            for command in (
                ("link", "set", "lo", "up"),
                ("addr", "add", f"{host.address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
            ):
                _run("ip", "-n", host.namespace, *command)

    def _insert_relay(self, host: Host, end: str) -> None:
        """A relay between the host's cable and the switch: host -- end [relay] other -- switch's port."""
        other = f"{host.cable}s"
        self._on_switch("ip", *_pair(host.cable, other))
        self._on_switch("ip", "link", "set", other, "up")
        # What a relay reads and writes has to be whole packets with valid checksums.
        for where, name in ((host.namespace, "eth0"), *((self._switch, n) for n in (end, other, host.cable))):
            features = [word for kind in ("tx", "rx", "tso", "gso", "gro") for word in (kind, "off")]
            _run("ip", "netns", "exec", where, "ethtool", "-K", name, *features)
        self._relays[host.namespace] = subprocess.Popen(
            [
                *("ip", "netns", "exec", self._switch, sys.executable),
                *(str(Path(__file__).with_name("relay.py")), end, other),
            ],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _remove(self) -> None:
        """Take all of it away, whatever else comes: a Ctrl-C now would leave half of it."""
        with _uninterrupted():
            for relay in self._relays.values():
                relay.kill()
                relay.wait()
            self._relays.clear()
            _remove_made(self._tag)

    # Faults

    def cut(self, host: Host) -> None:
        """Move the host's cable to a second switch: its link stays up, those on the first do not hear it."""
        self._on_switch("ip", "link", "set", host.cable, "master", "away")

    def heal(self, host: Host) -> None:
        """Put the cable back, and end every one-way cut and loss."""
        self._on_switch("ip", "link", "set", host.cable, "master", "lan")
        if shutil.which("iptables"):
            self._on(host, "iptables", "-F")

    def deafen(self, host: Host) -> None:
        """Nothing reaches the host any more; what it sends arrives."""
        self._on(host, "iptables", "-A", "INPUT", "-i", "eth0", "-j", "DROP")

    def mute(self, host: Host) -> None:
        """Nothing leaves the host any more; what others send arrives."""
        self._on(host, "iptables", "-A", "OUTPUT", "-o", "eth0", "-j", "DROP")

    def lose(self, host: Host, share: float) -> None:
        """Lose this share of the packets, in each direction; 0: no more than the cable does."""
        self._on(host, "iptables", "-F")
        if share:
            chance = ("-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")
            self._on(host, "iptables", "-A", "INPUT", "-i", "eth0", *chance)
            self._on(host, "iptables", "-A", "OUTPUT", "-o", "eth0", *chance)

    def limit_bandwidth(self, host: Host, kbit_s: int) -> None:
        """Let no more through, in each direction; 0: as much as the machine can."""
        for namespace, device in ((host.namespace, "eth0"), (self._switch, host.cable)):
            base = ("ip", "netns", "exec", namespace, "tc", "qdisc")
            subprocess.run([*base, "del", "dev", device, "root"], capture_output=True, check=False)
            if kbit_s:
                shape = ("rate", f"{kbit_s}kbit", "burst", "32k", "latency", "400ms")
                _run(*base, "add", "dev", device, "root", "tbf", *shape)

    def delay(self, host: Host, ms: float, jitter_ms: float) -> None:
        """Hold each packet back by so much, in each direction. The host must be `relayed`."""
        relay = self._relays[host.namespace]
        assert relay.stdin is not None
        relay.stdin.write(f"{ms / 1000} {jitter_ms / 1000}\n")
        relay.stdin.flush()

    def limit_cpu(self, host: Host, cores: float | None) -> None:
        """Give the host's processes so many cores' time; None: all there is. The lab must have quotas."""
        assert host.cgroup is not None
        quota = None if cores is None else max(1000, int(cores * _PERIOD_US))
        if (host.cgroup / "cpu.cfs_quota_us").exists():
            (host.cgroup / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (host.cgroup / "cpu.cfs_quota_us").write_text(str(quota or -1))
        else:
            (host.cgroup / "cpu.max").write_text(f"{quota or 'max'} {_PERIOD_US}")

    def plug_in(self, host: Host, address: str, device: str = "eth1") -> None:
        """Give the host a second cable to the switch, with an address of its own."""
        end = f"{host.cable}-{device}"
        self._on_switch("ip", *_pair(end, device), "netns", host.namespace)
        self._on_switch("ip", "link", "set", end, "master", "lan", "up")
        _run("ip", "-n", host.namespace, "addr", "add", f"{address}/24", "dev", device)
        _run("ip", "-n", host.namespace, "link", "set", device, "up")

    def readdress(self, host: Host, address: str) -> None:
        """Take the host's address away and give it another, as a router does when a lease of it ends."""
        _run("ip", "-n", host.namespace, "addr", "flush", "dev", "eth0")
        _run("ip", "-n", host.namespace, "addr", "add", f"{address}/24", "dev", "eth0")

    def unplug(self, host: Host, device: str = "eth0") -> None:
        """Remove one of the host's network devices."""
        _run("ip", "-n", host.namespace, "link", "del", device)

    def _on_switch(self, *command: str) -> None:
        _run("ip", "netns", "exec", self._switch, *command)

    def _on(self, host: Host, *command: str) -> None:
        _run("ip", "netns", "exec", host.namespace, *command)


def remove_leftovers() -> None:
    """Remove what labs have left that were killed before they could."""
    names = {line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.startswith(_TAG)}
    controller = cpu_controller()
    if controller is not None:
        names |= {path.name for path in controller.glob(f"{_TAG}*")}
    for tag in {"-".join(name.split("-")[:2]) for name in names}:
        pid = tag.removeprefix(_TAG)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove_made(tag)


def _remove_made(tag: str) -> None:
    namespaces = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line]
    for namespace in namespaces:
        if namespace.startswith(f"{tag}-"):
            # Another lab may be removing the same, or have done so.
            found = subprocess.run(
                ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
            )
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
    controller = cpu_controller()
    for group in controller.glob(f"{tag}-*") if controller is not None else ():
        # Its last processes may take a moment to be gone.
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            threading.Event().wait(0.1)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pair(name: str, peer: str) -> tuple[str, ...]:
    return ("link", "add", name, "type", "veth", "peer", "name", peer)


def _run(*command: str) -> str:
    """What a command prints; a failure says which it was, and why."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout
