"""Fuzz targets: what members of a run tell each other over the network.

A target that lies behind a MAC, a signature or a seal puts it on by itself, so that what is behind is tried
as well: an insider can do so, too.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from fuzzing import (
    ALICE,
    BOB,
    KEYS,
    NOW,
    RUN,
    SPEC,
    Target,
    contribution,
    msgpack_bombs,
    pack,
    reader,
    record,
    run_at_once,
    unpack,
)

from p2pcollab import limits
from p2pcollab.authentication import NONCE_BYTES, Authenticator, mac
from p2pcollab.errors import NotAuthorisedError, PeerError
from p2pcollab.ledger import Ledger
from p2pcollab.records import BOARD_DEVICES, open_record, seal_record
from p2pcollab.rotation import (
    Notice,
    RotationState,
    Verdict,
    adopt,
    decode_state,
    encode_state,
    forget,
    judge,
)
from p2pcollab.run import DeviceId, ShardId
from p2pcollab.screen import reason_to_refuse
from p2pcollab.wire import (
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
    decode_contribution,
    decode_reply,
    encode_contribution,
)

# Messages

_KINDS: dict[int, type[Message]] = {
    kind.TAG: kind
    for kind in (
        Hello,
        HelloReply,
        Exchange,
        ExchangeReply,
        Push,
        PushReply,
        Fetch,
        StreamHeader,
        ErrorReply,
        Earlier,
        EarlierReply,
    )
}


def _messages() -> list[Message]:
    summary = {
        (ShardId(f"t{number % 8}"), DeviceId(f"{number:032x}")): (number, bytes(8)) for number in range(9)
    }
    return [
        Hello(run_prefix="ab" * 7, version=1),
        HelloReply(spec=SPEC.encode()),
        Exchange.create(bytes(32), summary),
        Exchange.create(bytes(32), {}, (ShardId("stem"), ShardId("t0"))),
        ExchangeReply(root=bytes(32), entries=(contribution(),), want=((ShardId("t0"), DeviceId("0" * 32)),)),
        Push(entries=(contribution(),), record=seal_record(KEYS, ALICE, record())),
        Push(entries=()),
        PushReply(accepted=3),
        Fetch(digest="ef" * 32, offset=1000),
        StreamHeader(digest="ef" * 32, length=123_456),
        ErrorReply(code="not-found", text="this device does not hold that shard"),
        Earlier(shard=ShardId("t3"), device=DeviceId("0" * 32)),
        EarlierReply(entry=contribution()),
    ]


def _parse_message(data: bytes) -> Callable[[], None]:
    tag = data[0] if data else 0
    kind = _KINDS.get(tag, Hello)
    # Every kind of reply may be an error instead.
    message: Message = decode_reply(kind, data)

    def check() -> None:
        assert type(message).decode(message.encode()) == message
        if isinstance(message, Exchange):
            ledger = Ledger()
            assert ledger.newer_than(message.summary_map()) == ()
            assert len(ledger.older_than(message.summary_map())) <= len(message.summary)

    return check


def _message_bombs() -> Iterable[bytes]:
    for tag, kind in _KINDS.items():
        # Two kinds with sequences stand for all.
        if kind in (Exchange, ExchangeReply):
            for bomb in msgpack_bombs(limits.UNARY_BYTES_MAX - 1, kind.model_fields):
                yield bytes([tag]) + bomb
    full = {(ShardId(f"t{n % 128}"), DeviceId(f"{n:032x}")): (n, bytes(8)) for n in range(4096)}
    yield Exchange.create(bytes(32), full).encode()


MESSAGE = Target(
    name="message",
    promise="The bytes of a request or reply are a valid message, or PeerError is raised.",
    parse=_parse_message,
    allowed=(PeerError,),
    examples=lambda: (message.encode() for message in _messages()),
    form="msgpack",
    prefix=1,
    bombs=_message_bombs,
)


def _authenticator() -> Authenticator:
    return Authenticator(KEYS, BOB.peer_id)


def _parse_call(data: bytes) -> Callable[[], None] | None:
    """First byte: 0 a request and 1 a response as they come, 2 and 3 the same with a right MAC."""
    mode, rest = data[:1], data[1:]
    method, nonce = "p2pcollab/1/exchange", bytes(NONCE_BYTES)
    sender, own = ALICE.peer_id.encode(), BOB.peer_id.encode()
    if mode == b"\x02":
        rest = mac(KEYS, b"p2pcollab/request/1", method.encode(), sender, own, rest) + rest
    elif mode == b"\x03":
        rest = mac(KEYS, b"p2pcollab/response/1", method.encode(), sender, own, nonce + rest) + rest
    if mode in (b"\x00", b"\x02"):
        body, _ = _authenticator().open_request(method, rest, ALICE.peer_id, NOW)
        Exchange.decode(body)
    else:
        body = _authenticator().open_response(method, rest, ALICE.peer_id, nonce)
        decode_reply(ExchangeReply, body)
    return None


def _calls() -> Iterable[bytes]:
    alice, nonce = Authenticator(KEYS, ALICE.peer_id), bytes(NONCE_BYTES)
    request = alice.seal_request(
        "p2pcollab/1/exchange", Exchange.create(bytes(32), {}).encode(), BOB.peer_id, NOW, nonce
    )
    reply = ExchangeReply(root=bytes(32), entries=(), want=()).encode()
    yield b"\x00" + request
    yield b"\x01" + alice.seal_response("p2pcollab/1/exchange", reply, BOB.peer_id, nonce)
    yield b"\x02" + request[32:]
    yield b"\x03" + reply


CALL = Target(
    name="call",
    promise="A sealed request or response opens, or PeerError or NotAuthorisedError is raised.",
    parse=_parse_call,
    allowed=(PeerError, NotAuthorisedError),
    examples=_calls,
    bombs=lambda: [bytes([mode]) + bytes(limits.UNARY_BYTES_MAX + 100) for mode in range(4)],
)


# Contributions


def _check_contribution(data: bytes) -> Callable[[], None]:
    contribution = decode_contribution(data, RUN)

    def check() -> None:
        assert encode_contribution(contribution) == data
        reason = reason_to_refuse(contribution, SPEC)
        assert reason is None or reason.isprintable()
        ledger = Ledger([contribution])
        assert ledger.join(ledger) == ledger
        assert ledger.frontier(contribution.shard) == (contribution,)

    return check


def _signed(data: bytes) -> bytes:
    """An insider's bytes: any fields at all, signed by a key of the run."""
    fields = unpack(data)
    if not isinstance(fields, dict):
        return data
    fields.pop("signature", None)
    payload = pack(fields)
    return pack({**fields, "signature": ALICE.sign(b"p2pcollab/contribution/1" + payload)})


