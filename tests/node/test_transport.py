"""The transport between real p2pd processes on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from loopback import HELLO, LOOPBACK, Answers, Device, devices, fresh_keys, until, until_true

from p2pcollab import limits
from p2pcollab.daemon import transport as transport_module
from p2pcollab.daemon.calls import Counters, RefusalError, UnreachableError
from p2pcollab.daemon.p2pd import P2pdMark, end_stale_p2pd, make_socket_folder
from p2pcollab.daemon.streams import Tickets
from p2pcollab.daemon.transport import Transport
from p2pcollab.errors import IncompatibleError, NotAuthorisedError, PeerError, UsageError
from p2pcollab.keys import Identity, device_of_peer
from p2pcollab.run import ShardId
from p2pcollab.wire import Download, Earlier, Fetch


def _shard(size: int) -> tuple[str, bytes]:
    data = os.urandom(size)
    return hashlib.sha256(data).hexdigest(), data


def test_a_handler_knows_which_device_calls(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (first, second):
            reply = await second.transport.hello(first.transport.peer_id, HELLO)
            assert reply.spec == first.answers.spec
            assert first.answers.callers == [second.identity.peer_id]
            assert device_of_peer(first.answers.callers[0]) == second.identity.device

    asyncio.run(run())


def test_a_peer_says_what_it_holds_of_a_devices_work(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, meet=False) as (first, second):
            await second.transport.connect(first.transport.address)
            question = Earlier(shard=ShardId("t0"), device=second.identity.device)
            assert (await second.transport.earlier(first.transport.peer_id, question)).entry == b""
            first.answers.earlier_of["t0", second.identity.device] = b"a contribution"
            reply = await second.transport.earlier(first.transport.peer_id, question)
            assert reply.entry == b"a contribution"

    asyncio.run(run())


def test_both_ends_count_the_same_bytes(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, meet=False) as (first, second):
            await second.transport.connect(first.transport.address)
            await second.transport.hello(first.transport.peer_id, HELLO)
            digest, data = _shard(700_000)
            first.answers.shards[digest] = data
            await second.transport.fetch([first.transport.peer_id], digest, len(data))
            there, here = first.transport.counters, second.transport.counters
            assert there.bytes_sent == here.bytes_received > len(data)
            assert there.bytes_received == here.bytes_sent > 0
            assert here.board_bytes_sent == here.board_bytes_received == 0

    asyncio.run(run())


def test_a_device_with_another_join_code_is_told_so(tmp_path: Path) -> None:
    async def run() -> None:
        async with devices(tmp_path, fresh_keys(), fresh_keys(), meet=False) as (first, second):
            await second.transport.connect(first.transport.address)
            with pytest.raises(NotAuthorisedError, match="refuses our join code"):
                await second.transport.hello(first.transport.peer_id, HELLO)
            assert first.answers.callers == []
            assert first.transport.counters.refused == 1

    asyncio.run(run())


def test_a_clock_that_is_far_off_is_named_as_the_reason(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, meet=False) as (first, second):
            second.clock_off_s = 2 * limits.CLOCK_SKEW_S_MAX
            await second.transport.connect(first.transport.address)
            with pytest.raises(NotAuthorisedError, match="clock"):
                await second.transport.hello(first.transport.peer_id, HELLO)

    asyncio.run(run())


def test_a_handlers_reason_reaches_the_caller(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (first, second):
            first.answers.error = RefusalError("not-ready", "the data are being read")
            with pytest.raises(RefusalError, match="the data are being read") as refusal:
                await second.transport.hello(first.transport.peer_id, HELLO)
            assert refusal.value.code == "not-ready"
            first.answers.error = IncompatibleError("version 2 is spoken here")
            with pytest.raises(IncompatibleError, match="version 2"):
                await second.transport.hello(first.transport.peer_id, HELLO)

    asyncio.run(run())


def test_a_handler_that_never_answers_costs_its_caller_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        monkeypatch.setattr(transport_module, "CALL_S", 0.2)
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, meet=False) as (first, second):
            first.answers.stuck = True
            await second.transport.connect(first.transport.address)
            for _ in range(3):
                with pytest.raises(UnreachableError):
                    await second.transport.hello(first.transport.peer_id, HELLO)
            assert len(first.answers.callers) == 3
            first.answers.stuck = False
            assert (await second.transport.hello(first.transport.peer_id, HELLO)).spec

    asyncio.run(run())


def test_a_shard_arrives_as_it_was(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (first, second):
            for size in (1, limits.CHUNK_BYTES, 3 * limits.CHUNK_BYTES + 1):
                digest, data = _shard(size)
                first.answers.shards[digest] = data
                assert await second.transport.fetch([first.transport.peer_id], digest, size) == data
            with pytest.raises(RefusalError) as refusal:
                await second.transport.fetch([first.transport.peer_id], "0" * 64, 10)
            assert refusal.value.code == "not-found"

    asyncio.run(run())


def test_other_bytes_than_those_of_the_digest_are_never_returned(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, keys) as (liar, honest, asking):
            digest, data = _shard(500_000)
            liar.answers.shards[digest] = bytes(len(data))
            with pytest.raises(PeerError, match="not those of the digest"):
                await asking.transport.fetch([liar.transport.peer_id], digest, len(data))
            liar.answers.shards[digest] = data[:-1]
            with pytest.raises(PeerError, match="another shard"):
                await asking.transport.fetch([liar.transport.peer_id], digest, len(data))
            honest.answers.shards[digest] = data
            await asking.transport.connect(honest.transport.address)
            holders = [liar.transport.peer_id, honest.transport.peer_id]
            assert await asking.transport.fetch(holders, digest, len(data)) == data

    asyncio.run(run())


def test_what_a_dying_device_began_another_one_completes(tmp_path: Path) -> None:
    class Killing(Download):
        def feed(self, chunk: bytes) -> None:
            super().feed(chunk)
            if self.offset == 2 * limits.CHUNK_BYTES:
                os.kill(pid, signal.SIGKILL)

    digest, data = _shard(32 * limits.MIB)
    pid = 0

    async def run() -> None:
        nonlocal pid
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, keys, meet=False) as (dying, other, asking):
            dying.answers.shards[digest] = other.answers.shards[digest] = data
            pid = dying.transport.p2pd_pid or 0
            await asking.transport.connect(dying.transport.address)
            await asking.transport.connect(other.transport.address)
            download = Killing(digest, len(data))
            # A stream that breaks and one that ends early are both what a death looks like.
            with contextlib.suppress(UnreachableError):
                await asking.transport.fetch_part(dying.transport.peer_id, download)
            assert 2 * limits.CHUNK_BYTES <= download.offset < len(data)
            missing = len(data) - download.offset
            await asking.transport.fetch_part(other.transport.peer_id, download)
            assert download.finish() == data
            assert other.transport.counters.bytes_sent < missing + 1000
            with pytest.raises(UnreachableError):
                await asking.transport.hello(dying.transport.peer_id, HELLO)

    asyncio.run(run())


def test_more_shards_than_can_be_sent_at_once_are_refused_before_they_are_read() -> None:
    async def run() -> None:
        tickets = Tickets(Counters())
        for offset in range(limits.STREAMS_MAX):
            tickets.issue("peer", Fetch(digest="0" * 64, offset=offset), bytes(limits.STREAMS_MAX))
        with pytest.raises(RefusalError) as refusal:
            tickets.check_room()
        assert refusal.value.code == "busy"
        tickets.clear()
        tickets.check_room()

    asyncio.run(run())


def test_p2pd_that_is_killed_is_noticed_and_comes_back_as_the_same(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (first, second):
            address, pid = first.transport.address, first.transport.p2pd_pid
            assert pid is not None
            waiting = asyncio.create_task(first.transport.hello(second.transport.peer_id, HELLO))
            os.kill(pid, signal.SIGKILL)
            await asyncio.wait_for(first.transport.died.wait(), 5)
            await asyncio.wait([waiting], timeout=5)
            assert waiting.done(), "a call waits for a p2pd that is gone"
            waiting.exception()
            await first.transport.restart()
            assert first.transport.address == address
            assert first.transport.p2pd_pid != pid
            assert not first.transport.died.is_set()
            # The device that comes back calls first, as `Board.rebind` does: the other p2pd may have dialled
            # it by itself while it was down, and then refuses to do so again for some seconds.
            await first.transport.connect(second.transport.address)
            assert (await first.transport.hello(second.transport.peer_id, HELLO)).spec
            await second.transport.connect(address)
            assert (await second.transport.hello(address.peer, HELLO)).spec == first.answers.spec
            assert first.transport.counters.p2pd_restarts == 1

    asyncio.run(run())


def test_a_device_that_was_often_missed_is_linked_soon_after_it_is_back(tmp_path: Path) -> None:
    """p2pd dials a lost peer once by itself, and then not again for 6 s; had it dialled each time, for 30."""

    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (first, second):
            address = first.transport.address
            await first.transport.stop()
            for _ in range(5):
                with pytest.raises(UnreachableError):
                    await second.transport.connect(address)
            await first.transport.start()
            assert first.transport.address == address

            async def linked() -> bool:
                try:
                    await second.transport.connect(address)
                except UnreachableError:
                    return False
                return True

            await until_true(linked, 12.0)
            assert (await second.transport.hello(address.peer, HELLO)).spec

    asyncio.run(run())


def test_stop_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    async def run() -> None:
        async with devices(tmp_path, fresh_keys()) as (device,):
            pid, sockets = device.transport.p2pd_pid, device.transport._sockets
            assert pid is not None
            assert sockets is not None
            assert list(sockets.iterdir())
            assert sockets.stat().st_mode & 0o077 == 0
            assert (device.folder / "p2pd.key").stat().st_mode & 0o077 == 0
        assert not psutil.pid_exists(pid)
        assert not sockets.exists()
        assert not (device.folder / "p2pd.json").exists()

    asyncio.run(run())


def test_p2pd_of_a_killed_daemon_is_ended_at_the_next_start(tmp_path: Path) -> None:
    async def run() -> None:
        async with devices(tmp_path, fresh_keys()) as (killed,):
            pid, sockets = killed.transport.p2pd_pid, killed.transport._sockets
            assert pid is not None
            assert sockets is not None
            next_one = Transport(
                killed.identity,
                killed.keys,
                LOOPBACK,
                Answers(),
                folder=killed.folder,
                port=killed.transport.port,
            )
            try:
                await next_one.start()
                await until(lambda: not psutil.pid_exists(pid))
                assert not sockets.exists()
                assert next_one.address == killed.transport.address
            finally:
                await next_one.stop()

    asyncio.run(run())


def test_a_process_that_only_has_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    mark_path = tmp_path / "p2pd.json"
    for mark in (
        P2pdMark(pid=os.getpid(), started=time.time() - 86400, sockets="/nonexistent"),
        P2pdMark.of(os.getpid(), make_socket_folder()),
    ):
        mark.write(mark_path)
        assert not end_stale_p2pd(mark_path)
        assert not mark_path.exists()
        assert not Path(mark.sockets).exists()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"pid": "x", "started": 0, "sockets": "/etc"}'])
def test_a_damaged_mark_removes_nothing_but_itself(tmp_path: Path, damage: bytes) -> None:
    mark_path = tmp_path / "p2pd.json"
    mark_path.write_bytes(damage)
    assert not end_stale_p2pd(mark_path)
    assert not mark_path.exists()
    assert Path("/etc").is_dir()


def test_a_port_that_another_program_uses_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            transport = Transport(
                Identity.create(), fresh_keys(), LOOPBACK, Answers(), folder=tmp_path, port=port
            )
            with pytest.raises(UsageError, match=str(port)):
                await transport.start()

    asyncio.run(run())


def test_calls_while_p2pd_is_away_fail_as_unreachable(tmp_path: Path) -> None:
    async def run() -> None:
        device = Device(fresh_keys(), tmp_path / "device")
        with pytest.raises(UnreachableError):
            await device.transport.hello(Identity.create().peer_id, HELLO)

    asyncio.run(run())
