"""Small files that nobody gives back: each in two copies that can tell whether they are what was written.

    <name>        <name>.copy

Disks return other bytes than they were given, rarely but silently. A copy that is found so is made anew from
the other one. Both are written at each change, the first one first: after a crash in between, the second
holds what was there before.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..errors import StorageError
from ..files import storage_error, write_atomic

_DIGEST_CHARS: Final = 64


def run_folder(folder: Path) -> str:
    """How every error about a run's files calls them: of a full disk a person should read once."""
    return f"the run's folder {folder}"


def sealed(content: bytes) -> bytes:
    """Content, a line feed, and a line with its SHA-256: what is text stays text."""
    return content + b"\n" + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unsealed(raw: bytes) -> bytes | None:
    """The content of what `sealed` made; None if these are other bytes."""
    content = raw[: -_DIGEST_CHARS - 2]
    return content if raw == sealed(content) else None


class KeptFile:
    """One such file."""

    def __init__(
        self,
        path: Path,
        *,
        fix: str,
        seal: Callable[[bytes], bytes] = sealed,
        unseal: Callable[[bytes], bytes | None] = unsealed,
        older: Callable[[bytes], bytes | None] = lambda _raw: None,
    ) -> None:
        """
        Args:
            fix: what a person can do when both copies are damaged.
            seal, unseal: content to bytes that tell whether they are damaged, and back.
            older: the content of what an earlier version wrote without a digest.
        """
        self.path = path
        self._copy = path.with_name(path.name + ".copy")
        self._fix = fix
        self._seal = seal
        self._unseal = unseal
        self._older = older

    def read(self, notices: list[str]) -> bytes | None:
        """The content; None if the file is not there, whatever its copy says: a person may have removed it.

        Args:
            notices: told if one of the copies was damaged.

        Raises:
            StorageError: both are damaged, or the disk refused.
        """
        raw, spare = _read(self.path), _read(self._copy)
        if raw is None:
            return None
        content = self._content(raw)
        if content is None and spare is not None:
            content = self._content(spare)
        if content is None:
            raise StorageError(f"{self.path} is damaged, and so is its copy", self._fix)
        for path, found in ((self.path, raw), (self._copy, spare)):
            if found != self._seal(content):
                self._mend(path, found, content, notices)
        return content

    def write(self, content: bytes) -> None:
        """Write both copies, durably.

        Raises:
            StorageError: they were not written.
        """
        for path in (self.path, self._copy):
            write_atomic(path, self._seal(content), mode=0o600)

    def _content(self, raw: bytes) -> bytes | None:
        content = self._unseal(raw)
        return self._older(raw) if content is None else content

    def _mend(self, path: Path, found: bytes | None, content: bytes, notices: list[str]) -> None:
        """Make a copy anew that is damaged, missing, of an earlier version, or left behind by a crash."""
        try:
            write_atomic(path, self._seal(content), mode=0o600)
        except StorageError as error:
            # A full disk must not keep anybody from what the other copy says; the next start tries again.
            notices.append(str(error))
        else:
            if found is not None and self._content(found) is None:
                notices.append(f"{path} was damaged and was made anew from its second copy")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.EIO:
            return b""  # a sector that cannot be read is as good as one that holds something else
        raise storage_error(error, f"{path} was not read") from error
