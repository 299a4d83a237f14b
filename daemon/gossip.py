"""Gossip: ledgers and shards spread from device to device until everybody has what it needs.

Pull-based anti-entropy every `ROUND_S`, and a push of new contributions to a few devices at once, which
spares most rounds their work. Handlers answer from the ledger and the store; nothing here decides what to
train.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import anyio
import structlog

from .. import limits
from ..errors import IncompatibleError, NotAuthorisedError, P2PCollabError, PeerError, StorageError
from ..holdings import Want
from ..keys import device_of_peer, peer_id
from ..ledger import Contribution, Key
from ..run import PROTOCOL_VERSION, DeviceId, ShardId
from ..screen import reason_to_refuse
from ..wire import (
    Download,
    Earlier,
    EarlierReply,
    Exchange,
    ExchangeReply,
    Fetch,
    Hello,
    HelloReply,
    Push,
    PushReply,
    decode_contribution,
    encode_contribution,
    first_page,
    sign_again,
)
from .board import Board
from .calls import RefusalError, UnreachableError
from .renewal import Renewal
from .session import Bell, Session

log = structlog.get_logger()

#: Longer: news that a push missed arrives later. Shorter: more messages when nothing happens.
ROUND_S: Final = 2.0
#: Shards fetched at a time; more only share the same link.
_FETCHES_AT_ONCE: Final = 4
_TRIES_PER_HOLDER: Final = 2
#: Pause after the disk has refused a shard that was fetched.
_AFTER_REFUSAL_S: Final = 5.0
#: Refused contributions that are remembered, so that each is told of once.
_REFUSED_KEPT: Final = 4096
#: Leases whose results wait to be pushed.
_NEWS_MAX: Final = 16
#: Pages of one exchange; what is more is left to the next round.
_PAGES_MAX: Final = 32


class Gossip:
    """One device's part in it: the answers to its peers, and its own questions."""

    def __init__(self, session: Session, board: Board, renewal: Renewal) -> None:
        self._session = session
        self._board = board
        self._renewal = renewal
        #: Peer id of each device that has shown one.
        self._peers: dict[DeviceId, str] = {}
        #: What leases have made and nobody was told yet; what is dropped travels with the next round.
        self._news: deque[tuple[Contribution, ...]] = deque(maxlen=_NEWS_MAX)
        self._news_bell = Bell()
        #: Digests on their way here, and what tells that they came or did not.
        self.fetching: dict[str, anyio.Event] = {}
        #: Signatures of contributions that were refused, oldest first.
        self._refused: dict[bytes, None] = {}
        #: Devices that have fetched each of this device's shards: whether its work outlives it.
        self.fetched_by: dict[str, set[DeviceId]] = {}

    # Answers to peers: `calls.Handlers`

    async def hello(self, peer: str, request: Hello) -> HelloReply:
        """Give the run spec."""
        del peer
        if request.version != PROTOCOL_VERSION:
            raise IncompatibleError(
                f"this device speaks protocol version {PROTOCOL_VERSION}, the other one {request.version}",
                "install the same version of p2pcollab on all devices",
            )
        if not self._session.run_id.startswith(request.run_prefix):
            raise RefusalError("not-found", "this device takes part in another run")
        return HelloReply(spec=self._session.store.spec)

    async def exchange(self, peer: str, request: Exchange) -> ExchangeReply:
        """Compare ledgers."""
        del peer
        ledger = self._session.coordinator.ledger
        root = ledger.digest()
        if request.root == root:
            return ExchangeReply(root=root, entries=(), want=())
        theirs = request.summary_map()
        newer = ledger.newer_than(theirs)
        if request.shards:
            newer = tuple(entry for entry in newer if entry.shard in request.shards)
        return ExchangeReply(
            root=root, entries=first_page(map(encode_contribution, newer)), want=ledger.older_than(theirs)
        )

    async def push(self, peer: str, request: Push) -> PushReply:
        """Take contributions and the caller's record."""
        if request.record:
            self._board.learn(request.record, device_of_peer(peer))
            await self.observe(fresh=False)
        return PushReply(accepted=len(self.take(request.entries, device_of_peer(peer))))

    async def earlier(self, peer: str, request: Earlier) -> EarlierReply:
        """Say what is held of a device's contributions to a shard."""
        del peer
        session = self._session
        entry = session.coordinator.newest_here(request.shard, request.device, session.store.digests())
        return EarlierReply(entry=b"" if entry is None else encode_contribution(entry))

    async def fetch(self, peer: str, request: Fetch) -> bytes | None:
        """A shard's bytes."""
        data = await asyncio.to_thread(self._session.store.get_shard, request.digest)
        if data is not None:
            self.fetched_by.setdefault(request.digest, set()).add(device_of_peer(peer))
        return data

    # The board

    async def observe(self, *, fresh: bool = True) -> None:
        """Let the coordinator see the board; `fresh`: read it anew first."""
        session = self._session
        # A reading takes as long as the slowest node that is asked: what it shows is as old as its beginning.
        began = session.clock()
        records = await self._board.read() if fresh else self._board.newest()
        others = [
            record
            for record in records
            if record.device != session.device and record.device not in session.forgotten
        ]
        for record in others:
            session.names[DeviceId(record.device)] = record.name
        complete = session.coordinator.complete
        self._renewal.learn_peers(DeviceId(record.device) for record in others)
        if fresh:
            session.coordinator.observe_board(others, began)
        else:
            session.coordinator.hear(others, began)
        # What was held back may count from now on.
        self._tell_refusals()
        self._tell_completion(complete)

    # The ledger

    def take(self, encoded: Iterable[bytes], source: DeviceId) -> tuple[Contribution, ...]:
        """Verify contributions and take in the acceptable ones; those that were new.

        Raises:
            PeerError: one of them is not what a device of the run would send.
        """
        acceptable = []
        for data in encoded:
            contribution = decode_contribution(data, self._session.run_id)
            if contribution.device in self._session.forgotten:
                continue
            reason = reason_to_refuse(contribution, self._session.spec)
            if reason is None and not self._is_known(contribution):
                reason = self._reason_to_leave_out(contribution)
            if reason is None:
                acceptable.append(contribution)
            else:
                self._refuse(contribution, reason)
        new = self.enter(acceptable)
        self._learn_authors(new)
        if new:
            log.info("heard", entries=len(new), source=source)
        return new

    def _learn_authors(self, contributions: Iterable[Contribution]) -> None:
        keys = {entry.device: entry.public_key for entry in contributions}
        self._renewal.learn(keys, keys.get)

    def _is_known(self, contribution: Contribution) -> bool:
        return self._session.coordinator.ledger.get(*contribution.key) is not None

    def _reason_to_leave_out(self, contribution: Contribution) -> str | None:
        """Why a device that has no place in the ledger yet gets none."""
        # A run of honest devices never comes near: this bounds what invented identities can fill.
        if len(self._session.coordinator.ledger.of_shard(contribution.shard)) >= limits.DEVICES_MAX:
            return f"the shard has contributions of {limits.DEVICES_MAX} devices already"
        return None

    def enter(self, contributions: Sequence[Contribution]) -> tuple[Contribution, ...]:
        """Store contributions and enter them into the ledger; those that were new.

        Raises:
            StorageError: they could not be stored, and were not entered.
        """
        session = self._session
        ledger = session.coordinator.ledger
        acceptable = [entry for entry in contributions if entry.signature not in self._refused]
        self._convict(acceptable)
        fresh = [
            entry
            for entry in acceptable
            if (held := ledger.get(*entry.key)) is None or entry.version > held.version
        ]
        if not fresh:
            return ()
        session.store.put_contributions(
            (entry.shard, entry.device, encode_contribution(entry)) for entry in fresh
        )
        complete = session.coordinator.complete
        new = session.coordinator.receive(fresh, session.clock())
        self._tell_refusals()
        self._tell_completion(complete)
        session.work_bell.ring()
        session.news_bell.ring()
        session.fetch_bell.ring()
        return new

    def _convict(self, contributions: Sequence[Contribution]) -> None:
        """Look for two stories of one device in what came and what is here; pass them on, and keep them."""
        session = self._session
        known = len(session.coordinator.proofs)
        told: dict[Key, Contribution] = {}
        for entry in contributions:
            # A proof that is passed on comes as two entries of one message.
            for other in (session.coordinator.ledger.get(*entry.key), told.get(entry.key)):
                if other is not None:
                    session.coordinator.convict((other, entry))
            told[entry.key] = entry
        proofs = session.coordinator.proofs
        if len(proofs) == known:
            return
        self._tell_refusals()
        for proof in proofs[known:]:
            self.push_news(proof)
        session.store.set_meta(
            {"proofs": [[encode_contribution(one).hex() for one in proof] for proof in proofs]}
        )

    def restore_proofs(self, kept: object) -> None:
        """Remember who was caught lying before a restart; what is damaged is left out."""
        session = self._session
        for pair in kept if isinstance(kept, list) else ():
            try:
                one, other = (decode_contribution(bytes.fromhex(text), session.run_id) for text in pair)
            except (PeerError, TypeError, ValueError):
                continue
            session.coordinator.convict((one, other))
        session.coordinator.refusals()  # told of in an earlier life

    def _tell_completion(self, before: bool) -> None:
        session = self._session
        if session.coordinator.complete and not before:
            session.events.add("complete", "the run is complete: every shard has seen its samples")
            session.record_bell.ring()

    def _tell_refusals(self) -> None:
        for refusal in self._session.coordinator.refusals():
            self._refuse(refusal.contribution, refusal.reason)

    def restore(self, encoded: Iterable[bytes]) -> None:
        """Enter what the store remembers; what is damaged there is left to the peers to give again."""
        session = self._session
        known = []
        for data in encoded:
            try:
                known.append(decode_contribution(data, session.run_id))
            except PeerError as error:
                session.warn("store", f"a stored contribution is damaged and was left out: {error}")
        known = [entry for entry in known if entry.device not in session.forgotten]
        session.coordinator.forget(session.forgotten)
        session.coordinator.receive(known, session.clock())
        session.coordinator.refusals()  # told of in an earlier life
        self._learn_authors(known)

    def _refuse(self, contribution: Contribution, reason: str) -> None:
        session = self._session
        if contribution.signature in self._refused:
            return  # whoever believes in it offers it again and again
        self._refused[contribution.signature] = None
        if len(self._refused) > _REFUSED_KEPT:
            del self._refused[next(iter(self._refused))]
        session.counters.refused += 1
        event = session.events.add(
            "refused",
            f"a contribution of {session.name(contribution.device)} to "
            f"{session.labels([contribution.shard]) or contribution.shard} was refused: {reason}",
            device=contribution.device,
            shard=contribution.shard,
            reason=reason,
        )
        session.refusals.append(event)

    # Rounds

    async def run(self) -> None:
        """Exchange ledgers with some devices in each round, for ever."""
        session = self._session
        while True:
            partners = session.coordinator.partners(session.clock())
            async with anyio.create_task_group() as tasks:
                for device in partners:
                    tasks.start_soon(self.exchange_with, device)
            # Rounds of all devices at the same moments would come in bursts; the jitter spreads them.
            await anyio.sleep(ROUND_S * (0.75 + 0.5 * session.random.random()))

    async def exchange_all(self) -> None:
        """Exchange ledgers with every live device, once."""
        async with anyio.create_task_group() as tasks:
            for device in self._session.coordinator.live(self._session.clock()):
                if device != self._session.device:
                    tasks.start_soon(self.exchange_with, device)

    async def exchange_with(self, device: DeviceId) -> None:
        """Make this ledger and a device's equal, as far as it answers."""
        peer = self.peer_of(device)
        if peer is None:
            return
        await self._renewal.compare(peer)
        try:
            for shards in self._pages():
                for _ in range(_PAGES_MAX):
                    if not await self._exchange_page(device, peer, shards):
                        break
        except UnreachableError:
            return
        except (PeerError, NotAuthorisedError, StorageError) as error:
            log.warning("exchange failed", device=device, reason=str(error))

    def _pages(self) -> list[tuple[ShardId, ...]]:
        """The shards that one message's summary can cover, page by page; empty: all in one."""
        if len(self._session.coordinator.ledger) <= limits.SUMMARY_ENTRIES_MAX:
            return [()]
        size = limits.SUMMARY_ENTRIES_MAX // limits.DEVICES_MAX
        shards = self._session.spec.shards
        return [shards[start : start + size] for start in range(0, len(shards), size)]

    async def _exchange_page(self, device: DeviceId, peer: str, shards: tuple[ShardId, ...]) -> bool:
        """One message pair, and a push where the other side lacks something; whether there may be more."""
        ledger = self._session.coordinator.ledger
        summary = {key: mark for key, mark in ledger.summary().items() if not shards or key[0] in shards}
        reply = await self._session.transport.exchange(
            peer, Exchange.create(ledger.digest(), summary, shards)
        )
        new = self.take(reply.entries, device)
        lacking = [entry for key in reply.want if (entry := ledger.get(*key)) is not None]
        page = first_page(map(encode_contribution, lacking))
        if page:
            await self._session.transport.push(peer, Push(entries=page))
        return bool(new) or len(page) < len(lacking)

    def push_news(self, contributions: Sequence[Contribution]) -> None:
        """Tell some devices soon what is new here, and what this device does now."""
        self._news.append(tuple(contributions))
        self._news_bell.ring()

    async def spread_news(self) -> None:
        """Push what `push_news` was given, for ever.

        Beside the work, because a device that has just died answers nothing for seconds.
        """
        async with anyio.create_task_group() as tasks:
            while True:
                await self._news_bell.wait(ROUND_S)
                while self._news:
                    entries = first_page(map(encode_contribution, self._news.popleft()))
                    devices = self._session.coordinator.hints(self._session.clock())
                    push = Push(entries=entries, record=self._board.sealed)
                    tasks.start_soon(self._push_to, devices, push)

    async def hand_over(self) -> None:
        """Wait until another device holds what only this one has made, for as long as there are others.

        The frontier's tensors are fetched by their quota of devices within seconds; this only waits for it.
        """
        session = self._session
        while len(session.coordinator.live(session.clock())) > 1:
            own = [
                entry.tensors_digest
                for shard in session.spec.shards
                for entry in session.coordinator.believed.frontier(shard)
                if entry.device == session.device
            ]
            if all(self.fetched_by.get(digest) for digest in own):
                return
            await self.exchange_all()
            await anyio.sleep(0.25)

    async def say_goodbye(self) -> None:
        """Tell every live device that this one leaves."""
        devices = self._session.coordinator.live(self._session.clock())
        await self._push_to(devices, Push(entries=(), record=self._board.sealed))

    async def _push_to(self, devices: Sequence[DeviceId], push: Push) -> None:
        async def send(peer: str) -> None:
            try:
                await self._session.transport.push(peer, push)
            except P2PCollabError as error:
                log.info("push failed", peer=peer, reason=str(error))

        async with anyio.create_task_group() as tasks:
            for device in devices:
                peer = self.peer_of(device)
                if peer is not None and device != self._session.device:
                    tasks.start_soon(send, peer)

    def peer_of(self, device: DeviceId) -> str | None:
        """The libp2p peer id of a device, once it has shown one: its record or a contribution does."""
        known = self._peers.get(device)
        if known is None:
            known = self._board.peer_of(device) or self._author(device)
            if known is not None:
                self._peers[device] = known
        return known

    def _author(self, device: DeviceId) -> str | None:
        for entry in self._session.coordinator.ledger.entries.values():
            if entry.device == device:
                return peer_id(entry.public_key)
        return None

    # Shards

    async def fetch_wanted(self) -> None:
        """Fetch what the coordinator wants as soon as it wants it, for ever."""
        session = self._session
        while True:
            held = session.store.digests()
            wants = [
                want
                for want in session.coordinator.wanted(held, session.clock())
                if want.digest not in self.fetching and want.holders
            ]
            batch = wants[:_FETCHES_AT_ONCE]
            async with anyio.create_task_group() as tasks:
                for want in batch:
                    tasks.start_soon(self.fetch_one, want)
            if not any(session.store.has(want.digest) for want in batch):
                await session.fetch_bell.wait(0.5)

    async def fetch_all(self, wants: Sequence[Want]) -> None:
        """Fetch these, for an assembly; those that nobody gives are left out."""
        gate = anyio.CapacityLimiter(_FETCHES_AT_ONCE)

        async def fetch(want: Want) -> None:
            async with gate:
                await self.fetch_one(want)

        async with anyio.create_task_group() as tasks:
            for want in wants:
                tasks.start_soon(fetch, want)

    async def fetch_one(self, want: Want) -> bool:
        """Fetch one shard from the first holder that gives it, check it, keep it; whether it is here."""
        session = self._session
        underway = self.fetching.get(want.digest)
        if underway is not None:
            await underway.wait()
            return session.store.has(want.digest)
        self.fetching[want.digest] = anyio.Event()
        try:
            data = await self._download(want)
            if data is None:
                return False
            if not await self._passes(want, data):
                return False
            await asyncio.to_thread(session.store.put_shard, data)
            session.warnings.pop("disk", None)
            session.work_bell.ring()
            return True
        except StorageError as error:
            session.warn("disk", str(error))
            # Nor is it fetched again meanwhile, for the same disk to refuse.
            await anyio.sleep(_AFTER_REFUSAL_S)
            return False
        except P2PCollabError as error:
            log.info("fetch given up", digest=want.digest, reason=str(error))
            return False
        finally:
            self.fetching.pop(want.digest).set()

    async def _download(self, want: Want) -> bytes | None:
        """The shard's bytes from its holders in turn; what one of them began, the next goes on with."""
        session = self._session
        download = Download(want.digest, want.size)
        for device in want.holders:
            for _ in range(_TRIES_PER_HOLDER):
                try:
                    await session.transport.fetch_part(self._known_peer(device), download)
                    return await asyncio.to_thread(download.finish)
                except (UnreachableError, NotAuthorisedError) as error:
                    # It may come back, and then it has what it had: nothing is concluded from silence.
                    log.info("fetch failed", device=device, digest=want.digest, reason=str(error))
                except PeerError as error:
                    log.info("fetch refused", device=device, digest=want.digest, reason=str(error))
                    if not isinstance(error, RefusalError) or error.code == "not-found":
                        await self._ask_for_earlier(device, want)
                        session.coordinator.refused(want.digest, device, session.clock())
                        break
            if download.complete:
                download = Download(want.digest, want.size)  # all came, and it was not what was asked for
        return None

    async def _ask_for_earlier(self, device: DeviceId, want: Want) -> None:
        """Hear what a device has instead of tensors that it does not give: they may be lost."""
        session = self._session
        for author in session.coordinator.authors(want.shard, want.digest):
            try:
                question = Earlier(shard=want.shard, device=author)
                reply = await session.transport.earlier(self._known_peer(device), question)
                entry = decode_contribution(reply.entry, session.run_id) if reply.entry else None
            except P2PCollabError as error:
                log.info("no word of earlier tensors", device=device, reason=str(error))
                continue
            if (
                entry is not None
                and entry.key == (want.shard, author)
                and session.coordinator.offered(entry, session.store.digests(), session.clock())
            ):
                log.info("earlier tensors offered", device=device, digest=entry.tensors_digest)

    def _vote(self) -> None:
        """Tell the others whom this device accuses since its last contribution."""
        coordinator = self._session.coordinator
        unvoiced = coordinator.unvoiced
        if unvoiced is not None:
            again = sign_again(self._session.identity, unvoiced, coordinator.accused)
            if new := self.enter([again]):
                self.push_news(new)

    def _known_peer(self, device: DeviceId) -> str:
        peer = self.peer_of(device)
        if peer is None:
            raise UnreachableError(f"{self._session.name(device)} has not shown its address")
        return peer

    async def _passes(self, want: Want, data: bytes) -> bool:
        """Try tensors; whether they count. If they do not, neither does the contribution that names them."""
        session = self._session
        now = session.clock()
        entries = session.coordinator.named(want.shard, want.digest)
        held = session.store.digests() - self.fetching.keys()
        trials = [session.coordinator.trial(entry, held, now) for entry in entries]

        def read(digest: str) -> bytes:
            # What the garbage collection has taken meanwhile is left out of the comparison.
            return data if digest == want.digest else session.store.get_shard(digest) or b""

        verdicts = await session.trainer.check(trials, read)
        session.counters.training_macs += verdicts.macs
        known = session.coordinator.opinions
        for entry, verdict in zip(entries, verdicts.found, strict=True):
            session.coordinator.judged(entry, verdict)
            if verdict is not None:
                self._refuse(entry, verdict.reason)
        self._tell_refusals()
        if session.coordinator.opinions != known:
            session.store.set_meta({"opinions": session.coordinator.opinions})
        self._vote()
        return not entries or any(verdict is None or not verdict.malformed for verdict in verdicts.found)
