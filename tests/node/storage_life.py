"""What a state folder goes through, step by step, and what must be in it afterwards: for the store's tests.

A step is acknowledged when it returns. What was acknowledged must survive a power cut; a step in progress may
have happened or not; nothing else may be found.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pcollab.daemon.store import RunStore, Store
from p2pcollab.errors import StorageError
from p2pcollab.run import RunId

SPEC = b'{"name":"the store does not parse it"}'
RUN_ID = RunId(hashlib.sha256(SPEC).hexdigest())
SECRET = bytes(range(16))
DEVICES = ("aa" * 16, "bb" * 16)
SHARDS = ("stem", "t0", "t1")


@dataclass
class Seen:
    """What a state folder shows."""

    seed: bytes | None = None
    current: str | None = None
    run: bool = False
    secret: bytes | None = None
    options: Any = None
    contributions: dict[tuple[str, str], bytes] = field(default_factory=dict)
    shards: dict[str, bytes] = field(default_factory=dict)
    #: Numbers of events.
    events: list[int] = field(default_factory=list)
    notices: tuple[str, ...] = ()


@dataclass
class Step:
    """A change: what it does, and what is there once it has returned."""

    name: str
    do: Callable[[], None]
    #: Field of `Seen`, key in it, value.
    makes: tuple[tuple[str, Any, Any], ...] = ()


class Life:
    """A device's state folder from the first start on. The same for equal seeds, but for the identity."""

    def __init__(self, folder: Path, seed: int, leases: int) -> None:
        self.folder = folder
        self._rng = random.Random(seed)
        self._leases = leases
        self.store: Store | None = None
        self.run: RunStore | None = None
        self.seed = b""
        #: How many were noted.
        self.events = 0

    def steps(self) -> list[Step]:
        """All of it, in order."""
        steps = [
            Step("open", self._open),
            Step("identity", self._identity),
            Step("create", self._create, (("run", None, True), ("secret", None, SECRET))),
            Step("current", self._set_current, (("current", None, RUN_ID),)),
            self._options({"data": "digits"}),
        ]
        for number in range(self._leases):
            steps += self._lease(number)
            if number % 3 == 2:
                steps += [
                    Step("checkpoint", self._checkpoint),
                    Step("close", self.close),
                    Step("open", self._open),
                    Step("run", self._open_run),
                    self._options({"data": f"folder {number}"}),
                ]
        return steps

    def close(self) -> None:
        """Let the folder go, as a daemon that leaves."""
        if self.run is not None:
            self.run.close()
        if self.store is not None:
            self.store.close()
        self.run = self.store = None

    def _lease(self, number: int) -> list[Step]:
        shard, device = self._rng.choice(SHARDS), self._rng.choice(DEVICES)
        data = self._rng.randbytes(self._rng.randrange(1, 6000))
        digest = hashlib.sha256(data).hexdigest()
        encoded = f"{shard} {device} {digest} {number}".encode() + self._rng.randbytes(
            self._rng.randrange(200, 1500)
        )

        def put_shard() -> None:
            assert self.run is not None
            assert self.run.put_shard(data) == digest

        def put_contribution() -> None:
            assert self.run is not None
            self.run.put_contribution(shard, device, encoded)

        def notes() -> None:
            assert self.run is not None
            self.run.add_event(self.events + 1, 1.5 * number, "lease", "trained", {"shard": shard})
            self.events += 1
            self.run.add_metric(1.5 * number, shard, {"loss": 0.5})
            self.run.set_meta({"counters": {"leases": number}, "port": 4001}, durable=False)

        return [
            Step("shard", put_shard, (("shards", digest, data),)),
            Step("contribution", put_contribution, (("contributions", (shard, device), encoded),)),
            Step("notes", notes),
        ]

    def _open(self) -> None:
        self.store = Store.open(self.folder)

    def _identity(self) -> None:
        assert self.store is not None
        self.seed = self.store.identity_seed()

    def _create(self) -> None:
        assert self.store is not None
        self.run = self.store.create_run(SPEC, SECRET)

    def _open_run(self) -> None:
        assert self.store is not None
        self.run = self.store.open_run(RUN_ID)

    def _set_current(self) -> None:
        assert self.store is not None
        self.store.current = RUN_ID

    def _options(self, value: dict[str, Any]) -> Step:
        def put() -> None:
            assert self.run is not None
            self.run.set_meta({"options": value})

        return Step("options", put, (("options", None, value),))

    def _checkpoint(self) -> None:
        assert self.run is not None
        with contextlib.suppress(sqlite3.OperationalError):  # nothing depends on when it happens
            self.run._index._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def look(folder: Path, *, go_on: bool = False) -> Seen:
    """Open a state folder and read all that is in it.

    Args:
        go_on: a lease follows, and must be there when the folder is opened again.

    Raises:
        StorageError: it says that it cannot.
    """
    seen = Seen()
    store = Store.open(folder)
    try:
        if (folder / "identity.key").exists():
            seen.seed = store.identity_seed()
        seen.current = store.current
        notices: tuple[str, ...] = ()
        if RUN_ID in store.runs():
            run = store.open_run(RUN_ID)
            try:
                _look_at_run(run, seen)
                if go_on:
                    _go_on(run)
                notices = run.notices()
            finally:
                run.close()
        seen.notices = notices or tuple(store._notices)
    finally:
        store.close()
    return seen


