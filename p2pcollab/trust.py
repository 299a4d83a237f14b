"""Trust: which devices and which contributions a device no longer relies on, and what all agree on.

A device that was caught twice with tensors that no honest lease makes is *distrusted* by the device that
caught it. That one says so in its next contributions, which are in
the ledger: whom more than a third of the others distrust is *outvoted*, on all devices with equal ledgers
alike, whether they have examples to judge by or not. What a distrusted device has made does not count any
more, except where others have built on it.

So two devices with equal ledgers count the same, whatever each of them thinks. A refusal decides only what a
device builds on: even gross ones hit honest work now and then, say a branch that is tried on a stem which has
moved on since, and devices with few examples, or of few classes, refuse more of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from .ledger import Contribution, Ledger
from .limits import DISTRUSTS_MAX, OPINIONS_MAX
from .run import DeviceId

Work = tuple[DeviceId, str]
"""What a device has made: its author, and the digest of its tensors, which somebody else may repeat."""

#: Gross contributions for which a device is distrusted. After one, chance or a broken disk may be to blame.
GROSS_MAX: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a contribution is refused."""

    reason: str
    #: Whether it is so much worse that honest work hardly ever is.
    gross: bool
    #: Whether that follows from the bytes alone, so that every device says the same: it does not count.
    malformed: bool = False


#: One device alone is not believed about another one.
VOTES_MIN: Final = 2


def work(contribution: Contribution) -> Work:
    """What to remember a contribution by."""
    return contribution.device, contribution.tensors_digest


class Opinions:
    """What one device has found of the contributions that it has tried."""

    def __init__(self) -> None:
        #: Oldest first, at most `OPINIONS_MAX`.
        self._found: dict[Work, Verdict | None] = {}
        self._gross: Counter[DeviceId] = Counter()
        self._distrusted: dict[DeviceId, str] = {}
        self._shunned: frozenset[Work] = frozenset()

    @property
    def shunned(self) -> frozenset[Work]:
        """What this device does not build on."""
        return self._shunned

    @property
    def distrusted(self) -> frozenset[DeviceId]:
        """Devices that this device does not rely on."""
        return frozenset(self._distrusted)

    def reason(self, device: DeviceId) -> str | None:
        """Why a device is distrusted, if it is."""
        return self._distrusted.get(device)

    def judge(self, contribution: Contribution, verdict: Verdict | None) -> bool:
        """A contribution was tried; whether its device is distrusted from now on, and was not before."""
        made = work(contribution)
        if made in self._found:
            return False
        self._remember(made, verdict)
        device = contribution.device
        self._gross[device] += verdict is not None and verdict.gross
        if verdict is None or device in self._distrusted:
            return False
        gross = self._gross[device]
        if gross >= GROSS_MAX:
            self._distrusted[device] = f"{gross} of its contributions were far worse than what was there"
        return device in self._distrusted

    def _remember(self, made: Work, verdict: Verdict | None) -> None:
        self._found[made] = verdict
        if verdict is not None:
            self._shunned |= {made}
        if len(self._found) > OPINIONS_MAX:
            oldest = next(iter(self._found))
            del self._found[oldest]
            self._shunned -= {oldest}

    def to_json(self) -> dict[str, Any]:
        """What a restart must not forget."""
        return {
            "shunned": [list(made) for made in sorted(self._shunned)],
            "distrusted": [[device, reason] for device, reason in sorted(self._distrusted.items())],
        }

    def restore(self, kept: object) -> None:
        """Remember what `to_json` gave an earlier life; what is damaged is left out."""
        fields = kept if isinstance(kept, dict) else {}
        for device, digest in _pairs(fields.get("shunned")):
            self._remember((DeviceId(device), digest), Verdict(reason="refused earlier", gross=False))
        self._distrusted.update(
            {DeviceId(device): reason for device, reason in _pairs(fields.get("distrusted"))}
        )


def _pairs(kept: object) -> list[tuple[str, str]]:
    rows = kept if isinstance(kept, list) else []
    return [
        (row[0], row[1])
        for row in rows
        if isinstance(row, list) and len(row) == 2 and all(isinstance(one, str) for one in row)
    ]


def accused(distrusted: Iterable[DeviceId]) -> tuple[DeviceId, ...]:
    """Distrusted devices as a contribution names them."""
    return tuple(sorted(distrusted)[:DISTRUSTS_MAX])


def outvoted(ledger: Ledger) -> frozenset[DeviceId]:
    """Devices that more than a third of the others distrust, of those that have contributed."""
    contributors: set[DeviceId] = set()
    votes: set[tuple[DeviceId, DeviceId]] = set()
    for entry in ledger.entries.values():
        contributors.add(entry.device)
        votes.update((other, entry.device) for other in entry.distrusts if other != entry.device)
    against = Counter(device for device, _ in votes)
    return frozenset(
        device
        for device, voters in against.items()
        if voters >= VOTES_MIN and 3 * voters > len(contributors - {device})
    )
