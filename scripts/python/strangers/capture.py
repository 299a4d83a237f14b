"""Records all packets of a bridge, and looks in the recording for what must not be in it.

As a program (`capture.py INTERFACE FILE`, in the bridge's network namespace) it writes a pcap file until its
standard input ends, then prints how many packets the kernel passed to it and how many it had to drop. It
takes them from an AF_PACKET socket: no tcpdump is needed, and wireshark reads the file.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

_ETH_P_ALL: Final = 3
_SOL_PACKET, _ADD_MEMBERSHIP, _STATISTICS, _PROMISCUOUS = 263, 1, 6, 1
_SO_RCVBUFFORCE: Final = 33
_PACKET_BYTES_MAX: Final = 1 << 17
_PCAP_HEAD: Final = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _PACKET_BYTES_MAX, 1)
_PCAP_RECORD: Final = struct.Struct("<IIII")
_OUTGOING: Final = 4

#: A flow: protocol, source, source port, destination, destination port.
Flow = tuple[str, str, int, str, int]


def record(interface: str, path: Path) -> None:
    """Write packets until standard input ends."""
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 256 << 20)
    tap.bind((interface, 0))
    # A bridge shows what it only passes on to those who ask for everything.
    index = socket.if_nametoindex(interface)
    tap.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, struct.pack("iHH8s", index, _PROMISCUOUS, 0, b""))
    written = 0
    with path.open("wb", buffering=1 << 20) as file:
        file.write(_PCAP_HEAD)
        print("recording", flush=True)
        while True:
            ready, _, _ = select.select([tap, 0], [], [])
            if tap in ready:
                data, where = tap.recvfrom(_PACKET_BYTES_MAX)
                # What the bridge itself floods out again was seen on its way in.
                if where[2] == _OUTGOING:
                    continue
                now = time.time()
                file.write(_PCAP_RECORD.pack(int(now), int(now % 1 * 1e6), len(data), len(data)) + data)
                written += 1
            elif 0 in ready:
                break
    _, dropped = struct.unpack("II", tap.getsockopt(_SOL_PACKET, _STATISTICS, 8))
    print(json.dumps({"packets": written, "dropped": dropped}), flush=True)


def packets(path: Path) -> Iterator[bytes]:
    """The Ethernet frames of a recording."""
    with path.open("rb") as file:
        file.read(len(_PCAP_HEAD))
        while len(head := file.read(_PCAP_RECORD.size)) == _PCAP_RECORD.size:
            yield file.read(_PCAP_RECORD.unpack(head)[2])


def _ipv4(frame: bytes) -> tuple[int, str, str, bytes] | None:
    """Protocol, source, destination and payload; None for other frames."""
    if len(frame) < 34 or frame[12:14] != b"\x08\x00":
        return None
    packet = frame[14:]
    head_bytes, total = (packet[0] & 15) * 4, struct.unpack_from(">H", packet, 2)[0]
    # 0 where the network card was to cut a large packet into many.
    payload = packet[head_bytes : total or None]
    return packet[9], socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20]), payload


@dataclass(slots=True)
class Recording:
    """What was said on the network, put together again."""

    #: What each side of each TCP connection sent, in order, without what was sent twice; datagrams joined.
    flows: dict[Flow, bytes] = field(default_factory=dict)
    #: How many packets went to each address.
    sent_to: dict[str, int] = field(default_factory=dict)
    packets: int = 0
    bytes: int = 0
    #: Bytes of TCP that were not recorded, although what followed them was.
    missing_bytes: int = 0

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Read a file that `record` wrote."""
        made = cls()
        segments: dict[Flow, list[tuple[int, bytes]]] = defaultdict(list)
        starts: dict[Flow, int] = {}
        datagrams: dict[Flow, list[bytes]] = defaultdict(list)
        sent_to: dict[str, int] = defaultdict(int)
        for frame in packets(path):
            made.packets += 1
            made.bytes += len(frame)
            parsed = _ipv4(frame)
            if parsed is None:
                continue
            protocol, source, destination, payload = parsed
            sent_to[destination] += 1
            if protocol == socket.IPPROTO_TCP:
                source_port, destination_port, sequence = struct.unpack_from(">HHI", payload)
                flow = ("tcp", source, source_port, destination, destination_port)
                if payload[13] & 2:  # SYN: a new connection, even if the ports are those of an earlier one
                    made._close(flow, segments.pop(flow, []), starts.get(flow))
                    starts[flow] = (sequence + 1) & 0xFFFFFFFF
                data = payload[(payload[12] >> 4) * 4 :]
                if data:
                    segments[flow].append((sequence, data))
            elif protocol == socket.IPPROTO_UDP:
                source_port, destination_port = struct.unpack_from(">HH", payload)
                datagrams["udp", source, source_port, destination, destination_port].append(payload[8:])
        for flow, parts in segments.items():
            made._close(flow, parts, starts.get(flow))
        for flow, sent in datagrams.items():
            made.flows[flow] = b"\x00".join(sent)
        made.sent_to = dict(sent_to)
        return made

    def _close(self, flow: Flow, parts: list[tuple[int, bytes]], start: int | None) -> None:
        """Put one direction of a connection together, and add it to its flow."""
        if not parts:
            return
        base = parts[0][0] if start is None else start
        # Relative and signed, so that numbers that wrap around stay in order.
        ordered = sorted((((seq - base + (1 << 31)) & 0xFFFFFFFF) - (1 << 31), data) for seq, data in parts)
        joined, end = bytearray(), 0
        for offset, data in ordered:
            if offset > end:
                self.missing_bytes += offset - end
            elif offset + len(data) <= end:
                continue  # sent again
            else:
                data = data[end - offset :]
            joined += data
            end = max(end, offset) + len(data)
        self.flows[flow] = self.flows.get(flow, b"") + bytes(joined)


