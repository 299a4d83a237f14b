"""Looks in a recording for words and for pieces of files that must not be in it.

Words are found wherever they are. Of each file, the pieces of 32 bytes at every 32nd byte are looked for at
every offset of what was said: 63 bytes in a row of a file contain a whole piece, wherever they were cut.
There are millions of pieces and hundreds of millions of offsets, so nearly all offsets are ruled out by one
look into a table of bits. What is left is compared byte for byte: nothing is missed, and nothing found that
is not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .capture import Flow, Recording

Numbers = NDArray[np.uint64]

PIECE_BYTES: Final = 32
#: Pieces with fewer different values, such as all zeros, are found everywhere by chance.
VALUES_MIN: Final = 12
#: A shorter word is found by chance: any 8 bytes once in 3e10 recordings of 600 MB.
_WORD_BYTES_MIN: Final = 8
#: A piece is four numbers of this many bytes. So what was said is read as such numbers once from each of the
#: first 8 offsets, and that is all offsets.
_NUMBER_BYTES: Final = 8
#: Offsets looked at together. What is computed of them stays in the processor's caches.
_CHUNK_OFFSETS: Final = 1 << 18
#: 64 bits for each piece: at most one offset in 64 is compared in vain. 2^31 bits are 256 MiB of memory.
_TABLE_BITS_LOG: Final = (16, 31)
_FACTORS: Final = tuple(map(np.uint64, (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93)))


class Needles:
    """Words and pieces of files, to be found in any number of bytes in one pass."""

    def __init__(
        self,
        words: Mapping[str, bytes],
        files: Mapping[str, Iterable[bytes]],
        chunk_offsets: int = _CHUNK_OFFSETS,
    ) -> None:
        """
        Args:
            files: the files of each kind. A piece that files of two kinds share counts as the first kind's.
        """
        assert all(len(word) >= _WORD_BYTES_MIN for word in words.values())
        #: The words that are looked for, by what they are.
        self.words = dict(words)
        self._chunk_offsets = chunk_offsets
        self._kinds = tuple(files)
        #: Pieces that are not looked for, by kind: they have too few different values.
        self.plain: dict[str, int] = dict.fromkeys(self._kinds, 0)
        # Pieces are numbered through all files, and stay in them: there are gigabytes of files.
        self._files = [(kind, data) for kind in self._kinds for data in files[kind]]
        counts = [len(data) // PIECE_BYTES for _, data in self._files]
        self._first_pieces = np.cumsum([0, *counts])
        all_marks, all_pieces = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
        for (kind, data), first in zip(self._files, self._first_pieces.tolist(), strict=False):
            numbers, worth = _numbers(data), _worth_finding(data)
            marks = _marks(numbers[0::4], numbers[1::4], numbers[2::4], numbers[3::4])
            self.plain[kind] += len(worth) - int(np.count_nonzero(worth))
            all_marks.append(marks[worth])
            all_pieces.append(first + np.flatnonzero(worth))
        marks, pieces = np.concatenate(all_marks), np.concatenate(all_pieces)
        # Stable: of equal pieces the first kind's comes first.
        order = np.argsort(marks, kind="stable")
        marks, pieces = marks[order], pieces[order]
        new = np.ones(len(marks), dtype=bool)
        for index in np.flatnonzero(marks[1:] == marks[:-1]).tolist():
            new[index + 1] = self._piece(pieces[index])[1] != self._piece(pieces[index + 1])[1]
        self._marks, self._pieces = marks[new], pieces[new]
        smallest, largest = _TABLE_BITS_LOG
        bits_log = min(max(len(self._marks).bit_length() + 6, smallest), largest)
        # The highest bits: all bits of a piece are in them.
        self._shift = np.uint64(64 - bits_log)
        self._table = np.zeros(1 << (bits_log - 3), dtype=np.uint8)
        places = self._marks >> self._shift
        np.bitwise_or.at(self._table, places >> np.uint64(3), _bit(places))

    @property
    def pieces(self) -> dict[str, int]:
        """How many different pieces are looked for, by kind of file."""
        found = dict.fromkeys(self._kinds, 0)
        counts, _ = np.histogram(self._pieces, bins=self._first_pieces)
        for (kind, _), count in zip(self._files, counts.tolist(), strict=True):
            found[kind] += count
        return found

    def _piece(self, number: int) -> tuple[str, bytes]:
        """The kind of file that a piece is of, and its bytes."""
        file = int(np.searchsorted(self._first_pieces, number, side="right")) - 1
        start = (int(number) - int(self._first_pieces[file])) * PIECE_BYTES
        kind, data = self._files[file]
        return kind, data[start : start + PIECE_BYTES]

    def find(self, data: bytes) -> tuple[dict[str, int], dict[str, int]]:
        """How often each word is in the data, and how many pieces of each kind of file, at any offset."""
        words = {name: count for name, word in self.words.items() if (count := data.count(word))}
        pieces: Counter[str] = Counter()
        for place, mark in self._candidates(data):
            piece = data[place : place + PIECE_BYTES]
            index = int(np.searchsorted(self._marks, mark))
            # Different pieces may have one mark.
            while index < len(self._marks) and self._marks[index] == mark:
                kind, wanted = self._piece(self._pieces[index])
                if wanted == piece:
                    pieces[kind] += 1
                    break
                index += 1
        return words, dict(pieces)

    def _candidates(self, data: bytes) -> Iterator[tuple[int, np.uint64]]:
        """Each offset at which there is something with the mark of a piece, and that mark."""
        if not len(self._marks):
            return
        octets = np.frombuffer(data, dtype=np.uint8)
        for start in range(0, len(data) - PIECE_BYTES + 1, self._chunk_offsets):
            # The last offset's piece reaches into the next chunk.
            chunk = octets[start : start + self._chunk_offsets + PIECE_BYTES - 1]
            for first in range(min(_NUMBER_BYTES, len(chunk) - PIECE_BYTES + 1)):
                count = (len(chunk) - first) // _NUMBER_BYTES
                # A copy, because numpy is slow with numbers that do not begin at a multiple of their size.
                numbers = chunk[first : first + count * _NUMBER_BYTES].copy().view("<u8")
                marks = _marks(numbers[:-3], numbers[1:-2], numbers[2:-1], numbers[3:])
                places = marks >> self._shift
                passed = np.flatnonzero(self._table[places >> np.uint64(3)] & _bit(places))
                marks = marks[passed]
                nearest = np.minimum(np.searchsorted(self._marks, marks), len(self._marks) - 1)
                known = self._marks[nearest] == marks
                offsets = start + first + passed[known] * _NUMBER_BYTES
                yield from zip(offsets.tolist(), marks[known], strict=True)


def search(
    recording: Recording,
    needles: Needles,
    *,
    planted_port: int,
    told: Mapping[str, int],
    planted: bool,
) -> dict[str, Any]:
    """What of the needles is in the recording.

    Args:
        planted_port: of the connections on which needles were sent in clear on purpose.
        told: words that may be in clear on a port, and that port.
        planted: look only on that port; otherwise everywhere else.
    """
    words_found, pieces_found = [], []
    flows = flow_bytes = bytes_in_clear = 0
    for flow, data in recording.flows.items():
        ports = _ports(flow)
        if (planted_port in ports) != planted:
            continue
        flows += 1
        flow_bytes += len(data)
        words, pieces = needles.find(data)
        for name, count in words.items():
            if told.get(name) not in ports:
                size = count * len(needles.words[name])
                words_found.append({"flow": list(flow), "what": name, "bytes": size})
                bytes_in_clear += size
        for kind, count in pieces.items():
            pieces_found.append({"flow": list(flow), "what": kind, "pieces": count})
            bytes_in_clear += count * PIECE_BYTES
    return {
        "flows": flows,
        "flow_bytes": flow_bytes,
        "words_found": words_found,
        "pieces_found": pieces_found,
        "bytes_in_clear": bytes_in_clear,
    }


def pieces_to_find(data: bytes) -> int:
    """How many pieces must be found where a file was sent in clear, counted without `Needles`."""
    starts = range(0, len(data) - PIECE_BYTES + 1, PIECE_BYTES)
    return sum(len(set(data[start : start + PIECE_BYTES])) >= VALUES_MIN for start in starts)


def _ports(flow: Flow) -> tuple[int, ...]:
    """The ports of a flow that has any."""
    return (flow[2], flow[4]) if flow[0] in ("tcp", "udp") else ()


def _numbers(data: bytes) -> Numbers:
    """A file's whole pieces as numbers, four for each."""
    return np.frombuffer(data, dtype="<u8", count=len(data) // PIECE_BYTES * 4)


def _worth_finding(data: bytes) -> NDArray[np.bool_]:
    """Which of a file's pieces have enough different values."""
    octets = _numbers(data).view(np.uint8).reshape(-1, PIECE_BYTES)
    ordered = np.sort(octets, axis=1)
    values = 1 + np.count_nonzero(ordered[:, 1:] != ordered[:, :-1], axis=1)
    enough: NDArray[np.bool_] = values >= VALUES_MIN
    return enough


def _marks(first: Numbers, second: Numbers, third: Numbers, fourth: Numbers) -> Numbers:
    """A number for each piece, made of all its bytes, modulo 2^64: equal pieces have equal ones."""
    one, two, three = _FACTORS
    marks: Numbers = ((first * one + second) * two + (third * one + fourth)) * three
    return marks


def _bit(places: Numbers) -> NDArray[np.uint8]:
    """A byte of the table with the bit of each place set."""
    bits: NDArray[np.uint8] = np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))
    return bits
