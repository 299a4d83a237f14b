"""Fuzz targets: what people type and exchange, and what strangers announce on the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from fuzzing import ALICE, RUN, SPEC, Target, json_bombs

from p2pcollab import limits
from p2pcollab.errors import IncompatibleError, PeerError, UsageError
from p2pcollab.keys import public_key_of_peer
from p2pcollab.run import JoinCode, RunSpec


def _parse_join_code(data: bytes) -> Callable[[], None]:
    code = JoinCode.parse(data.decode(errors="surrogateescape"))

    def check() -> None:
        assert JoinCode.parse(str(code)) == code

    return check


JOIN_CODE = Target(
    name="join-code",
    promise="What a person types is a join code, or UsageError is raised.",
    parse=_parse_join_code,
    allowed=(UsageError,),
    examples=lambda: [
        str(JoinCode.create(b"the run's secret", SPEC.run_id)).encode(),
        str(JoinCode.create(bytes(16), RUN)).lower().replace("-", " ").encode(),
    ],
    length_max=512,
    bombs=lambda: [b"P2P-" + b"A" * limits.MIB, b"-" * limits.MIB, b"P2P" + b"\xff" * 1000],
)


def _parse_run_spec(data: bytes) -> Callable[[], None]:
    spec = RunSpec.decode(data)

    def check() -> None:
        assert spec.encode() == data
        assert RunSpec.decode(spec.encode()) == spec
        assert all(spec.budget(shard) >= 1 and spec.label(shard) for shard in spec.shards)

    return check


def _spec_examples() -> Iterable[bytes]:
    yield SPEC.encode()
    yield SPEC.model_copy(update={"name": "🐱 <b>", "seed": 2**31 - 1}).encode()


RUN_SPEC = Target(
    name="run-spec",
    promise="The bytes are a run spec in its one encoding, or PeerError or IncompatibleError is raised.",
    parse=_parse_run_spec,
    allowed=(PeerError, IncompatibleError),
    examples=_spec_examples,
    form="json",
    bombs=lambda: json_bombs(limits.RUN_SPEC_BYTES_MAX, SPEC.encode()),
)


def _parse_address(data: bytes) -> None:
    from p2pcollab.daemon.addresses import PeerAddress

    text = data.decode(errors="surrogateescape")
    for parse, error in (
        (public_key_of_peer, PeerError),
        (PeerAddress.parse, PeerError),
        (PeerAddress.parse_option, UsageError),
    ):
        try:
            parsed = parse(text)
        except error:
            continue
        if isinstance(parsed, PeerAddress):
            assert PeerAddress.parse(str(parsed)) == parsed


ADDRESS = Target(
    name="address",
    promise="Text is a peer id or an address, or PeerError is raised; UsageError where a person typed it.",
    parse=_parse_address,
    allowed=(),
    examples=lambda: [
        ALICE.peer_id.encode(),
        f"/ip4/192.168.1.7/tcp/31337/p2p/{ALICE.peer_id}".encode(),
        f"192.168.1.7:31337/{ALICE.peer_id}".encode(),
    ],
    length_max=512,
    bombs=lambda: [b"z" * limits.MIB, b"/ip4/1.2.3.4/tcp/1/p2p/" + b"z" * limits.MIB],
)


@lru_cache
def _interface() -> Any:
    from p2pcollab.daemon.interfaces import Interface

    return Interface(name="eth0", address="192.168.1.2", prefix_bits=24)


def _parse_announcement(data: bytes) -> Callable[[], None]:
    from zeroconf.asyncio import AsyncServiceInfo

    from p2pcollab.daemon.discovery import SERVICE, parse_announcement

    info = AsyncServiceInfo(
        SERVICE, f"x.{SERVICE}", addresses=[data[:4].ljust(4, b"\1")], port=1, properties=data[4:]
    )
    found = parse_announcement(info, _interface())

    def check() -> None:
        assert found.name.isprintable() and len(found.name) <= limits.NAME_CHARS_MAX
        assert len(found.run_prefix) == 14

    return check


def _txt(**fields: str) -> bytes:
    pairs = [f"{key}={value}".encode() for key, value in fields.items()]
    return b"".join(bytes([len(pair)]) + pair for pair in pairs)


ANNOUNCEMENT = Target(
    name="announcement",
    promise="What a stranger announces is an address on this network, or PeerError is raised.",
    parse=_parse_announcement,
    allowed=(PeerError,),
    examples=lambda: [
        bytes([192, 168, 1, 7]) + _txt(v="1", run="ab" * 7, name="pets", peer=ALICE.peer_id, port="4001"),
    ],
    length_max=2048,
    bombs=lambda: [bytes([192, 168, 1, 7]) + b"\xff" * 9000, bytes([192, 168, 1, 7]) + b"\x00" * 9000],
)


def _parse_packet(data: bytes) -> Callable[[], None] | None:
    from p2pcollab.daemon.discovery import _Answers

    taken: list[Any] = []
    manager = SimpleNamespace(async_updates_from_response=lambda message: taken.extend(message.answers()))
    zeroconf: Any = SimpleNamespace(record_manager=manager)
    _Answers(zeroconf, _interface()).datagram_received(data, ("192.168.1.7", 5353))
    return None


def _packets() -> Iterable[bytes]:
    from zeroconf import DNSOutgoing
    from zeroconf.asyncio import AsyncServiceInfo

    from p2pcollab.daemon.discovery import SERVICE

    fields = {"v": "1", "run": "ab" * 7, "name": "pets", "peer": ALICE.peer_id, "port": "4001"}
    info = AsyncServiceInfo(
        SERVICE,
        f"x.{SERVICE}",
        addresses=[bytes([192, 168, 1, 7])],
        port=1,
        properties=fields,
        server="x.local.",
    )
    answer = DNSOutgoing(0x8400)
    for made in (info.dns_pointer(), info.dns_service(), info.dns_text(), *info.dns_addresses()):
        answer.add_answer_at_time(made, 0)
    yield from answer.packets()


PACKET = Target(
    name="mdns-packet",
    promise="A packet on the port that asks for devices is an answer or is dropped; nothing is raised.",
    parse=_parse_packet,
    allowed=(),
    examples=_packets,
    length_max=9000,
    bombs=lambda: [
        b"\x00\x00\x84\x00\x00\x00\xff\xff\x00\x00\x00\x00" + b"\xc0\x0c" * 4400,
        b"\x00\x00\x84\x00\x00\x00\xff\xff\x00\x00\x00\x00" + b"\x00" * 8900,
        b"\x00\x00\x84\x00\x00\x00\xff\xff\x00\x00\x00\x00" + b"\x01a" * 4400,
        b"\x00\x00\x84\x00\x00\x00\x03\x00\x00\x00\x00\x00"
        + b"\x00\x00\x01\x00\x01\x00\x00\x00\x00\x00\x00" * 800,
    ],
)
