"""Discovery: announces this device on the LAN and finds others (mDNS/DNS-SD through zeroconf).

What is found is a hint: anyone on the LAN can announce anything, and a killed daemon stays listed for
minutes. So a finding is checked for form, never for truth, and whoever uses it proves the rest by calling.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from zeroconf import (
    DNSIncoming,
    DNSOutgoing,
    DNSQuestion,
    DNSQuestionType,
    IPVersion,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from .. import limits
from ..errors import PeerError, RunError
from ..run import PROTOCOL_VERSION
from .addresses import PeerAddress
from .interfaces import Interface

SERVICE: Final = "_p2pcollab._tcp.local."
#: Questions are repeated ever more rarely by zeroconf, up to once an hour; a device that was plugged in again
#: asks sooner.
BROWSE_AGAIN_S: Final = 20.0
#: In which a flood can add some 10,000 records, a few MiB.
_LOOK_AT_CACHE_S: Final = 1.0
#: A second question, for when the first got lost.
_ASK_TWICE_S: Final = 0.3
_RESOLVE_MS: Final = 3000
_RESOLVES_AT_ONCE: Final = 16
_STOP_S: Final = 3.0
#: DNS-SD asks for less than 400 bytes, and ours need 200.
_TXT_BYTES_MAX: Final = 1024
#: mDNS (RFC 6762).
_GROUP: Final = ("224.0.0.251", 5353)
_PACKET_BYTES_MAX: Final = 9000
_FLAGS_QUERY: Final = 0
_TYPE_PTR: Final = 12
_CLASS_IN: Final = 1
_RUN_PREFIX: Final = re.compile(r"[0-9a-f]{14}")
_HOSTILE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What this device tells the LAN: nothing that a stranger may not know."""

    #: First 14 hexadecimal digits of the run id.
    run_prefix: str
    #: The run's name.
    name: str
    #: libp2p peer id.
    peer: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What somebody announced. Unproved."""

    run_prefix: str
    name: str
    address: PeerAddress
    #: Protocol version.
    version: int


class Discovery:
    """Announcing and browsing on one interface. `start`, iterate, `stop`.

    Iteration gives every finding when it appears or changes, and again with every repeated question, so that
    who failed to reach a device tries once more. It ends with `stop`. Our own announcement is left out.
    """

    def __init__(self, interface: Interface, own_peer: str, run_prefix: str | None = None) -> None:
        """
        Args:
            own_peer: this device's libp2p peer id, which is never reported.
            run_prefix: report devices of this run only.
        """
        self._interface = interface
        self._own_peer = own_peer
        self._run_prefix = run_prefix
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._asking: asyncio.DatagramTransport | None = None
        self._announced: AsyncServiceInfo | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._resolving: set[str] = set()
        self._ask_now = asyncio.Event()
        #: Since the last question.
        self._reported: set[Found] = set()
        # Bounded: what is dropped comes again with the next question.
        self._queue: asyncio.Queue[Found | None] = asyncio.Queue(limits.ANNOUNCEMENTS_MAX)
        #: The newest finding per peer id, bounded.
        self.found: dict[str, Found] = {}

    async def start(self, announcement: Announcement | None = None) -> None:
        """Browse, and announce at once if there is something to announce.

        Raises:
            RunError: the interface takes no multicast.
        """
        try:
            self._zeroconf = AsyncZeroconf(interfaces=[self._interface.address], ip_version=IPVersion.V4Only)
        except OSError as error:
            raise RunError(
                f"devices cannot be found on {self._interface.name}, it takes no multicast: {error.strerror}",
                "name another interface with --interface, or the other device's address with --peer",
            ) from error
        await self._open_asking(self._zeroconf.zeroconf)
        self._spawn(self._browse())
        self._spawn(self._bound_cache(self._zeroconf.zeroconf))
        if announcement is not None:
            await self.announce(announcement)

    async def announce(self, announcement: Announcement) -> None:
        """Announce this device, from now on or with new contents."""
        assert self._zeroconf is not None, "discovery is not started"
        # Unique for each daemon, its host name too: two that share one get each other's addresses.
        instance = f"{announcement.run_prefix}-{announcement.peer[-12:]}"
        info = AsyncServiceInfo(
            SERVICE,
            f"{instance}.{SERVICE}",
            addresses=[socket.inet_aton(self._interface.address)],
            port=announcement.port,
            properties={
                "v": str(PROTOCOL_VERSION),
                "run": announcement.run_prefix,
                "name": announcement.name,
                "peer": announcement.peer,
                "port": str(announcement.port),
            },
            server=f"{instance}.local.",
        )
        if self._announced is None:
            # The name comes from the device's key, so probing for others that use it (0.5 s) is skipped.
            sent = await self._zeroconf.async_register_service(info, cooperating_responders=True)
        else:
            sent = await self._zeroconf.async_update_service(info)
        self._announced = info
        self._spawn(_finish(sent))

    def ask_again(self) -> None:
        """Ask who is there now, instead of when it is time again."""
        self._ask_now.set()

    async def stop(self) -> None:
        """Take the announcement back, so that nobody waits for us, and stop browsing."""
        if self._zeroconf is None:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._browser is not None:
            await self._browser.async_cancel()
        if self._asking is not None:
            self._asking.close()
        with contextlib.suppress(asyncio.TimeoutError):
            if self._announced is not None:
                goodbye = await self._zeroconf.async_unregister_service(self._announced)
                await asyncio.wait_for(goodbye, _STOP_S)
            await asyncio.wait_for(self._zeroconf.async_close(), _STOP_S)
        self._zeroconf = self._browser = self._asking = self._announced = None
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    def held(self) -> dict[str, int]:
        """How much of what was announced is kept: findings, and mDNS records of whatever kind."""
        return {
            "announcements": len(self.found),
            "mdns_records": 0 if self._zeroconf is None else _cached(self._zeroconf.zeroconf),
        }

    async def __aiter__(self) -> AsyncIterator[Found]:
        while (found := await self._queue.get()) is not None:
            yield found

    async def _browse(self) -> None:
        """Ask, for ever: every device by multicast, and each once to answer here alone."""
        assert self._zeroconf is not None and self._asking is not None
        while True:
            self._reported.clear()
            self._browser = AsyncServiceBrowser(
                self._zeroconf.zeroconf, SERVICE, handlers=[self._changed], question_type=DNSQuestionType.QM
            )
            for _ in range(2):
                self._asking.sendto(_question(), _GROUP)
                await asyncio.sleep(_ASK_TWICE_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ask_now.wait(), BROWSE_AGAIN_S)
            self._ask_now.clear()
            await self._browser.async_cancel()

    async def _bound_cache(self, zeroconf: Zeroconf) -> None:
        """Empty zeroconf's cache when it is too full, for ever: it keeps what anybody announces for 75
        minutes.

        Devices that are really there answer the next question; and who was met is remembered elsewhere.
        """
        while True:
            await asyncio.sleep(_LOOK_AT_CACHE_S)
            if _cached(zeroconf) > limits.MDNS_RECORDS_MAX:
                records = [record for named in zeroconf.cache.cache.values() for record in named]
                zeroconf.cache.async_remove_records(records)

    async def _open_asking(self, zeroconf: Zeroconf) -> None:
        """A socket for questions that are answered at once and here.

        Answers by multicast wait up to a second if there was one just before, and Wi-Fi loses more of them.
        Unicast ones to the port that all mDNS programs share reach any one of those on this machine. So the
        question comes from a port of its own (RFC 6762, 6.7), and what comes back goes into zeroconf's cache.
        """
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        address = socket.inet_aton(self._interface.address)
        asking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, address)
        asking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        asking.setblocking(False)
        asking.bind((self._interface.address, 0))
        loop = asyncio.get_running_loop()
        self._asking, _ = await loop.create_datagram_endpoint(
            lambda: _Answers(zeroconf, self._interface), sock=asking
        )

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed or name in self._resolving:
            return
        info = AsyncServiceInfo(service_type, name)
        if info.load_from_cache(zeroconf):
            self._report(info)
        elif len(self._resolving) < _RESOLVES_AT_ONCE:
            self._resolving.add(name)
            self._spawn(self._resolve(zeroconf, info))

    async def _resolve(self, zeroconf: Zeroconf, info: AsyncServiceInfo) -> None:
        try:
            if await info.async_request(zeroconf, _RESOLVE_MS, question_type=DNSQuestionType.QM):
                self._report(info)
        finally:
            self._resolving.discard(info.name)

    def _report(self, info: AsyncServiceInfo) -> None:
        try:
            found = parse_announcement(info, self._interface)
        except PeerError:
            return
        peer = found.address.peer
        if peer == self._own_peer or self._run_prefix not in (None, found.run_prefix):
            return
        if found in self._reported:
            return
        if peer in self.found or len(self.found) < limits.ANNOUNCEMENTS_MAX:
            self.found[peer] = found
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(found)
            if len(self._reported) < limits.ANNOUNCEMENTS_MAX:
                self._reported.add(found)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Answers(asyncio.DatagramProtocol):
    """Hands answers to zeroconf, which parses and bounds them like those by multicast."""

    def __init__(self, zeroconf: Zeroconf, interface: Interface) -> None:
        self._zeroconf = zeroconf
        self._interface = interface

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        """Take one packet."""
        host, port = addr
        if len(data) > _PACKET_BYTES_MAX or port != _GROUP[1] or not self._interface.may_reach(host):
            return
        message = DNSIncoming(data, addr)
        if message.valid and message.is_response():
            self._zeroconf.record_manager.async_updates_from_response(message)


def _cached(zeroconf: Zeroconf) -> int:
    return sum(map(len, zeroconf.cache.cache.values()))


def _question() -> bytes:
    # An id of its own: zeroconf drops a packet that equals one of the last second, such as the browser's.
    question = DNSOutgoing(_FLAGS_QUERY, multicast=False, id_=secrets.randbelow(65535) + 1)
    question.add_question(DNSQuestion(SERVICE, _TYPE_PTR, _CLASS_IN))
    packet: bytes = question.packets()[0]
    return packet


def parse_announcement(info: AsyncServiceInfo, interface: Interface) -> Found:
    """What a stranger's announcement says.

    Raises:
        PeerError: it is not one that this program makes, or names an address that it has no business with.
    """
    if len(info.text or b"") > _TXT_BYTES_MAX:
        raise PeerError("the announcement is too long")
    run_prefix, name = _field(info, b"run"), _HOSTILE.sub("?", _field(info, b"name"))
    version, port = _field(info, b"v"), _field(info, b"port")
    if not _RUN_PREFIX.fullmatch(run_prefix):
        raise PeerError("the announcement names no run")
    if not 1 <= len(name) <= limits.NAME_CHARS_MAX:
        raise PeerError("the announcement has no name, or a long one")
    if not re.fullmatch(r"[0-9]{1,6}", version, re.ASCII) or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII):
        raise PeerError("the announcement has no version or no port")
    for packed in info.addresses_by_version(IPVersion.V4Only)[:4]:
        host = str(ipaddress.IPv4Address(packed))
        if interface.may_reach(host):
            address = PeerAddress.checked(_field(info, b"peer"), host, int(port))
            return Found(run_prefix=run_prefix, name=name, address=address, version=int(version))
    raise PeerError("the announcement has no address on this network")


def _field(info: AsyncServiceInfo, key: bytes) -> str:
    value = info.properties.get(key)
    try:
        return (value or b"").decode()
    except UnicodeDecodeError as error:
        raise PeerError("the announcement is not text") from error


async def _finish(sent: Awaitable[None]) -> None:
    await sent
