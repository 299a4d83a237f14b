"""A device's state folder: identity, runs, shards.

    identity.key   32-byte Ed25519 seed, 0600    current    id of the run that `join` goes on with
    p2pd.key       the same key for p2pd         api.json   where the daemon's API listens
    daemon.lock    held while a daemon runs
    runs/<first 16 digits of the run id>/
        spec.json  secret  rotation                     secret: the one at joining; rotation: the later one
        ledger.sqlite  ledger.previous  headers/        see index.py
        shards/ab/<sha256>.safetensors                  see shard_files.py

`identity.key`, `current`, `spec.json`, `secret` and `rotation` are in two copies each (see kept.py). A shard
is written before the contribution that names it, so whatever the moment of a crash, a contribution in the
index of its own author has its shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Final

import platformdirs

from ..errors import StorageError, UsageError
from ..files import make_folder, remove, storage_error
from ..rotation import RotationState, decode_state, encode_state
from ..run import SECRET_BYTES, RunId
from .index import Index, Value
from .kept import KeptFile
from .lock import FolderLock
from .shard_files import ShardFiles

SEED_BYTES: Final = 32
_PREFIX_CHARS: Final = 16
_RUN_ID: Final = re.compile(r"[0-9a-f]{64}")
_NO_RUN: Final = b"none"
_LEFTOVERS: Final = (".*.tmp*", "runs/*/.*.tmp*", "runs/*/headers/.*.tmp*")
_JOIN_AGAIN: Final = "join the run again with its join code; nothing else of it is lost"


def default_state_folder() -> Path:
    """Where state lives unless the user says otherwise: `$XDG_STATE_HOME/p2pcollab` on Linux."""
    return platformdirs.user_state_path("p2pcollab", appauthor=False)


class Store:
    """The state folder, locked for this process."""

    def __init__(self, folder: Path, lock: FolderLock) -> None:
        self.folder = folder
        self._lock = lock
        self._notices: list[str] = []
        self._identity = KeptFile(
            folder / "identity.key",
            fix="restore it from a copy of your own, or remove it to go on as a new device",
            older=lambda raw: raw if len(raw) == SEED_BYTES else None,
        )
        self._current = KeptFile(
            folder / "current",
            fix="name the run with its join code: `p2pcollab join --code P2P-…`",
            older=lambda raw: (raw.strip() or _NO_RUN) if len(raw) in (1, 65) else None,
        )

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Lock the folder for this process; create it if it is not there.

        Raises:
            StorageError: a daemon already uses it, or the disk refused.
        """
        try:
            make_folder(folder / "runs")
            folder.chmod(0o700)
        except OSError as error:
            raise storage_error(error, f"the state folder {folder} was not opened") from error
        lock = FolderLock(folder)
        # What was being written when an earlier daemon was killed; what cannot be removed does no harm.
        with contextlib.suppress(OSError):
            for path in (path for pattern in _LEFTOVERS for path in folder.glob(pattern)):
                remove(path)
        return cls(folder, lock)

    def close(self) -> None:
        """Let another daemon use the folder."""
        self._lock.release()

    def identity_seed(self) -> bytes:
        """This device's 32-byte Ed25519 seed, created on first use.

        Raises:
            StorageError: it cannot be read or written, or is not a seed.
        """
        seed = self._identity.read(self._notices)
        if seed is None:
            seed = secrets.token_bytes(SEED_BYTES)
            self._identity.write(seed)
        if len(seed) != SEED_BYTES:
            raise StorageError(
                f"{self._identity.path} is not an identity: it has {len(seed)} bytes instead of {SEED_BYTES}",
                "restore it from a copy, or remove it to go on as a new device",
            )
        try:
            self._identity.path.chmod(0o600)
        except OSError as error:
            raise storage_error(error, f"{self._identity.path} was not protected") from error
        return seed

    def create_run(self, spec: bytes, secret: bytes) -> RunStore:
        """Remember a run and open it; of a run that is already there, what is damaged is written anew.

        Args:
            spec: canonical bytes of the run spec.

        Raises:
            StorageError: it was not written, or another run has the same prefix.
        """
        assert len(secret) == SECRET_BYTES
        run_id = RunId(hashlib.sha256(spec).hexdigest())
        folder = self._run_folder(run_id)
        try:
            make_folder(folder)
        except OSError as error:
            raise storage_error(error, f"{folder} was not created") from error
        # The spec comes last: a folder without one is no run yet.
        for file, content in ((_secret_file(folder), secret), (_spec_file(folder), spec)):
            held = None
            with contextlib.suppress(StorageError):
                held = file.read(self._notices)
            if held is None:
                file.write(content)
        return self.open_run(run_id)

    def open_run(self, run_id: RunId, secret: bytes | None = None) -> RunStore:
        """Open a run that this device knows.

        Args:
            secret: the run secret, where the join code is at hand: a damaged one is written anew.

        Raises:
            UsageError: it does not know it.
            StorageError: what is stored of it is damaged, or the disk refused.
        """
        folder = self._run_folder(run_id)
        spec = _spec_file(folder).read(self._notices)
        if spec is None:
            raise UsageError(
                f"this device knows no run {run_id[:_PREFIX_CHARS]}", "join it with its join code"
            )
        if hashlib.sha256(spec).hexdigest() != run_id:
            raise StorageError(f"{folder} holds another run of the same prefix", "use another state folder")
        file = _secret_file(folder)
        try:
            held = file.read(self._notices)
        except StorageError:
            if secret is None:
                raise
            held = None
        if held is None and secret is not None:
            file.write(secret)
            held = secret
        if held is None or len(held) != SECRET_BYTES:
            raise StorageError(f"{file.path} is not the run's secret", _JOIN_AGAIN)
        return RunStore(folder, run_id, spec, self._rotation(folder, run_id, held, secret), self._notices)

    def _rotation(self, folder: Path, run_id: RunId, first: bytes, typed: bytes | None) -> RotationState:
        """What came after the secret that the run was joined with.

        Args:
            typed: the secret of the join code, if it is at hand: it takes the place of what is damaged.
        """
        try:
            kept = _rotation_file(folder).read(self._notices)
            if kept is not None:
                return decode_state(kept, run_id)
        except StorageError:
            if typed is None:
                raise
        return RotationState(run_id=run_id, secret=first)

    def runs(self) -> tuple[RunId, ...]:
        """The ids of all runs that this device knows; one whose spec is lost, its join code brings back.

        Raises:
            StorageError: the disk refused.
        """
        found = []
        for path in sorted((self.folder / "runs").glob("*/spec.json")):
            try:
                spec = _spec_file(path.parent).read(self._notices)
            except StorageError as error:
                self._notices.append(str(error))
                continue
            if spec is not None:
                found.append(RunId(hashlib.sha256(spec).hexdigest()))
        return tuple(found)

    @property
    def current(self) -> RunId | None:
        """The run that this device last took part in, and has not left for good.

        Raises:
            StorageError: the disk refused, or it is not known any more.
        """
        text = (self._current.read(self._notices) or _NO_RUN).decode(errors="replace")
        return RunId(text) if _RUN_ID.fullmatch(text) else None

    @current.setter
    def current(self, run_id: RunId | None) -> None:
        content = run_id.encode() if run_id else _NO_RUN
        with contextlib.suppress(StorageError):
            if self._current.read(self._notices) == content:
                return
        self._current.write(content)

    def _run_folder(self, run_id: RunId) -> Path:
        assert _RUN_ID.fullmatch(run_id), run_id
        return self.folder / "runs" / run_id[:_PREFIX_CHARS]


