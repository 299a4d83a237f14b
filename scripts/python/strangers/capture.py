"""Records all packets of a bridge, and puts together again what was said in them.

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_ETH_P_ALL: Final = 3
_SOL_PACKET, _ADD_MEMBERSHIP, _STATISTICS, _PROMISCUOUS = 263, 1, 6, 1
_SO_RCVBUFFORCE: Final = 33
_PACKET_BYTES_MAX: Final = 1 << 17
_PCAP_HEAD: Final = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _PACKET_BYTES_MAX, 1)
_PCAP_RECORD: Final = struct.Struct("<IIII")
_OUTGOING: Final = 4
_IPV4: Final = b"\x08\x00"

#: A flow: protocol, source, source port, destination, destination port. For what is neither TCP nor UDP over
#: IPv4: "other", the Ethernet addresses, and the types of frame and packet in place of the ports.
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
            ready, _, _ = select.select([tap.fileno(), 0], [], [])
            if tap.fileno() in ready:
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
    """The Ethernet frames of a recording; without the last one, if it is still being written."""
    with path.open("rb") as file:
        file.read(len(_PCAP_HEAD))
        while len(head := file.read(_PCAP_RECORD.size)) == _PCAP_RECORD.size:
            size = _PCAP_RECORD.unpack(head)[2]
            if len(frame := file.read(size)) == size:
                yield frame


def _ipv4(frame: bytes) -> tuple[int, str, str, bytes] | None:
    """Protocol, source, destination and payload; None for other frames."""
    if len(frame) < 34 or frame[12:14] != _IPV4:
        return None
    packet = frame[14:]
    head_bytes, total = (packet[0] & 15) * 4, struct.unpack_from(">H", packet, 2)[0]
    # 0 where the network card was to cut a large packet into many.
    payload = packet[head_bytes : total or None]
    return packet[9], socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20]), payload


def _fragment(frame: bytes) -> bool:
    """Whether an IPv4 frame brings only a part of a packet."""
    return bool(int.from_bytes(frame[20:22], "big") & 0x3FFF)


def _other(frame: bytes) -> Flow:
    """The flow of a frame that is neither TCP nor UDP over IPv4."""
    kind = int.from_bytes(frame[12:14], "big")
    return "other", frame[6:12].hex(":"), kind, frame[:6].hex(":"), frame[23] if len(frame) > 23 else 0


@dataclass(slots=True)
class Recording:
    """What was said on the network, put together again."""

    #: What each side of each TCP connection sent, in order, without what was sent twice; datagrams joined;
    #: and of all the rest whole frames: nothing but the heads of packets is left out.
    flows: dict[Flow, bytes] = field(default_factory=dict)
    #: How many packets went to each address.
    sent_to: dict[str, int] = field(default_factory=dict)
    packets: int = 0
    packet_bytes: int = 0
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
            made.packet_bytes += len(frame)
            parsed = _ipv4(frame)
            if parsed is None:
                datagrams[_other(frame)].append(frame)
                continue
            protocol, source, destination, payload = parsed
            sent_to[destination] += 1
            if _fragment(frame):
                # Of its ports only the first part tells.
                datagrams[_other(frame)].append(frame)
            elif protocol == socket.IPPROTO_TCP:
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
            else:
                datagrams[_other(frame)].append(frame)
        for flow in list(segments):
            # Taken out one by one: a recording is too long to be in memory twice.
            made._close(flow, segments.pop(flow), starts.get(flow))
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


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]))
