"""A stranger on the LAN, with all of hivemind and none of the run secret, neither reads nor writes."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.multiaddr import Multiaddr
from loopback import HELLO, LOOPBACK, NAME, RUN, Device, devices, fresh_keys
from zeroconf import IPVersion
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from p2pcollab import limits
from p2pcollab.authentication import NONCE_BYTES, Authenticator
from p2pcollab.daemon import streams
from p2pcollab.daemon.addresses import PeerAddress
from p2pcollab.daemon.calls import PREFIX
from p2pcollab.daemon.discovery import SERVICE, Announcement, Discovery
from p2pcollab.errors import NotAuthorisedError, PeerError
from p2pcollab.keys import RunKeys
from p2pcollab.records import BOARD_DEVICES
from p2pcollab.run import PROTOCOL_VERSION
from p2pcollab.wire import Push

METHODS = ("hello", "exchange", "push", "fetch")
TTL_S = 60.0


class Stranger:
    """hivemind as it comes: own identity, no secret. Keeps every byte that it is sent."""

    def __init__(self, p2p: P2P) -> None:
        self.p2p = p2p
        self.received: list[bytes] = []
        self.peer_id: str = p2p.peer_id.to_base58()

    async def call(self, victim: Device, method: str, request: bytes) -> bytes | None:
        """The answer to a unary call; None if it is refused."""
        remote = PeerID.from_base58(victim.transport.peer_id)
        try:
            answer: bytes = await asyncio.wait_for(
                self.p2p._client.call_unary_handler(remote, method, request), 10
            )
        except (P2PHandlerError, P2PDaemonError) as refusal:
            self.received.append(str(refusal).encode())
            return None
        self.received.append(answer)
        return answer

    async def stream(self, victim: Device, request: bytes) -> bytes:
        """What a stream brings until it ends."""
        remote = PeerID.from_base58(victim.transport.peer_id)
        _, reader, writer = await self.p2p._client.stream_open(remote, (streams.METHOD,))
        with contextlib.suppress(OSError):
            writer.write(request)
            await writer.drain()
        data = b""
        with contextlib.suppress(OSError):
            data = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        self.received.append(data)
        return data


@contextlib.asynccontextmanager
async def stranger_beside(victim: Device) -> AsyncIterator[Stranger]:
    p2p = await P2P.create(
        host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False, auto_nat=False, use_relay=False
    )
    try:
        address = victim.transport.address
        await p2p._client.connect(
            PeerID.from_base58(address.peer), [Multiaddr(f"/ip4/{address.host}/tcp/{address.port}")]
        )
        yield Stranger(p2p)
    finally:
        await p2p.shutdown()


def _stored(device: Device) -> dict[Any, Any]:
    protocol = device.board._node.protocol
    return {key: dict(item.value.data) for key, item in [*protocol.storage.items(), *protocol.cache.items()]}


def _no_secrets(data: list[bytes], keys: RunKeys, *group: Device) -> None:
    seen = b"\n".join(data)
    for secret in (keys.board_key, keys.seal_key, keys.auth_key):
        assert secret not in seen
        assert secret.hex().encode() not in seen
    assert keys.board_name(BOARD_DEVICES).encode() not in seen
    assert NAME.encode() not in seen
    for device in group:
        assert device.answers.spec not in seen
        assert device.board.sealed[:16] not in seen, "not even what only insiders can open"
        assert device.identity.device.encode() not in seen


def test_mdns_shows_a_stranger_what_the_announcement_says_and_no_more() -> None:
    async def run() -> None:
        prefix, keys = secrets.token_hex(7), fresh_keys()
        peer = "12D3KooWBmAwcd4PJNJvfV89HwE48nwkRmAgo8Vy3uQEyNNHBox2"
        announcing = Discovery(LOOPBACK, peer)
        await announcing.start(Announcement(run_prefix=prefix, name="pets", peer=peer, port=4001))
        mdns = AsyncZeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
        names: asyncio.Queue[str] = asyncio.Queue()
        browser = AsyncServiceBrowser(
            mdns.zeroconf,
            SERVICE,
            handlers=[lambda zeroconf, service_type, name, state_change: names.put_nowait(name)],
        )
        try:
            while prefix not in (name := await asyncio.wait_for(names.get(), 10)):
                pass
            info = AsyncServiceInfo(SERVICE, name)
            assert await info.async_request(mdns.zeroconf, 3000)
            shown = {key.decode(): (value or b"").decode() for key, value in info.properties.items()}
            assert shown == {
                "v": str(PROTOCOL_VERSION),
                "run": prefix,
                "name": "pets",
                "peer": peer,
                "port": "4001",
            }
            _no_secrets([info.text, name.encode(), (info.server or "").encode()], keys)
        finally:
            await browser.async_cancel()
            await mdns.async_close()
            await announcing.stop()

    asyncio.run(run())


def test_a_stranger_on_the_dht_reads_and_writes_nothing_even_if_told_the_key(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as group:
            for device in group:
                await device.publish()
            before = [_stored(device) for device in group]
            assert all(before)
            neighbours = [device.board.neighbours for device in group]
            victim = group[0]
            true_key = DHTID.generate(keys.board_name(BOARD_DEVICES))
            async with stranger_beside(victim) as stranger:
                node = await DHTNode.create(p2p=stranger.p2p)
                remote = PeerID.from_base58(victim.transport.peer_id)
                assert await node.protocol.call_ping(remote) is None
                for key in (true_key, DHTID.generate(BOARD_DEVICES), DHTID.generate(RUN)):
                    assert await node.protocol.call_find(remote, [key]) is None
                    request = dht_pb2.FindRequest(keys=[key.to_bytes()], peer=node.protocol.node_info)
                    find = "DHTProtocol.rpc_find"
                    assert await stranger.call(victim, find, request.SerializeToString()) is None
                assert await node.get(keys.board_name(BOARD_DEVICES), latest=True) is None

                accepted = []
                expires = victim.clock() + TTL_S
                target = victim.identity.device
                genuine = MSGPackSerializer.dumps(victim.board.sealed)
                dictionary = DictionaryDHTValue()
                dictionary.store(target, genuine, expires)
                for key in (true_key, DHTID.generate("anything")):
                    for subkey, value in ((target, genuine), (target, b"junk"), (None, b"junk")):
                        accepted.append(
                            await node.protocol.call_store(remote, [key], [value], [expires], [subkey])
                        )
                    accepted.append(await node.protocol.call_store(remote, [key], [dictionary], [expires]))
                assert accepted == [None] * 8, "0 writes accepted"
                assert [_stored(device) for device in group] == before
                assert [device.board.neighbours for device in group] == neighbours
                assert len(await group[1].names()) == 2
                _no_secrets(stranger.received, keys, *group)
                assert victim.transport.counters.refused >= 1 + 3 * 2 + 8
                await node.shutdown()

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["nothing", "junk", "plain", "wrong-secret"])
def test_a_strangers_calls_are_refused_before_a_handler_sees_them(tmp_path: Path, kind: str) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys) as (victim,), stranger_beside(victim) as stranger:
            guess = Authenticator(fresh_keys(), stranger.peer_id)
            for method in METHODS:
                name = PREFIX + method
                request = {
                    "nothing": b"",
                    "junk": secrets.token_bytes(300),
                    "plain": HELLO.encode(),
                    "wrong-secret": guess.seal_request(
                        name,
                        HELLO.encode(),
                        victim.transport.peer_id,
                        victim.clock(),
                        secrets.token_bytes(NONCE_BYTES),
                    ),
                }[kind]
                assert await stranger.call(victim, name, request) is None
            assert victim.answers.callers == []
            assert victim.transport.counters.refused == len(METHODS)
            _no_secrets(stranger.received, keys)

    asyncio.run(run())


def test_a_request_that_was_overheard_is_of_no_use(tmp_path: Path) -> None:
    """TLS hides requests from the LAN. A device that is called can still hand on what it was sent."""

    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (victim, insider):
            request = Authenticator(keys, insider.transport.peer_id).seal_request(
                PREFIX + "hello",
                HELLO.encode(),
                victim.transport.peer_id,
                victim.clock(),
                secrets.token_bytes(NONCE_BYTES),
            )
            async with stranger_beside(victim) as stranger:
                assert await stranger.call(victim, PREFIX + "hello", request) is None, "from another device"
                assert victim.answers.callers == []
            remote = PeerID.from_base58(victim.transport.peer_id)
            client = insider.transport.p2p._client
            assert await client.call_unary_handler(remote, PREFIX + "hello", request)
            for method in METHODS:
                with pytest.raises(P2PHandlerError):
                    await client.call_unary_handler(remote, PREFIX + method, request)
            assert victim.answers.callers == [insider.transport.peer_id], "once, by whom it was made"

    asyncio.run(run())


def test_a_call_to_a_stranger_cannot_be_handed_on(tmp_path: Path) -> None:
    """A stranger may announce itself as a device of the run; whoever calls it gives it nothing to go on."""

    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (victim, caller):
            await victim.publish()
            async with stranger_beside(victim) as stranger:
                heard: dict[str, bytes] = {}

                def hear(method: str) -> Any:
                    async def handler(request: bytes, remote: PeerID) -> bytes:
                        heard[method] = request
                        stranger.received.append(request)
                        return await stranger.call(victim, method, request) or b""

                    return handler

                methods = [PREFIX + method for method in (*METHODS, "prove")]
                for method in (*methods, *(f"DHTProtocol.rpc_{name}" for name in ("ping", "find", "store"))):
                    await stranger.p2p._client.add_unary_handler(method, hear(method))
                await caller.transport.connect(
                    PeerAddress.parse(str((await stranger.p2p.get_visible_maddrs())[0]))
                )
                for _ in range(2):
                    with pytest.raises((NotAuthorisedError, PeerError)):
                        await caller.transport.push(stranger.peer_id, Push(entries=(), record=b"x"))
                assert await caller.board._ping(stranger.peer_id) is False
                assert set(heard) == {PREFIX + "prove"}, "a stranger is asked for its proof, and nothing else"
                assert victim.answers.callers == []
                assert stranger.peer_id not in (*victim.board.neighbours, *caller.board.neighbours)
                _no_secrets(stranger.received, keys, victim)

    asyncio.run(run())


def test_a_strangers_streams_are_closed_unread(tmp_path: Path) -> None:
    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys) as (victim, insider):
            digest = "ab" * 32
            shard = secrets.token_bytes(2 * limits.CHUNK_BYTES)
            victim.answers.shards[digest] = shard
            async with stranger_beside(victim) as stranger:
                asked = bytes.fromhex(digest) + bytes(8)
                assert await stranger.stream(victim, asked) == b""
                # Nor does the ticket of a device of the run help another.
                victim.transport._tickets.issue(
                    insider.transport.peer_id, streams.Fetch(digest=digest, offset=0), shard
                )
                assert await stranger.stream(victim, asked) == b""
                assert await stranger.stream(victim, b"\xff" * 8 + bytes(1 << 20)) == b""
                assert victim.transport.counters.refused == 3
                assert victim.transport.counters.bytes_sent < 2000

    asyncio.run(run())


class Shutting:
    """Shuts out one peer, and asks nobody for news."""

    def __init__(self, peer: str) -> None:
        self.peer = peer

    def is_forgotten(self, peer: str) -> bool:
        return peer == self.peer

    def may_ask(self, peer: str) -> bool:
        return False

    async def answer(self, peer: str, body: bytes, *, proved: bool) -> bytes:
        raise AssertionError("nobody may ask")

    async def renew(self, peer: str) -> bool:
        return False


def test_a_device_that_was_shut_out_is_a_stranger_even_with_the_secret(tmp_path: Path) -> None:
    """Whoever gives it the new join code by mistake: it is known by its key."""

    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys, keys, keys) as (victim, shut_out, friend):
            assert (await shut_out.transport.hello(victim.transport.peer_id, HELLO)).spec
            victim.transport.follow(Shutting(shut_out.transport.peer_id), [])
            before = _stored(victim)
            for call in (
                shut_out.transport.hello(victim.transport.peer_id, HELLO),
                shut_out.transport.push(victim.transport.peer_id, Push(entries=(), record=b"x")),
                shut_out.transport.renew(victim.transport.peer_id, b""),
            ):
                with pytest.raises(NotAuthorisedError):
                    await call
            assert await shut_out.board._ping(victim.transport.peer_id) is False
            assert _stored(victim) == before
            assert (await friend.transport.hello(victim.transport.peer_id, HELLO)).spec

    asyncio.run(run())


def test_a_change_of_the_secret_refuses_the_old_one_and_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        old, new = fresh_keys(), fresh_keys()
        async with devices(tmp_path, old, old) as (victim, late):
            await victim.publish()
            assert (await late.transport.hello(victim.transport.peer_id, HELLO)).spec
            victim.transport.rekey(new, [old])
            victim.board.rekey(new)
            assert _stored(victim) == {}, "the board of the old secret is no business of the new one"
            with pytest.raises(NotAuthorisedError, match="the join code is another one now"):
                await late.transport.hello(victim.transport.peer_id, HELLO)
            assert late.transport.peer_id not in victim.transport.p2p.proved
            late.transport.rekey(new, [old])
            late.board.rekey(new)
            assert (await late.transport.hello(victim.transport.peer_id, HELLO)).spec
            await victim.publish()
            await late.publish()
            assert set(await victim.names()) == {victim.identity.device, late.identity.device}

    asyncio.run(run())


def test_calls_that_a_stranger_gives_up_leave_nothing_behind(tmp_path: Path) -> None:
    """hivemind keeps the task of a call that is cancelled: each such call would cost memory for ever."""

    async def run() -> None:
        keys = fresh_keys()
        async with devices(tmp_path, keys) as (victim,), stranger_beside(victim) as stranger:
            control = stranger.p2p._client.control
            remote = PeerID.from_base58(victim.transport.peer_id).to_bytes()
            for _ in range(600):
                call_id = uuid.uuid4()
                call = p2pd_pb2.CallUnaryRequest(peer=remote, proto=PREFIX + "push", data=b"x" * 100)
                for message in (
                    p2pd_pb2.PersistentConnectionRequest(callId=call_id.bytes, callUnary=call),
                    p2pd_pb2.PersistentConnectionRequest(callId=call_id.bytes, cancel=p2pd_pb2.Cancel()),
                ):
                    await control._pending_messages.put(message)
            # One that is answered, so that all before it have been.
            assert await stranger.call(victim, PREFIX + "hello", b"") is None
            assert len(victim.transport.p2p._client.control._handler_tasks) <= 300

    asyncio.run(run())
