"""The stranger's equipment: its p2pd, its identity, what it was lent, and requests made of that."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import socket
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

TRY_S: Final = 15.0
OURS: Final = tuple(
    PREFIX + name for name in ("prove", "hello", "exchange", "push", "fetch", "renew", "rotation")
)
DHT: Final = tuple(f"DHTProtocol.rpc_{name}" for name in ("ping", "find", "store"))
_MDNS: Final = ("224.0.0.251", 5353)
_FLAGS_ANSWER: Final = 0x8400
_FINGERPRINT: Final = "tampered"
"""In the names of records that no honest device makes: whoever believes one shows it."""

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
        for name in (*OURS, *DHT):
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
        await asyncio.wait({calling}, timeout=TRY_S)
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

    # Tools

    def victim(self, n: int) -> Victim:
        return self.victims[n % len(self.victims)]

    def other(self, n: int) -> Victim:
        return self.victims[(n + 1) % len(self.victims)]

    async def hand_in(self, victim: Victim, n: int, device: str, sealed: bytes, expires: float) -> str:
        """A record, pushed or stored, raw, under a guessed proof, or under a lent one."""
        if n % 2:
            name, body = PREFIX + "push", Push(entries=(), record=sealed).encode()
        else:
            name, body = "DHTProtocol.rpc_store", self.store_request(self.board_key, device, sealed, expires)
        request = [
            body,
            self.guessed(name, body, victim),
            self.sealed(self.keys, name, body, self.other(n).peer, victim),
        ][n // 2 % 3]
        return await self.call(victim, name, request)

    async def replay_connection(self, victim: Victim, data: bytes) -> str:
        """Say on a new TCP connection what was said on another one."""
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(victim.host, victim.port), TRY_S)
        except (OSError, asyncio.TimeoutError):
            return SILENT
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.TimeoutError):
            writer.write(data)
            await asyncio.wait_for(writer.drain(), TRY_S)
            await asyncio.wait_for(reader.read(), 0.5)
        # Whatever the handshake says: what is asked and stored is seen by what the devices hold afterwards.
        return REFUSED

    async def say_on_stream(self, victim: Victim, name: str, data: bytes) -> str:
        try:
            _, reader, writer = await asyncio.wait_for(
                self.p2p._client.stream_open(PeerID.from_base58(victim.peer), (name,)), TRY_S
            )
        except (P2PDaemonError, OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            return REFUSED
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.TimeoutError):
            writer.write(data + self.random.randbytes(40))
            await asyncio.wait_for(writer.drain(), TRY_S)
            await asyncio.wait_for(reader.read(1 << 16), 0.2)
        return REFUSED

    def _announce(self, n: int) -> None:
        victim, other = self.victim(n), self.other(n)
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
