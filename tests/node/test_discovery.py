"""Discovery over real multicast on the loopback interface, and what hostile announcements come to."""

from __future__ import annotations

import asyncio
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import DNSPointer, IPVersion, ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from p2pcollab import limits
from p2pcollab.daemon import discovery as discovery_module
from p2pcollab.daemon.discovery import SERVICE, Announcement, Discovery, Found, parse_announcement
from p2pcollab.daemon.interfaces import Interface
from p2pcollab.errors import PeerError
from p2pcollab.keys import Identity
from p2pcollab.run import PROTOCOL_VERSION

LOOPBACK = Interface(name="lo", address="127.0.0.1", prefix_bits=8)
LAN = Interface(name="eth0", address="192.168.7.20", prefix_bits=24)
PEER = Identity.from_bytes(bytes(32)).peer_id
GOOD = {b"v": b"1", b"run": b"a" * 14, b"name": b"pets", b"peer": PEER.encode(), b"port": b"4001"}


def _prefix() -> str:
    # Other tests on this machine share the multicast group.
    return secrets.token_hex(7)


async def _first(discovery: Discovery, wanted: Callable[[Found], bool] = lambda found: True) -> Found:
    async def search() -> Found:
        async for found in discovery:
            if wanted(found):
                return found
        raise AssertionError("discovery ended")

    return await asyncio.wait_for(search(), 10)


def test_devices_of_a_run_find_each_other_across_processes() -> None:
    async def run() -> None:
        prefix, peers = _prefix(), [Identity.create().peer_id for _ in range(3)]
        script = Path(__file__).with_name("announce.py")
        announcers = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, str(script), prefix, peer, str(4001 + index)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            for index, peer in enumerate(peers)
        ]
        for announcer in announcers:
            assert announcer.stdout is not None
            assert await announcer.stdout.readline() == b"announced\n"
        discovery = Discovery(LOOPBACK, Identity.create().peer_id, prefix)
        await discovery.start()
        try:
            missing = set(peers)
            while missing:
                found = await _first(discovery)
                assert found.address.host == "127.0.0.1"
                assert found.address.port == 4001 + peers.index(found.address.peer)
                assert (found.run_prefix, found.name, found.version) == (prefix, "pets", PROTOCOL_VERSION)
                missing.discard(found.address.peer)
            assert set(discovery.found) == set(peers)
        finally:
            await discovery.stop()
            for announcer in announcers:
                await announcer.communicate(b"")
                assert announcer.returncode == 0

    asyncio.run(run())


def test_neither_ourselves_nor_other_runs_are_reported() -> None:
    async def run() -> None:
        prefix, other_prefix = _prefix(), _prefix()
        ours, other, theirs = (Identity.create().peer_id for _ in range(3))
        searching = Discovery(LOOPBACK, ours, prefix)
        elsewhere, beside = Discovery(LOOPBACK, other), Discovery(LOOPBACK, theirs)
        await elsewhere.start(Announcement(run_prefix=other_prefix, name="x", peer=other, port=1))
        await searching.start(Announcement(run_prefix=prefix, name="x", peer=ours, port=2))
        await beside.start(Announcement(run_prefix=prefix, name="x", peer=theirs, port=3))
        try:
            assert (await _first(searching)).address.peer == theirs
            # By the time that somebody without a filter sees all three, it has seen nobody else.
            seen: set[str] = set()
            watcher = Discovery(LOOPBACK, Identity.create().peer_id)
            await watcher.start()
            while not {ours, other, theirs} <= seen:
                seen.add((await _first(watcher)).address.peer)
            await watcher.stop()
            assert set(searching.found) == {theirs}
        finally:
            for discovery in (searching, elsewhere, beside):
                await discovery.stop()

    asyncio.run(run())


def test_a_question_is_answered_to_its_own_port_by_every_device_of_one_machine() -> None:
    async def run() -> None:
        prefix, peers = _prefix(), [Identity.create().peer_id for _ in range(3)]
        announcing = [Discovery(LOOPBACK, peer) for peer in peers]
        for discovery, peer in zip(announcing, peers, strict=True):
            await discovery.start(Announcement(run_prefix=prefix, name="pets", peer=peer, port=4001))
        loop, missing = asyncio.get_running_loop(), {f"{prefix}-{peer[-12:]}" for peer in peers}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.setblocking(False)
            asking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            asking.bind(("127.0.0.1", 0))
            asking.sendto(discovery_module._question(), ("224.0.0.251", 5353))
            while missing:
                answer = await asyncio.wait_for(loop.sock_recv(asking, 9000), 10)
                missing = {name for name in missing if name.encode() not in answer}
        for discovery in announcing:
            await discovery.stop()

    asyncio.run(run())


def test_a_device_that_leaves_says_so() -> None:
    async def run() -> None:
        peer, prefix, gone = Identity.create().peer_id, _prefix(), asyncio.Event()

        def changed(zeroconf: Any, service_type: str, name: str, state_change: ServiceStateChange) -> None:
            if state_change is ServiceStateChange.Removed and prefix in name:
                gone.set()

        watcher = AsyncZeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
        browser = AsyncServiceBrowser(watcher.zeroconf, SERVICE, handlers=[changed])
        leaving = Discovery(LOOPBACK, peer, prefix)
        await leaving.start(Announcement(run_prefix=prefix, name="pets", peer=peer, port=4001))
        finder = Discovery(LOOPBACK, Identity.create().peer_id, prefix)
        await finder.start()
        await _first(finder)
        await finder.stop()
        await leaving.stop()
        await asyncio.wait_for(gone.wait(), 10)
        await browser.async_cancel()
        await watcher.async_close()
        assert [found async for found in leaving] == []

    asyncio.run(run())


