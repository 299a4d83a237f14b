"""A simulated disk under a device's store: what the store guarantees, and nothing more.

The guarantees are those of `daemon/store.py`, which tests/node/test_storage_faults.py checks with a recorded
disk cut at every operation: a shard or a transaction is there once its write has returned; before that, it
is there whole or not at all; a shard that was removed may come back after a power cut; bytes that rot are
noticed when they are read, and not before.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from ..ledger import Contribution, Key


class Disk:
    """What of one device survives the death of its daemon."""

    def __init__(self) -> None:
        #: The index: the newest contribution of each device to each shard.
        self.entries: dict[Key, Contribution] = {}
        #: Shard files by digest, and those of them that no longer hold what was written.
        self.shards: set[str] = set()
        self.rotten: set[str] = set()
        #: What was found rotten, and is missing.
        self.lost: set[str] = set()
        self._unlinked: set[str] = set()
        self._shard_in_flight: str | None = None
        self._entries_in_flight: tuple[Contribution, ...] = ()

    # --- shards ---

    def begin_shard(self, digest: str) -> None:
        """The write of a shard begins; a crash leaves it whole or not at all."""
        self._shard_in_flight = digest

    def end_shard(self, digest: str) -> None:
        """The write has returned: the shard is safe."""
        self._shard_in_flight = None
        self.shards.add(digest)

    def put_shard(self, digest: str) -> None:
        """A whole write in one event: nothing depends on the moment."""
        self.shards.add(digest)
        self.rotten.discard(digest)

    def remove_shards(self, keep: Iterable[str]) -> None:
        """Remove all shards but these. Nobody waits until that is safe."""
        gone = self.shards.difference(keep)
        self.shards -= gone
        self.rotten -= gone
        self._unlinked = gone

    def read_shard(self, digest: str) -> bool:
        """Whether a shard's bytes are what was written; it is set aside if they are not."""
        if digest in self.rotten:
            self.rotten.discard(digest)
            self.shards.discard(digest)
            self.lost.add(digest)
        return digest in self.shards

    def lacks(self, digests: Iterable[str]) -> bool:
        """Whether any of these shards cannot be read; all that cannot are set aside."""
        return False in [self.read_shard(digest) for digest in digests]

    # --- the index ---

    def begin_entries(self, entries: Iterable[Contribution]) -> None:
        """A transaction begins; a crash leaves all of it or nothing."""
        self._entries_in_flight = tuple(entries)

    def end_entries(self) -> None:
        """The transaction has returned: it is safe."""
        self.put_entries(self._entries_in_flight)
        self._entries_in_flight = ()

    def put_entries(self, entries: Iterable[Contribution]) -> None:
        """A whole transaction in one event: the daemon does nothing else meanwhile."""
        for entry in entries:
            self.entries[entry.key] = entry

    # --- faults ---

    def crash(self, rng: random.Random, *, power_cut: bool) -> tuple[Contribution, ...]:
        """The daemon dies; the entries that were being written and turn out to be there."""
        if self._shard_in_flight is not None and rng.random() < 0.5:
            self.shards.add(self._shard_in_flight)
        self._shard_in_flight = None
        if power_cut and rng.random() < 0.5:
            self.shards |= self._unlinked
        self._unlinked = set()
        made = self._entries_in_flight if rng.random() < 0.5 else ()
        self.put_entries(made)
        self._entries_in_flight = ()
        return made

    def decay(self, rng: random.Random, own: str, share: float) -> None:
        """A part of the disk's sectors hold something else.

        This device's own contributions stay: the store keeps them in three places. The others' come back
        from them.
        """
        # What was collected because others had gone on from it is missed by nobody, though the entries that
        # said so may be gone now.
        gone = {entry.tensors_digest for entry in self.entries.values() if entry.device == own}
        self.lost |= gone - self.shards
        for key in [key for key in self.entries if key[1] != own and rng.random() < share]:
            del self.entries[key]
        self.rotten.update(digest for digest in sorted(self.shards) if rng.random() < share)
