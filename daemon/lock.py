"""One daemon per state folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..errors import StorageError
from ..files import storage_error


class FolderLock:
    """The lock of a state folder, held until `release` or the end of the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        `flock` and not a file's existence: the kernel drops it when the holder is killed. The descriptor is
        not inherited by the processes that the daemon starts, so none of them holds the folder after it.

        Raises:
            StorageError: another process holds it, or the file cannot be written.
        """
        path = folder / "daemon.lock"
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise storage_error(error, f"{path} was not opened") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise StorageError(
                f"a daemon (process {holder}) already uses {folder}",
                "stop it with `p2pcollab leave`, or give this one a folder of its own with --state",
            ) from error
        except OSError as error:
            os.close(self._descriptor)
            raise storage_error(error, f"{path} was not locked") from error

    def release(self) -> None:
        """Let another daemon use the folder."""
        os.close(self._descriptor)