def _spec_file(folder: Path) -> KeptFile:
    """The run spec needs no digest beside it: the folder is named by it."""
    return KeptFile(
        folder / "spec.json",
        fix=_JOIN_AGAIN,
        seal=lambda content: content,
        unseal=lambda raw: raw if hashlib.sha256(raw).hexdigest().startswith(folder.name) else None,
    )


def _rotation_file(folder: Path) -> KeptFile:
    return KeptFile(folder / "rotation", fix=_JOIN_AGAIN)


def _secret_file(folder: Path) -> KeptFile:
    return KeptFile(
        folder / "secret", fix=_JOIN_AGAIN, older=lambda raw: raw if len(raw) == SECRET_BYTES else None
    )


class RunStore:
    """What is stored of one run. Safe to use from several threads.

    `put_shard`, `get_shard` and `collect_garbage` wait for the disk: the daemon calls them in a thread. The
    rest is short enough for the event loop.
    """

    def __init__(
        self, folder: Path, run_id: RunId, spec: bytes, rotation: RotationState, notices: list[str]
    ) -> None:
        self.folder = folder
        self.run_id = run_id
        #: Canonical bytes of the run spec.
        self.spec = spec
        #: The run secret, and what is known of how it came to be.
        self.rotation = rotation
        #: It is from a join code, and is not what is stored here.
        self.rotation_is_typed = False
        self._notices = notices
        self._shards = ShardFiles(folder / "shards")
        self._index = Index(folder, notices)

    @property
    def secret(self) -> bytes:
        """The present run secret."""
        return self.rotation.secret

    def try_secret(self, secret: bytes) -> None:
        """Go on with the secret of a join code; what is stored stays as it is until it has proved right."""
        self.rotation = self.rotation.with_secret(secret)
        self.rotation_is_typed = True

    def keep_rotation(self, state: RotationState) -> None:
        """Remember a run secret and its notice, durably.

        Raises:
            StorageError: they were not stored.
        """
        _rotation_file(self.folder).write(encode_state(state))
        self.rotation = state

    def put_contribution(self, shard: str, device: str, encoded: bytes) -> None:
        """Store the newest contribution of a device to a shard, durably. Its own shard comes first.

        Raises:
            StorageError: it was not stored.
        """
        self._index.put_contributions([(shard, device, encoded)])

    def put_contributions(self, entries: Iterable[tuple[str, str, bytes]]) -> None:
        """Store (shard, device, signed bytes) of several contributions: all or none, with one fsync.

        Raises:
            StorageError: none was stored.
        """
        self._index.put_contributions(entries)

    def load_contributions(self) -> tuple[bytes, ...]:
        """The signed bytes of all contributions, to be verified like a peer's.

        Raises:
            StorageError: the disk refused.
        """
        return self._index.load_contributions()

    def put_shard(self, data: bytes) -> str:
        """Write a shard durably; its digest.

        Raises:
            StorageError: it was not written.
        """
        return self._shards.put(data)

    def get_shard(self, digest: str) -> bytes | None:
        """A shard's bytes, checked against the digest; `None` if it is missing or was found corrupt.

        Raises:
            StorageError: the disk refused.
        """
        return self._shards.get(digest)

    def has(self, digest: str) -> bool:
        """Whether a shard is held."""
        return digest in self._shards

    def digests(self) -> frozenset[str]:
        """The digests of all shards held."""
        return self._shards.digests()

    def collect_garbage(self, garbage: Set[str]) -> int:
        """Remove these shards, and corrupt files; the bytes freed.

        What is garbage must have been decided among the shards that were held at that moment: what has been
        written since then is not named by any contribution yet.

        Raises:
            StorageError: the disk refused.
        """
        return self._shards.collect_garbage(garbage)

    def set_meta(self, values: Mapping[str, Value], *, durable: bool = True) -> None:
        """Store key/value pairs: all or none. Values are whatever JSON can hold.

        Raises:
            StorageError: none was stored.
        """
        self._index.set_meta(values, durable=durable)

    def meta(self) -> dict[str, Value]:
        """All key/value pairs.

        Raises:
            StorageError: the disk refused.
        """
        return self._index.meta()

    def add_event(self, id: int, time: float, kind: str, text: str, fields: Mapping[str, Value]) -> None:
        """Remember an event.

        Raises:
            StorageError: it was not stored.
        """
        self._index.add_event(id, time, kind, text, fields)

    def events(self, newest: int = 1000) -> list[tuple[int, float, str, str, dict[str, Value]]]:
        """The newest events, oldest first: id, time, kind, text, fields.

        Raises:
            StorageError: the disk refused.
        """
        return self._index.events(newest)

    def add_metric(self, time: float, series: str, fields: Mapping[str, Value]) -> None:
        """Remember a point of a series.

        Raises:
            StorageError: it was not stored.
        """
        self._index.add_metric(time, series, fields)

    def metrics(self, after: int = 0, at_most: int = 5000) -> list[tuple[int, float, str, dict[str, Value]]]:
        """Points of the metrics history after an id, oldest first: id, time, series, fields.

        Raises:
            StorageError: the disk refused.
        """
        return self._index.metrics(after, at_most)

    def notices(self) -> tuple[str, ...]:
        """What a person should hear about the state folder since the last call."""
        notices, self._notices[:] = tuple(self._notices), []
        return notices

    def close(self) -> None:
        """Close the index."""
        self._index.close()
