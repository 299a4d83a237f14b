"""The board: one dictionary on the Hivemind DHT, in which every device keeps its own sealed record.

Consistency rests on three rules. Each device writes one subkey only, its id. A record's expiry follows from
its beat, which its device has signed and which only rises: the DHT prefers the later expiry, so it prefers
the newer record, and an old one cannot be passed off as new. And nothing is decided from a single read: a
reader keeps the newest record of each device that it ever saw, until that expires.

Who may ask and answer at all is the transport's business. What an insider may store is `RecordValidator`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.utils import MSGPackSerializer, ValueWithExpiration

from .. import limits
from ..errors import P2PCollabError, PeerError, RunError
from ..keys import Identity, RunKeys, device_of_peer
from ..presence import next_beat, record_expiry
from ..records import BOARD_DEVICES, DeviceRecord, open_record, seal_record
from ..run import DeviceId, RunId
from .addresses import PeerAddress
from .calls import UnreachableError
from .transport import Transport

#: How often remembered addresses are tried: a healed partition stays split until somebody reaches across.
KEEPALIVE_S: Final = 5.0
_RPC_S: Final = 1.5
#: Nodes that did not answer are left out of searches for a while, although others still name them.
_BAN_S: Final = 5.0
_OPERATION_S: Final = 6.0
_REPLICAS: Final = 5
_NEIGHBOURS: Final = 20
_LINKS_AT_ONCE: Final = 8

#: How hivemind packs a subkey of 32 characters: msgpack's str 8.
_SUBKEY_HEAD: Final = b"\xd9\x20"


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """Lets records of this run's devices into our memory, and nothing else."""

    def __init__(
        self,
        keys: RunKeys,
        run_id: RunId,
        clock: Callable[[], float],
        has_room: Callable[[DeviceId], bool],
    ) -> None:
        #: Blinded name of the dictionary of devices, and where the DHT keeps it.
        self.name = keys.board_name(BOARD_DEVICES)
        self.key = DHTID.generate(self.name)
        self._key_bytes: bytes = self.key.to_bytes()
        self._keys = keys
        self._run_id = run_id
        self._clock = clock
        self._has_room = has_room
        # The same bytes come back with every answer to every read: up to 20 answers of 256 records.
        self._opened: OrderedDict[tuple[DeviceId, bytes], DeviceRecord] = OrderedDict()

    def validate(self, record: DHTRecord) -> bool:
        """Whether another node may store this here, or we believe its answer."""
        try:
            device = _device_of_subkey(record.subkey)
            opened = self.open(_payload(record.value), device)
        except PeerError:
            return False
        return (
            record.key == self._key_bytes
            and record.expiration_time == record_expiry(opened.beat)
            and record.expiration_time <= self._clock() + limits.RECORD_TTL_S_MAX
            and self._has_room(device)
        )

    def open(self, sealed: bytes, device: DeviceId) -> DeviceRecord:
        """The record in the bytes.

        Raises:
            PeerError: see `records.open_record`.
        """
        known = self._opened.get((device, sealed))
        if known is not None:
            self._opened.move_to_end((device, sealed))
            return known
        record = open_record(self._keys, sealed, self._run_id, device)
        self._opened[device, sealed] = record
        if len(self._opened) > 2 * limits.DEVICES_MAX:
            self._opened.popitem(last=False)
        return record


