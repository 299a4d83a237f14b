"""The bytes between devices: strict parsing, contributions, messages and stream framing.

Everything a peer sent is parsed in here (`parse`), records included; what proves that a message is from a
device of the run is in `authentication.py`. Each decoder returns a checked value or raises `PeerError`. Sizes
are checked before anything is allocated, and the parts of a message are counted as they are unpacked: the
largest one costs a few milliseconds and MiB, whatever it holds (scripts/fuzz).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Final, TypeVar

import msgpack
from pydantic import BaseModel, Field, StringConstraints, ValidationError
from typing_extensions import Self

from . import limits
from .errors import PeerError, UsageError
from .keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, device_id, verify_signature
from .ledger import MARK_BYTES, NOTHING_MERGED, Contribution, Key, Mark
from .run import DeviceId, Frozen, RunId, ShardId, first_fault
from .trust import accused

Model = TypeVar("Model", bound=BaseModel)

DeviceField = Annotated[DeviceId, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
RunField = Annotated[RunId, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ShardField = Annotated[ShardId, StringConstraints(pattern=r"^(stem|t[0-9]{1,4})$")]
DigestField = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
CountField = Annotated[int, Field(ge=0, le=limits.COUNT_MAX)]

_CONTRIBUTION_DOMAIN: Final = b"p2pcollab/contribution/1"


def pack(value: object) -> bytes:
    """msgpack of a value of our own."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def parse(model: type[Model], data: bytes, bytes_max: int) -> Model:
    """A peer's msgpack map as `model`, without coercion.

    Raises:
        PeerError: too long, not msgpack, or not what `model` describes.
    """
    if len(data) > bytes_max:
        raise PeerError(f"{len(data)} bytes where at most {bytes_max} are allowed")
    left = limits.MESSAGE_PARTS_MAX

    def count(parts: Sized) -> Sized:
        nonlocal left
        left -= 1 + len(parts)
        if left < 0:
            raise ValueError("too many parts")
        return parts

    try:
        # Once without making anything: for arrays inside arrays that only claim to have 4,096 elements, room
        # is set aside, 32 MiB for a message of 3 KB.
        unpacker = msgpack.Unpacker(read_size=len(data) + 1, max_buffer_size=bytes_max + 1)
        unpacker.feed(data)
        unpacker.skip()
        fields = msgpack.unpackb(
            data,
            raw=False,
            use_list=False,
            list_hook=count,
            object_hook=count,
            strict_map_key=True,
            max_str_len=limits.UNARY_BYTES_MAX,
            max_bin_len=limits.UNARY_BYTES_MAX,
            max_array_len=limits.SUMMARY_ENTRIES_MAX,
            max_map_len=limits.TASKS_MAX,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise PeerError("the bytes are not the msgpack that this program writes") from error
    if not isinstance(fields, dict):
        raise PeerError("the message is not a map")
    try:
        return model.model_validate(fields, strict=True)
    except ValidationError as error:
        raise PeerError(f"the message is not valid: {first_fault(error)}") from error


# Contributions


class _ContributionFields(Frozen):
    """`ledger.Contribution` as it travels, field by field in the order that is signed."""

    run_id: RunField
    shard: ShardField
    device: DeviceField
    public_key: Annotated[bytes, Field(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
    generation: Annotated[int, Field(ge=1, le=limits.COUNT_MAX)]
    seen: Annotated[
        tuple[tuple[DeviceField, Annotated[int, Field(ge=1, le=limits.COUNT_MAX)]], ...],
        Field(min_length=1, max_length=limits.DEVICES_MAX, fail_fast=True),
    ]
    lease_samples: Annotated[int, Field(ge=1, le=limits.COUNT_MAX)]
    #: Empty for the stem itself.
    stem_digest: Annotated[str, StringConstraints(pattern=rf"^(|{NOTHING_MERGED}|[0-9a-f]{{64}})$")]
    tensors_digest: DigestField
    tensors_bytes: Annotated[int, Field(ge=1, le=limits.SHARD_BYTES_MAX)]
    loss: float
    accuracy: Annotated[float, Field(ge=0.0, le=1.0)]
    distrusts: Annotated[tuple[DeviceField, ...], Field(max_length=limits.DISTRUSTS_MAX, fail_fast=True)] = ()
    signature: Annotated[bytes, Field(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


def _travelling(contribution: Contribution) -> dict[str, Any]:
    fields = {name: getattr(contribution, name) for name in _ContributionFields.model_fields}
    if not contribution.distrusts:
        del fields["distrusts"]
    # msgpack writes 0 and 0.0 differently, and one contribution must have one encoding.
    return fields | {"loss": float(contribution.loss), "accuracy": float(contribution.accuracy)}


def contribution_payload(contribution: Contribution) -> bytes:
    """The bytes that a contribution's signature covers: its domain, and every field but the signature."""
    fields = _travelling(contribution)
    del fields["signature"]
    return _CONTRIBUTION_DOMAIN + pack(fields)


def sign_contribution(
    identity: Identity,
    *,
    run_id: RunId,
    shard: ShardId,
    generation: int,
    seen: Mapping[DeviceId, int] | Iterable[tuple[DeviceId, int]],
    lease_samples: int,
    stem_digest: str,
    tensors_digest: str,
    tensors_bytes: int,
    loss: float,
    accuracy: float,
    distrusts: Iterable[DeviceId] = (),
) -> Contribution:
    """This device's contribution, signed.

    Raises:
        UsageError: peers would refuse it: a loss that is not finite, a count out of bounds.
    """
    unsigned = Contribution(
        run_id=run_id,
        shard=shard,
        device=identity.device,
        public_key=identity.public_key,
        generation=generation,
        seen=tuple(sorted(dict(seen).items())),
        lease_samples=lease_samples,
        stem_digest=stem_digest,
        tensors_digest=tensors_digest,
        tensors_bytes=tensors_bytes,
        loss=float(loss),
        accuracy=float(accuracy),
        distrusts=accused(distrusts),
        signature=bytes(SIGNATURE_BYTES),
    )
    try:
        _ContributionFields.model_validate(_travelling(unsigned), strict=True)
    except ValidationError as error:
        raise UsageError(f"the contribution cannot be published: {first_fault(error)}") from error
    fields = _travelling(unsigned)
    fields["signature"] = identity.sign(contribution_payload(unsigned))
    return Contribution(**fields)


def sign_again(identity: Identity, contribution: Contribution, distrusts: Iterable[DeviceId]) -> Contribution:
    """A contribution of this device, naming more devices as liars."""
    unsigned = replace(contribution, distrusts=accused({*contribution.distrusts, *distrusts}))
    return replace(unsigned, signature=identity.sign(contribution_payload(unsigned)))


def verify_contribution(contribution: Contribution) -> None:
    """Check that the device that a contribution names has signed it.

    Raises:
        PeerError: it has not.
    """
    if device_id(contribution.public_key) != contribution.device:
        raise PeerError("the contribution's device id is not that of its key")
    payload = contribution_payload(contribution)
    if not verify_signature(contribution.public_key, contribution.signature, payload):
        raise PeerError("the contribution's signature is not valid")


def encode_contribution(contribution: Contribution) -> bytes:
    """The one encoding of a contribution."""
    return pack(_travelling(contribution))


def decode_contribution(data: bytes, run_id: RunId) -> Contribution:
    """A verified contribution to this run.

    Raises:
        PeerError: it is malformed, of another run, not in its one encoding, or not signed by its device.
    """
    fields = parse(_ContributionFields, data, limits.CONTRIBUTION_BYTES_MAX)
    if fields.run_id != run_id:
        raise PeerError("the contribution belongs to another run")
    devices = [device for device, _ in fields.seen]
    if any(first >= second for first, second in itertools.pairwise(devices)):
        raise PeerError("the contribution's seen counters are not in order")
    if any(first >= second for first, second in itertools.pairwise(fields.distrusts)):
        raise PeerError("the devices that the contribution distrusts are not in order")
    contribution = Contribution(**dict(fields))
    if encode_contribution(contribution) != data:
        raise PeerError("the contribution is not in canonical form")
    verify_contribution(contribution)
    return contribution


# Messages

_Mark = Annotated[bytes, Field(min_length=MARK_BYTES, max_length=MARK_BYTES)]
SummaryEntry = tuple[ShardField, DeviceField, CountField, _Mark]
_Entries = Annotated[
    tuple[Annotated[bytes, Field(max_length=limits.CONTRIBUTION_BYTES_MAX)], ...],
    Field(max_length=limits.ENTRIES_PER_MESSAGE_MAX, fail_fast=True),
]
_Root = Annotated[bytes, Field(min_length=32, max_length=32)]
_Shards = Annotated[tuple[ShardField, ...], Field(max_length=limits.TASKS_MAX + 1, fail_fast=True)]
_Offset = Annotated[int, Field(ge=0, le=limits.SHARD_BYTES_MAX)]


class Message(Frozen):
    """One request or reply: a tag byte, then a msgpack map."""

    TAG: ClassVar[int]

    def encode(self) -> bytes:
        """The message's bytes, at most `limits.UNARY_BYTES_MAX` (see `first_page`)."""
        data = bytes([self.TAG]) + pack(dict(self))
        assert len(data) <= limits.UNARY_BYTES_MAX
        return data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse a peer's bytes.

        Raises:
            PeerError: they are not a valid message of this kind.
        """
        if data[:1] != bytes([cls.TAG]):
            raise PeerError(f"the peer sent something else than {cls.__name__}")
        return parse(cls, data[1:], limits.UNARY_BYTES_MAX)


class Hello(Message):
    """Asks for the run spec by the prefix that the join code holds."""

    TAG = 1
    run_prefix: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{14}$")]
    version: CountField


class HelloReply(Message):
    """The canonical bytes of the run spec."""

    TAG = 2
    spec: Annotated[bytes, Field(max_length=limits.RUN_SPEC_BYTES_MAX)]


class Exchange(Message):
    """Half of an anti-entropy round: what the sender's ledger holds."""

    TAG = 3
    #: Digest of the whole ledger.
    root: _Root
    #: (shard, device) and mark of each entry that the page covers.
    summary: Annotated[tuple[SummaryEntry, ...], Field(max_length=limits.SUMMARY_ENTRIES_MAX, fail_fast=True)]
    #: The shards that this page of the summary covers; empty: all. A missing entry of a covered shard is one
    #: that the sender lacks.
    shards: _Shards = ()

    @classmethod
    def create(cls, root: bytes, summary: Mapping[Key, Mark], shards: tuple[ShardId, ...] = ()) -> Exchange:
        """The message for `Ledger.summary()`."""
        entries = tuple((*key, *value) for key, value in sorted(summary.items()))
        return cls(root=root, summary=entries, shards=shards)

    def summary_map(self) -> dict[Key, Mark]:
        """The summary as `Ledger.newer_than` takes it."""
        return {(shard, device): (generation, mark) for shard, device, generation, mark in self.summary}


class ExchangeReply(Message):
    """The other half: what the asker lacks, and what it should push."""

    TAG = 4
    root: _Root
    #: Encoded contributions, as many as fit.
    entries: _Entries
    #: Keys of which the asker has something newer.
    want: Annotated[
        tuple[tuple[ShardField, DeviceField], ...],
        Field(max_length=limits.SUMMARY_ENTRIES_MAX, fail_fast=True),
    ]


class Push(Message):
    """Contributions, and the sender's sealed record (empty: none)."""

    TAG = 5
    entries: _Entries
    record: Annotated[bytes, Field(max_length=limits.RECORD_BYTES_MAX)] = b""


class PushReply(Message):
    """How many of the contributions were new."""

    TAG = 6
    accepted: CountField


class Fetch(Message):
    """Asks for a shard's bytes from an offset on, as a stream."""

    TAG = 7
    digest: DigestField
    offset: _Offset


class StreamHeader(Message):
    """Opens a stream: which bytes follow, and how many the whole has."""

    TAG = 8
    digest: DigestField
    length: _Offset


class ErrorReply(Message):
    """Why there is no other reply."""

    TAG = 9
    code: Annotated[str, StringConstraints(pattern=r"^[a-z-]{1,32}$")]
    text: Annotated[
        str, StringConstraints(max_length=limits.ERROR_TEXT_CHARS_MAX, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
    ]

    @classmethod
    def create(cls, code: str, text: str) -> ErrorReply:
        """A reply whose text is made to fit: cut, and without control characters."""
        printable = "".join(character if character.isprintable() else "?" for character in text)
        return cls(code=code, text=printable[: limits.ERROR_TEXT_CHARS_MAX])


class Earlier(Message):
    """Asks for the newest of a device's contributions to a shard whose tensors the other one holds."""

    TAG = 10
    shard: ShardField
    device: DeviceField


class EarlierReply(Message):
    """The encoded contribution; empty: it holds none."""

    TAG = 11
    entry: Annotated[bytes, Field(max_length=limits.CONTRIBUTION_BYTES_MAX)]


MessageKind = TypeVar("MessageKind", bound=Message)


def decode_reply(kind: type[MessageKind], data: bytes) -> MessageKind | ErrorReply:
    """A reply of the expected kind, or why there is none.

    Raises:
        PeerError: it is neither.
    """
    if data[:1] == bytes([ErrorReply.TAG]):
        return ErrorReply.decode(data)
    return kind.decode(data)


def first_page(entries: Iterable[bytes]) -> tuple[bytes, ...]:
    """As many encoded contributions, from the first on, as one message holds.

    Half of the message is left to its other fields: `want` or a record.
    """
    page: list[bytes] = []
    size = 0
    for entry in entries:
        size += len(entry) + 5
        if len(page) == limits.ENTRIES_PER_MESSAGE_MAX or size > limits.UNARY_BYTES_MAX // 2:
            break
        page.append(entry)
    return tuple(page)


# Streams


def chunks(data: bytes, offset: int) -> Iterator[bytes]:
    """The bytes from an offset on, in pieces for a stream."""
    view = memoryview(data)
    for start in range(offset, len(data), limits.CHUNK_BYTES):
        yield bytes(view[start : start + limits.CHUNK_BYTES])


class Download:
    """Bytes known by digest and length, received in chunks over one or more streams.

    A remote that dies ends its stream normally, so an end proves nothing: only length and digest do. Memory
    grows with what has arrived, not with what was declared.
    """

    def __init__(self, digest: str, length: int) -> None:
        if not 0 <= length <= limits.SHARD_BYTES_MAX:
            raise PeerError(f"a shard of {length} bytes is over {limits.SHARD_BYTES_MAX}")
        self._digest = digest
        self._length = length
        self._received = bytearray()

    @property
    def offset(self) -> int:
        """Where to go on: bytes that have arrived."""
        return len(self._received)

    @property
    def complete(self) -> bool:
        """Whether all bytes have arrived; `finish` checks them."""
        return len(self._received) == self._length

    def request(self) -> Fetch:
        """What to ask the next holder for."""
        return Fetch(digest=self._digest, offset=self.offset)

    def start(self, header: StreamHeader) -> None:
        """Check the header of a stream.

        Raises:
            PeerError: other bytes follow than were asked for.
        """
        if (header.digest, header.length) != (self._digest, self._length):
            raise PeerError("the stream holds another shard than was asked for")

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk.

        Raises:
            PeerError: it is empty (a stream that never gets on), too long, or more than was declared.
        """
        if not 1 <= len(chunk) <= limits.CHUNK_BYTES_MAX:
            raise PeerError(f"a chunk of {len(chunk)} bytes, where 1 to {limits.CHUNK_BYTES_MAX} are allowed")
        if len(self._received) + len(chunk) > self._length:
            raise PeerError("the stream is longer than its header says")
        self._received += chunk

    def finish(self) -> bytes:
        """The bytes, after the stream has ended.

        Raises:
            PeerError: bytes are missing, and another stream can go on at `offset`; or they are not those of
                the digest, and the next stream starts at 0, because nothing tells which part is wrong.
        """
        if not self.complete:
            raise PeerError(f"the stream ended after {self.offset} of {self._length} bytes")
        if hashlib.sha256(self._received).hexdigest() != self._digest:
            self._received.clear()
            raise PeerError("the bytes received are not those of the digest")
        return bytes(self._received)
