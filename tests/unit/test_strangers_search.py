"""The search of a recording for what must not be in clear (scripts/attack-strangers) finds what is there.

Its answer is to be "0 bytes". So would be that of a search which is blind.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "python"))

from strangers.capture import Flow, Recording
from strangers.needles import PIECE_BYTES, VALUES_MIN, Needles, pieces_to_find, search

WORDS = {"class": b"kingfisher-0", "key": bytes(range(200, 232)), "field": b"tensors_digest"}
#: Few, so that everything planted lies over the border of a chunk somewhere.
CHUNK_OFFSETS = 40
ALICE, BOB = "10.77.0.1", "10.77.0.2"


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


SHARD, OTHER_SHARD, ENTRY = noise(1, 1000), noise(2, 500), noise(3, 170)


def needles(chunk_offsets: int = CHUNK_OFFSETS) -> Needles:
    return Needles(WORDS, {"shards": [SHARD, OTHER_SHARD], "contributions": [ENTRY]}, chunk_offsets)


def found_slowly(data: bytes, files: dict[str, list[bytes]]) -> dict[str, int]:
    """What `Needles.find` must say of pieces, by looking at one offset after the other."""
    kinds: dict[bytes, str] = {}
    for kind, contents in files.items():
        for content in contents:
            for start in range(0, len(content) - PIECE_BYTES + 1, PIECE_BYTES):
                piece = content[start : start + PIECE_BYTES]
                if len(set(piece)) >= VALUES_MIN:
                    kinds.setdefault(piece, kind)
    there = (data[place : place + PIECE_BYTES] for place in range(len(data)))
    return dict(Counter(kinds[piece] for piece in there if piece in kinds))


# The search of bytes


def test_nothing_is_found_in_random_bytes() -> None:
    assert needles(1 << 16).find(noise(4, 1 << 21)) == ({}, {})


@pytest.mark.parametrize("before", range(PIECE_BYTES + 8 + 1))
def test_a_file_is_found_whole_at_every_offset(before: int) -> None:
    data = noise(5, before) + SHARD + noise(6, 77)
    assert needles().find(data) == ({}, {"shards": len(SHARD) // PIECE_BYTES})


@pytest.mark.parametrize("before", range(2 * CHUNK_OFFSETS))
def test_one_piece_is_found_over_every_border_of_chunks(before: int) -> None:
    piece = OTHER_SHARD[3 * PIECE_BYTES : 4 * PIECE_BYTES]
    assert needles().find(noise(5, before) + piece + noise(6, 77)) == ({}, {"shards": 1})


@pytest.mark.parametrize("start", range(PIECE_BYTES + 1))
def test_any_63_bytes_of_a_file_are_found(start: int) -> None:
    data = noise(5, 100) + SHARD[start : start + 2 * PIECE_BYTES - 1] + noise(6, 100)
    assert needles().find(data)[1]["shards"] >= 1


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("before", range(0, 2 * CHUNK_OFFSETS, 3))
def test_each_word_is_found_at_every_offset(name: str, before: int) -> None:
    assert needles().find(noise(5, before) + WORDS[name] * 2) == ({name: 2}, {})


def test_what_is_all_there_is_of_the_data_is_found() -> None:
    assert needles().find(SHARD[:PIECE_BYTES]) == ({}, {"shards": 1})
    assert needles().find(SHARD[: PIECE_BYTES - 1]) == ({}, {})
    assert needles().find(b"") == ({}, {})


def test_one_wrong_byte_anywhere_is_no_piece() -> None:
    piece = SHARD[:PIECE_BYTES]
    for place in range(PIECE_BYTES):
        wrong = bytearray(piece)
        wrong[place] ^= 1
        assert needles().find(bytes(wrong)) == ({}, {})


def test_pieces_with_one_mark_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strangers.needles._marks", lambda first, *_: first & 1)
    data = noise(5, 33) + SHARD + ENTRY + noise(6, 33)
    assert needles().find(data) == ({}, {"shards": 31, "contributions": 5})


def test_plain_pieces_are_left_out_and_counted() -> None:
    looking = Needles({}, {"shards": [bytes(320) + SHARD, bytes(range(11)) * 32]})
    assert looking.plain == {"shards": 10 + 11}
    assert looking.pieces == {"shards": len(SHARD) // PIECE_BYTES}
    assert looking.find(bytes(10_000)) == ({}, {})


def test_a_piece_of_two_kinds_counts_once_as_the_firsts() -> None:
    looking = Needles({}, {"shards": [SHARD, SHARD], "contributions": [SHARD[:PIECE_BYTES]]})
    assert looking.pieces == {"shards": len(SHARD) // PIECE_BYTES, "contributions": 0}
    assert looking.find(SHARD[:PIECE_BYTES]) == ({}, {"shards": 1})


def test_words_alone_can_be_looked_for() -> None:
    for files in ({}, {"shards": []}, {"shards": [b"", SHARD[: PIECE_BYTES - 1]]}):
        looking = Needles(WORDS, files)
        assert looking.pieces == dict.fromkeys(files, 0)
        assert looking.find(b"a kingfisher-0" + SHARD) == ({"class": 1}, {})


def test_files_without_a_whole_piece_lie_between_others() -> None:
    looking = Needles({}, {"shards": [b"", SHARD[:40], b"short"], "none": [], "contributions": [b"", ENTRY]})
    assert looking.pieces == {"shards": 1, "none": 0, "contributions": 5}
    assert looking.find(ENTRY + SHARD) == ({}, {"shards": 1, "contributions": 5})


def test_a_word_that_chance_would_find_is_refused() -> None:
    with pytest.raises(AssertionError):
        Needles({"digit": b"5"}, {})


@given(
    parts=st.lists(
        st.tuples(st.binary(max_size=50), st.integers(0, 999), st.integers(0, 300)),
        max_size=6,
    ),
    chunk_offsets=st.integers(1, 300),
    few_values=st.booleans(),
)
def test_finds_what_a_slow_search_finds(
    parts: list[tuple[bytes, int, int]], chunk_offsets: int, few_values: bool
) -> None:
    # Few values make pieces that nearly are there, and copies that overlap.
    shard = bytes(value % 13 for value in SHARD) if few_values else SHARD
    files = {"shards": [shard, OTHER_SHARD], "contributions": [ENTRY, shard[32:200]]}
    data = b"".join(junk + shard[start : start + size] for junk, start, size in parts)
    assert Needles({}, files, chunk_offsets).find(data)[1] == found_slowly(data, files)


# The search of a recording


def frame(protocol: int, packet: bytes, source: str = ALICE, destination: str = BOB) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(packet), 0, 0, 64, protocol, 0)
    return bytes(12) + b"\x08\x00" + head + socket.inet_aton(source) + socket.inet_aton(destination) + packet


def tcp(data: bytes, sequence: int, port: int = 4001, flags: int = 16) -> bytes:
    numbers = struct.pack(">HHIIBBHHH", 50_000, port, sequence % 2**32, 0, 5 << 4, flags, 0, 0, 0)
    return frame(socket.IPPROTO_TCP, numbers + data)


def udp(data: bytes, port: int) -> bytes:
    return frame(socket.IPPROTO_UDP, struct.pack(">HHHH", port, port, 8 + len(data), 0) + data)


def recording(folder: Path, frames: list[bytes]) -> Recording:
    path = folder / "packets.pcap"
    records = (struct.pack("<IIII", 0, 0, len(one), len(one)) + one for one in frames)
    path.write_bytes(bytes(24) + b"".join(records))
    return Recording.read(path)


def in_clear(recorded: Recording, planted: bool = False) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes of each word, pieces of each kind, and bytes of both."""
    result = search(recorded, needles(), planted_port=7777, told={"class": 5353}, planted=planted)
    return (
        {item["what"]: item["bytes"] for item in result["words_found"]},
        {item["what"]: item["pieces"] for item in result["pieces_found"]},
        result["bytes_in_clear"],
    )


