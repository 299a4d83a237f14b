"""How a shard's bytes follow the call that asked for it: tickets, and a stream of length-prefixed chunks.

The call proves who asks and leaves a ticket; the stream then names the ticket in 40 bytes. A stream of a peer
without a ticket is closed before a byte of it is read, so a stranger can make this device buffer nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Final

from .. import limits
from ..errors import PeerError
from ..wire import Fetch, chunks
from .calls import Counters, RefusalError

METHOD: Final = "p2pcollab/1/stream"
#: From the call that asks for a shard to the stream that brings it.
_TICKET_S: Final = 10.0
#: Until one chunk has been taken or given.
CHUNK_S: Final = 10.0
_REQUEST: Final = struct.Struct(">32sQ")
_LENGTH: Final = struct.Struct(">I")

_Key = tuple[str, bytes]


@dataclass(slots=True)
class _Ticket:
    data: bytes = field(repr=False)
    offset: int
    expiry: asyncio.TimerHandle


class Tickets:
    """The shards that are about to be streamed, or are: at most `limits.STREAMS_MAX`."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._waiting: dict[_Key, _Ticket] = {}
        self._streaming = 0

    def check_room(self) -> None:
        """See whether one more shard can be served, before it is read from the disk.

        Raises:
            RefusalError: as many as there may be are served already.
        """
        if len(self._waiting) + self._streaming >= limits.STREAMS_MAX:
            raise RefusalError("busy", f"{limits.STREAMS_MAX} shards are being sent")

    def issue(self, peer: str, request: Fetch, data: bytes) -> None:
        """Let a peer open the stream that brings what it asked for."""
        if request.offset > len(data):
            raise RefusalError("bad-request", f"the shard has {len(data)} bytes")
        self.check_room()
        key = (peer, _request_bytes(request))
        if key in self._waiting:
            self._waiting.pop(key).expiry.cancel()
        expiry = asyncio.get_running_loop().call_later(_TICKET_S, self._waiting.pop, key, None)
        self._waiting[key] = _Ticket(data=data, offset=request.offset, expiry=expiry)

    def clear(self) -> None:
        """Take back all tickets."""
        for ticket in self._waiting.values():
            ticket.expiry.cancel()
        self._waiting.clear()

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one stream, and close it."""
        with contextlib.closing(writer):
            ticket = await self._redeem(peer, reader)
            if ticket is None:
                self._counters.refused += 1
                return
            self._streaming += 1
            try:
                for chunk in chunks(ticket.data, ticket.offset):
                    writer.write(_LENGTH.pack(len(chunk)))
                    writer.write(chunk)
                    self._counters.sent(METHOD, len(chunk))
                    await asyncio.wait_for(writer.drain(), CHUNK_S)
            except (OSError, asyncio.TimeoutError):
                pass  # the receiver went away or is stuck: it asks again, from where it is
            finally:
                self._streaming -= 1

    async def _redeem(self, peer: str, reader: asyncio.StreamReader) -> _Ticket | None:
        if not any(holder == peer for holder, _ in self._waiting):
            return None
        try:
            named = await asyncio.wait_for(reader.readexactly(_REQUEST.size), CHUNK_S)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            return None
        ticket = self._waiting.pop((peer, named), None)
        if ticket is not None:
            ticket.expiry.cancel()
        return ticket


async def receive(
    request: Fetch, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counters: Counters
) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream, up to its end, which proves nothing: a peer that dies ends it as well.

    Raises:
        PeerError: a chunk is longer than any that this program sends.
        OSError, asyncio.TimeoutError: the link broke, or nothing came for CHUNK_S.
    """
    with contextlib.closing(writer):
        writer.write(_request_bytes(request))
        await asyncio.wait_for(writer.drain(), CHUNK_S)
        while True:
            try:
                chunk = await asyncio.wait_for(_read_chunk(reader), CHUNK_S)
            except asyncio.IncompleteReadError:
                return
            counters.received(METHOD, len(chunk))
            yield chunk


async def _read_chunk(reader: asyncio.StreamReader) -> bytes:
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > limits.CHUNK_BYTES_MAX:
        raise PeerError(f"a chunk of {size} bytes, more than {limits.CHUNK_BYTES_MAX}")
    return await reader.readexactly(size)


def _request_bytes(request: Fetch) -> bytes:
    return _REQUEST.pack(bytes.fromhex(request.digest), request.offset)
