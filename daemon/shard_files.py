"""Shards as files named by the digest of their bytes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import threading
from collections.abc import Set
from pathlib import Path

from ..errors import StorageError
from ..files import make_folder, move, remove, storage_error, write_atomic
from .kept import run_folder

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"


class ShardFiles:
    """A folder `ab/<sha256>.safetensors`. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """Open the folder, create it if needed, and remove what a killed process left half written.

        Raises:
            StorageError: the folder cannot be read.
        """
        self._folder = folder
        self._lock = threading.Lock()
        self._held: set[str] = set()
        try:
            make_folder(folder)
            for path in folder.glob("??/*"):
                if path.suffix == ".tmp":
                    remove(path)
                elif path.suffix == _SUFFIX and _DIGEST.fullmatch(path.stem):
                    self._held.add(path.stem)
        except OSError as error:
            raise storage_error(error, f"{folder} was not read") from error

    def put(self, data: bytes) -> str:
        """Write a shard durably, unless it is there; its SHA-256 in hexadecimal.

        Blocks for the disk: call it from a thread.

        Raises:
            StorageError: it was not written.
        """
        digest = hashlib.sha256(data).hexdigest()
        if digest in self:
            return digest
        path = self._path(digest)
        try:
            make_folder(path.parent)
        except OSError as error:
            raise storage_error(error, f"{path.parent} was not created") from error
        try:
            write_atomic(path, data, mode=0o600, called=run_folder(self._folder.parent))
        except StorageError:
            with contextlib.suppress(OSError):
                remove(path)
            raise
        with self._lock:
            self._held.add(digest)
        return digest

    def get(self, digest: str) -> bytes | None:
        """The bytes that have this digest, or `None`.

        A file whose bytes have another digest is set aside as `<digest>.corrupt`, and missing from then on.

        Raises:
            StorageError: the disk refused to read it. If that is because of a bad sector, it is missing from
                then on: fetched again, it is written elsewhere.
        """
        if digest not in self:
            return None
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self._forget(digest)
            return None
        except OSError as error:
            if error.errno == errno.EIO:
                self._forget(digest)
            raise storage_error(error, f"{path} was not read") from error
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        self._forget(digest)
        try:
            move(path, path.with_suffix(".corrupt"))
        except OSError as error:
            raise storage_error(error, f"{path} is corrupt and was not set aside") from error
        return None

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._held

    def digests(self) -> frozenset[str]:
        """The digests of all shards held."""
        with self._lock:
            return frozenset(self._held)

    def collect_garbage(self, garbage: Set[str]) -> int:
        """Remove these shards, and corrupt files; the number of bytes freed.

        Raises:
            StorageError: the disk refused.
        """
        freed = 0
        try:
            for path in self._folder.glob("??/*"):
                if path.suffix == _SUFFIX and path.stem in garbage:
                    self._forget(path.stem)
                elif path.suffix != ".corrupt":
                    continue
                freed += path.stat().st_size
                remove(path)
        except OSError as error:
            raise storage_error(error, f"{self._folder} was not cleaned") from error
        return freed

    def _forget(self, digest: str) -> None:
        with self._lock:
            self._held.discard(digest)

    def _path(self, digest: str) -> Path:
        assert _DIGEST.fullmatch(digest), digest
        return self._folder / digest[:2] / f"{digest}{_SUFFIX}"
