"""What devices send each other arrives unchanged, or is refused with the one error that is meant for it."""

from __future__ import annotations

import hashlib
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest
from hostile_bytes import BOMBS, mutated, mutated_map, only_raises, pack, quick, refused, values
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab import limits
from p2pcollab.claims import equivocation
from p2pcollab.errors import PeerError, UsageError
from p2pcollab.keys import Identity
from p2pcollab.ledger import Contribution, Ledger, states_digest
from p2pcollab.run import STEM, DeviceId, RunId, ShardId
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
    chunks,
    contribution_payload,
    decode_contribution,
    decode_reply,
    encode_contribution,
    first_page,
    sign_again,
    sign_contribution,
    verify_contribution,
)

RUN = RunId("ab" * 32)
ALICE, BOB, EVE = (Identity.from_bytes(bytes([number]) * 32) for number in (1, 2, 3))


def contribution(identity: Identity = ALICE, **changes: Any) -> Contribution:
    """A plausible contribution."""
    wanted: dict[str, Any] = {
        "run_id": RUN,
        "shard": ShardId("t3"),
        "generation": 2,
        "seen": {identity.device: 640, DeviceId("0" * 32): 128},
        "lease_samples": 512,
        "stem_digest": "cd" * 32,
        "tensors_digest": "ef" * 32,
        "tensors_bytes": 123_456,
        "loss": 0.5,
        "accuracy": 0.75,
    }
    return sign_contribution(identity, **(wanted | changes))


ENCODED = encode_contribution(contribution())
FIELDS: dict[str, Any] = msgpack.unpackb(ENCODED)

counts = st.integers(1, limits.COUNT_MAX)
hex64 = st.binary(min_size=32, max_size=32).map(bytes.hex)
devices = st.binary(min_size=16, max_size=16).map(lambda raw: DeviceId(raw.hex()))


# Contributions


@quick
@given(
    shard=st.sampled_from(["stem", "t0", "t9999"]),
    generation=counts,
    seen=st.dictionaries(devices, counts, min_size=1, max_size=5),
    lease_samples=counts,
    stem_digest=hex64 | st.sampled_from(["", "initial"]),
    tensors_digest=hex64,
    tensors_bytes=st.integers(1, limits.SHARD_BYTES_MAX),
    loss=st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 9),
    accuracy=st.floats(0, 1) | st.integers(0, 1),
)
def test_contribution_round_trip(**changes: Any) -> None:
    sent = contribution(**changes)
    received = decode_contribution(encode_contribution(sent), RUN)
    assert received == sent
    assert encode_contribution(received) == encode_contribution(sent)


def test_the_largest_legitimate_contribution_fits() -> None:
    seen = {DeviceId(f"{number:032x}"): limits.COUNT_MAX for number in range(limits.DEVICES_MAX)}
    encoded = encode_contribution(contribution(seen=seen))
    assert len(encoded) <= limits.CONTRIBUTION_BYTES_MAX
    assert decode_contribution(encoded, RUN).seen == tuple(sorted(seen.items()))


_SIGNED = (
    "run_id", "shard", "generation", "seen", "lease_samples", "stem_digest", "tensors_digest",
    "tensors_bytes", "loss", "accuracy",
)  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Contribution)])
def test_no_field_of_a_contribution_can_be_altered(name: str) -> None:
    changed: dict[str, Any] = {
        "run_id": "12" * 32,
        "shard": STEM,
        "device": BOB.device,
        "public_key": BOB.public_key,
        "generation": 3,
        "seen": ((ALICE.device, 641),),
        "lease_samples": 511,
        "stem_digest": "",
        "tensors_digest": "12" * 32,
        "tensors_bytes": 1,
        "loss": 0.25,
        "accuracy": 1.0,
        "distrusts": (BOB.device,),
        "signature": bytes(64),
    }
    data = encode_contribution(replace(contribution(), **{name: changed[name]}))
    refused(PeerError, lambda: decode_contribution(data, RUN))


def test_a_contribution_that_was_signed_again_names_more_and_takes_the_place_of_the_first() -> None:
    fields = {name: getattr(contribution(), name) for name in _SIGNED}
    one = sign_contribution(ALICE, **fields, distrusts=[EVE.device])
    again = sign_again(ALICE, one, [BOB.device])
    assert again.distrusts == tuple(sorted((BOB.device, EVE.device)))
    assert decode_contribution(encode_contribution(again), RUN) == again
    assert again.newer_than(one) and not one.newer_than(again)
    assert states_digest((one,)) == states_digest((again,))
    assert not equivocation(one, again)


