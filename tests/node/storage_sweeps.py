"""Power cuts, flipped bytes and refusals over a small state folder, one after the other.

tests/node/test_storage_faults.py tries a part of them, scripts/storage-faults all.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from recorded_disk import Disk, Leaves, Operation, after_power_cut
from storage_life import Life, Seen, Step, complaint, expected, look, refuses_clearly

from p2pcollab.errors import StorageError

#: What every folder shows, besides the events.
_FACTS: Final = ("seed", "current", "run", "secret", "options", "contributions", "shards")
#: Steps after which the index is on the disk.
_DURABLE: Final = ("contribution", "options")


@dataclass
class Tally:
    """What came of the cases."""

    outcomes: Counter[str] = field(default_factory=Counter)
    #: What must not be, with what leads to it.
    problems: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many there were."""
        return sum(self.outcomes.values())

    def add(self, outcome: str, problem: str | None, where: str) -> None:
        """Count a case."""
        self.outcomes["wrong" if problem else outcome] += 1
        if problem:
            self.problems.append(f"{where}: {problem}")


# Power cuts


@dataclass(frozen=True)
class _Recorded:
    log: list[Operation]
    seed: bytes
    #: Length of the log, step, and events by then, at each acknowledgement.
    acknowledged: list[tuple[int, Step, int]]


def power_cuts(seed: int, leases: int, *, every: int = 1, leaves: tuple[Leaves, ...]) -> Tally:
    """Cut the log of a life after every so many operations: what is left must open, hold what was
    acknowledged, and be of further use."""
    recorded = _record(seed, leases)
    tally = Tally()
    for cut in range(seed % every, len(recorded.log) + 1, every):
        for turn, left in enumerate(leaves):
            where = f"seed {seed}, cut {cut}, {left} of what was unsafe is left (turn {turn})"
            with _folder() as folder:
                rng = random.Random(f"{seed} {cut} {turn}")
                after_power_cut(recorded.log[:cut], left, rng, folder)
                tally.add("opened", _cut_problem(folder, recorded, cut), where)
    return tally


def _record(seed: int, leases: int) -> _Recorded:
    with _folder() as folder:
        disk, life = Disk(folder), Life(folder, seed, leases)
        acknowledged = []
        with disk.recording():
            for step in life.steps():
                step.do()
                acknowledged.append((len(disk.log), step, life.events))
            life.close()
    return _Recorded(disk.log, life.seed, acknowledged)


def _cut_problem(folder: Path, recorded: _Recorded, cut: int) -> str | None:
    done = [entry for entry in recorded.acknowledged if entry[0] <= cut]
    steps = [step for _, step, _ in done]
    in_progress = next((step for at, step, _ in recorded.acknowledged if at > cut), None)
    # A durable change of the index makes what was noted before it safe as well.
    safe_events = max((events for _, step, events in done if step.name in _DURABLE), default=0)
    try:
        with Disk(folder).recording():
            seen = look(folder, go_on=True)
    except StorageError as error:
        return f"it is refused: {error}"
    if any(step.name == "identity" for step in steps) and seen.seed != recorded.seed:
        return "the identity is another one"
    return complaint(seen, steps, in_progress, safe_events)


# Flipped bytes


def flips(seed: int, *, closed: bool, sample: int = 0) -> Tally:
    """Flip bytes of every file, one at a time: what is read is what was written, or missing and said to be.

    Args:
        closed: the daemon left; otherwise it was killed, and SQLite's log is still there.
        sample: flip at most so many bytes of each file, chosen at random; 0: all.
    """
    tally = Tally()
    with _folder() as base, _folder() as holder:
        safe_events = _make_for_flips(base, seed, closed)
        work = holder / "state"
        shutil.copytree(base, work)
        with Disk(work).recording():
            truth = look(work)
        for path in sorted(path for path in base.rglob("*") if path.is_file()):
            relative, data = path.relative_to(base), path.read_bytes()
            rng = random.Random(f"{seed} {relative}")
            positions = list(range(len(data)))
            # SQLite never reads what a daemon that has ended left in its shared memory.
            most = sample or (500 if relative.name.endswith("-shm") else 0)
            if most and len(data) > most:
                positions = sorted(rng.sample(positions, most))
            for position in positions:
                flip = rng.choice([0xFF, *(1 << bit for bit in range(8))])
                shutil.rmtree(work)
                shutil.copytree(base, work)
                flipped = bytearray(data)
                flipped[position] ^= flip
                (work / relative).write_bytes(flipped)
                outcome, problem = _flip_outcome(work, truth, safe_events)
                tally.add(outcome, problem, f"seed {seed}, {relative}, byte {position} ^ {flip:#x}")
    return tally


