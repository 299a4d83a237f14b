"""Trust: which devices and which contributions a device no longer relies on, and what all agree on.

A device that was caught with tensors of two leases that no honest lease makes is *distrusted* by the device
that caught it. A device of whose work a judge refuses much more than of everybody else's is *suspected* by
it: that catches lies of which none is gross, such as flipped labels. A judge that refuses much of everybody's
work, because it has few classes or holds a spoilt state, suspects nobody for that. A device of whose work
some was refused, as may happen to any, is *doubted*: its next work is tried as soon as it is there, and not
only where it is needed.

A device names both in its next contributions, which are in the ledger: whom more than a quarter of the
others name is *outvoted*, on all devices with equal ledgers alike, whether they have examples to judge by or
not. What an outvoted device has made does not count any more, except where others have built on it. Who
suspects a device does not build on its branches either, and treats it like any other in everything else: one
judge may suspect an honest device by chance, several hardly ever. In a run so small that two votes are enough
nobody is suspected.

So two devices with equal ledgers count the same, whatever each of them thinks. A refusal decides only what a
device builds on: even gross ones hit honest work now and then, say a branch that is tried on a stem which has
moved on since, and devices with few examples, or of few classes, refuse more of it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .ledger import Contribution, Ledger
from .limits import DEVICES_MAX, DISTRUSTS_MAX, OPINIONS_MAX
from .run import DeviceId, ShardId

Work = tuple[DeviceId, str]
"""What a device has made: its author, and the digest of its tensors, which somebody else may repeat."""
_Lately = OrderedDict[tuple[DeviceId, str, int], Counter[ShardId]]

#: Leases with gross contributions for which a device is distrusted. After one, chance or a broken disk may be
#: to blame; and what spoils a lease spoils all of its bundle.
GROSS_MAX: Final = 2
#: Leases with refused contributions for which a device may be suspected, if an honest one would be so unlucky
#: with at most this probability. In a run of ten a judge tries two to six of each of the others.
SUSPECT_MIN: Final = 2
SUSPECT_CHANCE: Final = 0.06
#: Part of honest work that a judge refuses at least, for that estimate: what it has seen is little.
SUSPECT_BASE: Final = 0.05
#: The same for shards in this first part of their budget, where the learning rate is high. Of honest
#: devices' branches on the digits 17 % were refused in it, and 0.5 % after 0.4 of the budget. With 0.1 for
#: all, one of ten honest devices was outvoted in 3 of 9 runs; now it is in 2 of the same 9. Stems go wrong
#: there, too: seven of twelve judges refused one in keyword spotting, after 0.3 of the budget, and a
#: refused stem counts for no more than a branch.
SUSPECT_BASE_EARLY: Final = 0.2
SUSPECT_EARLY: Final = 0.35
#: One in so many of the others, those whose work was refused most, is left out of that estimate: or two liars
#: would vouch for each other.
LEFT_OUT_PART: Final = 4
#: Leases of which it is remembered how often each shard was tried: a few for each device, because what a
#: lease has made is tried within a lease or two.
LATELY_MAX: Final = 4 * DEVICES_MAX
#: What is heard of a device within so many seconds may be of one lease: its contributions travel together.
#: Longer: a lie that follows soon is taken for the same one. Shorter: a bundle that comes in two messages may
#: be taken for two leases.
TOGETHER_S: Final = 0.25
#: Below this chance a device is doubted. Nearer to 1: one refusal in a long run has everything fetched that
#: its maker makes afterwards. Nearer to 0: a liar is known only to those who happen to need two of its lies.
DOUBT_CHANCE: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a contribution is refused."""

    reason: str
    #: Whether it is so much worse that honest work hardly ever is.
    gross: bool
    #: Whether that follows from the bytes alone, so that every device says the same: it does not count.
    malformed: bool = False
    #: Whether it may be only because it is late. That is held against nobody: a slow device's honest lease is
    #: worse than what the others have made meanwhile.
    excused: bool = False


#: Part of a device's classes that a judge must have examples of to hold refusals against it.
FAIR_PART: Final = 0.75
#: One device alone is not believed about another one.
VOTES_MIN: Final = 2
#: Who is named by more than one in so many of the others is outvoted. With three, four of nine had to agree:
#: liars were outvoted late or not at all. With five, two liars among ten could have anybody left out.
VOTES_PART: Final = 4
#: Among so few others two votes outvote, and nobody votes for work that is not gross: a bad lease of an
#: honest device is refused by all alike. With suspicion, one was outvoted in 2 of 14 runs of five devices on
#: the digits without any attack.
AT_HOME_MAX: Final = VOTES_MIN * VOTES_PART - 1


def work(contribution: Contribution) -> Work:
    """What to remember a contribution by."""
    return contribution.device, contribution.tensors_digest