def test_devices_that_a_contribution_distrusts_travel_in_order_and_few() -> None:
    fields = {name: getattr(contribution(), name) for name in _SIGNED}
    several = sign_contribution(ALICE, **fields, distrusts=[EVE.device, BOB.device])
    assert several.distrusts == tuple(sorted((BOB.device, EVE.device)))
    assert decode_contribution(encode_contribution(several), RUN) == several
    unordered = replace(several, distrusts=several.distrusts[::-1])
    refused(PeerError, lambda: decode_contribution(encode_contribution(unordered), RUN))
    many = [f"{number:032x}" for number in range(limits.DISTRUSTS_MAX + 1)]
    assert len(sign_contribution(ALICE, **fields, distrusts=many).distrusts) == limits.DISTRUSTS_MAX
    too_many = replace(several, distrusts=tuple(many))
    refused(PeerError, lambda: decode_contribution(encode_contribution(too_many), RUN))


def test_a_contribution_in_another_devices_name_is_refused() -> None:
    forged = replace(contribution(EVE), device=ALICE.device, public_key=ALICE.public_key)
    refused(PeerError, lambda: decode_contribution(encode_contribution(forged), RUN))
    renamed = replace(contribution(EVE), device=ALICE.device)
    resigned = replace(renamed, signature=EVE.sign(contribution_payload(renamed)))
    refused(PeerError, lambda: decode_contribution(encode_contribution(resigned), RUN))


def test_a_contribution_to_another_run_is_refused() -> None:
    refused(PeerError, lambda: decode_contribution(ENCODED, RunId("12" * 32)))


def test_a_signature_for_something_else_does_not_sign_a_contribution() -> None:
    payload = contribution_payload(contribution())
    assert payload.startswith(b"p2pcollab/contribution/1")
    body = payload.removeprefix(b"p2pcollab/contribution/1")
    for other in (body, b"p2pcollab/record/1" + body):
        forged = replace(contribution(), signature=ALICE.sign(other))
        refused(PeerError, lambda forged=forged: verify_contribution(forged))


def _resigned(changes: dict[str, Any]) -> bytes:
    """An insider's bytes: any fields at all, signed by a key of the run."""
    altered = {name: value for name, value in (FIELDS | changes).items() if name != "signature"}
    return pack(altered | {"signature": ALICE.sign(b"p2pcollab/contribution/1" + pack(altered))})


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": math.nan},
        {"loss": math.inf},
        {"accuracy": math.nan},
        {"accuracy": 1.5},
        {"generation": 0},
        {"generation": 2**63},
        {"generation": True},
        {"seen": []},
        {"seen": [[ALICE.device, 0]]},
        {"seen": [[ALICE.device, -5]]},
        {"seen": [[ALICE.device, 5], [ALICE.device, 6]]},
        {"seen": sorted(FIELDS["seen"], reverse=True)},
        {"seen": [[f"{number:032x}", 1] for number in range(limits.DEVICES_MAX + 1)]},
        {"shard": "../../etc/passwd"},
        {"shard": "t1\n"},
        {"tensors_digest": "../x"},
        {"tensors_digest": "AB" * 32},
        {"tensors_bytes": limits.SHARD_BYTES_MAX + 1},
        {"lease_samples": 0},
        {"lease_samples": 512.0},
        {"extra": 1},
    ],
)
def test_an_insider_cannot_sign_nonsense(changes: dict[str, Any]) -> None:
    refused(PeerError, lambda: decode_contribution(_resigned(changes), RUN))


def test_a_contribution_has_one_encoding_only() -> None:
    assert _resigned({}) == ENCODED
    backwards = dict(reversed(FIELDS.items()))
    as_integer = _resigned({"loss": 1})
    short_float = ENCODED.replace(
        b"\xa4loss\xcb" + struct.pack(">d", 0.5), b"\xa4loss\xca" + struct.pack(">f", 0.5)
    )
    long_integer = ENCODED.replace(b"generation\x02", b"generation\xcc\x02")
    for data in (pack(backwards), as_integer, short_float, long_integer, ENCODED + b"\x00"):
        assert data != ENCODED
        refused(PeerError, lambda data=data: decode_contribution(data, RUN))


@pytest.mark.parametrize("changes", [{"loss": math.nan}, {"lease_samples": 0}, {"tensors_digest": "x"}])
def test_what_peers_would_refuse_is_not_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        contribution(**changes)


@quick
@given(st.binary(max_size=600) | mutated(ENCODED) | mutated_map(FIELDS).map(pack) | values.map(pack))
def test_any_bytes_as_contribution_raise_only_peer_error(data: bytes) -> None:
    only_raises(PeerError, lambda: decode_contribution(data, RUN))


