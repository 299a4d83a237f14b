"""Files that are there whole or not at all, and what a disk's refusal means to a person."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from .errors import StorageError


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old bytes or the new ones.

    Temporary file in the same folder, fsync, rename, fsync of the folder. After a failed fsync the kernel may
    have dropped the pages, and a second fsync would report success: the write is given up, not repeated.

    Args:
        mode: permissions of the file; it never has wider ones, not even for a moment.

    Raises:
        StorageError: nothing was written, and an older file of that name is untouched unless the folder
            itself could not be synchronised.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, f"{path} was not written") from error


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable.

    Raises:
        OSError: they are not.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
