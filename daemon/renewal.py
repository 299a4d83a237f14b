"""Keeps this device's run secret up to date, and shuts devices out: `rotation.py` with a network and a disk.

A new notice goes by push to the live devices, each of which hands it on to a few; and by pull, which needs no
luck: whenever one device refuses another, or is refused, both compare their notices before they give up. So a
device that was switched off for a year learns from the first member it meets.

The switch itself is one step without waiting: disk, calls, board. A call that is under way then ends under
the secret that it began with.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

import anyio
import structlog

from ..errors import NotAuthorisedError, P2PCollabError, PeerError, StorageError, UsageError
from ..keys import RunKeys, device_of_peer, peer_id, public_key_of_peer
from ..rotation import Notice, RotationState, Verdict, adopt, forget, judge, left_out
from ..run import SECRET_BYTES, DeviceId
from .board import Board
from .index import Value
from .session import Session

log = structlog.get_logger()

#: A peer that refuses is asked for news this often: it may be one that has shut this device out.
_ASK_AGAIN_S: Final = 3.0
#: And one that does not compare notices, because it only just starts or knows no rotation, this often.
_COMPARE_AGAIN_S: Final = 30.0
_TOLD_AT_ONCE: Final = 16
#: Beginnings of device ids that are enough to name one.
_ID_CHARS_MIN: Final = 4
_IDS_LISTED_MAX: Final = 20


class Renewal:
    """One device's part in the rotation of the run secret. Also `transport.RenewalPort`."""

    def __init__(
        self,
        session: Session,
        board: Board,
        state: RotationState,
        *,
        on_secret: Callable[[bytes], None],
        typed: bool = False,
    ) -> None:
        """
        Args:
            on_secret: told of every new run secret.
            typed: the secret is from a join code, and another one than this device had: nobody has accepted
                it yet.
        """
        self._session = session
        self._board = board
        self.state = state.with_members([session.identity.public_key])
        self._on_secret = on_secret
        self.unproved = typed
        #: Set when this device was shut out, to the reason.
        self.shut_out: NotAuthorisedError | None = None
        self.ended = anyio.Event()
        self._ask_after: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[bool]] = {}
        #: When notices may be compared with a peer; once it was done, not before the next change.
        self._compare_after: dict[str, float] = {}
        self._forgetting = anyio.Lock()
        #: Set when others should hear of what is new here.
        self._news = anyio.Event()
        self._again: frozenset[DeviceId] = frozenset()
        session.forgotten = self.state.forgotten
        session.transport.follow(self, [RunKeys.derive(secret) for secret in self.state.retired])

    # Members

    def learn(self, devices: Iterable[DeviceId], public_key_of: Callable[[DeviceId], bytes | None]) -> None:
        """Remember devices that have shown a record or a contribution of their own."""
        new = [device for device in devices if device not in self.state.members]
        if new:
            keys = filter(None, map(public_key_of, new))
            self.state = self.state.with_members(keys)

    def learn_peers(self, devices: Iterable[DeviceId]) -> None:
        """The same for devices that the board shows."""

        def key_of(device: DeviceId) -> bytes | None:
            peer = self._board.peer_of(device)
            return public_key_of_peer(peer) if peer is not None else None

        self.learn(devices, key_of)

    # sealed_calls.RenewalPort

    def is_forgotten(self, peer: str) -> bool:
        """Whether a device is shut out, whatever it knows."""
        if not self.state.forgotten:
            return False
        try:
            return device_of_peer(peer) in self.state.forgotten
        except PeerError:
            return False

    def may_ask(self, peer: str) -> bool:
        """Whether a device may ask for news: members may, and those that must hear that they are out."""
        try:
            device = device_of_peer(peer)
        except PeerError:
            return False
        return device in self.state.members or device in self.state.forgotten

    async def answer(self, peer: str, body: bytes, *, proved: bool) -> bytes:
        """Take a device's notice, and give our own if it is another one."""
        device = device_of_peer(peer)
        if body and device not in self.state.forgotten:
            try:
                self._hear(body, None if proved else device)
            except PeerError as error:
                log.warning("notice refused", peer=peer, reason=str(error))
        notice = self._encoded()
        return b"" if notice == body else notice

    async def renew(self, peer: str) -> bool:
        """Compare notices with a member that refuses us, or is refused; whether it is worth another try."""
        now = self._session.clock()
        device = device_of_peer(peer)
        if not self.state.is_member(device):
            return False
        asking = self._asking.get(peer)
        if asking is None:
            if self._ask_after.get(peer, now) > now:
                return False
            self._ask_after[peer] = now + _ASK_AGAIN_S
            # A task of its own: hivemind gives up the calls that wait for it after a second or two.
            asking = self._asking[peer] = asyncio.create_task(self._tell(peer, device))
            asking.add_done_callback(lambda _task: self._asking.pop(peer, None))
        return await asyncio.shield(asking)

    def stop(self) -> None:
        """Ask nobody any more."""
        for asking in list(self._asking.values()):
            asking.cancel()

    async def _tell(self, peer: str, device: DeviceId) -> bool:
        """Give a member our notice and take its own; whether both have the same now."""
        try:
            theirs = await self._session.transport.renew(peer, self._encoded())
            if theirs:
                self._hear(theirs, device)
            return theirs == b"" or theirs == self._encoded()
        except P2PCollabError as error:
            log.info("no news of the run secret", peer=peer, reason=str(error))
            return False

    async def compare(self, peer: str) -> None:
        """Once with each device that shares the secret: who has joined with it was not told of its notice."""
        now = self._session.clock()
        if self._compare_after.get(peer, now) > now:
            return
        self._compare_after[peer] = math.inf
        try:
            theirs = await self._session.transport.rotation(peer, self._encoded())
            if theirs:
                self._hear(theirs, None)
        except PeerError as error:
            log.info("notice refused", peer=peer, reason=str(error))
        except P2PCollabError as error:
            # It has not answered, or is of a version that knows no rotation.
            self._compare_after[peer] = now + _COMPARE_AGAIN_S
            log.info("notices not compared", peer=peer, reason=str(error))
            return
        if self.unproved:
            self.unproved = False
            self._keep()

    # Notices

    def _encoded(self) -> bytes:
        return self.state.notice.encode() if self.state.notice else b""

    def _hear(self, encoded: bytes, relay: DeviceId | None) -> None:
        """Take a notice, and do what it asks for.

        Raises:
            PeerError: it is none.
        """
        if encoded == self._encoded():
            return
        notice = Notice.decode(encoded, self._session.run_id)
        verdict, secret = judge(self.state, notice, self._session.identity, relay)
        match verdict:
            case Verdict.ADOPT:
                before = self.state
                self._switch(adopt(before, notice, secret))
                self._session.events.add(
                    "rotated",
                    f"{self._names(self.state.forgotten - before.forgotten) or 'a device'} was shut out by "
                    f"{self._session.name(notice.author_id)}; the join code is another one now",
                    epoch=notice.epoch,
                )
                self._again |= left_out(before, self.state, self._session.identity)
                self._news.set()
            case Verdict.SHUT_OUT:
                self._end(notice)
            case Verdict.IGNORE:
                log.info("notice ignored", epoch=notice.epoch, author=notice.author_id)

    def _end(self, notice: Notice) -> None:
        if self.shut_out is None:
            self.shut_out = NotAuthorisedError(
                f"this device was shut out of the run by {self._session.name(notice.author_id)}",
                "if that is a mistake: stop it, remove identity.key from its state folder, and join with the "
                "run's new join code",
            )
            self._session.events.add("shut-out", str(self.shut_out), epoch=notice.epoch)
            self.ended.set()

    def _switch(self, after: RotationState) -> None:
        """Go over to another notice. Nothing waits in here: nobody sees half of it."""
        session = self._session
        new_secret = after.secret != self.state.secret
        self.state = after
        self.unproved = False
        self._keep()
        session.forgotten = after.forgotten
        if new_secret:
            session.keys = RunKeys.derive(after.secret)
            session.transport.rekey(session.keys, [RunKeys.derive(secret) for secret in after.retired])
            self._board.rekey(session.keys)
            self._on_secret(after.secret)
        self._board.forget(after.forgotten)
        session.coordinator.forget(after.forgotten)
        self._ask_after.clear()
        self._compare_after.clear()
        session.record_bell.ring()
        session.work_bell.ring()
        session.fetch_bell.ring()

    def _keep(self) -> None:
        """Remember it over restarts. A device whose disk refuses is told again by the others after one."""
        try:
            self._session.store.keep_rotation(self.state)
            self.save_members(durable=True)
            self._session.warnings.pop("rotation", None)
        except StorageError as error:
            self._session.warn("rotation", str(error))

    def save_members(self, *, durable: bool = False) -> None:
        """Remember who the members are, and what they are called.

        Raises:
            StorageError: the disk refused.
        """
        names = self._session.names
        members: dict[str, Value] = {
            device: {"key": key.hex(), "name": names.get(device, "")}
            for device, key in self.state.members.items()
        }
        self._session.store.set_meta({"members": members}, durable=durable)

    # Shutting out

    async def forget(self, wanted: str) -> dict[str, Any]:
        """Shut a device out; what to tell the person who asked for it.

        Args:
            wanted: its name, its id, or the beginning of that.

        Raises:
            UsageError: there is no such device, or more than one.
            StorageError: the new secret could not be stored; nothing has changed.
        """
        async with self._forgetting:
            device = self._find(wanted)
            name = self._session.name(device)
            told = await self._forget({device})
        remaining = {other for other in self.state.members if other != self._session.device}
        return {
            "device": device,
            "name": name,
            "epoch": self.state.epoch,
            "told": sorted(map(self._session.name, told)),
            "not_told": sorted(map(self._session.name, remaining - told)),
        }

    async def _forget(self, devices: Collection[DeviceId]) -> set[DeviceId]:
        state = self.state
        secret = os.urandom(SECRET_BYTES)
        notice = forget(state, self._session.identity, devices, secret=secret, ephemeral_seed=os.urandom(32))
        after = adopt(state, notice, secret)
        # Before anybody hears of it: a secret that only others have would shut this device out.
        self._session.store.keep_rotation(after)
        names = self._names(devices)
        self._switch(after)
        self._session.events.add(
            "rotated",
            f"{names} was shut out by this device; the join code is another one now",
            epoch=after.epoch,
        )
        return await self._spread(self._session.coordinator.live(self._session.clock()))

    async def run(self) -> None:
        """Hand on what is heard, for ever."""
        while True:
            await self._news.wait()
            self._news = anyio.Event()
            again, self._again = self._again - self.state.forgotten, frozenset()
            try:
                if again:
                    # Another notice was made at the same time as ours, and goes before it.
                    async with self._forgetting:
                        await self._forget(again)
                else:
                    await self._spread(self._session.coordinator.hints(self._session.clock()))
            except P2PCollabError as error:
                self._session.warn("rotation", str(error))
                self._again |= again

    async def _spread(self, devices: Iterable[DeviceId]) -> set[DeviceId]:
        """Tell devices; those that have it now."""
        told: set[DeviceId] = set()
        places = asyncio.Semaphore(_TOLD_AT_ONCE)

        async def tell(device: DeviceId, peer: str) -> None:
            async with places:
                if await self._tell(peer, device):
                    told.add(device)

        async with anyio.create_task_group() as tasks:
            for device in devices:
                peer = self._peer_of(device)
                if peer is not None and device != self._session.device:
                    tasks.start_soon(tell, device, peer)
        return told

    def _peer_of(self, device: DeviceId) -> str | None:
        key = self.state.members.get(device)
        return peer_id(key) if key is not None else None

    def _find(self, wanted: str) -> DeviceId:
        session = self._session
        members = sorted(self.state.members)
        found = [device for device in members if session.name(device) == wanted]
        if not found and len(wanted) >= _ID_CHARS_MIN:
            found = [device for device in members if device.startswith(wanted.lower())]
        if len(found) == 1:
            return found[0]
        listed = ", ".join(
            f"{session.name(device)} ({device[:8]})"
            for device in (found or members)[:_IDS_LISTED_MAX]
            if device != session.device
        )
        if found:
            raise UsageError(f"more than one device is called {wanted!r}", f"name one by its id: {listed}")
        raise UsageError(
            f"no device of this run is called {wanted!r}",
            f"these are known: {listed}" if listed else "no other device was seen in it so far",
        )

    def _names(self, devices: Iterable[DeviceId]) -> str:
        return ", ".join(sorted(map(self._session.name, devices)))