def test_findings_come_again_with_every_question(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(discovery_module, "BROWSE_AGAIN_S", 0.05)
        peer, prefix = Identity.create().peer_id, _prefix()
        announcing, finder = Discovery(LOOPBACK, peer), Discovery(LOOPBACK, Identity.create().peer_id, prefix)
        await announcing.start(Announcement(run_prefix=prefix, name="pets", peer=peer, port=4001))
        await finder.start()
        for _ in range(3):
            await _first(finder)
        await finder.stop()
        await announcing.stop()

    asyncio.run(run())


def test_a_new_port_replaces_the_old_one() -> None:
    async def run() -> None:
        peer, prefix = Identity.create().peer_id, _prefix()
        announcing, finder = Discovery(LOOPBACK, peer), Discovery(LOOPBACK, Identity.create().peer_id, prefix)
        announcement = Announcement(run_prefix=prefix, name="pets", peer=peer, port=4001)
        await announcing.start(announcement)
        await finder.start()
        await _first(finder, lambda found: found.address.port == 4001)
        await announcing.announce(Announcement(run_prefix=prefix, name="pets", peer=peer, port=4002))
        await _first(finder, lambda found: found.address.port == 4002)
        await finder.stop()
        await announcing.stop()

    asyncio.run(run())


def _info(
    properties: dict[bytes, bytes | None] | bytes, addresses: tuple[str, ...] = ("192.168.7.9",)
) -> AsyncServiceInfo:
    return AsyncServiceInfo(
        SERVICE,
        f"x.{SERVICE}",
        port=4001,
        addresses=[socket.inet_aton(address) for address in addresses],
        properties=properties,
    )


def test_a_good_announcement_is_understood() -> None:
    found = parse_announcement(_info(GOOD), LAN)
    assert (found.run_prefix, found.name, found.version) == ("a" * 14, "pets", 1)
    assert str(found.address) == f"/ip4/192.168.7.9/tcp/4001/p2p/{PEER}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"run", b"A" * 14),
        (b"run", b"a" * 13),
        (b"run", "\u0661".encode() * 14),
        (b"run", None),
        (b"v", b"-1"),
        (b"v", "\u0661".encode()),
        (b"v", b"1" * 200),
        (b"port", b"0"),
        (b"port", b"65536"),
        (b"port", b"1e3"),
        (b"name", b""),
        (b"name", b"n" * (limits.NAME_CHARS_MAX + 1)),
        (b"name", b"\xff\xfe"),
        (b"peer", b"QmViufsa9s6DEiNKgipo7BXXYQrs2CjEsptddGHbNQLJMe"),
        (b"peer", PEER.encode() + b"/../.."),
        (b"peer", b"1" * 200),
        (b"peer", None),
    ],
)
def test_a_malformed_announcement_is_dropped(key: bytes, value: bytes | None) -> None:
    with pytest.raises(PeerError):
        parse_announcement(_info({**GOOD, key: value}), LAN)


@pytest.mark.parametrize("address", ["127.0.0.1", "8.8.8.8", "0.0.0.0", "224.0.0.251", "192.168.7.255"])
def test_nobody_has_us_dial_outside_of_the_lan(address: str) -> None:
    with pytest.raises(PeerError):
        parse_announcement(_info(GOOD, (address,)), LAN)


def test_loopback_reaches_loopback_only() -> None:
    assert parse_announcement(_info(GOOD, ("192.168.7.9", "127.0.0.1")), LOOPBACK).address.host == "127.0.0.1"
    with pytest.raises(PeerError):
        parse_announcement(_info(GOOD), LOOPBACK)


def test_a_name_cannot_write_to_a_terminal() -> None:
    name = "pets\x1b[2J\u202e\n"
    found = parse_announcement(_info({**GOOD, b"name": name.encode()}), LAN)
    assert found.name == "pets?[2J??"


def test_a_flood_of_text_is_dropped() -> None:
    with pytest.raises(PeerError):
        parse_announcement(_info({**GOOD, **{b"%d" % index: b"x" * 200 for index in range(10)}}), LAN)


@given(
    st.one_of(
        st.binary(max_size=300),
        st.dictionaries(
            st.sampled_from(sorted(GOOD)), st.one_of(st.none(), st.binary(max_size=80)), max_size=5
        ).map(lambda changes: GOOD | changes),
    )
)
def test_an_announcement_is_a_finding_or_a_peer_error_and_nothing_else(text: Any) -> None:
    try:
        found = parse_announcement(_info(text), LAN)
    except PeerError:
        return
    assert LAN.may_reach(found.address.host)
    assert 0 < found.address.port < 65536
    assert found.name.isprintable()


def test_a_flood_of_announcements_does_not_fill_memory() -> None:
    """zeroconf keeps whatever anybody announces for as long as it was told to, however much that is."""

    async def run() -> None:
        discovery = Discovery(LOOPBACK, PEER)
        await discovery.start()
        try:
            assert discovery._zeroconf is not None
            cache = discovery._zeroconf.zeroconf.cache
            flood = [
                DNSPointer(SERVICE, 12, 1, 4500, f"{number:x}.{SERVICE}")
                for number in range(limits.MDNS_RECORDS_MAX + 100)
            ]
            cache.async_add_records(flood)
            assert discovery.held()["mdns_records"] > limits.MDNS_RECORDS_MAX

            async def emptied() -> None:
                while discovery.held()["mdns_records"] > limits.MDNS_RECORDS_MAX:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

            await asyncio.wait_for(emptied(), 10)
        finally:
            await discovery.stop()

    asyncio.run(run())