class Board:
    """This device's part of the board. `start`, use, `stop`; after `Transport.restart`, `rebind`.

    Needs no other device: what is published alone spreads when the first one is met.
    """

    def __init__(
        self,
        transport: Transport,
        keys: RunKeys,
        identity: Identity,
        run_id: RunId,
        *,
        observer: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            observer: read and write, but hold nothing for others.
            clock: unix time in seconds.
        """
        self._transport = transport
        self._keys = keys
        self._identity = identity
        self._observer = observer
        self._clock = clock
        self._run_id = run_id
        self._validator = self._make_validator(keys)
        self._node: Any = None  # hivemind has no types
        self._newest: dict[DeviceId, DeviceRecord] = {}
        self._beat = 0
        #: Our record as it was last published, for `Push`; empty before the first.
        self.sealed = b""

    # Life

    async def start(self) -> None:
        """Take part in the DHT, alone so far."""
        self._node = node = await DHTNode.create(
            p2p=self._transport.p2p,
            # The same after a restart: another id would be a second node to everybody, and this one dead.
            node_id=_node_id(self._identity.peer_id),
            bucket_size=_NEIGHBOURS,
            num_replicas=_REPLICAS,
            wait_timeout=_RPC_S,
            # Whatever saves a question may give an old answer: caches, and the answers to earlier reads.
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            reuse_get_requests=False,
            blacklist_time=_BAN_S,
            backoff_rate=1.0,
            num_workers=8,
            client_mode=self._observer,
            record_validator=self._validator,
        )
        node.protocol._validate_dictionary = self._keep_valid
        self._find, node.protocol.call_find = node.protocol.call_find, self._call_find
        self._route, node.protocol.update_routing_table = node.protocol.update_routing_table, self._add_node

    async def rebind(self) -> None:
        """Go on, with all that is known, on the p2pd that `Transport.restart` has started.

        Raises:
            RunError: that p2pd has died as well.
        """
        protocol = self._node.protocol
        self._node.p2p = protocol.p2p = self._transport.p2p
        if not self._observer:
            try:
                await protocol.add_p2p_handlers(protocol.p2p)
            except (P2PDaemonError, OSError) as error:
                raise RunError(f"p2pd ended at once: {error}") from error
        now = asyncio.get_running_loop().time()
        await self._reach({*self.neighbours, *self._transport.book.due(now)} - {self._transport.peer_id})

    async def stop(self) -> None:
        """Leave the DHT. The transport goes on."""
        if self._node is None:
            return
        self._node.is_alive = False
        if self._has_p2pd:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._node.protocol.shutdown(), _RPC_S)

    @property
    def _has_p2pd(self) -> bool:
        """Whether hivemind would get answers. It does not notice itself when its p2pd is gone."""
        with contextlib.suppress(UnreachableError):
            return self._node.p2p is self._transport.p2p and not self._transport.died.is_set()
        return False

    # The run secret's rotation

    def rekey(self, keys: RunKeys) -> None:
        """Go over to the board of another run secret, which is another name on the same DHT."""
        self._keys = keys
        before, self._validator = self._validator, self._make_validator(keys)
        # A record under the old seal is none any more.
        self.sealed = b""
        if self._node is not None:
            protocol = self._node.protocol
            protocol.record_validator = self._validator
            for part in (protocol.storage, protocol.cache):
                del part[before.key]

    def forget(self, devices: Collection[DeviceId]) -> None:
        """Drop what is known of devices that were shut out."""
        self._newest = {device: record for device, record in self._newest.items() if device not in devices}

    def _make_validator(self, keys: RunKeys) -> RecordValidator:
        return RecordValidator(keys, self._run_id, self._clock, self._has_room)

    # Neighbours

    @property
    def neighbours(self) -> tuple[str, ...]:
        """Peer ids of the nodes that answered last time: those that hold our record, if there are few."""
        return tuple(peer.to_base58() for peer in self._node.protocol.routing_table.peer_id_to_uid)

    async def meet(self, address: PeerAddress) -> bool:
        """Link to a device, and make the two parts of the board one; whether it answers as one of the run."""
        try:
            await self._transport.connect(address)
        except UnreachableError:
            return False
        return await self._ping(address.peer)

    async def keep_alive(self) -> int:
        """Try all remembered devices that are no neighbours and due; how many answered."""
        now = asyncio.get_running_loop().time()
        known = {self._transport.peer_id, *self.neighbours}
        return await self._reach([peer for peer in self._transport.book.due(now) if peer not in known])

    async def _reach(self, peers: Iterable[str]) -> int:
        places = asyncio.Semaphore(_LINKS_AT_ONCE)

        async def reach(peer: str) -> bool:
            async with places:
                try:
                    await self._transport.link(peer)
                except UnreachableError:
                    return False
                return await self._ping(peer)

        return sum(await asyncio.gather(*(reach(peer) for peer in peers)))

    async def maintain(self) -> None:
        """Keep the board in one piece, for ever."""
        while True:
            if await self.keep_alive():
                # Whoever is back is seldom back alone: a cable is in again, or a switch runs.
                self._transport.book.retry_all()
            await asyncio.sleep(KEEPALIVE_S)

    async def _ping(self, peer: str) -> bool:
        remote = PeerID.from_base58(peer)
        answer = await self._node.protocol.call_ping(remote, validate=False, strict=False)
        if answer is None:
            self._transport.unlink(peer)
            return False
        await self._node.protocol.update_routing_table(answer, remote, responded=True)
        self._node.blacklist.register_success(remote)
        return True

    # Records

    def next_beat(self) -> int:
        """The beat of this device's next record; see `presence.next_beat`."""
        own = self._newest.get(self._identity.device)
        self._beat = next_beat(max(self._beat, own.beat if own else 0), self._clock())
        return self._beat

    async def publish(self, record: DeviceRecord) -> int:
        """Put our record, made with `next_beat`, on the board; how many other devices can hold it.

        Raises:
            RunError: the record is too long.
        """
        sealed = seal_record(self._keys, self._identity, record)
        self.sealed = sealed
        self._newest[record.device] = record
        if not self._has_p2pd:
            return 0
        try:
            stored = await asyncio.wait_for(
                self._node.store(
                    self._validator.name, sealed, record_expiry(record.beat), subkey=record.device
                ),
                _OPERATION_S,
            )
        except (asyncio.TimeoutError, P2PCollabError):
            return 0
        # A node without neighbours stores at itself and calls that a success; nodes that do not answer have
        # left the neighbours by now.
        return len(self.neighbours) if stored else 0

    async def read(self) -> tuple[DeviceRecord, ...]:
        """The newest record of every device, in device order, as far as anybody reachable knows.

        Records say what they say; who is alive is for the coordinator to decide.
        """
        found = None
        if self._has_p2pd:
            with contextlib.suppress(asyncio.TimeoutError, P2PCollabError):
                found = await asyncio.wait_for(
                    self._node.get(self._validator.name, latest=True), _OPERATION_S
                )
        if found is not None and isinstance(found.value, dict):
            for device, item in found.value.items():
                with contextlib.suppress(PeerError):
                    self._take(self._validator.open(item.value, device))
        now = self._clock()
        self._newest = {
            device: record for device, record in self._newest.items() if record_expiry(record.beat) >= now
        }
        return self.newest()

    def held(self) -> dict[str, int]:
        """How much of others this device's part of the DHT keeps: names, records under them, neighbours."""
        if self._node is None:
            return {"names": 0, "records": 0, "neighbours": 0}
        protocol = self._node.protocol
        values = [item.value for part in (protocol.storage, protocol.cache) for _, item in part.items()]
        records = sum(len(value) if isinstance(value, DictionaryDHTValue) else 1 for value in values)
        return {"names": len(values), "records": records, "neighbours": len(self.neighbours)}

    def newest(self) -> tuple[DeviceRecord, ...]:
        """What is known of every device without asking anybody, in device order."""
        return tuple(record for _, record in sorted(self._newest.items()))

    def peer_of(self, device: DeviceId) -> str | None:
        """The libp2p peer id of a device, from the address in its record."""
        record = self._newest.get(device)
        for text in record.addresses if record is not None else ():
            with contextlib.suppress(PeerError):
                address = PeerAddress.parse(text)
                if device_of_peer(address.peer) == device:
                    return address.peer
        return None

    def learn(self, sealed: bytes, device: DeviceId) -> DeviceRecord:
        """Take a record that came by another way than the board, e.g. with a `Push`.

        Raises:
            PeerError: it is not that device's record, or there are too many devices.
        """
        record = self._validator.open(sealed, device)
        if record_expiry(record.beat) > self._clock() + limits.RECORD_TTL_S_MAX:
            raise PeerError("a record expires too late")
        if device not in self._newest and len(self._newest) >= limits.DEVICES_MAX:
            raise PeerError(f"there are {limits.DEVICES_MAX} devices already")
        self._take(record)
        return record

    def _take(self, record: DeviceRecord) -> None:
        known = self._newest.get(record.device)
        if known is None and len(self._newest) >= limits.DEVICES_MAX:
            return
        if known is not None and known.beat >= record.beat:
            return
        self._newest[record.device] = record
        if record.device == self._identity.device or record.state == "left":
            return
        for text in record.addresses:
            try:
                address = PeerAddress.parse(text)
                own = device_of_peer(address.peer) == record.device
            except PeerError:
                continue
            if own and self._transport.interface.may_reach(address.host):
                self._transport.book.learn(address)

    # Guards around hivemind

    def _has_room(self, device: DeviceId) -> bool:
        protocol = self._node.protocol
        return all(
            held is None or device in held.value or len(held.value) < limits.DEVICES_MAX
            for held in (protocol.storage.get(self._validator.key), protocol.cache.get(self._validator.key))
        )

    def _keep_valid(self, _key: bytes, dictionary: Any) -> bool:
        """Replaces a check that throws away a whole answer for one bad record in it."""
        if not isinstance(dictionary, DictionaryDHTValue):
            return False
        with dictionary.freeze():
            for subkey, (value, expiration) in list(dictionary.items()):
                record = DHTRecord(_key, MSGPackSerializer.dumps(subkey), value, expiration)
                if not self._validator.validate(record):
                    del dictionary[subkey]
            dictionary.maxsize = float("inf")  # whoever packed it chose this
            return len(dictionary) > 0

    async def _call_find(self, peer: PeerID, keys: Collection[DHTID]) -> Any:
        """Bounds what an answer claims: an infinite expiry would end every search at it, many made-up
        neighbours would keep it going."""
        found = await self._find(peer, keys)
        if not found:
            return found
        bounded = {}
        for key, (value, nearest) in found.items():
            if value is not None:
                newest = max(expiration for _, (_, expiration) in value.value.items())
                value = ValueWithExpiration(value.value, newest)
            honest = (node for node in nearest.items() if node[0] == _node_id(node[1].to_base58()))
            bounded[key] = value, dict(itertools.islice(honest, _NEIGHBOURS))
        return bounded

    async def _add_node(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        """Keeps the places on the DHT apart: one device, one place, which it cannot choose."""
        if node_id is None or node_id == _node_id(peer_id.to_base58()):
            await self._route(node_id, peer_id, responded)


def _node_id(peer: str) -> DHTID:
    return DHTID.generate(peer)


def _device_of_subkey(subkey: bytes) -> DeviceId:
    if len(subkey) != len(_SUBKEY_HEAD) + 32 or not subkey.startswith(_SUBKEY_HEAD):
        raise PeerError("the subkey is not a device id")
    try:
        return DeviceId(subkey[len(_SUBKEY_HEAD) :].decode("ascii"))
    except UnicodeDecodeError as error:
        raise PeerError("the subkey is not a device id") from error


def _payload(value: bytes) -> bytes:
    """The bytes that hivemind has packed, without handing a stranger's value to its unpacker."""
    if len(value) > limits.RECORD_BYTES_MAX + 3:
        raise PeerError("the value is too long for a record")
    for head_bytes in (2, 3):
        if MSGPackSerializer.dumps(value[head_bytes:]) == value:
            return value[head_bytes:]
    raise PeerError("the value is not bytes")
