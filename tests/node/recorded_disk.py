"""A disk that remembers what was asked of it, and what a power cut would leave: for the tests of the store.

Two recorders write one log. `_Os` stands in for the module `os` in p2pcollab/files.py, through which all of
our own changes go. SQLite's go through a VFS of ours, written with ctypes, that hands everything on to its
own: it needs a Python that does not hide its SQLite, as those of Linux distributions, pyenv and Homebrew.

The model of the disk is the strict one of POSIX. A file's bytes are safe when the file was synchronised,
its name when its folder was. Of what is not safe yet, a power cut leaves any part: every write alone is
kept, dropped, or torn at a sector; so is every change of a name. SQLite is promised one thing more, on
which it relies by default (SQLITE_IOCAP_POWERSAFE_OVERWRITE): a torn write does not harm bytes beside it.
"""

from __future__ import annotations

import _sqlite3
import ctypes as C
import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from p2pcollab import files

SECTOR = 512
Leaves = Literal["all", "nothing", "some"]
"""What a power cut leaves of the changes that were not safe yet."""


@dataclass(frozen=True)
class Operation:
    """One change, or one request to make changes safe."""

    kind: Literal["create", "write", "truncate", "sync", "rename", "unlink", "folder", "sync folder"]
    #: Number of the file that a name stands for; names come and go, files stay what they are.
    file: int = -1
    path: str = ""
    target: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass
class Disk:
    """The log, and the faults to come. Paths are relative to `root`; what lies elsewhere is not recorded."""

    root: Path
    log: list[Operation] = field(default_factory=list)
    #: Refuse every change from this number in the log on, with this errno; -1: none.
    refuses_from: int = -1
    code: int = errno.ENOSPC
    _files: dict[str, int] = field(default_factory=dict)
    _count: int = 0

    def name(self, path: Path | bytes) -> str | None:
        """The path inside `root`; None for others."""
        try:
            return str(Path(os.fsdecode(path)).relative_to(self.root))
        except ValueError:
            return None

    def file(self, path: str, *, create: bool) -> int:
        """The number of the file of this name."""
        if path not in self._files:
            self._files[path] = self._count
            self._count += 1
            if create:
                self.add(Operation("create", self._files[path], path))
        return self._files[path]

    def add(self, operation: Operation) -> None:
        """Record a change."""
        self.log.append(operation)
        if operation.kind == "rename":
            self._files[operation.target] = self._files.pop(operation.path)
        elif operation.kind == "unlink":
            self._files.pop(operation.path, None)

    def check(self) -> None:
        """Refuse the next change if it is its turn.

        Raises:
            OSError: it is.
        """
        if 0 <= self.refuses_from <= len(self.log):
            raise OSError(self.code, os.strerror(self.code))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Everything that the store does to the disk is recorded; nothing is really synchronised."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "os", _Os(self))
            with _recording_vfs(self):
                yield


# Our own changes


