"""What devices ask of each other: the handlers' port, its errors, and what the calls cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from ..errors import IncompatibleError, NoPeersError, P2PCollabError, PeerError
from ..wire import (
    Earlier,
    EarlierReply,
    ErrorReply,
    Exchange,
    ExchangeReply,
    Fetch,
    Hello,
    HelloReply,
    Push,
    PushReply,
)

#: Names of our calls on the wire; those of the board have none.
PREFIX: Final = "p2pcollab/1/"


class UnreachableError(NoPeersError):
    """A peer does not answer."""


class RefusalError(PeerError):
    """A device of the run answers, but not with what was asked for: handlers raise it, callers get it.

    Codes in use: `busy`, `not-found`, `not-ready`, `bad-request`, `failed`.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Handlers(Protocol):
    """What this device answers. `peer` is the caller's libp2p peer id, proved; it knows the run secret.

    A handler may raise `RefusalError`, or another of our errors, to answer with the reason instead.
    """

    async def hello(self, peer: str, request: Hello) -> HelloReply:
        """Give the run spec."""

    async def exchange(self, peer: str, request: Exchange) -> ExchangeReply:
        """Compare ledgers."""

    async def push(self, peer: str, request: Push) -> PushReply:
        """Take contributions and the caller's record."""

    async def earlier(self, peer: str, request: Earlier) -> EarlierReply:
        """Say what is held of a device's contributions to a shard."""

    async def fetch(self, peer: str, request: Fetch) -> bytes | None:
        """The whole shard; None if it is not held."""


def error_reply(error: P2PCollabError) -> ErrorReply:
    """How a handler's error travels."""
    match error:
        case RefusalError():
            code = error.code
        case IncompatibleError():
            code = "incompatible"
        case PeerError():
            code = "bad-request"
        case _:
            code = "failed"
    return ErrorReply.create(code, str(error))


def error_of_reply(reply: ErrorReply) -> P2PCollabError:
    """What the caller of a handler that failed gets."""
    if reply.code == "incompatible":
        return IncompatibleError(reply.text)
    return RefusalError(reply.code, reply.text)


@dataclass(slots=True)
class Counters:
    """What the transport did since the daemon started. Bytes are those of requests, responses and streams."""

    bytes_sent: int = 0
    bytes_received: int = 0
    #: Of these, what the board cost.
    board_bytes_sent: int = 0
    board_bytes_received: int = 0
    #: Requests and streams of strangers.
    refused: int = 0
    p2pd_restarts: int = 0

    def sent(self, method: str, size: int) -> None:
        """Count what leaves."""
        self.bytes_sent += size
        if not method.startswith(PREFIX):
            self.board_bytes_sent += size

    def received(self, method: str, size: int) -> None:
        """Count what arrives."""
        self.bytes_received += size
        if not method.startswith(PREFIX):
            self.board_bytes_received += size