@quick
@given(mutated(ENCODED))
def test_no_mutation_of_a_contribution_is_accepted(data: bytes) -> None:
    refused(PeerError, lambda: decode_contribution(data, RUN))


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_by_every_decoder(bomb: bytes) -> None:
    refused(PeerError, lambda: decode_contribution(bomb, RUN))
    for kind in MESSAGES:
        refused(PeerError, lambda kind=kind: kind.decode(bomb))
        refused(PeerError, lambda kind=kind: kind.decode(bytes([kind.TAG]) + bomb))


def test_a_peers_invented_field_name_cannot_write_to_a_terminal() -> None:
    with pytest.raises(PeerError) as caught:
        decode_contribution(pack(FIELDS | {"\x1b[2J\x07" * 100: 1}), RUN)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


# Messages

EXAMPLES: tuple[Message, ...] = (
    Hello(run_prefix=RUN[:14], version=1),
    HelloReply(spec=b"{}"),
    Exchange(root=bytes(32), summary=((ShardId("t0"), ALICE.device, 3, bytes(8)),), shards=(ShardId("t0"),)),
    ExchangeReply(root=bytes(32), entries=(ENCODED,), want=((STEM, BOB.device),)),
    Push(entries=(ENCODED, b""), record=b"sealed"),
    PushReply(accepted=2),
    Fetch(digest="ab" * 32, offset=7),
    StreamHeader(digest="ab" * 32, length=limits.SHARD_BYTES_MAX),
    ErrorReply(code="not-found", text="no such shard"),
    Earlier(shard=STEM, device=BOB.device),
    EarlierReply(entry=ENCODED),
)
MARKED = ["t0", "0" * 32, 1, bytes(8)]
MESSAGES: tuple[type[Message], ...] = tuple(type(message) for message in EXAMPLES)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_message_round_trip(message: Message) -> None:
    assert type(message).decode(message.encode()) == message


def test_every_message_has_a_tag_of_its_own() -> None:
    assert set(Message.__subclasses__()) == set(MESSAGES)
    assert len({kind.TAG for kind in MESSAGES}) == len(MESSAGES)
    for kind in MESSAGES:
        for message in EXAMPLES:
            if not isinstance(message, kind):
                refused(PeerError, lambda kind=kind, message=message: kind.decode(message.encode()))


@quick
@given(data=st.data())
def test_any_bytes_as_message_raise_only_peer_error(data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(EXAMPLES))
    kind, encoded = type(message), message.encode()
    tag = encoded[:1]
    hostile = data.draw(
        st.binary(max_size=100)
        | mutated(encoded)
        | mutated_map(msgpack.unpackb(encoded[1:])).map(lambda fields: tag + pack(fields))
        | values.map(lambda value: tag + pack(value))
    )
    only_raises(PeerError, lambda: kind.decode(hostile))
    only_raises(PeerError, lambda: decode_reply(kind, hostile))


@pytest.mark.parametrize(
    "make",
    [
        lambda: (Push, {"entries": [b""] * (limits.ENTRIES_PER_MESSAGE_MAX + 1), "record": b""}),
        lambda: (Push, {"entries": [bytes(limits.CONTRIBUTION_BYTES_MAX + 1)], "record": b""}),
        lambda: (Push, {"entries": [], "record": bytes(limits.RECORD_BYTES_MAX + 1)}),
        lambda: (HelloReply, {"spec": bytes(limits.RUN_SPEC_BYTES_MAX + 1)}),
        lambda: (HelloReply, {"spec": bytes(limits.UNARY_BYTES_MAX)}),
        lambda: (Fetch, {"digest": "ab" * 32, "offset": -1}),
        lambda: (Fetch, {"digest": "../" * 21 + "x", "offset": 0}),
        lambda: (StreamHeader, {"digest": "ab" * 32, "length": limits.SHARD_BYTES_MAX + 1}),
        lambda: (ErrorReply, {"code": "busy", "text": "\x1b[2J"}),
        lambda: (ErrorReply, {"code": "busy", "text": "x" * 201}),
        lambda: (Exchange, {"root": bytes(31), "summary": []}),
        lambda: (
            Exchange,
            {
                "root": bytes(32),
                "summary": [["t0", "0" * 32, 1, bytes(8)]] * (limits.SUMMARY_ENTRIES_MAX + 1),
            },
        ),
    ],
)
def test_messages_over_a_limit_are_refused(make: Callable[[], tuple[type[Message], dict[str, Any]]]) -> None:
    kind, content = make()
    refused(PeerError, lambda: kind.decode(bytes([kind.TAG]) + pack(content)))