class _Os:
    """`os`, as p2pcollab/files.py uses it."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._open: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        name = self._disk.name(path)
        if name is not None and flags & os.O_CREAT:
            self._disk.check()
        descriptor = os.open(path, flags, mode)
        if name is not None:
            self._open[descriptor] = name
            if flags & os.O_CREAT:
                self._disk.file(name, create=True)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        if descriptor not in self._open:
            return os.write(descriptor, data)
        self._disk.check()
        offset = os.lseek(descriptor, 0, os.SEEK_CUR)
        written = os.write(descriptor, data)
        number = self._disk.file(self._open[descriptor], create=False)
        self._disk.add(Operation("write", number, offset=offset, data=bytes(data[:written])))
        return written

    def fsync(self, descriptor: int) -> None:
        name = self._open.get(descriptor)
        if name is None:
            return
        self._disk.check()
        if (self._disk.root / name).is_dir():
            self._disk.add(Operation("sync folder", path=name))
        else:
            self._disk.add(Operation("sync", self._disk.file(name, create=False)))

    def close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        os.close(descriptor)

    def replace(self, path: Path, target: Path) -> None:
        name, new = self._disk.name(path), self._disk.name(target)
        if name is None or new is None:
            path.replace(target)
            return
        self._disk.check()
        path.replace(target)
        self._disk.add(Operation("rename", self._disk.file(name, create=False), name, new))

    def unlink(self, path: Path) -> None:
        path.unlink()
        name = self._disk.name(path)
        if name is not None:
            self._disk.add(Operation("unlink", path=name))

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        name = self._disk.name(path)
        if name is not None:
            self._disk.check()
        path.mkdir(mode)
        if name is not None:
            self._disk.add(Operation("folder", path=name))


# SQLite's changes. Source: sqlite3.h (sqlite3_vfs, sqlite3_io_methods) and os_unix.c (unixOpen, unixSync).

#: Functions of a VFS after xOpen and xDelete.
_VFS_REST = 14
#: Methods of a file in their order; those that we replace have names.
_METHODS = ("xClose", "xRead", "xWrite", "xTruncate", "xSync", *(f"other{index}" for index in range(13)))
_OK, _FULL, _IOERR = 0, 13, 10
_OPEN_CREATE, _OPEN_JOURNALS = 0x4, 0x800 | 0x4000 | 0x80000


class _Vfs(C.Structure):
    _fields_ = [
        ("iVersion", C.c_int),
        ("szOsFile", C.c_int),
        ("mxPathname", C.c_int),
        ("pNext", C.c_void_p),
        ("zName", C.c_char_p),
        ("pAppData", C.c_void_p),
        ("xOpen", C.c_void_p),
        ("xDelete", C.c_void_p),
        ("rest", C.c_void_p * _VFS_REST),
    ]


class _Methods(C.Structure):
    _fields_ = [("iVersion", C.c_int), *((name, C.c_void_p) for name in _METHODS)]


# Names as addresses: SQLite keeps them, and a copy of ours would be gone by then.
_Open = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_void_p, C.c_void_p, C.c_int, C.c_void_p)
_Delete = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_void_p, C.c_int)
_Close = C.CFUNCTYPE(C.c_int, C.c_void_p)
_Write = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_void_p, C.c_int, C.c_int64)
_Truncate = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_int64)
_Sync = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_int)


@dataclass
class _OpenFile:
    name: str
    number: int
    #: SQLite synchronises a journal's folder with the journal's first synchronisation.
    folder_is_due: bool


def sqlite_library() -> Any:
    """The very SQLite that Python uses, found through its module; None where that hides it."""
    path = getattr(_sqlite3, "__file__", None)
    library = C.CDLL(path) if path else None
    if library is None or not hasattr(library, "sqlite3_vfs_register"):
        return None
    library.sqlite3_vfs_find.restype = C.c_void_p
    library.sqlite3_vfs_find.argtypes = [C.c_char_p]
    return library


@contextmanager
def _recording_vfs(disk: Disk) -> Iterator[None]:
    library = sqlite_library()
    assert library is not None
    inner_at = library.sqlite3_vfs_find(None)
    inner = _Vfs.from_address(inner_at)
    shim = _Vfs.from_buffer_copy(inner)
    shim.zName, shim.pNext = b"recorded", None
    opened: dict[int, _OpenFile] = {}
    originals: dict[int, _Methods] = {}
    tables: dict[int, _Methods] = {}
    kept_alive: list[Any] = []

    def attempt(change: Callable[[], int]) -> int:
        try:
            disk.check()
        except OSError as error:
            return _FULL if error.errno == errno.ENOSPC else _IOERR
        return change()

    def on_open(vfs: int, name: int | None, file: int, flags: int, out_flags: int) -> int:
        relative = disk.name(C.string_at(name)) if name else None
        new = relative is not None and not (disk.root / relative).exists()
        if new:
            try:
                disk.check()
            except OSError as error:
                C.c_void_p.from_address(file).value = None
                return _FULL if error.errno == errno.ENOSPC else _IOERR
        result: int = _Open(inner.xOpen)(inner_at, name, file, flags, out_flags)
        if result == _OK and relative is not None:
            journal = bool(flags & _OPEN_CREATE and flags & _OPEN_JOURNALS)
            opened[file] = _OpenFile(relative, disk.file(relative, create=new), journal)
            wrap(file)
        return result

    def wrap(file: int) -> None:
        """Put our methods in the place of the file's own."""
        slot = C.c_void_p.from_address(file)
        own = slot.value
        assert own is not None
        if own not in tables:
            original = originals[own] = _Methods.from_address(own)
            table = _Methods.from_buffer_copy(original)
            for name, kind, function in (
                ("xClose", _Close, lambda f, o=original: closed(o, f)),
                ("xWrite", _Write, lambda f, b, n, at, o=original: written(o, f, b, n, at)),
                ("xTruncate", _Truncate, lambda f, size, o=original: truncated(o, f, size)),
                ("xSync", _Sync, lambda f, _flags: synced(f)),
            ):
                callback = kind(function)
                kept_alive.append(callback)
                setattr(table, name, C.cast(callback, C.c_void_p).value)
            tables[own] = table
        slot.value = C.addressof(tables[own])

    def closed(original: _Methods, file: int) -> int:
        opened.pop(file, None)
        return int(_Close(original.xClose)(file))

    def written(original: _Methods, file: int, buffer: int, size: int, offset: int) -> int:
        def change() -> int:
            data = C.string_at(buffer, size)
            result = int(_Write(original.xWrite)(file, buffer, size, offset))
            if result == _OK:
                disk.add(Operation("write", opened[file].number, offset=offset, data=data))
            return result

        return attempt(change)

    def truncated(original: _Methods, file: int, size: int) -> int:
        def change() -> int:
            result = int(_Truncate(original.xTruncate)(file, size))
            if result == _OK:
                disk.add(Operation("truncate", opened[file].number, offset=size))
            return result

        return attempt(change)

    def synced(file: int) -> int:
        def change() -> int:
            one = opened[file]
            disk.add(Operation("sync", one.number))
            if one.folder_is_due:
                disk.add(Operation("sync folder", path=str(Path(one.name).parent)))
                one.folder_is_due = False
            return _OK

        return attempt(change)

    def on_delete(vfs: int, name: int, sync: int) -> int:
        result = int(_Delete(inner.xDelete)(inner_at, name, 0))
        relative = disk.name(C.string_at(name))
        if result == _OK and relative is not None:
            disk.add(Operation("unlink", path=relative))
            if sync:
                disk.add(Operation("sync folder", path=str(Path(relative).parent)))
        return result

    for name, kind, function in (("xOpen", _Open, on_open), ("xDelete", _Delete, on_delete)):
        callback = kind(function)
        kept_alive.append(callback)
        setattr(shim, name, C.cast(callback, C.c_void_p).value)
    assert library.sqlite3_vfs_register(C.byref(shim), 1) == _OK
    try:
        yield
    finally:
        assert library.sqlite3_vfs_register(C.c_void_p(inner_at), 1) == _OK
        assert library.sqlite3_vfs_unregister(C.byref(shim)) == _OK
        assert not opened, f"still open: {[one.name for one in opened.values()]}"


