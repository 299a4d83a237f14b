"""Shards come here: what the coordinator wants is fetched from who holds it, tried, and kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import anyio
import structlog

from ..errors import NotAuthorisedError, P2PCollabError, PeerError, StorageError
from ..holdings import Want
from ..run import DeviceId
from ..wire import Download, Earlier, decode_contribution, sign_again
from .calls import RefusalError, UnreachableError
from .intake import Intake
from .peer_ids import PeerIds
from .session import Session

log = structlog.get_logger()

#: Shards fetched at a time; more only share the same link.
_FETCHES_AT_ONCE: Final = 4
_TRIES_PER_HOLDER: Final = 2
#: Pause after the disk has refused a shard that was fetched.
_AFTER_REFUSAL_S: Final = 5.0


class Fetcher:
    """Fetches one device's shards."""

    def __init__(self, session: Session, intake: Intake, peer_ids: PeerIds) -> None:
        self._session = session
        self._intake = intake
        self._peer_ids = peer_ids
        #: Digests on their way here, and what tells that they came or did not.
        self.fetching: dict[str, anyio.Event] = {}

    async def run(self) -> None:
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
                    await session.transport.fetch_part(self._peer_ids.known_peer(device), download)
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
                reply = await session.transport.earlier(self._peer_ids.known_peer(device), question)
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
            if new := self._intake.enter([again]):
                self._intake.news.add(new)

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
        session.counters.tried_macs += verdicts.macs
        known = session.coordinator.opinions
        for entry, verdict in zip(entries, verdicts.found, strict=True):
            session.coordinator.judged(entry, verdict)
            if verdict is not None:
                self._intake.refuse(entry, verdict.reason)
        self._intake.tell_refusals()
        if session.coordinator.opinions != known:
            session.store.set_meta({"opinions": session.coordinator.opinions})
        self._vote()
        return not entries or any(verdict is None or not verdict.malformed for verdict in verdicts.found)
