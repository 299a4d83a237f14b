"""A relay in a cable: `relay.py DEVICE DEVICE` carries packets between two network devices, and delays them.

Standard input says by how much: lines with the delay and its jitter in seconds; its end ends the relay. In
place of netem, which not every kernel has. Packets of one direction keep their order.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import sys
import time
from collections import deque
from typing import Final

_ETH_P_ALL: Final = 3
#: Packets that wait at a time, in each direction, like the queue of a router: more are dropped.
_QUEUE_MAX: Final = 2000


class Direction:
    """Packets from one device to the other."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        #: Each with the moment at which it goes on.
        self.waiting: deque[tuple[float, bytes]] = deque()

    def take(self, due: float) -> None:
        """Read what has come; it goes on at `due`, or after what came before it."""
        with contextlib.suppress(BlockingIOError, OSError):
            while True:
                packet, (_, _, kind, *_) = self.source.recvfrom(65_535)
                if kind != socket.PACKET_OUTGOING and len(self.waiting) < _QUEUE_MAX:
                    self.waiting.append((max(due, self.waiting[-1][0] if self.waiting else 0.0), packet))

    def give(self, now: float) -> None:
        """Send what is due."""
        while self.waiting and self.waiting[0][0] <= now:
            # A device that is down takes nothing, like any cable that is not plugged in.
            with contextlib.suppress(OSError):
                self.target.send(self.waiting[0][1])
            self.waiting.popleft()


def _open(device: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    opened.bind((device, 0))
    opened.setblocking(False)
    return opened


def main() -> None:
    one, other = _open(sys.argv[1]), _open(sys.argv[2])
    directions = {one: Direction(one, other), other: Direction(other, one)}
    delay_s = jitter_s = 0.0
    rng = random.Random(" ".join(sys.argv[1:]))
    while True:
        next_due = min((d.waiting[0][0] for d in directions.values() if d.waiting), default=None)
        wait_s = None if next_due is None else max(0.0, next_due - time.monotonic())
        readable, _, _ = select.select([sys.stdin, *directions], [], [], wait_s)
        for source in readable:
            if source is sys.stdin:
                line = sys.stdin.readline()
                if not line:
                    return
                delay_s, jitter_s = (float(word) for word in line.split())
            else:
                directions[source].take(time.monotonic() + delay_s + rng.uniform(0.0, jitter_s))
        for direction in directions.values():
            direction.give(time.monotonic())


if __name__ == "__main__":
    main()