# Power cuts


@dataclass
class _File:
    safe: bytearray = field(default_factory=bytearray)
    pending: list[Operation] = field(default_factory=list)


def after_power_cut(log: list[Operation], leaves: Leaves, rng: random.Random, folder: Path) -> None:
    """Make in `folder` what is on the disk when the power fails after the last operation of `log`."""
    contents: dict[int, _File] = {}
    names: dict[str, int] = {}
    folders = {"."}
    pending: list[Operation] = []
    for operation in log:
        match operation.kind:
            case "write" | "truncate":
                contents.setdefault(operation.file, _File()).pending.append(operation)
            case "sync":
                one = contents.setdefault(operation.file, _File())
                _apply(one.safe, one.pending)
                one.pending = []
            case "sync folder":
                safe = [other for other in pending if str(Path(other.path).parent) == operation.path]
                _rename(names, folders, safe)
                pending = [other for other in pending if other not in safe]
            case _:
                pending.append(operation)
    _rename(names, folders, [one for one in pending if _is_left(leaves, rng)])
    for path in sorted(folders):
        if all(str(parent) in folders for parent in Path(path).parents):
            (folder / path).mkdir(mode=0o700, exist_ok=True)
    for path, number in names.items():
        if (folder / path).parent.is_dir():
            one = contents.get(number, _File())
            data = bytearray(one.safe)
            _apply(data, [_torn(write, leaves, rng) for write in one.pending if _is_left(leaves, rng)])
            (folder / path).write_bytes(data)


def _is_left(leaves: Leaves, rng: random.Random) -> bool:
    return leaves == "all" or (leaves == "some" and rng.random() < 0.5)


def _torn(operation: Operation, leaves: Leaves, rng: random.Random) -> Operation:
    if leaves == "all" or operation.kind != "write" or rng.random() < 0.7:
        return operation
    end = (operation.offset // SECTOR + rng.randrange(1 + len(operation.data) // SECTOR)) * SECTOR
    return Operation(
        "write",
        operation.file,
        offset=operation.offset,
        data=operation.data[: max(0, end - operation.offset)],
    )


def _apply(data: bytearray, operations: list[Operation]) -> None:
    for operation in operations:
        if operation.kind == "truncate":
            del data[operation.offset :]
            data.extend(bytes(operation.offset - len(data)))
        elif operation.data:
            data.extend(bytes(max(0, operation.offset - len(data))))
            data[operation.offset : operation.offset + len(operation.data)] = operation.data


def _rename(names: dict[str, int], folders: set[str], operations: list[Operation]) -> None:
    for operation in operations:
        match operation.kind:
            case "create":
                names[operation.path] = operation.file
            case "rename":
                names.pop(operation.path, None)
                names[operation.target] = operation.file
            case "unlink":
                names.pop(operation.path, None)
            case _:
                folders.add(operation.path)
