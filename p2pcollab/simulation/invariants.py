"""The promises that every simulated run is held to, by name, and what breaks one."""

from __future__ import annotations

from typing import Final

#: Name of each invariant, and what it says. A violation names it, with scenario, seed and simulated time.
INVARIANTS: Final = {
    "coverage-recovers": "whatever dies, hangs or is cut off, every shard sees its budget in the end, and "
    "live devices hold tensors of every shard",
    "ledgers-converge": "so many gossip rounds after a cut has healed, and at the end, every live device has "
    "heard what any has",
    "models-equal": "in the end all live devices assemble the same model, whatever has died with others",
    "newer-stays": "in no ledger does an older contribution of a device take the place of a newer one",
    "counted-once": "no state counts more samples of a device than it has given to that shard, and no "
    "contribution counts fewer of its maker's",
    "nothing-lost": "what was stored by a device that lives at the end is in everybody's ledger",
    "told-apart": "no device uses one generation of a shard for two contributions",
    "leases-expire": "nobody counts a dead device, nor its leases, as alive for longer than the silence that "
    "follows from CoordinatorSettings",
    "living-are-seen": "a device that beats, and whose beats the board shows, is taken for alive",
    "memory-bounded": "ledger, holdings, presence and pending fetches hold no more than devices and shards "
    "account for, and so does the disk after its garbage is collected",
    "stored-before-named": "the tensors of a device's own newest contributions are on its disk, after a "
    "crash in the middle of any write too",
    "tensors-at-hand": "no lease begins before the tensors that it starts from are held",
    "gate-holds": "no branch passes the gate before the stem is sealed",
    "wishes-hold": "no device trains a task that it was told not to",
}


class Broken(AssertionError):
    """An invariant that does not hold.

    Attributes:
        invariant: its name.
    """

    def __init__(self, invariant: str, what: str) -> None:
        assert invariant in INVARIANTS, invariant
        super().__init__(f"{invariant}: {what}")
        self.invariant = invariant
