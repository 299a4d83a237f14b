"""Under which libp2p peer id each device is reached."""

from __future__ import annotations

from ..keys import peer_id
from ..run import DeviceId
from .board import Board
from .calls import UnreachableError
from .session import Session


class PeerIds:
    """Peer ids, as records on the board and contributions show them."""

    def __init__(self, session: Session, board: Board) -> None:
        self._session = session
        self._board = board
        #: Peer id of each device that has shown one.
        self._peers: dict[DeviceId, str] = {}

    def peer_of(self, device: DeviceId) -> str | None:
        """The libp2p peer id of a device, once it has shown one: its record or a contribution does."""
        known = self._peers.get(device)
        if known is None:
            known = self._board.peer_of(device) or self._author(device)
            if known is not None:
                self._peers[device] = known
        return known

    def known_peer(self, device: DeviceId) -> str:
        """The same, for who cannot go on without it.

        Raises:
            UnreachableError: the device has shown none yet.
        """
        peer = self.peer_of(device)
        if peer is None:
            raise UnreachableError(f"{self._session.name(device)} has not shown its address")
        return peer

    def _author(self, device: DeviceId) -> str | None:
        for entry in self._session.coordinator.ledger.entries.values():
            if entry.device == device:
                return peer_id(entry.public_key)
        return None
