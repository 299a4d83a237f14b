"""Messages between the daemon and its trainer: four bytes of length, then a msgpack map."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, BinaryIO, Final, cast

import msgpack

from .. import limits

Fields = dict[str, Any]
"""A message; what it holds is between the two ends, which are of one version."""

_LENGTH_BYTES: Final = 4


class BrokenFrame(Exception):
    """The other end writes something else than frames, or has ended in the middle of one."""


def encode_frame(fields: Mapping[str, Any]) -> bytes:
    """A message as bytes."""
    body: bytes = msgpack.packb(fields, use_bin_type=True)
    assert len(body) <= limits.TRAINER_FRAME_BYTES_MAX, len(body)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def receive_frame(reader: asyncio.StreamReader) -> Fields | None:
    """The next message, or `None` at the end.

    Raises:
        BrokenFrame: what came is not a message.
    """
    try:
        head = await reader.readexactly(_LENGTH_BYTES)
        return _decode(await reader.readexactly(_body_bytes(head)))
    except asyncio.IncompleteReadError as error:
        if error.partial or error.expected != _LENGTH_BYTES:
            raise BrokenFrame("a message ends early") from error
        return None


def read_frame(file: BinaryIO) -> Fields | None:
    """The next message, or `None` at the end. Blocks.

    Raises:
        BrokenFrame: what came is not a message.
    """
    head = file.read(_LENGTH_BYTES)
    if not head:
        return None
    length = _body_bytes(head)
    body = bytearray()
    # In pieces: a read of all would set aside what the head only claims.
    while len(body) < length:
        piece = file.read(min(length - len(body), limits.MIB))
        if not piece:
            raise BrokenFrame("a message ends early")
        body += piece
    return _decode(body)


def _body_bytes(head: bytes) -> int:
    length = int.from_bytes(head, "big")
    if len(head) != _LENGTH_BYTES or length > limits.TRAINER_FRAME_BYTES_MAX:
        raise BrokenFrame(f"a message of {length} bytes is announced")
    return length


def _decode(body: bytes | bytearray) -> Fields:
    bound = limits.TRAINER_FRAME_BYTES_MAX
    try:
        fields = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_bin_len=bound,
            max_str_len=limits.MIB,
            # A row of the confusion matrix; the trainer is ours, but may write from damaged memory.
            max_array_len=limits.CLASSES_MAX,
            max_map_len=limits.CLASSES_MAX,
        )
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise BrokenFrame("a message is not msgpack") from error
    if not isinstance(fields, dict):
        raise BrokenFrame("a message is not a map")
    return cast("Fields", fields)
