"""Which network interface, and which of its IPv4 addresses, the daemon uses."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import ifaddr

from ..errors import UsageError

#: Where a packet to the outside would go tells the interface of the default route. Connecting a UDP socket
#: sends nothing.
_OUTSIDE: Final = ("198.51.100.1", 9)
#: What a LAN may be (RFC 1918, RFC 3927). `is_private` means more: networks for documentation and benchmarks
#: and all of 0.0.0.0/8 are "private" too, and packets to them leave by the default route.
_PRIVATE: Final = tuple(
    map(ipaddress.IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"))
)
#: Interfaces of containers, virtual machines and tunnels: other devices of the LAN are hardly behind them.
_VIRTUAL: Final = (
    *("docker", "br-", "veth", "cni", "flannel", "lxc"),
    *("virbr", "vmnet", "vboxnet"),
    *("tun", "tap", "utun", "wg", "tailscale", "zt"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """An IPv4 address of this device, and the network it is on."""

    name: str
    #: Dotted IPv4.
    address: str
    #: Leading bits of the address that name the network.
    prefix_bits: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this device can reach it."""
        return ipaddress.IPv4Address(self.address).is_loopback

    @property
    def is_virtual(self) -> bool:
        """Whether containers, virtual machines or a tunnel are behind it, rather than a LAN."""
        return self.name.startswith(_VIRTUAL)

    def may_reach(self, host: str) -> bool:
        """Whether a host that a stranger named may be dialled from here.

        Addresses come from announcements that anyone can send: one outside the network, or on this device's
        own loopback, would have us dial on the stranger's behalf.
        """
        try:
            address = ipaddress.IPv4Address(host)
        except ValueError:
            return False
        if address.is_loopback or self.is_loopback:
            return address.is_loopback and self.is_loopback
        network = ipaddress.IPv4Network(f"{self.address}/{self.prefix_bits}", strict=False)
        if address in network:
            return (
                address not in (network.network_address, network.broadcast_address) or network.prefixlen > 30
            )
        return any(address in private for private in _PRIVATE)


def list_interfaces() -> tuple[Interface, ...]:
    """All IPv4 addresses of this device, loopback last."""
    found = [
        Interface(name=adapter.name, address=ip.ip, prefix_bits=ip.network_prefix)
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if ip.is_IPv4
    ]
    return tuple(sorted(found, key=lambda interface: interface.is_loopback))


def choose_interface(wanted: str | None = None, available: Sequence[Interface] | None = None) -> Interface:
    """The interface that a person named, or the one that leads to the LAN.

    Args:
        wanted: name (`eth0`) or IPv4 address; loopback is used only when it is named here.
        available: what to choose from; this device's interfaces if not given.

    Raises:
        UsageError: there is no such interface, or none leads to a network.
    """
    interfaces = list_interfaces() if available is None else tuple(available)
    if wanted is not None:
        for interface in interfaces:
            if wanted in (interface.address, interface.name):
                return interface
        raise UsageError(f"this device has no interface or IPv4 address {wanted!r}", _choices(interfaces))
    outward = _outward_address()
    candidates = [interface for interface in interfaces if not interface.is_loopback]
    if not candidates:
        raise UsageError(
            "this device is on no network: it has no IPv4 address but loopback",
            "connect it, or try things out on this device alone with `--interface 127.0.0.1`",
        )
    return min(candidates, key=lambda interface: _rank(interface, outward))


def _rank(interface: Interface, outward: str | None) -> tuple[bool, bool, bool, bool]:
    """Smaller is better: private before public, real before virtual, the default route's before others."""
    address = ipaddress.IPv4Address(interface.address)
    return (
        interface.is_virtual,
        address.is_link_local,
        not address.is_private,
        interface.address != outward,
    )


def _outward_address() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_OUTSIDE)
        except OSError:
            return None
        address: str = probe.getsockname()[0]
        return address


def _choices(interfaces: Sequence[Interface]) -> str:
    listed = ", ".join(f"{interface.name} ({interface.address})" for interface in interfaces)
    return f"choose one of {listed}" if listed else "no interface has an IPv4 address"
