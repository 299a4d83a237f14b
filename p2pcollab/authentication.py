"""Authentication: who knows the run secret, and that each of their messages counts once.

Opening a message raises `PeerError` where its bytes are no message, and `NotAuthorisedError` where they were
not made with the run secret, for this receiver, now. Lengths are checked before anything is computed.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac
import struct
from typing import Final

from . import limits
from .errors import NotAuthorisedError, PeerError
from .keys import RunKeys

_REQUEST_DOMAIN: Final = b"p2pcollab/request/1"
_RESPONSE_DOMAIN: Final = b"p2pcollab/response/1"

_MAC_BYTES: Final = 32
NONCE_BYTES: Final = 16
_TIME: Final = struct.Struct(">Q")
_REQUEST_OVERHEAD: Final = _MAC_BYTES + _TIME.size + NONCE_BYTES


def mac(keys: RunKeys, domain: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 under the run's authentication key; no two different (domain, parts) share their input."""
    code = hmac.new(keys.auth_key, digestmod=hashlib.sha256)
    for part in (domain, *parts):
        code.update(_TIME.pack(len(part)))
        code.update(part)
    return code.digest()


def verify_mac(keys: RunKeys, tag: bytes, domain: bytes, *parts: bytes) -> bool:
    """Whether `tag` is the MAC of the parts, in constant time."""
    return hmac.compare_digest(tag, mac(keys, domain, *parts))


class _Window:
    """The newest nonces of one sender. Forgetting one raises a floor: what is dated below it is refused."""

    __slots__ = ("_by_time", "_floor_ms", "_nonces")

    def __init__(self, floor_ms: int) -> None:
        self._floor_ms = floor_ms
        self._by_time: list[tuple[int, bytes]] = []
        self._nonces: set[bytes] = set()

    @property
    def newest_ms(self) -> int:
        """The time of the newest request; the floor if there is none."""
        return max((time_ms for time_ms, _ in self._by_time), default=self._floor_ms)

    def admit(self, nonce: bytes, time_ms: int, capacity: int) -> bool:
        """Whether the request is new; it is remembered."""
        if time_ms <= self._floor_ms or nonce in self._nonces:
            return False
        self._nonces.add(nonce)
        heapq.heappush(self._by_time, (time_ms, nonce))
        if len(self._by_time) > capacity:
            self._floor_ms, forgotten = heapq.heappop(self._by_time)
            self._nonces.discard(forgotten)
        return True


class ReplayGuard:
    """Lets each request through once, in bounded memory.

    A sender's requests arrive nearly in the order of its own clock, so its newest few hundred nonces and a
    floor below them are enough. Nothing forgotten is ever admitted again, not even after our clock has
    jumped; and a sender that floods displaces only its own nonces. One memory for all senders was rejected:
    an insider's requests dated ahead of time would have raised everybody's floor. A restart forgets all; a
    replay then still needs the sender's own libp2p connection.
    """

    def __init__(
        self,
        *,
        senders_max: int = limits.DEVICES_MAX,
        nonces_max: int = limits.NONCES_MAX // limits.DEVICES_MAX,
        window_s: float = limits.CLOCK_SKEW_S_MAX,
    ) -> None:
        self._senders_max = senders_max
        self._nonces_max = nonces_max
        self._window_ms = round(window_s * 1000)
        self._windows: dict[str, _Window] = {}
        self._floor_ms = -1

    def admit(self, sender: str, nonce: bytes, time_ms: int, now: float) -> None:
        """Let a request through once.

        Args:
            sender: as the transport, or at least the request's MAC, has proved it.
            time_ms: the request's date by its sender's clock, unix time in milliseconds.
            now: our clock, unix time in seconds.

        Raises:
            NotAuthorisedError: it is a replay, dated outside the window, or of one sender too many.
        """
        now_ms = round(now * 1000)
        if abs(now_ms - time_ms) > self._window_ms:
            raise NotAuthorisedError(
                f"the request is dated {abs(now_ms - time_ms) // 1000} s off this device's clock",
                "set the clocks of both devices",
            )
        window = self._windows.get(sender) or self._new_window(sender, now_ms)
        if not window.admit(nonce, time_ms, self._nonces_max):
            raise NotAuthorisedError("the request was seen before, or is older than what is remembered")

    def _new_window(self, sender: str, now_ms: int) -> _Window:
        if len(self._windows) >= self._senders_max:
            self._forget_silent_senders(now_ms - self._window_ms)
        if len(self._windows) >= self._senders_max:
            raise NotAuthorisedError(f"more than {self._senders_max} devices send requests")
        return self._windows.setdefault(sender, _Window(self._floor_ms))

    def _forget_silent_senders(self, before_ms: int) -> None:
        for sender, window in list(self._windows.items()):
            if window.newest_ms < before_ms:
                self._floor_ms = max(self._floor_ms, window.newest_ms)
                del self._windows[sender]


