"""Which interface is chosen, and which hosts may be dialled from it."""

from __future__ import annotations

import pytest

from p2pcollab.daemon import interfaces
from p2pcollab.daemon.interfaces import Interface, choose_interface, list_interfaces
from p2pcollab.errors import UsageError

LOOPBACK = Interface(name="lo", address="127.0.0.1", prefix_bits=8)
DOCKER = Interface(name="docker0", address="172.17.0.1", prefix_bits=16)
WIFI = Interface(name="wlan0", address="192.168.7.20", prefix_bits=24)
CABLE = Interface(name="eth0", address="10.1.2.3", prefix_bits=16)
UNCONFIGURED = Interface(name="eth1", address="169.254.3.4", prefix_bits=16)
VPN = Interface(name="tun0", address="10.8.0.2", prefix_bits=24)
ALL = (LOOPBACK, DOCKER, UNCONFIGURED, VPN, WIFI, CABLE)


def test_this_device_has_loopback_and_it_is_listed_last() -> None:
    assert list_interfaces()[-1].is_loopback


@pytest.mark.parametrize("outward", [WIFI, CABLE])
def test_the_interface_of_the_default_route_is_chosen(
    monkeypatch: pytest.MonkeyPatch, outward: Interface
) -> None:
    monkeypatch.setattr(interfaces, "_outward_address", lambda: outward.address)
    assert choose_interface(None, ALL) == outward


@pytest.mark.parametrize("outward", [None, VPN.address, DOCKER.address])
def test_tunnels_and_containers_are_not_the_lan(monkeypatch: pytest.MonkeyPatch, outward: str | None) -> None:
    monkeypatch.setattr(interfaces, "_outward_address", lambda: outward)
    assert choose_interface(None, ALL) in (WIFI, CABLE)
    assert choose_interface(None, (LOOPBACK, DOCKER, UNCONFIGURED)) == UNCONFIGURED


@pytest.mark.parametrize("wanted", ["wlan0", "192.168.7.20"])
def test_what_a_person_names_is_taken(wanted: str) -> None:
    assert choose_interface(wanted, ALL) == WIFI


def test_loopback_is_used_only_when_it_is_named() -> None:
    assert choose_interface("lo", ALL) == choose_interface("127.0.0.1", ALL) == LOOPBACK
    with pytest.raises(UsageError, match="on no network"):
        choose_interface(None, (LOOPBACK,))


def test_an_unknown_interface_is_answered_with_the_choice() -> None:
    with pytest.raises(UsageError, match=r"wlan0 \(192\.168\.7\.20\)"):
        choose_interface("wlan1", ALL)


@pytest.mark.parametrize(
    ("host", "reachable"),
    [
        ("192.168.7.9", True),
        ("192.168.7.0", False),
        ("192.168.7.255", False),
        ("10.0.0.1", True),
        ("172.31.255.1", True),
        ("169.254.3.4", True),
        ("172.32.0.1", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("198.51.100.7", False),
        ("203.0.113.9", False),
        ("0.1.2.3", False),
        ("240.0.0.1", False),
        ("127.0.0.1", False),
        ("8.8.8.8", False),
        ("0.0.0.0", False),
        ("255.255.255.255", False),
        ("224.0.0.251", False),
        ("::1", False),
        ("localhost", False),
        ("", False),
    ],
)
def test_hosts_that_a_stranger_names_are_dialled_only_in_private_networks(host: str, reachable: bool) -> None:
    assert WIFI.may_reach(host) is reachable


def test_loopback_and_the_lan_do_not_mix() -> None:
    assert LOOPBACK.may_reach("127.0.0.1")
    assert not LOOPBACK.may_reach("192.168.7.9")