@pytest.mark.parametrize("cut", range(1, 2 * PIECE_BYTES))
def test_a_piece_is_found_over_every_border_of_packets(tmp_path: Path, cut: int) -> None:
    data = noise(5, 16) + SHARD[:PIECE_BYTES] + WORDS["class"] + noise(6, 16)
    # The first number wraps around; the second packet comes first, and the first one twice.
    begin = 2**32 - 10
    frames = [tcp(b"", begin - 1, flags=2), tcp(data[cut:], begin + cut)] + [tcp(data[:cut], begin)] * 2
    recorded = recording(tmp_path, frames)
    assert recorded.missing_bytes == 0
    assert in_clear(recorded) == ({"class": 12}, {"shards": 1}, 12 + PIECE_BYTES)


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(udp(SHARD[:64], 4001), id="udp"),
        pytest.param(frame(socket.IPPROTO_ICMP, SHARD[:64]), id="icmp"),
        pytest.param(bytes(12) + b"\x86\xdd" + SHARD[:64], id="ipv6"),
        pytest.param(bytes(12) + b"\x88\xb5" + SHARD[:64], id="neither"),
        pytest.param(udp(SHARD[:64], 4001)[:20] + b"\x20\x00" + udp(SHARD[:64], 4001)[22:], id="fragment"),
        pytest.param(tcp(SHARD[:64], 1), id="tcp-without-beginning"),
    ],
)
def test_pieces_are_found_in_packets_of_all_kinds(tmp_path: Path, one: bytes) -> None:
    assert in_clear(recording(tmp_path, [udp(noise(5, 100), 9), one])) == ({}, {"shards": 2}, 64)


def test_what_was_planted_is_found_apart_from_all_else(tmp_path: Path) -> None:
    recorded = recording(tmp_path, [tcp(SHARD + ENTRY + WORDS["key"], 1, port=7777), tcp(noise(5, 900), 1)])
    assert in_clear(recorded) == ({}, {}, 0)
    pieces = {"shards": pieces_to_find(SHARD), "contributions": pieces_to_find(ENTRY)}
    assert in_clear(recorded, planted=True) == ({"key": 32}, pieces, 32 * (1 + sum(pieces.values())))


def test_a_word_that_is_told_on_purpose_is_in_clear_elsewhere(tmp_path: Path) -> None:
    assert in_clear(recording(tmp_path, [udp(WORDS["class"], 5353)])) == ({}, {}, 0)
    assert in_clear(recording(tmp_path, [udp(WORDS["class"], 5354)])) == ({"class": 12}, {}, 12)
    assert in_clear(recording(tmp_path, [udp(WORDS["field"], 5353)])) == ({"field": 14}, {}, 14)


def test_a_last_packet_that_is_only_begun_is_left_out(tmp_path: Path) -> None:
    whole = recording(tmp_path, [udp(b"first", 9), tcp(b"second", 1)])
    assert whole.packets == 2
    path = tmp_path / "packets.pcap"
    path.write_bytes(path.read_bytes()[:-1])
    half = Recording.read(path)
    flow: Flow = ("udp", ALICE, 9, BOB, 9)
    assert (half.packets, half.flows) == (1, {flow: b"first"})
