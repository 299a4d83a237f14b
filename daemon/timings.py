"""How long the parts of a join took."""

from __future__ import annotations

import time
from typing import Final

#: In the order in which they end.
PARTS: Final = ("imports", "p2pd", "discovery", "allotment", "first_step")


class Timings:
    """Seconds from the start of the process to the end of each part, noted once."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._ended: dict[str, float] = {}

    def done(self, part: str) -> None:
        """A part has ended; only the first time counts."""
        self._ended.setdefault(part, time.monotonic() - self._started)

    def has(self, part: str) -> bool:
        """Whether a part has ended."""
        return part in self._ended

    @property
    def uptime_s(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._started

    def to_status(self) -> dict[str, float]:
        """Seconds that each part took by itself, and those to the first training step in all."""
        result: dict[str, float] = {}
        before = 0.0
        for part in PARTS:
            if part in self._ended:
                # A lone device trains before it has found another one.
                result[part] = max(0.0, self._ended[part] - before)
                before = max(before, self._ended[part])
        if "first_step" in self._ended:
            result["seconds_to_first_training_step"] = self._ended["first_step"]
        return result
