"""Where peers can be reached, and when to try them again."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from .. import limits
from ..errors import PeerError, UsageError
from ..keys import public_key_of_peer

_MULTIADDR: Final = re.compile(
    r"/ip4/(?P<host>[0-9.]{7,15})/tcp/(?P<port>[0-9]{1,5})/p2p/(?P<peer>[1-9A-HJ-NP-Za-km-z]{1,64})"
)
_HOST_PORT: Final = re.compile(
    r"(?P<host>[0-9.]{7,15}):(?P<port>[0-9]{1,5})/(?P<peer>[1-9A-HJ-NP-Za-km-z]{1,64})"
)
#: Addresses kept per peer: a device has one, or two while it changes networks.
_PER_PEER_MAX: Final = 4
#: Seconds until a peer that did not answer is tried again: doubled each time, so that a device that was
#: switched off costs little, and a healed partition merges within the longest.
_RETRY_S: Final = 5.0
_RETRY_S_MAX: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAddress:
    """A peer, and an IPv4 address at which it listens. Constructed from checked parts only."""

    #: libp2p peer id, base58.
    peer: str
    #: Dotted IPv4.
    host: str
    port: int

    def __str__(self) -> str:
        """The multiaddr."""
        return f"/ip4/{self.host}/tcp/{self.port}/p2p/{self.peer}"

    @property
    def option(self) -> str:
        """As a person gives it to `--peer`."""
        return f"{self.host}:{self.port}/{self.peer}"

    @classmethod
    def checked(cls, peer: str, host: str, port: int) -> PeerAddress:
        """An address from outside.

        Raises:
            PeerError: it is not one that a peer can have.
        """
        public_key_of_peer(peer)
        try:
            address = ipaddress.IPv4Address(host)
        except ValueError as error:
            raise PeerError(f"{host!r} is not an IPv4 address") from error
        if address.is_multicast or address.is_unspecified or address.is_reserved:
            raise PeerError(f"{host} is not the address of a device")
        if not 0 < port < 65536:
            raise PeerError(f"{port} is not a TCP port")
        return cls(peer=peer, host=str(address), port=port)

    @classmethod
    def parse(cls, text: str) -> PeerAddress:
        """A multiaddr `/ip4/HOST/tcp/PORT/p2p/PEER`, as device records carry it.

        Raises:
            PeerError: it is something else.
        """
        return cls._from_match(_MULTIADDR.fullmatch(text))

    @classmethod
    def parse_option(cls, text: str) -> PeerAddress:
        """What a person gives to `--peer`: `HOST:PORT/PEER-ID`, or a multiaddr.

        Raises:
            UsageError: it is neither.
        """
        try:
            return cls._from_match(_MULTIADDR.fullmatch(text) or _HOST_PORT.fullmatch(text))
        except PeerError as error:
            raise UsageError(
                f"{text!r} is not a peer's address: {error}",
                "give it as `p2pcollab peers` or `p2pcollab status --json` prints it: HOST:PORT/PEER-ID",
            ) from error

    @classmethod
    def _from_match(cls, match: re.Match[str] | None) -> PeerAddress:
        if match is None:
            raise PeerError("it has not the form of an address")
        return cls.checked(match["peer"], match["host"], int(match["port"]))


@dataclass(slots=True)
class _Entry:
    addresses: list[PeerAddress] = field(default_factory=list)
    failures: int = 0
    next_try: float = 0.0
    #: Whether the peer ever proved to be at one of these addresses.
    proven: bool = False


class AddressBook:
    """Addresses of peers, newest first. Hints only: the transport proves who is at an address.

    Times are monotonic seconds. Bounded in both directions, because announcements cost a stranger nothing:
    an address that never worked makes room first.
    """

    def __init__(self, addresses: Iterable[PeerAddress] = ()) -> None:
        self._entries: dict[str, _Entry] = {}
        for address in addresses:
            self.learn(address)

    def learn(self, address: PeerAddress) -> bool:
        """Remember an address; whether it is new. A new address of a peer is due at once."""
        entry = self._entries.get(address.peer)
        if entry is None:
            if not self._make_room():
                return False
            entry = self._entries[address.peer] = _Entry()
        if address in entry.addresses:
            return False
        # A proven address keeps its place: whoever floods the network with others must not push it out.
        keep = entry.addresses[:1] if entry.proven else []
        entry.addresses = [*keep, address, *entry.addresses[len(keep) :]][:_PER_PEER_MAX]
        entry.failures, entry.next_try = 0, 0.0
        return True

    def of(self, peer: str) -> tuple[PeerAddress, ...]:
        """A peer's addresses, the one to try first at the front."""
        entry = self._entries.get(peer)
        return tuple(entry.addresses) if entry else ()

    def proven(self, peer: str) -> bool:
        """Whether this device ever reached the peer at one of its addresses."""
        entry = self._entries.get(peer)
        return entry is not None and entry.proven

    def all(self) -> tuple[PeerAddress, ...]:
        """Everything known, to be stored over a restart; proven peers first."""
        entries = sorted(self._entries.values(), key=lambda entry: not entry.proven)
        return tuple(address for entry in entries for address in entry.addresses)

    def succeeded(self, address: PeerAddress) -> None:
        """The peer is at this address."""
        entry = self._entries.get(address.peer)
        if entry is not None:
            rest = [other for other in entry.addresses if other != address]
            entry.addresses = [address, *rest][:_PER_PEER_MAX]
            entry.proven, entry.failures, entry.next_try = True, 0, 0.0

    def failed(self, peer: str, now: float) -> None:
        """The peer answered at none of its addresses."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.next_try = now + min(_RETRY_S_MAX, _RETRY_S * 2.0**entry.failures)
            entry.failures += 1

    def retry_all(self) -> None:
        """Make all peers due at once, however often they failed."""
        for entry in self._entries.values():
            entry.failures, entry.next_try = 0, 0.0

    def due(self, now: float) -> tuple[str, ...]:
        """Peers that may be tried now."""
        return tuple(peer for peer, entry in self._entries.items() if entry.next_try <= now)

    def _make_room(self) -> bool:
        if len(self._entries) < limits.ADDRESS_BOOK_PEERS_MAX:
            return True
        for peer, entry in self._entries.items():
            if not entry.proven:
                del self._entries[peer]
                return True
        return False
