"""The stranger: a host on the LAN with all of this program and of hivemind, and without the run secret.

Reads a line of JSON that says whom to attack, then one line for each attack, `{"attack": NAME, "tries": N}`,
and answers each with a line of what came of it. A try is *answered* when the device gives anything but a
refusal: nothing of what is asked for here is given to strangers.

Where an attack is about something overheard, the stranger is lent what nobody on the LAN can overhear,
because links are encrypted: requests, records and names made with the run secret and the keys of real
devices. So what is tried is whether they would be of any use.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import secrets
import socket
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.multiaddr import Multiaddr
from zeroconf import DNSOutgoing, ServiceInfo

from p2pcollab.authentication import NONCE_BYTES, Authenticator
from p2pcollab.daemon import streams
from p2pcollab.daemon.calls import PREFIX
from p2pcollab.daemon.discovery import SERVICE
from p2pcollab.keys import Identity, RunKeys, peer_id
from p2pcollab.presence import record_expiry
from p2pcollab.records import BOARD_DEVICES, DeviceRecord, seal_record
from p2pcollab.run import PROTOCOL_VERSION, STEM, RunId, RunSpec, ShardId
from p2pcollab.wire import (
    Earlier,
    Exchange,
    Fetch,
    Hello,
    Push,
    decode_contribution,
    encode_contribution,
    sign_contribution,
)

_AT_ONCE: Final = 16
_TRY_S: Final = 15.0
_OURS: Final = tuple(
    PREFIX + name for name in ("prove", "hello", "exchange", "push", "fetch", "renew", "rotation")
)
_DHT: Final = tuple(f"DHTProtocol.rpc_{name}" for name in ("ping", "find", "store"))
_FINGERPRINT: Final = "tampered"
"""In the names of records that no honest device makes: whoever believes one shows it."""
_MDNS: Final = ("224.0.0.251", 5353)
_FLAGS_ANSWER: Final = 0x8400

ANSWERED, REFUSED, SILENT = "answered", "refused", "silent"


@dataclass(frozen=True)
class Victim:
    """A device to attack. Its key is lent only to make what might be overheard of it."""

    host: str
    port: int
    identity: Identity

    @property
    def peer(self) -> str:
        return self.identity.peer_id


class Stranger:
    """Its p2pd, its identity, and what it was lent."""

    def __init__(self, brief: dict[str, Any]) -> None:
        self.address: str = brief["address"]
        self.random = random.Random(brief["seed"])
        self.victims = [
            Victim(item["host"], item["port"], Identity.from_bytes(bytes.fromhex(item["seed"])))
            for item in brief["victims"]
        ]
        self.spec = RunSpec.decode(Path(brief["spec"]).read_bytes())
        self.run_id = RunId(self.spec.run_id)
        self.keys = RunKeys.derive(bytes.fromhex(brief["secret"]))
        self.contributions = [bytes.fromhex(item) for item in brief["contributions"]]
        self.wire = [bytes.fromhex(item) for item in brief["wire"]]
        self.board_key: bytes = DHTID.generate(self.keys.board_name(BOARD_DEVICES)).to_bytes()
        self.identity = Identity.create()
        self.heard: Counter[str] = Counter()
        self._unanswered: list[asyncio.Future[bytes]] = []
        self.p2p: Any = None
        self.port = 0

    async def start(self) -> None:
        """Start p2pd, listen under every name that a device of the run would, and link to all victims."""
        with tempfile.NamedTemporaryFile() as key:
            key.write(self.identity.libp2p_private_key)
            key.flush()
            self.p2p = await P2P.create(
                identity_path=key.name,
                check_if_identity_free=False,
                host_maddrs=[f"/ip4/{self.address}/tcp/0"],
                nat_port_map=False,
                auto_nat=False,
                use_relay=False,
            )
        self.port = int((await self.p2p.get_visible_maddrs())[0]["tcp"])
        for name in (*_OURS, *_DHT):
            await self.p2p._client.add_unary_handler(name, self._hear(name))
        for victim in self.victims:
            await self.link(victim)

    def _hear(self, name: str) -> Callable[[bytes, PeerID], Awaitable[bytes]]:
        async def handler(request: bytes, _remote: PeerID) -> bytes:
            # A proof is 32 + 8 + 16 bytes and no body.
            self.heard[name if len(request) <= 56 else f"{name} with a body"] += 1
            return b""

        return handler

    async def link(self, victim: Victim) -> None:
        """Connect to a victim's p2pd; anybody may."""
        await self.p2p._client.connect(
            PeerID.from_base58(victim.peer), [Multiaddr(f"/ip4/{victim.host}/tcp/{victim.port}")]
        )

    async def call(self, victim: Victim, name: str, request: bytes) -> str:
        """One unary call. Never cancelled: hivemind's client may break when one is."""
        remote = PeerID.from_base58(victim.peer)
        calling = asyncio.ensure_future(self.p2p._client.call_unary_handler(remote, name, request))
        await asyncio.wait({calling}, timeout=_TRY_S)
        if not calling.done():
            self._unanswered.append(calling)
            return SILENT
        try:
            calling.result()
        except (P2PHandlerError, P2PDaemonError):
            return REFUSED
        return ANSWERED

    async def give_up(self, victim: Victim, name: str, request: bytes) -> str:
        """A call that is taken back while it is being answered."""
        control = self.p2p._client.control
        call_id = uuid.uuid4()
        control._pending_calls[call_id] = answer = asyncio.get_running_loop().create_future()
        call = p2pd_pb2.CallUnaryRequest(
            peer=PeerID.from_base58(victim.peer).to_bytes(), proto=name, data=request
        )
        for message in (
            p2pd_pb2.PersistentConnectionRequest(callId=call_id.bytes, callUnary=call),
            p2pd_pb2.PersistentConnectionRequest(callId=call_id.bytes, cancel=p2pd_pb2.Cancel()),
        ):
            await control._pending_messages.put(message)
            await asyncio.sleep(self.random.choice((0.0, 0.001, 0.01)))
        await asyncio.wait({answer}, timeout=0.5)
        control._pending_calls.pop(call_id)
        if answer.done() and answer.exception() is None and answer.result() is not None:
            return ANSWERED
        return REFUSED

    def check_alive(self) -> None:
        """Whether its own p2pd can still be used: a try that never left proves nothing."""
        control = self.p2p._client.control
        if control._read_task.done() or control._write_task.done():
            raise RuntimeError("the stranger's own p2pd client has ended")

    # What is asked and stored

    def record(self, identity: Identity, **changes: Any) -> DeviceRecord:
        """A record of a device, as it would make it, except that the name tells."""
        fields: dict[str, Any] = {
            "run_id": self.run_id,
            "device": identity.device,
            "name": f"{_FINGERPRINT}-{self.random.randrange(10**6)}",
            "beat": round(time.time() * 1000) + 60_000,
            "state": "idle",
            "speed": 1e12,
            "budget": 1.0,
            "class_counts": (1000,) * len(self.spec.classes),
            "addresses": (f"/ip4/{self.address}/tcp/{self.port}/p2p/{identity.peer_id}",),
        }
        return DeviceRecord(**(fields | changes))

    def store_request(
        self, key: bytes, subkey: str | None, value: bytes, expires: float, node: bytes | None = None
    ) -> bytes:
        """A DHT store, as hivemind makes it."""
        place = MSGPackSerializer.dumps(subkey) if subkey is not None else b""
        return bytes(
            dht_pb2.StoreRequest(
                keys=[key],
                subkeys=[place],
                values=[MSGPackSerializer.dumps(value)],
                expiration_time=[expires],
                in_cache=[False],
                peer=dht_pb2.NodeInfo(node_id=node or secrets.token_bytes(20)),
            ).SerializeToString()
        )

    def contribution(self, identity: Identity, shard: str, generation: int = 100) -> bytes:
        """A plausible contribution of a device, which would be taken if it came from one of the run."""
        return encode_contribution(
            sign_contribution(
                identity,
                run_id=self.run_id,
                shard=ShardId(shard),
                generation=generation,
                seen={identity.device: generation * self.spec.schedule.batch_size},
                lease_samples=self.spec.schedule.batch_size,
                stem_digest="" if shard == "stem" else "initial",
                tensors_digest=secrets.token_hex(32),
                tensors_bytes=1000,
                loss=0.0,
                accuracy=1.0,
            )
        )

    def sound_request(self, of: Victim, n: int) -> tuple[str, bytes]:
        """A method and the body of a sound request, as a device would make it; all kinds in turn."""
        node = dht_pb2.NodeInfo(node_id=DHTID.generate(of.peer).to_bytes())

        def sealed() -> tuple[DeviceRecord, bytes]:
            record = self.record(of.identity)
            return record, seal_record(self.keys, of.identity, record)

        def push() -> bytes:
            return Push(entries=(self.random.choice(self.contributions),), record=sealed()[1]).encode()

        def store() -> bytes:
            record, data = sealed()
            return self.store_request(self.board_key, record.device, data, record_expiry(record.beat))

        kinds: tuple[tuple[str, Callable[[], bytes]], ...] = (
            (PREFIX + "prove", lambda: b""),
            (PREFIX + "hello", lambda: Hello(run_prefix=self.run_id[:14], version=PROTOCOL_VERSION).encode()),
            (PREFIX + "exchange", lambda: Exchange(root=bytes(32), summary=()).encode()),
            (PREFIX + "push", push),
            (PREFIX + "earlier", lambda: Earlier(shard=STEM, device=of.identity.device).encode()),
            (PREFIX + "fetch", lambda: Fetch(digest=self._digest(), offset=0).encode()),
            (PREFIX + "rotation", lambda: secrets.token_bytes(32)),
            (PREFIX + "renew", lambda: secrets.token_bytes(200)),
            ("DHTProtocol.rpc_ping", dht_pb2.PingRequest(peer=node, validate=True).SerializeToString),
            (
                "DHTProtocol.rpc_find",
                dht_pb2.FindRequest(keys=[self.board_key], peer=node).SerializeToString,
            ),
            ("DHTProtocol.rpc_store", store),
        )
        # Not by n alone: each victim would always get the same ones.
        name, body = kinds[n // len(self.victims) % len(kinds)]
        return name, body()

    def _digest(self) -> str:
        """Of tensors that a victim holds."""
        return decode_contribution(self.random.choice(self.contributions), self.run_id).tensors_digest

    def sealed(self, keys: RunKeys, name: str, body: bytes, sender: str, victim: Victim) -> bytes:
        """A request with a MAC under some keys, in the name of a sender."""
        return Authenticator(keys, sender).seal_request(
            name, body, victim.peer, time.time(), secrets.token_bytes(NONCE_BYTES)
        )

    def guessed(self, name: str, body: bytes, victim: Victim) -> bytes:
        """The same under a secret that the stranger has made up."""
        return self.sealed(RunKeys.derive(secrets.token_bytes(16)), name, body, self.identity.peer_id, victim)

    # Attacks: what try number `n` is

    async def no_code(self, n: int) -> str:
        """Sound requests of every kind, without any proof."""
        victim = self._victim(n)
        return await self.call(victim, *self.sound_request(victim, n))

    async def wrong_code(self, n: int) -> str:
        """The same with a proof, each time under another secret."""
        victim = self._victim(n)
        name, body = self.sound_request(victim, n)
        return await self.call(victim, name, self.guessed(name, body, victim))

    async def replayed_call(self, n: int) -> str:
        """Requests that a device has made: the very bytes of its connection, or the request lent in clear."""
        victim = self._victim(n)
        if n % 4 == 0 and self.wire:
            return await self._replay_connection(victim, self.wire[n // 4 % len(self.wire)])
        # The prove call has no body to spoil: an answer to it would mean that the stranger is believed.
        name, body = self.sound_request(victim, n)
        request = self.sealed(self.keys, name, body, self._other(n).peer, victim)
        first = await self.call(victim, name, request)
        return first if first != REFUSED else await self.call(victim, name, request)

    async def replayed_record(self, n: int) -> str:
        """Records that a device has sealed and signed itself, lent: pushed, or stored where they belong."""
        victim, other = self._victim(n), self._other(n)
        record = self.record(other.identity, beat=round(time.time() * 1000) - 30_000 + n)
        sealed = seal_record(self.keys, other.identity, record)
        return await self._hand_in(victim, n, other.identity.device, sealed, record_expiry(record.beat))

    async def forged_record(self, n: int) -> str:
        """Records for another device's subkey, or for a device of its own, under a guessed or a lent seal."""
        victim, other = self._victim(n), self._other(n)
        own = Identity.create() if n % 2 else self.identity
        keys = self.keys if n % 3 else RunKeys.derive(secrets.token_bytes(16))
        record = self.record(own)
        device = own.device if n % 5 == 0 else other.identity.device
        return await self._hand_in(
            victim, n, device, seal_record(keys, own, record), record_expiry(record.beat)
        )

    async def forged_contribution(self, n: int) -> str:
        """Contributions of its own, in another device's name, and altered ones of real devices."""
        victim = self._victim(n)
        shard = self.random.choice(self.spec.shards)
        other = self._other(n).identity
        own = self.contribution(self.identity, shard)
        if n % 4 == 0:
            entry = own
        elif n % 4 == 1:
            named = decode_contribution(own, self.run_id)
            entry = encode_contribution(
                dataclasses.replace(named, device=other.device, public_key=other.public_key)
            )
        elif n % 4 == 2:
            entry = self.contribution(other, shard)  # lent: really signed by that device
        else:
            genuine = bytearray(self.random.choice(self.contributions))
            genuine[self.random.randrange(len(genuine))] ^= 1 << self.random.randrange(8)
            entry = bytes(genuine)
        name, body = PREFIX + "push", Push(entries=(entry,)).encode()
        request = [
            body,
            self.guessed(name, body, victim),
            self.sealed(self.keys, name, body, other.peer_id, victim),
        ][n // 4 % 3]
        return await self.call(victim, name, request)

    async def another_devices_id(self, n: int) -> str:
        """Requests in another device's name, with its own proof, lent: only the link is the stranger's."""
        victim, other = self._victim(n), self._other(n)
        name, body = self.sound_request(other, n)
        return await self.call(victim, name, self.sealed(self.keys, name, body, other.peer, victim))

    async def blinded_keys(self, n: int) -> str:
        """DHT reads and writes under the board's true blinded key, lent as if it had been seen."""
        victim, other = self._victim(n), self._other(n)
        expires = time.time() + 250
        if n % 2:
            body = dht_pb2.FindRequest(
                keys=[self.board_key],
                peer=dht_pb2.NodeInfo(node_id=DHTID.generate(self.identity.peer_id).to_bytes()),
            ).SerializeToString()
            name = "DHTProtocol.rpc_find"
        else:
            value = secrets.token_bytes(self.random.choice((16, 400, 8000)))
            subkey = self.random.choice((other.identity.device, None, self.identity.device))
            body, name = self.store_request(self.board_key, subkey, value, expires), "DHTProtocol.rpc_store"
        return await self.call(victim, name, body if n % 4 < 2 else self.guessed(name, body, victim))

    async def board_flood(self, n: int) -> str:
        """Large values under ever new keys, that are to stay for years."""
        victim = self._victim(n)
        value = self.random.randbytes(self.random.choice((1_000, 60_000, 400_000)))
        body = self.store_request(secrets.token_bytes(20), f"{n}", value, time.time() + 1e9)
        name = "DHTProtocol.rpc_store"
        return await self.call(victim, name, body if n % 2 else self.guessed(name, body, victim))

    async def stream_flood(self, n: int) -> str:
        """Streams that ask for tensors which are there, push junk or hang, and calls that are given up."""
        victim = self._victim(n)
        remote = PeerID.from_base58(victim.peer)
        if n % 5 == 4:
            # What is left of it has to be cleared away.
            return await self.give_up(victim, PREFIX + "push", self.random.randbytes(100_000))
        method = (streams.METHOD, streams.METHOD, PREFIX + "fetch", "/ipfs/ping/9.9.9")[n % 4]
        try:
            _, reader, writer = await asyncio.wait_for(
                self.p2p._client.stream_open(remote, (method,)), _TRY_S
            )
        except (P2PDaemonError, OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            return REFUSED
        with contextlib.closing(writer):
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                if n % 7:  # the others say nothing at all
                    writer.write(bytes.fromhex(self._digest()) + bytes(8))
                    writer.write(self.random.randbytes(self.random.choice((0, 1 << 10, 1 << 18))))
                    await asyncio.wait_for(writer.drain(), _TRY_S)
            try:
                data = await asyncio.wait_for(reader.read(1 << 20), 0.5)
            except (OSError, asyncio.TimeoutError):
                return SILENT
        # A call's stream brings its refusal.
        return ANSWERED if data and method == streams.METHOD else REFUSED

    async def false_announcements(self, n: int) -> str:
        """mDNS answers that give false addresses, of devices that exist and of ones that do not."""
        for _ in range(2):
            self._announce(n)
            n += 1_000_003
        await asyncio.sleep(0)
        return REFUSED

    async def lying_lengths(self, n: int) -> str:
        """Lengths that are not there, too long or too short: on raw TCP, on streams, in whole messages."""
        victim = self._victim(n)
        match n % 4:
            case 0:
                name = self.random.choice((*_OURS, *_DHT))
                size = self.random.choice((0, 1, 31, 55, 56, 524_288 + 57, 1 << 20, 3 << 20))
                return await self.call(victim, name, self.random.randbytes(size))
            case 1:
                # hivemind reads a length in base 128 before a call's bytes.
                name = self.random.choice((*_OURS, *_DHT, streams.METHOD))
                return await self._say_on_stream(victim, name, _varint(1 << self.random.randrange(10, 64)))
            case 2:
                head = (self.random.getrandbits(32)).to_bytes(4, "big")
                return await self._say_on_stream(victim, streams.METHOD, head * 8 + b"\xff" * 8)
            case _:
                # libp2p's own greeting, with a length that lies.
                greeting = _varint(1 << self.random.randrange(7, 63)) + b"/multistream/1.0.0\n"
                return await self._replay_connection(victim, greeting)

    # Tools

    def _victim(self, n: int) -> Victim:
        return self.victims[n % len(self.victims)]

    def _other(self, n: int) -> Victim:
        return self.victims[(n + 1) % len(self.victims)]

    async def _hand_in(self, victim: Victim, n: int, device: str, sealed: bytes, expires: float) -> str:
        """A record, pushed or stored, raw, under a guessed proof, or under a lent one."""
        if n % 2:
            name, body = PREFIX + "push", Push(entries=(), record=sealed).encode()
        else:
            name, body = "DHTProtocol.rpc_store", self.store_request(self.board_key, device, sealed, expires)
        request = [
            body,
            self.guessed(name, body, victim),
            self.sealed(self.keys, name, body, self._other(n).peer, victim),
        ][n // 2 % 3]
        return await self.call(victim, name, request)

    async def _replay_connection(self, victim: Victim, data: bytes) -> str:
        """Say on a new TCP connection what was said on another one."""
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(victim.host, victim.port), _TRY_S)
        except (OSError, asyncio.TimeoutError):
            return SILENT
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.TimeoutError):
            writer.write(data)
            await asyncio.wait_for(writer.drain(), _TRY_S)
            await asyncio.wait_for(reader.read(), 0.5)
        # Whatever the handshake says: what is asked and stored is seen by what the devices hold afterwards.
        return REFUSED

    async def _say_on_stream(self, victim: Victim, name: str, data: bytes) -> str:
        try:
            _, reader, writer = await asyncio.wait_for(
                self.p2p._client.stream_open(PeerID.from_base58(victim.peer), (name,)), _TRY_S
            )
        except (P2PDaemonError, OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            return REFUSED
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.TimeoutError):
            writer.write(data + self.random.randbytes(40))
            await asyncio.wait_for(writer.drain(), _TRY_S)
            await asyncio.wait_for(reader.read(1 << 16), 0.2)
        return REFUSED

    def _announce(self, n: int) -> None:
        victim, other = self._victim(n), self._other(n)
        prefix = self.run_id[:14]
        peer, host, port, name = other.peer, self.address, self.port, "invented"
        instance = f"{prefix}-{other.peer[-12:]}"
        ttl = 4500
        match n % 7:
            case 0:  # a device that exists, under its own name, at the stranger's address
                pass
            case 1:  # a device that exists, where nobody is
                host, port, instance = "10.77.0.200", 4001, f"{prefix}-{secrets.token_hex(6)}"
            case 2:  # one that does not exist, at the stranger's address
                peer = self.identity.peer_id
                instance = f"{prefix}-{secrets.token_hex(6)}"
            case 3:  # ever new ones, at a device that is there
                peer, host, port = peer_id(secrets.token_bytes(32)), victim.host, victim.port
                instance = f"{prefix}-{peer[-12:]}"
            case 4:  # somewhere on the internet
                host, instance = "198.51.100.7", f"{prefix}-{secrets.token_hex(6)}"
            case 5:  # text that is long, and not fit for a terminal
                name, instance = "\x1b[31m" + "n" * 200, f"{prefix}-{secrets.token_hex(6)}"
            case _:  # a device that exists says good-bye
                host, port, ttl = other.host, other.port, 0
        self._send_answer(instance, peer, host, port, name, ttl)

    def _send_answer(self, instance: str, peer: str, host: str, port: int, name: str, ttl: int) -> None:
        told = {"run": self.run_id[:14], "name": name, "peer": peer, "port": str(port)}
        info = ServiceInfo(
            SERVICE,
            f"{instance}.{SERVICE}",
            addresses=[socket.inet_aton(host)],
            port=port,
            properties={**told, "v": str(PROTOCOL_VERSION)},
            server=f"{instance}.local.",
        )
        answer = DNSOutgoing(_FLAGS_ANSWER)
        for entry in (
            info.dns_pointer(override_ttl=ttl),
            info.dns_service(override_ttl=ttl),
            info.dns_text(override_ttl=ttl),
            *info.dns_addresses(override_ttl=ttl),
        ):
            answer.add_answer_at_time(entry, 0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
            sending.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sending.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(self.address))
            sending.bind((self.address, _MDNS[1]))
            for packet in answer.packets():
                sending.sendto(packet, _MDNS)

    # The counter-check: the same writes by somebody who knows the run secret

    async def insider(self) -> dict[str, str]:
        """What an insider does, sent like the attacks: all of it must be answered, or they prove nothing."""
        victim = self.victims[0]
        record = self.record(self.identity, name="insider", beat=round(time.time() * 1000))
        sealed = seal_record(self.keys, self.identity, record)
        push = Push(entries=(self.contribution(self.identity, "t1", 1),), record=sealed)
        store = self.store_request(
            self.board_key,
            self.identity.device,
            sealed,
            record_expiry(record.beat),
            DHTID.generate(self.identity.peer_id).to_bytes(),
        )
        done = {}
        for name, body in (
            (PREFIX + "hello", Hello(run_prefix=self.run_id[:14], version=PROTOCOL_VERSION).encode()),
            ("DHTProtocol.rpc_store", store),
            (PREFIX + "push", push.encode()),
        ):
            request = self.sealed(self.keys, name, body, self.identity.peer_id, victim)
            done[name] = await self.call(victim, name, request)
        return done


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


ATTACKS: Final[dict[str, Callable[[Stranger, int], Awaitable[str]]]] = {
    "no-join-code": Stranger.no_code,
    "wrong-join-code": Stranger.wrong_code,
    "replayed-call": Stranger.replayed_call,
    "replayed-record": Stranger.replayed_record,
    "forged-record": Stranger.forged_record,
    "forged-contribution": Stranger.forged_contribution,
    "another-devices-id": Stranger.another_devices_id,
    "blinded-keys": Stranger.blinded_keys,
    "board-flood": Stranger.board_flood,
    "stream-flood": Stranger.stream_flood,
    "false-announcements": Stranger.false_announcements,
    "lying-lengths": Stranger.lying_lengths,
}


async def attack(stranger: Stranger, name: str, first: int, tries: int) -> dict[str, Any]:
    """Some tries of an attack, a few at a time."""
    outcomes: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    numbers = iter(range(first, first + tries))

    async def worker() -> None:
        for n in numbers:
            try:
                outcome = await ATTACKS[name](stranger, n)
                stranger.check_alive()
                outcomes[outcome] += 1
            except Exception as error:
                errors[f"{type(error).__name__}: {error}"[:200]] += 1
                outcomes["failed"] += 1

    start = time.monotonic()
    heard = Counter(stranger.heard)
    await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))
    for victim in stranger.victims:
        with contextlib.suppress(P2PDaemonError, OSError, asyncio.TimeoutError):
            await asyncio.wait_for(stranger.link(victim), _TRY_S)
    return {
        "outcomes": dict(outcomes),
        "errors": dict(errors),
        "heard": dict(stranger.heard - heard),
        "seconds": round(time.monotonic() - start, 1),
    }


async def main() -> None:
    """Attack as told, until standard input ends."""
    stranger = Stranger(json.loads(sys.stdin.readline()))
    await stranger.start()
    _say({"port": stranger.port, "device": stranger.identity.device})
    try:
        # Not in the loop: it answers whom false announcements have lured here.
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = json.loads(line)
            if order["attack"] == "insider":
                _say(await stranger.insider())
            else:
                _say(await attack(stranger, order["attack"], order["first"], order["tries"]))
    finally:
        await stranger.p2p.shutdown()


def _say(fields: dict[str, Any]) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