class Authenticator:
    """Wraps requests and responses so that only a device that knows the run secret can make them.

    A request is MAC, time, nonce, body; a response is MAC, body. Both MACs cover the method and both peer
    ids, which the transport has proved; the response's also covers the request's nonce. The transport
    encrypts; this only keeps strangers out.
    """

    def __init__(self, keys: RunKeys, own_peer_id: str) -> None:
        self._keys = keys
        self._own = own_peer_id.encode()
        self._replays = ReplayGuard()

    def seal_request(
        self, method: str, body: bytes, receiver_peer_id: str, now: float, nonce: bytes
    ) -> bytes:
        """A request's bytes. `now`: unix time in seconds; `nonce`: 16 random bytes, never used before."""
        assert len(nonce) == NONCE_BYTES
        assert len(body) <= limits.UNARY_BYTES_MAX
        covered = _TIME.pack(round(now * 1000)) + nonce + body
        return self._mac(_REQUEST_DOMAIN, method, self._own, receiver_peer_id.encode(), covered) + covered

    def open_request(self, method: str, data: bytes, sender_peer_id: str, now: float) -> tuple[bytes, bytes]:
        """The body of a request to this device, and the nonce to answer under. `now`: unix time in seconds.

        Raises:
            PeerError: it is too short or too long.
            NotAuthorisedError: its sender does not know the run secret, or it is a replay.
        """
        _check_length(data, _REQUEST_OVERHEAD)
        tag, covered = data[:_MAC_BYTES], data[_MAC_BYTES:]
        expected = self._mac(_REQUEST_DOMAIN, method, sender_peer_id.encode(), self._own, covered)
        if not hmac.compare_digest(tag, expected):
            raise NotAuthorisedError("a request came from a device that does not know the run secret")
        (time_ms,) = _TIME.unpack_from(covered)
        nonce = covered[_TIME.size : _TIME.size + NONCE_BYTES]
        self._replays.admit(sender_peer_id, nonce, time_ms, now)
        return covered[_TIME.size + NONCE_BYTES :], nonce

    def made_by(self, method: str, data: bytes, sender_peer_id: str) -> bool:
        """Whether a request was made by its sender under this run secret, whenever that was."""
        if not _REQUEST_OVERHEAD <= len(data) <= _REQUEST_OVERHEAD + limits.UNARY_BYTES_MAX:
            return False
        expected = self._mac(_REQUEST_DOMAIN, method, sender_peer_id.encode(), self._own, data[_MAC_BYTES:])
        return hmac.compare_digest(data[:_MAC_BYTES], expected)

    def seal_response(self, method: str, body: bytes, receiver_peer_id: str, nonce: bytes) -> bytes:
        """The bytes of the response to the request with this nonce."""
        assert len(body) <= limits.UNARY_BYTES_MAX
        covered = nonce + body
        return self._mac(_RESPONSE_DOMAIN, method, self._own, receiver_peer_id.encode(), covered) + body

    def open_response(self, method: str, data: bytes, sender_peer_id: str, nonce: bytes) -> bytes:
        """The body of the response to our request with this nonce.

        Raises:
            PeerError: it is too short or too long.
            NotAuthorisedError: its sender does not know the run secret, or it answers another request.
        """
        _check_length(data, _MAC_BYTES)
        tag, body = data[:_MAC_BYTES], data[_MAC_BYTES:]
        expected = self._mac(_RESPONSE_DOMAIN, method, sender_peer_id.encode(), self._own, nonce + body)
        if not hmac.compare_digest(tag, expected):
            raise NotAuthorisedError("a response came from a device that does not know the run secret")
        return body

    def _mac(self, domain: bytes, method: str, sender: bytes, receiver: bytes, covered: bytes) -> bytes:
        return mac(self._keys, domain, method.encode(), sender, receiver, covered)


def _check_length(data: bytes, overhead: int) -> None:
    if not overhead <= len(data) <= overhead + limits.UNARY_BYTES_MAX:
        raise PeerError(f"a message of {len(data)} bytes is shorter or longer than any")