def _make_for_flips(folder: Path, seed: int, closed: bool) -> int:
    """A folder that was closed once and used again; the number of events that are safe."""
    with _folder() as other:
        life = Life(other, seed, 5)
        steps = life.steps()
        with Disk(other).recording():
            safe = 0
            for step in steps:
                step.do()
                if step.name in _DURABLE:
                    safe = life.events
            if not closed:
                shutil.copytree(other, folder, dirs_exist_ok=True)
            life.close()
        if closed:
            shutil.copytree(other, folder, dirs_exist_ok=True)
    return safe


def _flip_outcome(folder: Path, truth: Seen, safe_events: int) -> tuple[str, str | None]:
    try:
        with Disk(folder).recording():
            seen = look(folder)
    except StorageError as error:
        return "refused clearly", None if refuses_clearly(error) else f"it says {str(error)!r}"
    for name in _FACTS:
        found, was = getattr(seen, name), getattr(truth, name)
        if found == was:
            continue
        if name != "shards" or any(found[key] != was.get(key) for key in found):
            return "", f"{name} is {found!r}"
    if not set(seen.events) <= set(truth.events):
        return "", f"events that never were: {seen.events}"
    if len(seen.shards) < len(truth.shards):
        return "a shard is missing: peers give it", None
    if len(seen.events) < len(truth.events):
        if not seen.notices and seen.events != truth.events[: max(len(seen.events), safe_events)]:
            return "", f"events are missing without a word: {seen.events}"
        return "history is shorter" + (", said" if seen.notices else ", by what a power cut costs"), None
    return ("made good, said" if seen.notices else "made good, or nothing was there"), None


# Refusals


def refusals(seed: int, leases: int, code: int, *, every: int = 1) -> Tally:
    """Let the disk refuse from some operation on, until the error is told: one clear sentence, nothing lost,
    and the same step works afterwards."""
    tally = Tally()
    total = len(_record(seed, leases).log)
    for at in range(seed % every, total, every):
        where = f"seed {seed}, {errno.errorcode[code]} from operation {at} on"
        with _folder() as folder:
            tally.add(*_refusal_outcome(folder, seed, leases, code, at), where)
    return tally


def _refusal_outcome(folder: Path, seed: int, leases: int, code: int, at: int) -> tuple[str, str | None]:
    disk, life = Disk(folder, refuses_from=at, code=code), Life(folder, seed, leases)
    done: list[Step] = []
    told = 0
    with disk.recording():
        try:
            for step in life.steps():
                try:
                    step.do()
                except StorageError as error:
                    told += 1
                    problem = _told_problem(error, life, done, step)
                    if problem:
                        return "", problem
                    disk.refuses_from = -1
                    step.do()
                done.append(step)
        except StorageError as error:
            return "", f"{step.name} fails although there is room again: {error}"
        finally:
            disk.refuses_from = -1
            life.close()
        problem = complaint(look(folder, go_on=True), done, None, life.events)
    return ("told once" if told else "not noticed: nothing depends on it"), problem


def _told_problem(error: StorageError, life: Life, done: list[Step], step: Step) -> str | None:
    if not refuses_clearly(error):
        return f"it says {str(error)!r}"
    if life.run is None:
        return None
    # On a full disk, too, what is there can be read.
    held = dict.fromkeys(life.run.load_contributions())
    was, will_be = expected(done).contributions, expected([*done, step]).contributions
    if not (set(held) <= {*was.values(), *will_be.values()} and len(held) >= len(was)):
        return "contributions are not those that were stored"
    if any(life.run.get_shard(digest) != data for digest, data in expected(done).shards.items()):
        return "a shard is gone"
    return None


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder in memory, where there is one: what is tried here is not the speed of a disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="p2pcollab-faults-", dir=memory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
