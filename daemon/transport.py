"""The transport: this device's p2pd, the links to its peers, and the calls between them.

Every unary call on this p2pd, the DHT's own included, is sealed (see sealed_calls.py). Shards follow on raw
streams (see streams.py): hivemind's streaming handlers read whatever length a stranger declares.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from .. import limits
from ..authentication import Authenticator
from ..errors import NotAuthorisedError, P2PCollabError, PeerError, RunError, UsageError
from ..files import write_atomic
from ..keys import Identity, RunKeys
from ..wire import (
    Download,
    Earlier,
    EarlierReply,
    ErrorReply,
    Exchange,
    ExchangeReply,
    Fetch,
    Hello,
    HelloReply,
    Message,
    Push,
    PushReply,
    StreamHeader,
    decode_reply,
)
from . import streams
from .addresses import AddressBook, PeerAddress
from .calls import PREFIX, Counters, Handlers, RefusalError, UnreachableError, error_of_reply, error_reply
from .interfaces import Interface
from .p2pd import (
    P2PD_MARK,
    P2pdMark,
    check_port_is_free,
    end_stale_p2pd,
    make_socket_folder,
    remove_socket_folder,
)
from .sealed_calls import PROVE, ROTATION, RenewalPort, SealedHandler, SealedP2P, short_peer

#: A link on a LAN takes milliseconds; a host that is gone answers nothing at all.
_PROBE_S: Final = 1.5
_CONNECT_S: Final = 4.0
CALL_S: Final = 8.0
#: p2pd ends by itself this long after its daemon was killed.
_P2PD_IDLE_S: Final = 15
_START_S: Final = 20.0
_STOP_S: Final = 3.0
#: A request, its MAC, and what protobuf puts around it. hivemind lets strangers send 8 MiB.
_P2PD_MESSAGE_BYTES_MAX: Final = limits.UNARY_BYTES_MAX + 4 * limits.KIB
#: Calls in a row without an answer after which a link is taken for dead and made anew: a cut cable leaves TCP
#: connections that hang for minutes, but one slow answer of a busy device must not cut its other streams.
_SILENT_CALLS_MAX: Final = 2

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply", bound=Message)


class Transport:
    """This device on the network. `start`, use, `stop`; after `died`, `restart`."""

    def __init__(
        self,
        identity: Identity,
        keys: RunKeys,
        interface: Interface,
        handlers: Handlers,
        *,
        folder: Path,
        port: int = 0,
        book: AddressBook | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            folder: state folder, for the identity as p2pd reads it and the mark of the process.
            port: TCP port to listen on; 0 lets one be chosen.
            clock: unix time in seconds, for the freshness of requests.
        """
        self.peer_id = identity.peer_id
        self.interface = interface
        self.book = book if book is not None else AddressBook()
        self.counters = Counters()
        #: Set when p2pd is gone; a new one after `restart`.
        self.died = asyncio.Event()
        self._identity = identity
        self._authenticator = Authenticator(keys, identity.peer_id)
        self._retired: tuple[Authenticator, ...] = ()
        self._renewal: RenewalPort | None = None
        self._handlers = handlers
        self._folder = folder
        self._port = port
        self._clock = clock
        self._sockets: Path | None = None
        self._p2p: SealedP2P | None = None
        self._watch: asyncio.Task[None] | None = None
        self._linked: set[str] = set()
        self._silent_calls: dict[str, int] = {}
        self._tickets = streams.Tickets(self.counters)

    # Life

    async def start(self) -> None:
        """Start p2pd on the interface's address, and answer calls.

        Raises:
            UsageError: the port is taken.
            RunError: p2pd does not start.
            StorageError: the state folder cannot be written.
        """
        _quieten_hivemind()
        end_stale_p2pd(self._mark_path)
        if self._port:
            check_port_is_free(self.interface.address, self._port)
        key_path = self._folder / "p2pd.key"
        write_atomic(key_path, self._identity.libp2p_private_key, mode=0o600)
        self._sockets = make_socket_folder()
        # hivemind reads the folder of its sockets from the class.
        kind: Any = type("SealedP2P", (SealedP2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{self._sockets}/"})
        try:
            self._p2p = p2p = await kind.create(
                identity_path=str(key_path),
                check_if_identity_free=False,
                host_maddrs=[f"/ip4/{self.interface.address}/tcp/{self._port}"],
                nat_port_map=False,
                auto_nat=False,
                use_relay=False,
                idle_timeout=_P2PD_IDLE_S,
                startup_timeout=_START_S,
                persistent_conn_max_msg_size=_P2PD_MESSAGE_BYTES_MAX,
            )
        except (P2PDaemonError, OSError) as error:
            remove_socket_folder(self._sockets)
            raise RunError(
                f"p2pd does not start: {error}", "the daemon's log may say more: `p2pcollab paths`"
            ) from error
        assert p2p.peer_id.to_base58() == self.peer_id
        await p2p.begin(self._authenticator, self.counters, self._clock)
        p2p.renewal, p2p.retired = self._renewal, self._retired
        self._port = int((await p2p.get_visible_maddrs())[0]["tcp"])
        P2pdMark.of(p2p._child.pid, self._sockets).write(self._mark_path)
        self.died = asyncio.Event()
        self._watch = asyncio.create_task(self._watch_p2pd(p2p, self.died))
        await self._add_handlers(p2p)

    async def restart(self) -> None:
        """Start p2pd again, under the same peer id and port; the board has to be bound to it again.

        Raises:
            RunError, UsageError, StorageError: as for `start`.
        """
        await self.stop()
        self.counters.p2pd_restarts += 1
        await self.start()

    def move(self, interface: Interface, *, port: int) -> None:
        """Be at another address from the next `restart` on.

        Args:
            port: TCP port to listen on there; 0 keeps the present one if it is free there.
        """
        self.interface = interface
        if port:
            self._port = port
            return
        try:
            check_port_is_free(interface.address, self._port)
        except UsageError:
            self._port = 0

    async def stop(self) -> None:
        """End p2pd and leave nothing of it behind."""
        if self._watch is not None:
            self._watch.cancel()
        self._tickets.clear()
        if self._p2p is not None:
            child = self._p2p._child
            try:
                await asyncio.wait_for(self._p2p.shutdown(), _STOP_S)
            except asyncio.TimeoutError:
                child.kill()
                await child.wait()
            # asyncio's end of the process's output; left open, it complains when the loop is gone.
            child._transport.close()
        if self._sockets is not None:
            remove_socket_folder(self._sockets)
        self._mark_path.unlink(missing_ok=True)
        self._p2p, self._sockets, self._watch = None, None, None
        self._linked.clear()
        self._silent_calls.clear()

    @property
    def p2p(self) -> SealedP2P:
        """For the board: the p2pd to run the DHT on.

        Raises:
            UnreachableError: it does not run; it may be on its way back.
        """
        if self._p2p is None:
            raise UnreachableError("p2pd does not run")
        return self._p2p

    @property
    def p2pd_pid(self) -> int | None:
        """Process id of p2pd, while it runs."""
        return None if self._p2p is None else int(self._p2p._child.pid)

    @property
    def port(self) -> int:
        """TCP port that p2pd listens on; after `start` never 0."""
        return self._port

    @property
    def address(self) -> PeerAddress:
        """Where this device listens."""
        return PeerAddress(peer=self.peer_id, host=self.interface.address, port=self._port)

    @property
    def known_addresses(self) -> tuple[PeerAddress, ...]:
        """Addresses of peers, to be stored over a restart of the daemon."""
        return self.book.all()

    @property
    def _mark_path(self) -> Path:
        return self._folder / P2PD_MARK

    async def _watch_p2pd(self, p2p: SealedP2P, died: asyncio.Event) -> None:
        await p2p.ended()
        died.set()

    # The run secret

    def follow(self, renewal: RenewalPort, retired: Sequence[RunKeys]) -> None:
        """Have the run secret kept up to date; `retired`: of earlier ones."""
        self._renewal = renewal
        self._retired = tuple(Authenticator(earlier, self.peer_id) for earlier in retired)
        if self._p2p is not None:
            self._p2p.renewal, self._p2p.retired = renewal, self._retired

    async def prove(self, peer: str) -> None:
        """See whether a device shares the run secret.

        Raises:
            NotAuthorisedError: it does not.
            UnreachableError, PeerError: it does not answer, or not so.
        """
        await self.link(peer)
        await self._within(peer, self.p2p.call_sealed(PeerID.from_base58(peer), PROVE, b""))

    def rekey(self, keys: RunKeys, retired: Sequence[RunKeys]) -> None:
        """Use another run secret from now on. Calls that are being answered end under the one before."""
        self._authenticator = Authenticator(keys, self.peer_id)
        self._retired = tuple(Authenticator(earlier, self.peer_id) for earlier in retired)
        # Whoever was shut out may hold one; the others ask again.
        self._tickets.clear()
        if self._p2p is not None:
            self._p2p.rekey(self._authenticator, self._retired)

    async def renew(self, peer: str, notice: bytes) -> bytes:
        """Give a member our notice, which need not share the run secret; its own if that is another one.

        Raises:
            UnreachableError, NotAuthorisedError, PeerError: it does not answer, or not so.
        """
        await self.link(peer)
        return await self._within(peer, self.p2p.call_renew(PeerID.from_base58(peer), notice))

    async def rotation(self, peer: str, notice: bytes) -> bytes:
        """The same with a device that does.

        Raises:
            UnreachableError, NotAuthorisedError, PeerError: it does not answer, or not so.
        """
        await self.link(peer)
        remote = PeerID.from_base58(peer)
        return await self._within(peer, self.p2p.call_sealed(remote, ROTATION, notice))

    async def _within(self, peer: str, answer: Awaitable[bytes]) -> bytes:
        try:
            return await asyncio.wait_for(answer, CALL_S)
        except (asyncio.TimeoutError, P2PDaemonError) as error:
            raise UnreachableError(f"{short_peer(peer)} does not answer") from error

    # Links

    async def connect(self, address: PeerAddress) -> None:
        """Link to a peer at an address.

        Raises:
            UnreachableError: nothing answers there, or somebody else does.
        """
        self.book.learn(address)
        remote = PeerID.from_base58(address.peer)
        # p2pd refuses to dial for 5 s after a failed attempt, and for longer after each further one. Asking
        # by TCP first keeps it from failing, so that a device that comes back is linked at once.
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(address.host, address.port), _PROBE_S)
        except (OSError, asyncio.TimeoutError) as error:
            # Whatever connection p2pd still has is from before; when the host is back, it is not waited for.
            self._silent_calls[address.peer] = _SILENT_CALLS_MAX
            raise UnreachableError(f"nothing answers at {address.host}:{address.port}") from error
        writer.close()
        client = self.p2p._client
        try:
            if self._silent_calls.get(address.peer, 0) >= _SILENT_CALLS_MAX:
                await asyncio.wait_for(client.control.disconnect(remote), _CONNECT_S)
            await asyncio.wait_for(client.connect(remote, [Multiaddr(_without_peer(address))]), _CONNECT_S)
        except asyncio.TimeoutError as error:
            raise UnreachableError(f"{short_peer(address.peer)} does not answer at {address.host}") from error
        except (P2PDaemonError, OSError, asyncio.IncompleteReadError) as error:
            raise UnreachableError(
                f"no link to {short_peer(address.peer)} at {address.host}:{address.port}"
            ) from error
        self._linked.add(address.peer)
        self._silent_calls.pop(address.peer, None)
        self.book.succeeded(address)

    async def link(self, peer: str) -> None:
        """Link to a peer at one of its known addresses, unless there is a link.

        Raises:
            UnreachableError: it is at none of them.
        """
        if peer in self._linked:
            return
        addresses = self.book.of(peer)
        for address in addresses:
            with contextlib.suppress(UnreachableError):
                await self.connect(address)
                return
        # A device behind a firewall may have called us: then there is a link, whatever its addresses.
        if peer in await self.peers():
            self._linked.add(peer)
            return
        self.book.failed(peer, asyncio.get_running_loop().time())
        raise UnreachableError(f"{short_peer(peer)} answers at none of its {len(addresses)} addresses")

    def unlink(self, peer: str) -> None:
        """Trust a link no longer, because a call over it was not answered: the next one looks first."""
        self._silent_calls[peer] = self._silent_calls.get(peer, 0) + 1
        self._linked.discard(peer)

    async def refuses(self, peer: str) -> bool:
        """Whether a peer's host is there, and says that nobody listens at any of the peer's addresses."""
        if not self.book.proven(peer):
            # Where this device never got in, being turned away says nothing: a firewall may refuse, too.
            return False
        return all(await asyncio.gather(*(_refused(address) for address in self.book.of(peer))))

    async def peers(self) -> tuple[str, ...]:
        """Peer ids that there is a link to, as p2pd sees it: strangers, too."""
        try:
            infos = await asyncio.wait_for(self.p2p._client.list_peers(), _CONNECT_S)
        except (P2PDaemonError, OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            return ()
        return tuple(info.peer_id.to_base58() for info in infos)

    # Calls

    async def hello(self, peer: str, request: Hello) -> HelloReply:
        """Ask a peer for the run spec. Raises: see `_call`."""
        return await self._call(peer, "hello", request, HelloReply)

    async def exchange(self, peer: str, request: Exchange) -> ExchangeReply:
        """Compare ledgers with a peer. Raises: see `_call`."""
        return await self._call(peer, "exchange", request, ExchangeReply)

    async def push(self, peer: str, request: Push) -> PushReply:
        """Give contributions and our record to a peer. Raises: see `_call`."""
        return await self._call(peer, "push", request, PushReply)

    async def earlier(self, peer: str, request: Earlier) -> EarlierReply:
        """Ask a peer what it holds of a device's contributions to a shard. Raises: see `_call`."""
        return await self._call(peer, "earlier", request, EarlierReply)

    async def fetch(self, peers: Sequence[str], digest: str, length: int) -> bytes:
        """A shard, from the first of the peers that has it; what one of them began, the next goes on with.

        Raises:
            PeerError: none of them gave all its bytes, or they were not those of the digest.
            UnreachableError: none of them answered.
        """
        download = Download(digest, length)
        reason: P2PCollabError = UnreachableError("there is nobody to ask")
        for peer in peers:
            try:
                await self.fetch_part(peer, download)
                # Hashing 60 MB takes 50 ms, and the interpreter lock is free meanwhile.
                return await asyncio.to_thread(download.finish)
            except (PeerError, UnreachableError, NotAuthorisedError) as error:
                reason = error
        raise reason

    async def fetch_part(self, peer: str, download: Download) -> None:
        """Receive from a peer what is missing of a download, or as much of it as comes.

        Raises: see `_call`; what has arrived is kept.
        """
        request = download.request()
        download.start(await self._call(peer, "fetch", request, StreamHeader))
        try:
            _, reader, writer = await asyncio.wait_for(
                self.p2p._client.stream_open(PeerID.from_base58(peer), (streams.METHOD,)), _CONNECT_S
            )
            async with contextlib.aclosing(streams.receive(request, reader, writer, self.counters)) as chunks:
                async for chunk in chunks:
                    download.feed(chunk)
                    if download.complete:
                        return
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, P2PDaemonError) as error:
            raise UnreachableError(f"{short_peer(peer)} stopped in the middle of a shard") from error

    async def _call(self, peer: str, method: str, request: Message, reply: type[Reply]) -> Reply:
        """Call a handler of a peer.

        Raises:
            UnreachableError: it does not answer within the deadline.
            NotAuthorisedError: it does not know our run secret, or we not its.
            RefusalError, IncompatibleError: its handler answers with a reason.
            PeerError: its answer breaks the protocol.
        """
        await self.link(peer)
        try:
            body = await asyncio.wait_for(
                self.p2p.call_sealed(PeerID.from_base58(peer), PREFIX + method, request.encode()), CALL_S
            )
        except asyncio.TimeoutError as error:
            self._silent_calls[peer] = self._silent_calls.get(peer, 0) + 1
            if self._silent_calls[peer] >= _SILENT_CALLS_MAX:
                self._linked.discard(peer)
            raise UnreachableError(f"{short_peer(peer)} does not answer") from error
        except P2PDaemonError as error:
            self._linked.discard(peer)
            raise UnreachableError(f"{short_peer(peer)} does not answer: {error}") from error
        self._silent_calls.pop(peer, None)
        answer = decode_reply(reply, body)
        if isinstance(answer, ErrorReply):
            raise error_of_reply(answer)
        return answer

    # Answers

    async def _add_handlers(self, p2p: SealedP2P) -> None:
        await p2p.add_sealed_handler(PREFIX + "hello", _answering(Hello, self._handlers.hello))
        await p2p.add_sealed_handler(PREFIX + "exchange", _answering(Exchange, self._handlers.exchange))
        await p2p.add_sealed_handler(PREFIX + "push", _answering(Push, self._handlers.push))
        await p2p.add_sealed_handler(PREFIX + "earlier", _answering(Earlier, self._handlers.earlier))
        await p2p.add_sealed_handler(PREFIX + "fetch", _answering(Fetch, self._answer_fetch))
        await p2p.add_binary_stream_handler(streams.METHOD, self._answer_stream)

    async def _answer_fetch(self, peer: str, request: Fetch) -> StreamHeader:
        self._tickets.check_room()
        data = await self._handlers.fetch(peer, request)
        if data is None:
            raise RefusalError("not-found", "this device does not hold that shard")
        self._tickets.issue(peer, request, data)
        return StreamHeader(digest=request.digest, length=len(data))

    async def _answer_stream(
        self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._tickets.serve(info.peer_id.to_base58(), reader, writer)


def _answering(kind: type[Request], handler: Callable[[str, Request], Awaitable[Message]]) -> SealedHandler:
    async def answer(peer: str, body: bytes) -> bytes:
        try:
            return (await handler(peer, kind.decode(body))).encode()
        except P2PCollabError as error:
            return error_reply(error).encode()

    return answer


async def _refused(address: PeerAddress) -> bool:
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address.host, address.port), _PROBE_S)
    except ConnectionRefusedError:
        return True
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return False


def _without_peer(address: PeerAddress) -> str:
    return str(address).rsplit("/p2p/", 1)[0]


def _quieten_hivemind() -> None:
    """Keep hivemind's and p2pd's logs out of the user's sight: who refuses whom is counted and reported."""
    os.environ.setdefault("GOLOG_LOG_LEVEL", "ERROR")
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.ERROR)