class Needles:
    """Words, and pieces of files, to be found in any number of bytes in one pass.

    Of each file, its pieces of 32 bytes at every 32nd byte: 63 bytes of it in a row contain one of them.
    """

    PIECE_BYTES: Final = 32
    #: Pieces with fewer different values, such as all zeros, are found everywhere by chance.
    _VALUES_MIN: Final = 12
    _HEAD_BYTES: Final = 8

    def __init__(self, words: Mapping[str, bytes], files: Iterable[bytes]) -> None:
        assert all(len(word) >= self._HEAD_BYTES for word in words.values())
        self._pieces = {
            piece
            for data in files
            for start in range(0, len(data) - self.PIECE_BYTES + 1, self.PIECE_BYTES)
            if len(set(piece := data[start : start + self.PIECE_BYTES])) >= self._VALUES_MIN
        }
        self._words: dict[bytes, list[tuple[str, bytes]]] = defaultdict(list)
        for name, word in words.items():
            self._words[word[: self._HEAD_BYTES]].append((name, word))
        heads = {piece[: self._HEAD_BYTES] for piece in self._pieces} | set(self._words)
        self._heads = np.unique(np.frombuffer(b"".join(sorted(heads)), dtype="<u8"))
        #: Which first two bytes there are: a look-up that spares nearly all searches.
        self._first = np.zeros(1 << 16, dtype=bool)
        self._first[(self._heads & np.uint64(0xFFFF)).astype(np.uint16)] = True

    @property
    def pieces(self) -> int:
        """How many pieces of files are looked for."""
        return len(self._pieces)

    def find(self, data: bytes) -> tuple[dict[str, int], int]:
        """How often each word is in the data, and how many of the pieces, at any offset."""
        words: dict[str, int] = defaultdict(int)
        pieces = 0
        for place in self._candidates(data):
            pieces += data[place : place + self.PIECE_BYTES] in self._pieces
            for name, word in self._words.get(data[place : place + self._HEAD_BYTES], ()):
                if data.startswith(word, place):
                    words[name] += 1
        return dict(words), pieces

    def _candidates(self, data: bytes) -> list[int]:
        starts = len(data) - self._HEAD_BYTES + 1
        if starts < 1:
            return []
        octets = np.frombuffer(data, dtype=np.uint8)
        pairs = octets[:starts].astype(np.uint16)
        pairs |= octets[1 : starts + 1].astype(np.uint16) << 8
        places = np.flatnonzero(self._first[pairs])
        heads = np.zeros(len(places), dtype="<u8")
        for index in range(self._HEAD_BYTES):
            heads |= octets[places + index].astype("<u8") << np.uint64(8 * index)
        found: list[int] = places[np.isin(heads, self._heads)].tolist()
        return found


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]))
