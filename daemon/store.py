"""A device's state folder: identity, runs, shards.

    identity.key   32-byte Ed25519 seed, 0600    current    id of the run that `join` goes on with
    p2pd.key       the same key for p2pd         api.json   where the daemon's API listens
    daemon.lock    held while a daemon runs
    runs/<first 16 digits of the run id>/
        spec.json  secret (0600)
        ledger.sqlite  headers/                         see index.py
        shards/ab/<sha256>.safetensors                  see shard_files.py

A shard is written before the contribution that names it, so whatever the moment of a crash, a contribution in
the index of its own author has its shard.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Final

import platformdirs

from ..errors import StorageError, UsageError
from ..files import storage_error, write_atomic
from ..run import SECRET_BYTES, RunId
from .index import Index, Value
from .lock import FolderLock
from .shard_files import ShardFiles

SEED_BYTES: Final = 32
_PREFIX_CHARS: Final = 16
_RUN_ID: Final = re.compile(r"[0-9a-f]{64}")


def default_state_folder() -> Path:
    """Where state lives unless the user says otherwise: `$XDG_STATE_HOME/p2pcollab` on Linux."""
    return platformdirs.user_state_path("p2pcollab", appauthor=False)


class Store:
    """The state folder, locked for this process."""

    def __init__(self, folder: Path, lock: FolderLock) -> None:
        self.folder = folder
        self._lock = lock

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Lock the folder for this process; create it if it is not there.

        Raises:
            StorageError: a daemon already uses it, or the disk refused.
        """
        try:
            (folder / "runs").mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise storage_error(error, f"the state folder {folder} was not opened") from error
        return cls(folder, FolderLock(folder))

    def close(self) -> None:
        """Let another daemon use the folder."""
        self._lock.release()

    def identity_seed(self) -> bytes:
        """This device's 32-byte Ed25519 seed, created on first use.

        Raises:
            StorageError: it cannot be read or written, or is not a seed.
        """
        path = self.folder / "identity.key"
        seed = _read(path)
        if seed is None:
            seed = secrets.token_bytes(SEED_BYTES)
            write_atomic(path, seed, mode=0o600)
        if len(seed) != SEED_BYTES:
            raise StorageError(
                f"{path} is not an identity: it has {len(seed)} bytes instead of {SEED_BYTES}",
                "restore it from a copy, or remove it to go on as a new device",
            )
        try:
            path.chmod(0o600)
        except OSError as error:
            raise storage_error(error, f"{path} was not protected") from error
        return seed

    @property
    def p2pd_key_path(self) -> Path:
        """Where the transport keeps the identity in p2pd's format."""
        return self.folder / "p2pd.key"

    def create_run(self, spec: bytes, secret: bytes) -> RunStore:
        """Remember a run and open it; a run that is already there is opened as it is.

        Args:
            spec: canonical bytes of the run spec.

        Raises:
            StorageError: it was not written, or another run has the same prefix.
        """
        assert len(secret) == SECRET_BYTES
        run_id = RunId(hashlib.sha256(spec).hexdigest())
        folder = self._run_folder(run_id)
        if not (folder / "spec.json").exists():
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise storage_error(error, f"{folder} was not created") from error
            write_atomic(folder / "secret", secret, mode=0o600)
            write_atomic(folder / "spec.json", spec)
        return self.open_run(run_id)

    def open_run(self, run_id: RunId) -> RunStore:
        """Open a run that this device knows.

        Raises:
            UsageError: it does not know it.
            StorageError: what is stored of it is damaged, or the disk refused.
        """
        folder = self._run_folder(run_id)
        spec, secret = _read(folder / "spec.json"), _read(folder / "secret")
        if spec is None:
            raise UsageError(
                f"this device knows no run {run_id[:_PREFIX_CHARS]}", "join it with its join code"
            )
        if hashlib.sha256(spec).hexdigest() != run_id or secret is None or len(secret) != SECRET_BYTES:
            raise StorageError(
                f"the run in {folder} is damaged: its spec or its secret is not what was written",
                "move that folder away and join the run again with its join code",
            )
        return RunStore(folder, run_id, spec, secret)

    def runs(self) -> tuple[RunId, ...]:
        """The ids of all runs that this device knows.

        Raises:
            StorageError: the disk refused.
        """
        specs = (_read(path) for path in sorted((self.folder / "runs").glob("*/spec.json")))
        return tuple(RunId(hashlib.sha256(spec).hexdigest()) for spec in specs if spec is not None)

    @property
    def current(self) -> RunId | None:
        """The run that this device last took part in, and has not left for good.

        Raises:
            StorageError: the disk refused.
        """
        text = (_read(self.folder / "current") or b"").decode(errors="replace").strip()
        return RunId(text) if _RUN_ID.fullmatch(text) else None

    @current.setter
    def current(self, run_id: RunId | None) -> None:
        write_atomic(self.folder / "current", (run_id or "").encode() + b"\n")

    def _run_folder(self, run_id: RunId) -> Path:
        assert _RUN_ID.fullmatch(run_id), run_id
        return self.folder / "runs" / run_id[:_PREFIX_CHARS]


class RunStore:
    """What is stored of one run. Safe to use from several threads.

    `put_shard`, `get_shard` and `collect_garbage` wait for the disk: the daemon calls them in a thread. The
    rest is short enough for the event loop.
    """

    def __init__(self, folder: Path, run_id: RunId, spec: bytes, secret: bytes) -> None:
        self.folder = folder
        self.run_id = run_id
        #: Canonical bytes of the run spec.
        self.spec = spec
        self.secret = secret
        self._index = Index(folder)
        self._shards = ShardFiles(folder / "shards")

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

    def collect_garbage(self, keep: Set[str]) -> int:
        """Remove shards that are not in `keep`, which must name those being written; the bytes freed.

        Raises:
            StorageError: the disk refused.
        """
        return self._shards.collect_garbage(keep)

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
        """What a person should hear about this store since the last call."""
        return self._index.notices()

    def close(self) -> None:
        """Close the index."""
        self._index.close()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error(error, f"{path} was not read") from error