class Opinions:
    """What one device has found of the contributions that it has tried."""

    def __init__(self) -> None:
        #: Oldest first, at most `OPINIONS_MAX`.
        self._found: dict[Work, Verdict | None] = {}
        self._gross: Counter[DeviceId] = Counter()
        #: Leases of each device of whose contributions any was tried, and any refused; at most `DEVICES_MAX`
        #: devices.
        self._tried: Counter[DeviceId] = Counter()
        self._refused: Counter[DeviceId] = Counter()
        #: Of the tried ones, those early in a shard's training.
        self._early: Counter[DeviceId] = Counter()
        #: How often each shard was tried, and refused, of a device's work on one state of the stem.
        self._tried_on: _Lately = OrderedDict()
        self._refused_on: _Lately = OrderedDict()
        self._gross_on: _Lately = OrderedDict()
        #: When contributions came, oldest first, at most `OPINIONS_MAX`: a number for each device and moment.
        self._came: OrderedDict[Work, int] = OrderedDict()
        #: Of each device, when the last of these moments began, and its number.
        self._last_came: dict[DeviceId, tuple[float, int]] = {}
        self._suspected: set[DeviceId] = set()
        self._doubted: set[DeviceId] = set()
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

    @property
    def accused(self) -> frozenset[DeviceId]:
        """Devices that this device votes against: those that it distrusts, and those that it suspects."""
        return frozenset(self._distrusted) | self._suspected

    @property
    def doubted(self) -> frozenset[DeviceId]:
        """Devices whose next work should be tried, whoever else needs it: it was refused, and may have been
        by chance."""
        return frozenset(self._doubted) - self.accused

    def reason(self, device: DeviceId) -> str | None:
        """Why a device is distrusted, if it is."""
        return self._distrusted.get(device)

    def heard(self, contribution: Contribution, now: float) -> None:
        """A contribution has come: what comes of a device later is of another lease."""
        made, device = work(contribution), contribution.device
        if made in self._came:
            return
        since, number = self._last_came.get(device, (-math.inf, 0))
        if now - since > TOGETHER_S:
            since, number = now, number + 1
            if device not in self._last_came and len(self._last_came) >= DEVICES_MAX:
                return
            self._last_came[device] = since, number
        self._came[made] = number
        if len(self._came) > OPINIONS_MAX:
            self._came.popitem(last=False)

    def judge(
        self,
        contribution: Contribution,
        verdict: Verdict | None,
        *,
        progress: float = 1.0,
        fair: bool = True,
        at_home: bool = False,
    ) -> bool:
        """A contribution was tried; whether its device is distrusted from now on, and was not before.

        Args:
            progress: the part of its shard's budget that it has seen.
            fair: whether this device can tell a lie from honest work on data that are unlike its own. If it
                cannot, it does not build on what it refuses, and holds that against nobody.
            at_home: whether the run is so small that two votes outvote a device: then nobody is suspected.
        """
        made = work(contribution)
        if made in self._found:
            return False
        self._remember(made, verdict)
        device = contribution.device
        if not fair and (verdict is None or not verdict.malformed):
            return False
        if verdict is not None and verdict.excused:
            return False
        early = progress < SUSPECT_EARLY
        self._tally(contribution, refused=verdict is not None, early=early, at_home=at_home)
        if verdict is not None and verdict.gross:
            self._gross[device] += _is_another_lease(self._gross_on, contribution, self._moment(contribution))
        if verdict is None or device in self._distrusted:
            return False
        gross = self._gross[device]
        if gross >= GROSS_MAX:
            self._distrusted[device] = f"{gross} of its leases made what was far worse than what was there"
        return device in self._distrusted

    def _tally(self, contribution: Contribution, *, refused: bool, early: bool, at_home: bool) -> None:
        """Count leases, not contributions: one that went wrong, as honest ones do at a high learning rate,
        spoils all branches of its bundle.
        """
        device = contribution.device
        if device not in self._tried and len(self._tried) >= DEVICES_MAX:
            return
        came = self._moment(contribution)
        tried = _is_another_lease(self._tried_on, contribution, came)
        self._tried[device] += tried
        self._early[device] += tried * early
        if refused:
            self._refused[device] += _is_another_lease(self._refused_on, contribution, came)
        counts = self._counts(device)
        if refused and not at_home and stands_out(*counts, early=self._early[device]):
            self._suspected.add(device)
        if self._refused[device] and chance_of(*counts, early=self._early[device]) < DOUBT_CHANCE:
            self._doubted.add(device)
        else:
            self._doubted.discard(device)

    def _moment(self, contribution: Contribution) -> int:
        """The number of the moment at which a contribution came."""
        return self._came.get(work(contribution), 0)

    def _counts(self, device: DeviceId) -> tuple[int, int, int, int]:
        """What was refused and tried of a device's work, and of the others'."""
        others = sorted(
            (
                (self._refused[one] / tried, self._refused[one], tried)
                for one, tried in self._tried.items()
                if one != device
            ),
        )
        others = others[: len(others) - len(others) // LEFT_OUT_PART]
        return (
            self._refused[device],
            self._tried[device],
            sum(refused for _, refused, _ in others),
            sum(tried for _, _, tried in others),
        )

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
            "suspected": sorted(self._suspected),
            "tried": [
                [device, self._refused[device], tried, self._early[device]]
                for device, tried in sorted(self._tried.items())
            ],
        }

    def restore(self, kept: object) -> None:
        """Remember what `to_json` gave an earlier life; what is damaged is left out."""
        fields = kept if isinstance(kept, dict) else {}
        for device, digest in _pairs(fields.get("shunned")):
            self._remember((DeviceId(device), digest), Verdict(reason="refused earlier", gross=False))
        self._distrusted.update(
            {DeviceId(device): reason for device, reason in _pairs(fields.get("distrusted"))}
        )
        self._suspected.update(
            DeviceId(device)
            for device in _list(fields.get("suspected"))[:DEVICES_MAX]
            if isinstance(device, str)
        )
        for row in _list(fields.get("tried"))[:DEVICES_MAX]:
            match row:
                case [str(device), int(refused), int(tried), int(early)] if (
                    0 <= refused <= tried and 0 <= early <= tried and tried > 0
                ):
                    self._tried[DeviceId(device)] = tried
                    self._refused[DeviceId(device)] = refused
                    self._early[DeviceId(device)] = early


