"""Files that are there whole or not at all, and what a disk's refusal means to a person.

Whatever changes the state folder, SQLite apart, goes through the functions in here, and these through `os`:
the tests record the calls to see what a power cut leaves, and let them fail (tests/node/recorded_disk.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

from .errors import StorageError


def write_atomic(
    path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True, called: str = ""
) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old bytes or the new ones.

    Temporary file in the same folder, fsync, rename, fsync of the folder. After a failed fsync the kernel may
    have dropped the pages, and a second fsync would report success: the write is given up, not repeated.

    Args:
        mode: permissions of the file; it never has wider ones, not even for a moment.
        durable: survives a power cut once this returns. Without it, a power cut may leave the old file, none,
            or one of other bytes: for what carries a digest and can be had elsewhere.
        called: what an error calls it; its path by default.

    Raises:
        StorageError: nothing was written, and an older file of that name is untouched unless the folder
            itself could not be synchronised.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            _write(temporary, data, mode, durable)
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
            raise
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, f"{called or path} was not written") from error


def move(path: Path, target: Path) -> None:
    """Give a file another name, durably. An older file of that name is replaced.

    Raises:
        OSError: it was not moved.
    """
    os.replace(path, target)  # noqa: PTH105
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there. After a power cut it may be back.

    Raises:
        OSError: it was not removed.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108


def make_folder(path: Path) -> None:
    """Make a private folder, and those above it, durably; one that is there is left as it is.

    Raises:
        OSError: it is not there, and was not made.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)  # noqa: PTH102
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable.

    Raises:
        OSError: they are not.
    """
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable.

    Raises:
        OSError: they are not.
    """
    _sync(path, os.O_RDONLY)


def storage_error(error: OSError, consequence: str) -> StorageError:
    """What the operating system's refusal means, and what to do.

    Args:
        consequence: what did not happen because of it, e.g. `model.safetensors was not written`.
    """
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return StorageError(f"{consequence}: the disk is full", "free some space; nothing was lost")
        case errno.EACCES | errno.EPERM:
            return StorageError(f"{consequence}: no permission", "check who owns the folder")
        case errno.EROFS:
            return StorageError(f"{consequence}: the disk is read-only", "choose another folder")
        case errno.ENOENT | errno.ENOTDIR:
            return StorageError(f"{consequence}: the folder is not there", "create it, or choose another one")
        case errno.EIO:
            return StorageError(
                f"{consequence}: the disk reports an error",
                "check the disk (`dmesg`), and move the folder to another one",
            )
        case _:
            return StorageError(f"{consequence}: {error.strerror or error}")


def _write(path: Path, data: bytes, mode: int, durable: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