def test_the_largest_summary_fits_a_message() -> None:
    summary = {
        (ShardId(f"t{number % 128}"), DeviceId(f"{number:032x}")): (limits.COUNT_MAX, bytes(8))
        for number in range(limits.SUMMARY_ENTRIES_MAX)
    }
    message = Exchange.create(bytes(32), summary)
    assert Exchange.decode(message.encode()).summary_map() == summary


def test_an_exchange_carries_a_ledgers_summary() -> None:
    ledger = Ledger([contribution(ALICE), contribution(BOB), contribution(BOB, shard=STEM, stem_digest="")])
    message = Exchange.create(ledger.digest(), ledger.summary())
    received = Exchange.decode(message.encode())
    assert received.root == ledger.digest()
    assert Ledger().older_than(received.summary_map()) == tuple(sorted(ledger.entries))
    assert ledger.newer_than(received.summary_map()) == ()


def test_an_error_takes_the_place_of_any_reply() -> None:
    error = ErrorReply.create("busy", "32 streams\x1b[2J\n" + "x" * 500)
    assert len(error.text) == limits.ERROR_TEXT_CHARS_MAX
    assert error.text.startswith("32 streams?[2J?")
    assert decode_reply(PushReply, error.encode()) == error
    assert decode_reply(PushReply, PushReply(accepted=1).encode()) == PushReply(accepted=1)


def test_a_page_of_entries_leaves_room_for_the_rest_of_the_message() -> None:
    large = bytes(limits.CONTRIBUTION_BYTES_MAX)
    page = first_page([large] * 100)
    assert 10 < len(page) < 100
    want = ((ShardId("t9999"), ALICE.device),) * limits.SUMMARY_ENTRIES_MAX
    ExchangeReply(root=bytes(32), entries=page, want=want).encode()
    assert len(first_page([b"small"] * 100)) == limits.ENTRIES_PER_MESSAGE_MAX
    assert first_page([]) == ()


# Streams

SHARD = bytes(range(256)) * 3000
DIGEST = hashlib.sha256(SHARD).hexdigest()


def test_a_shard_arrives_over_streams_that_die() -> None:
    download = Download(DIGEST, len(SHARD))
    for stream in range(10):
        download.start(StreamHeader(digest=DIGEST, length=len(SHARD)))
        for number, chunk in enumerate(chunks(SHARD, download.request().offset)):
            if stream < 2 and number == 1:
                break
            download.feed(chunk)
        if download.complete:
            break
        refused(PeerError, download.finish)
    assert stream == 2
    assert download.finish() == SHARD


@quick
@given(st.binary(max_size=50), st.data())
def test_a_shard_arrives_however_it_is_cut(shard: bytes, data: st.DataObject) -> None:
    download = Download(hashlib.sha256(shard).hexdigest(), len(shard))
    while not download.complete:
        size = data.draw(st.integers(1, len(shard) - download.offset))
        download.feed(shard[download.offset : download.offset + size])
    assert download.finish() == shard


def test_chunks_are_within_the_limit_and_resume_at_any_offset() -> None:
    assert all(0 < len(chunk) <= limits.CHUNK_BYTES_MAX for chunk in chunks(SHARD, 0))
    for offset in (0, 1, limits.CHUNK_BYTES, len(SHARD) - 1, len(SHARD), len(SHARD) + 9):
        assert b"".join(chunks(SHARD, offset)) == SHARD[offset:]


def test_a_stream_of_other_bytes_is_refused() -> None:
    download = Download(DIGEST, len(SHARD))
    for header in (
        StreamHeader(digest="ab" * 32, length=len(SHARD)),
        StreamHeader(digest=DIGEST, length=len(SHARD) + 1),
    ):
        refused(PeerError, lambda header=header: download.start(header))


def test_empty_oversized_and_surplus_chunks_are_refused() -> None:
    download = Download(DIGEST, 10)
    for chunk in (b"", bytes(11), bytes(limits.CHUNK_BYTES_MAX + 1)):
        refused(PeerError, lambda chunk=chunk: download.feed(chunk))
    assert download.offset == 0


def test_wrong_bytes_are_thrown_away_and_asked_for_again() -> None:
    download = Download(DIGEST, len(SHARD))
    for chunk in chunks(bytes(len(SHARD)), 0):
        download.feed(chunk)
    refused(PeerError, download.finish)
    assert download.request() == Fetch(digest=DIGEST, offset=0)


def test_a_shard_over_the_limit_is_refused_before_it_is_asked_for() -> None:
    refused(PeerError, lambda: Download(DIGEST, limits.SHARD_BYTES_MAX + 1))


def test_parsing_peers_bytes_needs_no_torch() -> None:
    script = (
        "import sys, p2pcollab.wire, p2pcollab.records, p2pcollab.screen; "
        "sys.exit(any(name.partition('.')[0] in ('torch', 'hivemind') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