def _is_another_lease(lately: _Lately, contribution: Contribution, came: int) -> bool:
    """Whether a contribution is certainly of another lease than those of its device before it.

    A lease trains each shard once, and on one state of the stem; and what it has made comes at one moment.
    """
    key = contribution.device, contribution.stem_digest, came
    counts = lately.setdefault(key, Counter())
    most = max(counts.values(), default=0)
    counts[contribution.shard] += 1
    lately.move_to_end(key)
    if len(lately) > LATELY_MAX:
        lately.popitem(last=False)
    return counts[contribution.shard] > most


def _pairs(kept: object) -> list[tuple[str, str]]:
    return [
        (row[0], row[1])
        for row in _list(kept)
        if isinstance(row, list) and len(row) == 2 and all(isinstance(one, str) for one in row)
    ]


def _list(kept: object) -> list[Any]:
    return kept if isinstance(kept, list) else []


def chance_of(refused: int, tried: int, others_refused: int, others_tried: int, *, early: int = 0) -> float:
    """How likely so much of a device's work, or more, is refused by chance.

    As often as of the others' work, and the less is known of that, the nearer to a half (Laplace's rule).

    Args:
        early: of those that were tried, the ones early in a branch's training.
    """
    base = (others_refused + 1) / (others_tried + 2)
    soon = _binomial(early, max(SUSPECT_BASE_EARLY, base))
    later = _binomial(tried - early, max(SUSPECT_BASE, base))
    at_least = [*itertools.accumulate(reversed(later))][::-1]
    return sum(
        one * at_least[max(0, refused - count)]
        for count, one in enumerate(soon)
        if refused - count < len(at_least)
    )


def _binomial(tried: int, part: float) -> list[float]:
    """How likely 0, 1, ... of so many are refused."""
    # In logarithms: the binomial coefficients of a long run are no floats any more.
    return [
        math.exp(
            math.lgamma(tried + 1)
            - math.lgamma(count + 1)
            - math.lgamma(tried - count + 1)
            + count * math.log(part)
            + (tried - count) * math.log1p(-part)
        )
        for count in range(tried + 1)
    ]


def stands_out(refused: int, tried: int, others_refused: int, others_tried: int, *, early: int = 0) -> bool:
    """Whether a judge refuses so much of one device's work that chance does not explain it."""
    return (
        refused >= SUSPECT_MIN
        and chance_of(refused, tried, others_refused, others_tried, early=early) < SUSPECT_CHANCE
    )


def can_tell(own_counts: Sequence[int], their_counts: Sequence[int]) -> bool:
    """Whether a judge has examples of most classes that a device trains on: `FAIR_PART` of them.

    A device with three classes of ten builds a state that is good at those three. Honest work of one with all
    ten is worse on them, time and again.

    Args:
        own_counts: the judge's training examples of each class.
        their_counts: the device's; none, if that is not known: it may have any class.
    """
    theirs = their_counts if any(their_counts) else (1,) * len(own_counts)
    shared = sum(own > 0 < count for own, count in zip(own_counts, theirs, strict=False))
    return shared >= FAIR_PART * sum(count > 0 for count in theirs)


def accused(distrusted: Iterable[DeviceId]) -> tuple[DeviceId, ...]:
    """Distrusted devices as a contribution names them."""
    return tuple(sorted(distrusted)[:DISTRUSTS_MAX])


def is_household(ledger: Ledger) -> bool:
    """Whether so few have contributed that two of them can have a third left out."""
    contributors = {entry.device for entry in ledger.entries.values()}
    return len(contributors) <= AT_HOME_MAX + 1


def outvoted(ledger: Ledger) -> frozenset[DeviceId]:
    """Devices that more than a quarter of the others name, of those that have contributed."""
    contributors: set[DeviceId] = set()
    votes: set[tuple[DeviceId, DeviceId]] = set()
    for entry in ledger.entries.values():
        contributors.add(entry.device)
        votes.update((other, entry.device) for other in entry.distrusts if other != entry.device)
    against = Counter(device for device, _ in votes)
    return frozenset(
        device
        for device, voters in against.items()
        if voters >= VOTES_MIN and VOTES_PART * voters > len(contributors - {device})
    )
