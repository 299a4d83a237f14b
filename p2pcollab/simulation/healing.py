"""What follows the end of a cut: how soon everybody has heard what anybody knew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..ledger import Ledger
from .devices import GOSSIP_S, Device
from .outcome import Healing

if TYPE_CHECKING:
    from .simulator import Simulation

#: Rounds after which nobody looks any more.
_ROUNDS_MAX: Final = 30


class HealingWatch:
    """Looks at the ledgers after each gossip round, for the figures, and once for the invariant.

    Devices that die or stand still meanwhile are left out, with what only they knew: it has died with them,
    or comes with them.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._ended = simulation.now
        self._until = simulation.now + simulation.checks.healing_s
        self._before = [(device, device.life, device.coordinator.ledger) for device in simulation.live()]
        self._healing = Healing()

    def begin(self) -> None:
        """The cut has ended now."""
        simulation = self._simulation
        simulation.outcome.healings.append(self._healing)
        self._look_after(1)
        if not any(cut.start < self._until and self._ended < cut.end for cut in simulation.scenario.cuts):
            simulation.at(self._until, self._check)

    def _look_after(self, rounds: int) -> None:
        self._simulation.at(self._ended + rounds * GOSSIP_S, lambda: self._look(rounds))

    def _look(self, rounds: int) -> None:
        healing = self._healing
        devices, known = self._there()
        ledgers = [device.coordinator.ledger for device in devices]
        if healing.heard_rounds is None and all(ledger.join(known) is ledger for ledger in ledgers):
            healing.heard_rounds = rounds
        if healing.equal_rounds is None and len({ledger.digest() for ledger in ledgers}) == 1:
            healing.equal_rounds = rounds
        if rounds < _ROUNDS_MAX and None in (healing.heard_rounds, healing.equal_rounds):
            self._look_after(rounds + 1)

    def _check(self) -> None:
        self._simulation.checks.heard_all(*self._there(), self._ended)

    def _there(self) -> tuple[list[Device], Ledger]:
        """The devices that were there all the time, and what they knew together when the cut ended."""
        there = [
            (device, ledger)
            for device, life, ledger in self._before
            if device.life == life and device.stopped_until <= self._ended
        ]
        known = Ledger()
        for _, ledger in there:
            known = known.join(ledger)
        return [device for device, _ in there], known