def _contribution_bombs() -> list[bytes]:
    return msgpack_bombs(limits.CONTRIBUTION_BYTES_MAX, ("seen", "surprise"))


CONTRIBUTION = Target(
    name="contribution",
    promise="The bytes are a verified contribution of this run in its one encoding, or PeerError is raised.",
    parse=_check_contribution,
    allowed=(PeerError,),
    examples=lambda: [contribution(), contribution(shard=ShardId("stem"), stem_digest="")],
    form="msgpack",
    bombs=_contribution_bombs,
)
SIGNED_CONTRIBUTION = Target(
    name="signed-contribution",
    promise="Whatever an insider signs is a contribution in its one encoding, or PeerError is raised.",
    parse=lambda data: _check_contribution(_signed(data)),
    allowed=(PeerError,),
    examples=CONTRIBUTION.examples,
    form="msgpack",
    bombs=_contribution_bombs,
)


# Notices that the run secret was changed


def _notice() -> bytes:
    """Alice forgets a device; Bob is a member as well."""
    state = RotationState(run_id=RUN, secret=bytes(16)).with_members([ALICE.public_key, BOB.public_key])
    notice = forget(state, ALICE, [DeviceId("0" * 32)], secret=b"s" * 16, ephemeral_seed=b"e" * 32)
    return notice.encode()


def _check_notice(data: bytes) -> Callable[[], None]:
    notice = Notice.decode(data, RUN)
    state = RotationState(run_id=RUN, secret=bytes(16)).with_members([ALICE.public_key, BOB.public_key])

    def check() -> None:
        assert notice.encode() == data
        with suppress(PeerError):  # a box that its author has spoilt
            verdict, secret = judge(state, notice, BOB, ALICE.device)
            if verdict is Verdict.ADOPT:
                after = adopt(state, notice, secret)
                assert len(after.members) <= limits.DEVICES_MAX
                assert decode_state(encode_state(after), RUN).notice == notice

    return check


def _signed_notice(data: bytes) -> bytes:
    fields = unpack(data)
    if not isinstance(fields, dict):
        return data
    fields.pop("signature", None)
    return pack({**fields, "signature": ALICE.sign(b"p2pcollab/rotation/1" + pack(fields))})


def _notice_bombs() -> list[bytes]:
    return msgpack_bombs(limits.NOTICE_BYTES_MAX, ("forgotten", "boxes", "surprise"))