def _look_at_run(run: RunStore, seen: Seen) -> None:
    seen.run, seen.secret = True, run.secret
    assert run.spec == SPEC
    seen.options = run.meta().get("options")
    for encoded in run.load_contributions():
        shard, device = encoded.split(b" ", 2)[:2]
        seen.contributions[shard.decode(), device.decode()] = encoded
    for digest in run.digests():
        data = run.get_shard(digest)
        if data is not None:
            seen.shards[digest] = data
    for position, (id, at, kind, text, fields) in enumerate(run.events()):
        assert (kind, text) == ("lease", "trained") and fields["shard"] in SHARDS and at >= 0.0, position
        seen.events.append(id)
    for _, _, series, fields in run.metrics():
        assert series in SHARDS and fields == {"loss": 0.5}


def _go_on(run: RunStore) -> None:
    digest = run.put_shard(b"what comes next")
    encoded = f"t9 {DEVICES[0]} {digest}".encode()
    run.put_contribution("t9", DEVICES[0], encoded)
    assert run.get_shard(digest) == b"what comes next"
    assert encoded in run.load_contributions()


def expected(steps: list[Step]) -> Seen:
    """What is there after these steps."""
    seen = Seen()
    for step in steps:
        for name, key, value in step.makes:
            if key is None:
                setattr(seen, name, value)
            else:
                getattr(seen, name)[key] = value
    return seen


def complaint(seen: Seen, done: list[Step], next_step: Step | None, events_at_least: int) -> str | None:
    """What is wrong with what was found after `done` was acknowledged and `next_step` was in progress."""
    before = expected(done)
    after = expected([*done, next_step]) if next_step is not None else before
    for name in ("run", "secret", "current", "options"):
        if getattr(seen, name) not in (getattr(before, name), getattr(after, name)):
            return f"{name} is {getattr(seen, name)!r}"
    for name in ("contributions", "shards"):
        found, was, will_be = getattr(seen, name), getattr(before, name), getattr(after, name)
        if lost := was.keys() - found.keys():
            return f"{name} lost: {lost}"
        if wrong := {key for key in found if found[key] not in (was.get(key), will_be.get(key))}:
            return f"{name} that nobody wrote: {wrong}"
    for encoded in seen.contributions.values():
        if encoded.split(b" ", 3)[2].decode() not in seen.shards:
            return "a contribution without its shard"
    if seen.events != list(range(1, len(seen.events) + 1)):
        return f"events are not a beginning of what happened: {seen.events}"
    if len(seen.events) < events_at_least:
        return f"{len(seen.events)} events, of which {events_at_least} were safe"
    if any("corrupt" in notice for notice in seen.notices):
        return f"it says {seen.notices}"
    return None


def refuses_clearly(error: StorageError) -> bool:
    """Whether an error is one sentence with what to do."""
    return bool(error.what and error.fix and str(error).isprintable() and len(str(error)) < 500)
