"""Isolation: whether this device has lost all others, though none of them has said good-bye.

A device that was never with others is alone, not isolated; and one whose company has left has nobody to look
for.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Final

from .run import DeviceId

#: How long nobody must be alive before that is said, on top of the lease term that a silent device counts as
#: alive. Shorter: a switch that is started again is told of. Longer: a pulled cable is noticed late.
ISOLATED_AFTER_S: Final = 10.0


class Change(Enum):
    """What has become of this device's company."""

    ISOLATED = "isolated"
    REJOINED = "rejoined"


class Isolation:
    """Watches the set of live devices."""

    def __init__(self) -> None:
        self._company: frozenset[DeviceId] = frozenset()
        self._alone_since: float | None = None
        #: Whether all others are lost.
        self.isolated = False

    def observe(self, live: AbstractSet[DeviceId], left: AbstractSet[DeviceId], now: float) -> Change | None:
        """Take in who is alive now, this device excepted, and who has left; what has changed, if anything."""
        if live:
            self._company, self._alone_since = frozenset(live), None
            if self.isolated:
                self.isolated = False
                return Change.REJOINED
            return None
        lost = self._company - left
        if not lost:
            # Nobody was here, or all have said good-bye.
            self._alone_since, self.isolated = None, False
            return None
        if self._alone_since is None:
            self._alone_since = now
        if not self.isolated and now - self._alone_since >= ISOLATED_AFTER_S:
            self.isolated = True
            return Change.ISOLATED
        return None

    def alone_s(self, now: float) -> float:
        """For how long nobody has been alive."""
        return 0.0 if self._alone_since is None else now - self._alone_since