NOTICE = Target(
    name="notice",
    promise="The bytes are a signed notice of this run in its one encoding, or PeerError is raised.",
    parse=_check_notice,
    allowed=(PeerError,),
    examples=lambda: [_notice()],
    form="msgpack",
    bombs=_notice_bombs,
)
SIGNED_NOTICE = Target(
    name="signed-notice",
    promise="Whatever a member signs is a notice in its one encoding, or PeerError is raised.",
    parse=lambda data: _check_notice(_signed_notice(data)),
    allowed=(PeerError,),
    examples=NOTICE.examples,
    form="msgpack",
    bombs=_notice_bombs,
)


# Board records


def _check_record(data: bytes) -> Callable[[], None]:
    record = open_record(KEYS, data, RUN, ALICE.device)

    def check() -> None:
        assert open_record(KEYS, seal_record(KEYS, ALICE, record), RUN, ALICE.device) == record

    return check


def _sealed_record(payload: bytes) -> bytes:
    """Any payload at all, signed by Alice and sealed for her place."""
    nonce = hashlib.sha256(payload).digest()[:12]
    content = ALICE.public_key + ALICE.sign(b"p2pcollab/record/1" + payload) + payload
    bound_to = b"p2pcollab/record/1" + pack([RUN, BOARD_DEVICES, ALICE.device])
    return nonce + ChaCha20Poly1305(KEYS.seal_key).encrypt(nonce, content, bound_to)


RECORD = Target(
    name="record",
    promise="What lies on the board under a device's name is its record, or PeerError is raised.",
    parse=_check_record,
    allowed=(PeerError,),
    examples=lambda: [_sealed_record(pack(record().model_dump()))],
    bombs=lambda: [bytes(limits.RECORD_BYTES_MAX), bytes(limits.RECORD_BYTES_MAX + 1)],
)
SEALED_RECORD = Target(
    name="sealed-record",
    promise="Whatever an insider seals is a record, or PeerError is raised.",
    parse=lambda data: _check_record(_sealed_record(data)),
    allowed=(PeerError,),
    examples=lambda: [pack(record().model_dump()), pack(record(tasks=(), state="left").model_dump())],
    form="msgpack",
    bombs=lambda: msgpack_bombs(limits.RECORD_BYTES_MAX - 124, ("class_counts", "progress", "surprise")),
)


@lru_cache
def _validator() -> Any:
    from p2pcollab.daemon.board import RecordValidator

    return RecordValidator(KEYS, RUN, lambda: NOW, lambda _device: True)


def _parse_board_value(data: bytes) -> Callable[[], None] | None:
    """First byte: 0 subkey and value as they come, 1 the right subkey and the value sealed."""
    from hivemind.dht.validation import DHTRecord

    subkey, value = data[1:35], data[35:]
    if data[:1] == b"\x01":
        subkey, value = b"\xd9\x20" + ALICE.device.encode(), pack(_sealed_record(data[1:]))
    validator = _validator()
    record = DHTRecord(validator.key.to_bytes(), subkey, value, NOW + 300)
    assert validator.validate(record) in (True, False)
    return None


BOARD_VALUE = Target(
    name="board-value",
    promise="The DHT's validator says yes or no to any subkey and value, and raises nothing.",
    parse=_parse_board_value,
    allowed=(),
    examples=lambda: [
        b"\x00" + b"\xd9\x20" + ALICE.device.encode() + pack(_sealed_record(pack(record().model_dump()))),
        b"\x01" + pack(record().model_dump()),
    ],
    form="msgpack",
    prefix=1,
    bombs=lambda: [b"\x00" + b"\xd9\x20" + b"a" * 32 + bytes(limits.UNARY_BYTES_MAX)],
)


# Streams


_STREAMED = bytes(range(256)) * 8


def _parse_stream(data: bytes) -> Callable[[], None] | None:
    from p2pcollab.daemon.streams import _read_chunk

    download = Download(hashlib.sha256(_STREAMED).hexdigest(), len(_STREAMED))
    stream = reader(data)
    with suppress(asyncio.IncompleteReadError):
        while not download.complete:
            download.feed(run_at_once(_read_chunk(stream)))
    whole = download.finish()

    def check() -> None:
        assert whole == _STREAMED

    return check


STREAM = Target(
    name="stream",
    promise="A stream of chunks brings the bytes of the digest that was asked for, or PeerError is raised.",
    parse=_parse_stream,
    allowed=(PeerError,),
    examples=lambda: [
        struct.pack(">I", len(_STREAMED)) + _STREAMED,
        struct.pack(">I", 1000) + _STREAMED[:1000] + struct.pack(">I", 1048) + _STREAMED[1000:],
    ],
    bombs=lambda: [b"\xff\xff\xff\xff" + bytes(1000), struct.pack(">I", limits.CHUNK_BYTES_MAX) + bytes(9)],
)
