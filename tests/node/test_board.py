"""The board between real p2pd processes on 127.0.0.1: what spreads, what heals, what an insider cannot do."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer
from loopback import NAME, Device, devices, fresh_keys

from p2pcollab import limits
from p2pcollab.errors import PeerError
from p2pcollab.keys import Identity
from p2pcollab.presence import RECORD_TTL_S, record_expiry
from p2pcollab.records import BOARD_DEVICES, seal_record


def test_every_device_reads_the_record_of_every_device(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, keys) as group:
            for index, device in enumerate(group):
                assert await device.publish(name=f"device {index}") >= 1
            expected = {device.identity.device: f"device {index}" for index, device in enumerate(group)}
            for device in group:
                assert await device.names() == expected
            await group[1].publish(name="renamed", state="left")
            for device in group:
                assert (await device.names())[group[1].identity.device] == "renamed"

    asyncio.run(run())


def test_what_was_published_alone_is_there_when_devices_meet(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, meet=False) as (first, second):
            assert await first.publish() == 0
            assert await second.publish() == 0
            assert len(await first.names()) == len(await second.names()) == 1
            assert await second.board.meet(first.transport.address)
            assert len(await first.names()) == len(await second.names()) == 2

    asyncio.run(run())


def test_a_partition_merges_once_one_device_remembers_one_address(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, keys, keys, meet=False) as group:
            assert await group[1].board.meet(group[0].transport.address)
            assert await group[3].board.meet(group[2].transport.address)
            for device in group:
                await device.publish()
            assert [len(await device.names()) for device in group] == [2, 2, 2, 2]
            group[3].transport.book.learn(group[1].transport.address)
            assert await group[3].board.keep_alive() == 1
            assert [len(await device.names()) for device in group] == [4, 4, 4, 4]
            # Records carry addresses, so that the others find each other without help.
            for device in group:
                await device.board.keep_alive()
                assert len(device.board.neighbours) == 3

    asyncio.run(run())


def test_the_board_goes_on_after_its_p2pd_was_killed(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, keys) as group:
            for device in group:
                await device.publish()
            struck = group[0]
            assert len(await struck.names()) == 3
            os.kill(struck.transport.p2pd_pid or 0, signal.SIGKILL)
            await struck.transport.died.wait()
            assert await struck.publish() == 0, "a store without p2pd is not believed"
            assert len(await struck.names()) == 3, "what was known is known"
            await struck.transport.restart()
            await struck.board.rebind()
            assert await struck.publish(name="back again") == 2
            for device in group:
                assert (await device.names())[struck.identity.device] == "back again"

    asyncio.run(run())


def test_clocks_that_differ_by_minutes_do_no_harm(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, keys, meet=False) as (first, late, early):
            late.clock_off_s, early.clock_off_s = -120.0, 120.0
            for device in (late, early):
                assert await device.board.meet(first.transport.address)
            for device in (first, late, early):
                await device.publish()
            for device in (first, late, early):
                assert len(await device.names()) == 3

    asyncio.run(run())


def test_beats_rise_whatever_the_clock_does(tmp_path: Path) -> None:
    device = Device(fresh_keys(), tmp_path / "device")
    now = 1_800_000_000.0
    device.clock_off_s = 0.0
    device.board._clock = lambda: now
    beats = [device.board.next_beat() for _ in range(3)]
    now -= 100
    beats += [device.board.next_beat() for _ in range(3)]
    assert beats == sorted(set(beats))
    now -= 2 * limits.CLOCK_SKEW_S_MAX
    assert record_expiry(device.board.next_beat()) == now + RECORD_TTL_S, (
        "others would refuse a record so far ahead"
    )


def test_an_observer_sees_and_is_not_relied_on(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (first, second):
            await first.publish()
            await second.publish()
            watcher = Device(keys, tmp_path / "watcher", observer=True)
            await watcher.transport.start()
            try:
                await watcher.board.start()
                assert await watcher.board.meet(first.transport.address)
                assert len(await watcher.names()) == 2
                assert watcher.transport.peer_id not in first.board.neighbours
            finally:
                await watcher.board.stop()
                await watcher.transport.stop()

    asyncio.run(run())


async def _store(attacker: Device, victim: Device, key: Any, subkey: Any, value: Any, expires: float) -> bool:
    """What an insider with a changed program can send."""
    answer = await attacker.board._node.protocol.call_store(
        PeerID.from_base58(victim.transport.peer_id), [key], [value], [expires], [subkey]
    )
    return answer == [True]


def test_an_insider_stores_nothing_but_records_of_their_authors(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (victim, insider):
            await victim.publish(name="older")
            old, old_sealed = victim.record(name="older"), victim.board.sealed
            await victim.publish(name="newer")
            protocol = victim.board._node.protocol
            key, target = DHTID.generate(keys.board_name(BOARD_DEVICES)), victim.identity.device
            mine = insider.record(name="mine")
            sealed = MSGPackSerializer.dumps(seal_record(keys, insider.identity, mine))
            own, until = insider.identity.device, record_expiry(mine.beat)
            old_value = MSGPackSerializer.dumps(old_sealed)

            assert not await _store(insider, victim, key, target, sealed, until), "in another's name"
            assert not await _store(insider, victim, key, target, old_value, record_expiry(old.beat) + 60), (
                "replayed"
            )
            assert not await _store(insider, victim, key, own, sealed, until + 1), "valid for longer"
            assert not await _store(insider, victim, key, own, sealed, float("inf")), "valid for ever"
            assert not await _store(insider, victim, key, None, sealed, until), "in place of the dictionary"
            assert not await _store(insider, victim, key, own, b"\xc1", until), "not bytes"
            assert not await _store(insider, victim, key, "x" * 32, sealed, until), "no device"
            assert not await _store(insider, victim, DHTID.generate("other"), own, sealed, until), "elsewhere"
            assert list(dict(protocol.storage.items())) == [key]
            assert (await insider.names())[target] == "newer"

            assert await _store(insider, victim, key, own, sealed, until), "its own record is welcome"

    asyncio.run(run())


def test_one_bad_record_in_an_answer_does_not_hide_the_good_ones(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (holder, reader):
            await holder.publish()
            await reader.publish()
            protocol = holder.board._node.protocol
            key = DHTID.generate(keys.board_name(BOARD_DEVICES))
            stored = protocol.storage.get(key).value
            assert isinstance(stored, DictionaryDHTValue)
            stored.store("f" * 32, MSGPackSerializer.dumps(b"rubbish"), holder.clock() + 100)
            stored.store(7, b"", holder.clock() + 1e9)
            stored.maxsize = 0
            reader.board._newest.clear()
            assert set((await reader.names()).values()) == {NAME}
            assert len(await reader.names()) == 2

    asyncio.run(run())


def test_a_node_cannot_choose_its_place_or_take_several(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, meet=False) as (victim, insider):
            await insider.transport.connect(victim.transport.address)
            protocol = insider.board._node.protocol
            for place in range(5):
                protocol.node_info.node_id = DHTID.generate(f"place {place}").to_bytes()
                await protocol.call_ping(PeerID.from_base58(victim.transport.peer_id))
            assert victim.board.neighbours == ()

    asyncio.run(run())


def test_invented_devices_stop_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(limits, "DEVICES_MAX", 5)
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (victim, insider):
            await victim.publish()
            key = DHTID.generate(keys.board_name(BOARD_DEVICES))
            accepted = 0
            for _ in range(10):
                invented = Identity.create()
                record = insider.record(device=invented.device)
                sealed = MSGPackSerializer.dumps(seal_record(keys, invented, record))
                accepted += await _store(
                    insider, victim, key, record.device, sealed, record_expiry(record.beat)
                )
            assert accepted == 4
            assert len(await victim.names()) == 5
            with pytest.raises(PeerError, match="devices already"):
                last = Identity.create()
                victim.board.learn(seal_record(keys, last, insider.record(device=last.device)), last.device)

    asyncio.run(run())


def test_addresses_in_a_record_count_only_if_they_are_its_authors(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (reader, insider):
            stranger = Identity.create().peer_id
            own = insider.transport.address
            await insider.publish(
                addresses=(
                    f"/ip4/127.0.0.1/tcp/4001/p2p/{stranger}",
                    f"/ip4/192.0.2.7/tcp/4001/p2p/{own.peer}",
                    f"/ip4/224.0.0.1/tcp/4001/p2p/{own.peer}",
                    "/dns4/example.org/tcp/443",
                    str(own),
                )
            )
            await reader.board.read()
            assert reader.transport.known_addresses == (own,)

    asyncio.run(run())


def test_a_record_that_came_by_another_way_is_never_older_than_the_boards(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (reader, writer):
            await writer.publish(name="older")
            older = writer.board.sealed
            await writer.publish(name="newer")
            assert (await reader.names())[writer.identity.device] == "newer"
            reader.board.learn(older, writer.identity.device)
            assert (await reader.names())[writer.identity.device] == "newer"
            newest = writer.record(name="newest")
            reader.board.learn(seal_record(keys, writer.identity, newest), writer.identity.device)
            assert (await reader.names())[writer.identity.device] == "newest"
            with pytest.raises(PeerError):
                reader.board.learn(older[:-1] + b"\x00", writer.identity.device)

    asyncio.run(run())
