"""The SQLite index of one run: contributions, events, metrics history, counters.

What a disk makes of it is found (see index_file.py) and made good from what else there is:

    headers/<shard>.<device>, meta.<key>    each contribution's signed bytes, and each counter: written after
                                            the index, without fsync, with a digest
    ledger.previous                         the whole index, as it was when it was last closed

Contributions and counters carry a sequence number, so that the newer one is known. An index whose structure
is damaged is set aside as `ledger.corrupt` and begun anew from these, and from what can still be read of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import sqlite3
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from .. import limits
from ..errors import StorageError
from ..files import make_folder, move, remove, storage_error, sync_file, sync_folder, write_atomic
from . import index_file
from .index_file import Row, Rows, with_sum
from .kept import run_folder, sealed, unsealed

T = TypeVar("T")
Value = str | int | float | bool | None | list["Value"] | dict[str, "Value"]

_COPY_NAME: Final = re.compile(r"([A-Za-z0-9]{1,64})\.([A-Za-z0-9]{1,64})")
_SEQUENCE: Final = struct.Struct(">Q")
#: Rows beyond a table's bound are removed once in so many ids.
_TRIM_EVERY: Final = 64
_WORDS: Final = {
    "contributions": "contributions",
    "meta": "counters",
    "events": "events",
    "metrics": "metrics",
}


class Index:
    """One SQLite connection in WAL mode. Safe to use from several threads; every call is short.

    `durable` writes are synchronised to the disk before the call returns (`synchronous=FULL`). The others
    survive a killed process, because WAL leaves them in the operating system's cache, but the last of them
    may be missing after a power cut (`NORMAL`): an fsync per event would wear out an SD card.
    """

    def __init__(self, folder: Path, notices: list[str]) -> None:
        """Open the index in a run's folder, or begin it anew if it is corrupt.

        Args:
            notices: told what a person should hear about it.

        Raises:
            StorageError: the disk refused.
        """
        self._path = folder / "ledger.sqlite"
        self._previous = folder / "ledger.previous"
        self._headers = folder / "headers"
        self._lock = threading.RLock()
        self._notices = notices
        self._closed = False
        #: Second copies that are still to be written, by name.
        self._uncopied: dict[str, bytes] = {}
        try:
            make_folder(self._headers)
            # Left behind by a process that did not close it. A damaged frame ends such a log without a word.
            unclean = self._log.exists() and self._log.stat().st_size > 0
            self._connection, self._sequence = self._open(catch_up=unclean)
        except OSError as error:
            raise self._refused(error) from error
        except sqlite3.DatabaseError as error:
            if not _means_corrupt(error):
                raise self._refused(error) from error
            self._begin_anew(error)

    def put_contributions(self, entries: Iterable[tuple[str, str, bytes]]) -> None:
        """Store (shard, device, signed bytes), each in place of the one before it; all or none, durably.

        Raises:
            StorageError: none was stored.
        """
        self._put("contributions", [(shard, device, bytes(encoded)) for shard, device, encoded in entries])

    def load_contributions(self) -> tuple[bytes, ...]:
        """The signed bytes of all contributions, by shard and device. They are to be verified like a peer's.

        Raises:
            StorageError: the disk refused.
        """
        return tuple(row[2] for row in self._select("contributions", "ORDER BY shard, device"))

    def set_meta(self, values: Mapping[str, Value], *, durable: bool = True) -> None:
        """Store key/value pairs, all or none. Values are whatever JSON can hold.

        Raises:
            StorageError: none was stored.
        """
        self._put("meta", [(key, json.dumps(value)) for key, value in values.items()], durable=durable)

    def meta(self) -> dict[str, Value]:
        """All key/value pairs.

        Raises:
            StorageError: the disk refused.
        """
        return {row[0]: json.loads(row[1]) for row in self._select("meta")}

    def add_event(self, id: int, time: float, kind: str, text: str, fields: Mapping[str, Value]) -> None:
        """Remember an event; the newest `EVENTS_MAX` are kept.

        Raises:
            StorageError: it was not stored.
        """
        row = (id, float(time), kind, text, json.dumps(fields))
        self._append("events", lambda _next: row, limits.EVENTS_MAX)

    def events(self, newest: int) -> list[tuple[int, float, str, str, dict[str, Value]]]:
        """The newest events, oldest first: id, time, kind, text, fields.

        Raises:
            StorageError: the disk refused.
        """
        rows = self._select("events", "ORDER BY id DESC LIMIT ?", (newest,))
        return [(id, time, kind, text, json.loads(fields)) for id, time, kind, text, fields in reversed(rows)]

    def add_metric(self, time: float, series: str, fields: Mapping[str, Value]) -> None:
        """Remember a point of a series, e.g. of a shard; the newest `METRICS_MAX` of all are kept.

        Raises:
            StorageError: it was not stored.
        """
        point = (float(time), series, json.dumps(fields))
        self._append("metrics", lambda id: (id, *point), limits.METRICS_MAX)

    def metrics(self, after: int = 0, at_most: int = 5000) -> list[tuple[int, float, str, dict[str, Value]]]:
        """Points of the metrics history with an id above `after`, oldest first: id, time, series, fields.

        Raises:
            StorageError: the disk refused.
        """
        rows = self._select("metrics", "WHERE id > ? ORDER BY id LIMIT ?", (after, at_most))
        return [(id, time, series, json.loads(fields)) for id, time, series, fields in rows]

    def close(self) -> None:
        """Close the connection, and keep a copy of the index."""
        with self._lock:
            if self._closed:
                return
            self._copy_rows()
            with contextlib.suppress(StorageError):
                # What has rotted unread must not take the place of the copy that makes it good.
                for table in index_file.TABLES:
                    self._select(table)
                self._copy_all()
            self._closed = True
            self._connection.close()

    # Transactions

    def _put(self, table: str, rows: list[Row], *, durable: bool = True) -> None:
        with self._lock:
            sequence = self._sequence + 1
            stored = [with_sum((*row, sequence)) for row in rows]
            self._transact(lambda c: index_file.insert(c, table, stored), durable=durable)
            self._sequence = max(sequence, self._sequence)
            for row in rows:
                name = ".".join(row[:2] if table == "contributions" else ("meta", row[0]))
                assert _COPY_NAME.fullmatch(name), name
                data = row[-1] if isinstance(row[-1], bytes) else row[-1].encode()
                self._uncopied[name] = sealed(_SEQUENCE.pack(sequence) + data)
            if durable:
                self._copy_rows()

    def _append(self, table: str, row_of: Callable[[int], Row], at_most: int) -> None:
        trim = f"DELETE FROM {table} WHERE id <= (SELECT max(id) FROM {table}) - {at_most}"  # noqa: S608
        greatest = f"SELECT coalesce(max(id), 0) FROM {table}"  # noqa: S608

        def write(connection: sqlite3.Connection) -> None:
            row = row_of(connection.execute(greatest).fetchone()[0] + 1)
            index_file.insert(connection, table, [with_sum(row)])
            if row[0] % _TRIM_EVERY == 0:
                connection.execute(trim)

        self._transact(write)

    def _select(self, table: str, clause: str = "", parameters: Row = ()) -> list[Row]:
        """Rows without their sums. Damaged ones are made good, or left out if nothing has them."""
        query = f"SELECT * FROM {table} {clause}"  # noqa: S608
        rows = self._transact(lambda c: c.execute(query, parameters).fetchall())
        if not all(index_file.is_whole(table, row) for row in rows):
            self._mend(table)
            rows = self._transact(lambda c: c.execute(query, parameters).fetchall())
        return [row[:-1] for row in rows if index_file.is_whole(table, row)]

    def _transact(self, work: Callable[[sqlite3.Connection], T], *, durable: bool = False) -> T:
        with self._lock:
            try:
                return _attempt(self._connection, work, durable)
            except sqlite3.DatabaseError as error:
                if not _means_corrupt(error):
                    raise self._refused(error) from error
                self._connection.close()
                self._begin_anew(error)
            try:
                return _attempt(self._connection, work, durable)
            except sqlite3.DatabaseError as error:
                raise self._refused(error) from error

    # Damage

    @property
    def _log(self) -> Path:
        return self._path.with_name(self._path.name + "-wal")

    def _open(
        self, salvaged: Rows | None = None, *, catch_up: bool = False
    ) -> tuple[sqlite3.Connection, int]:
        """The connection, and the greatest sequence number."""
        connection = index_file.connect(self._path)
        try:
            restored = salvaged or index_file.nothing()
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                index_file.merge(restored, index_file.salvage(self._previous))
                index_file.merge(restored, self._copies())
            _attempt(connection, lambda c: index_file.prepare(c, restored), durable=True)
            if catch_up:
                self._catch_up(connection)
            return connection, index_file.greatest_sequence(connection)
        except BaseException:
            connection.close()
            raise

    def _begin_anew(self, reason: Exception) -> None:
        salvaged = index_file.salvage(self._path)
        try:
            # The log first: it must never be taken for that of another index.
            for suffix in ("-wal", "-shm"):
                remove(self._path.with_name(self._path.name + suffix))
            sync_folder(self._path.parent)
            if self._path.exists():
                move(self._path, self._path.with_suffix(".corrupt"))
            self._connection, self._sequence = self._open(salvaged)
            counts = ", ".join(
                f"{self._connection.execute(f'SELECT count(*) FROM {table}').fetchone()[0]} {words}"  # noqa: S608
                for table, words in _WORDS.items()
            )
        except (OSError, sqlite3.DatabaseError) as error:
            raise self._refused(error) from error
        self._notices.append(
            f"the index {self._path} was corrupt ({reason}) and set aside; restored were {counts}; peers "
            "give back what is missing"
        )

    def _catch_up(self, connection: sqlite3.Connection) -> None:
        """Take from the second copies what a damaged log has swallowed."""
        newer = index_file.nothing()

        def write(connection: sqlite3.Connection) -> None:
            for table, rows in self._copies().items():
                held = index_file.whole_rows(connection, table)
                for key, row in rows.items():
                    if key not in held or row[-2] > held[key][-2]:
                        newer[table][key] = row
                index_file.insert(connection, table, newer[table].values())

        _attempt(connection, write, durable=True)
        count = sum(map(len, newer.values()))
        if count:
            self._notices.append(
                f"the log of {self._path} had lost its last entries; {count} were restored from their copies"
            )

    def _mend(self, table: str) -> None:
        """Make the damaged rows of a table anew from what else holds them."""
        restored = index_file.nothing()
        index_file.merge(restored, index_file.salvage(self._previous))
        index_file.merge(restored, self._copies())

        def write(connection: sqlite3.Connection) -> tuple[int, int]:
            stored = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608
            whole = index_file.whole_rows(connection, table)
            rows = index_file.nothing() | {table: dict(whole)}
            index_file.merge(rows, {table: restored[table]})
            connection.execute(f"DELETE FROM {table}")  # noqa: S608
            index_file.insert(connection, table, rows[table].values())
            return stored - len(whole), len(rows[table]) - len(whole)

        damaged, made_good = self._transact(write, durable=True)
        if damaged:
            self._notices.append(
                f"{damaged} {_WORDS[table]} in {self._path} were damaged; {made_good} were restored"
            )

    def _refused(self, error: OSError | sqlite3.DatabaseError) -> StorageError:
        text, cause = str(error), error
        if not isinstance(cause, OSError):
            code = errno.ENOSPC if "full" in text else errno.EIO if "I/O" in text else 0
            # SQLite calls it so, too, when there is no room for its shared memory.
            if code == errno.EIO and shutil.disk_usage(self._path.parent).free < limits.MIB:
                code = errno.ENOSPC
            cause = OSError(code, text)
        refused = storage_error(cause, f"{run_folder(self._path.parent)} was not written")
        return (
            refused if refused.fix else StorageError(refused.what, "check the disk, and who owns the folder")
        )

    # Copies

    def _copy_rows(self) -> None:
        """Write the second copies that are due; what a full disk refuses is due again the next time."""
        with contextlib.suppress(StorageError):
            for name, data in list(self._uncopied.items()):
                write_atomic(self._headers / name, data, mode=0o600, durable=False)
                del self._uncopied[name]

    def _copy_all(self) -> None:
        """Keep the whole index as it is now, if there is room."""
        temporary = self._previous.with_name(f".{self._previous.name}.tmp")
        with contextlib.suppress(OSError, sqlite3.Error):
            remove(temporary)
            self._connection.execute("VACUUM INTO ?", (str(temporary),))
            temporary.chmod(0o600)
            sync_file(temporary)
            move(temporary, self._previous)
        with contextlib.suppress(OSError):
            remove(temporary)

    def _copies(self) -> Rows:
        """The second copies that are what was written."""
        rows = index_file.nothing()
        for path in self._headers.iterdir():
            name, content = _COPY_NAME.fullmatch(path.name), None
            with contextlib.suppress(OSError):
                content = unsealed(path.read_bytes())
            if name is None or content is None or len(content) < _SEQUENCE.size:
                continue
            (sequence,) = _SEQUENCE.unpack_from(content)
            first, second = name.groups()
            data = content[_SEQUENCE.size :]
            if first == "meta":
                rows["meta"][second,] = with_sum((second, data.decode(), sequence))
            else:
                rows["contributions"][first, second] = with_sum((first, second, data, sequence))
        return rows


def _attempt(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T], durable: bool) -> T:
    connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
    connection.execute("BEGIN")
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if isinstance(error, UnicodeDecodeError):
            # Of SQLite's message, which quotes a damaged statement.
            raise sqlite3.DatabaseError("its schema is damaged") from error
        raise
    return result


def _means_corrupt(error: sqlite3.DatabaseError) -> bool:
    # SQLITE_CORRUPT and SQLITE_NOTADB are the two results that Python maps to the base class itself; error
    # codes are only on exceptions from Python 3.11. The text is that of a damaged format number.
    return type(error) is sqlite3.DatabaseError or "unsupported file format" in str(error)
