"""The SQLite index of one run: contributions, events, metrics history, counters.

The index can be lost (a disk that returns other bytes than were written); what it is the only keeper of is
therefore little. Each contribution's signed bytes also lie in a file of their own under `headers/`, written
without fsync: an index that is found corrupt is set aside and begun anew from them. A header file that is
itself torn fails the signature check of whoever decodes it, like any other bytes from outside.
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from .. import limits
from ..errors import StorageError

T = TypeVar("T")
Value = str | int | float | bool | None | list["Value"] | dict[str, "Value"]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS contributions (
    shard TEXT NOT NULL, device TEXT NOT NULL, encoded BLOB NOT NULL, PRIMARY KEY (shard, device)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL, fields TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS metrics (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, series TEXT NOT NULL, fields TEXT NOT NULL
);
"""
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9]{1,64}")
#: Rows beyond a table's bound are removed once in so many ids.
_TRIM_EVERY: Final = 64


class Index:
    """One SQLite connection in WAL mode. Safe to use from several threads; every call is short.

    `durable` writes are synchronised to the disk before the call returns (`synchronous=FULL`). The others
    survive a killed process, because WAL leaves them in the operating system's cache, but the last of them
    may be missing after a power cut (`NORMAL`): an fsync per event would wear out an SD card.
    """

    def __init__(self, folder: Path) -> None:
        """Open the index in a run's folder, or begin it anew if it is corrupt.

        Raises:
            StorageError: the disk refused.
        """
        self._path = folder / "ledger.sqlite"
        self._headers = folder / "headers"
        self._lock = threading.RLock()
        self._notices: list[str] = []
        try:
            self._headers.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise _refused(error) from error
        try:
            self._connection = self._connect()
        except sqlite3.DatabaseError as error:
            if not _means_corrupt(error):
                raise _refused(error) from error
            self._begin_anew(error)

    def put_contributions(self, entries: Iterable[tuple[str, str, bytes]]) -> None:
        """Store (shard, device, signed bytes), each in place of the one before it; all or none, durably.

        Raises:
            StorageError: none was stored.
        """
        rows = list(entries)

        def write(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT OR REPLACE INTO contributions VALUES (?, ?, ?)", rows)

        self._transact(write, durable=True)
        for shard, device, encoded in rows:
            self._back_up(shard, device, encoded)

    def load_contributions(self) -> tuple[bytes, ...]:
        """The signed bytes of all contributions, by shard and device. They are to be verified like a peer's.

        Raises:
            StorageError: the disk refused.
        """
        query = "SELECT encoded FROM contributions ORDER BY shard, device"
        return tuple(bytes(row[0]) for row in self._transact(lambda c: c.execute(query).fetchall()))

    def set_meta(self, values: Mapping[str, Value], *, durable: bool = True) -> None:
        """Store key/value pairs, all or none. Values are whatever JSON can hold.

        Raises:
            StorageError: none was stored.
        """
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        self._transact(
            lambda c: c.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows), durable=durable
        )

    def meta(self) -> dict[str, Value]:
        """All key/value pairs.

        Raises:
            StorageError: the disk refused.
        """
        rows = self._transact(lambda c: c.execute("SELECT key, value FROM meta").fetchall())
        return {key: json.loads(value) for key, value in rows}

    def add_event(self, id: int, time: float, kind: str, text: str, fields: Mapping[str, Value]) -> None:
        """Remember an event; the newest `EVENTS_MAX` are kept.

        Raises:
            StorageError: it was not stored.
        """
        row = (id, time, kind, text, json.dumps(fields))
        self._insert("events", "INSERT OR REPLACE INTO events VALUES (?, ?, ?, ?, ?)", row, limits.EVENTS_MAX)

    def events(self, newest: int) -> list[tuple[int, float, str, str, dict[str, Value]]]:
        """The newest events, oldest first: id, time, kind, text, fields.

        Raises:
            StorageError: the disk refused.
        """
        query = "SELECT id, time, kind, text, fields FROM events ORDER BY id DESC LIMIT ?"
        rows = self._transact(lambda c: c.execute(query, (newest,)).fetchall())
        return [(id, time, kind, text, json.loads(fields)) for id, time, kind, text, fields in reversed(rows)]

    def add_metric(self, time: float, series: str, fields: Mapping[str, Value]) -> None:
        """Remember a point of a series, e.g. of a shard; the newest `METRICS_MAX` of all are kept.

        Raises:
            StorageError: it was not stored.
        """
        row = (time, series, json.dumps(fields))
        query = "INSERT INTO metrics (time, series, fields) VALUES (?, ?, ?)"
        self._insert("metrics", query, row, limits.METRICS_MAX)

    def metrics(self, after: int = 0, at_most: int = 5000) -> list[tuple[int, float, str, dict[str, Value]]]:
        """Points of the metrics history with an id above `after`, oldest first: id, time, series, fields.

        Raises:
            StorageError: the disk refused.
        """
        query = "SELECT id, time, series, fields FROM metrics WHERE id > ? ORDER BY id LIMIT ?"
        rows = self._transact(lambda c: c.execute(query, (after, at_most)).fetchall())
        return [(id, time, series, json.loads(fields)) for id, time, series, fields in rows]

    def notices(self) -> tuple[str, ...]:
        """What a person should hear about the index since the last call."""
        with self._lock:
            notices, self._notices = tuple(self._notices), []
            return notices

    def close(self) -> None:
        """Close the connection; the index stays as it is."""
        with self._lock:
            self._connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        return connection

    def _transact(self, work: Callable[[sqlite3.Connection], T], *, durable: bool = False) -> T:
        with self._lock:
            try:
                return self._attempt(work, durable)
            except sqlite3.DatabaseError as error:
                if not _means_corrupt(error):
                    raise _refused(error) from error
                self._connection.close()
                self._begin_anew(error)
            try:
                return self._attempt(work, durable)
            except sqlite3.DatabaseError as error:
                raise _refused(error) from error

    def _attempt(self, work: Callable[[sqlite3.Connection], T], durable: bool) -> T:
        connection = self._connection
        connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        connection.execute("BEGIN")
        try:
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return result

    def _insert(self, table: str, query: str, row: tuple[object, ...], at_most: int) -> None:
        trim = f"DELETE FROM {table} WHERE id <= (SELECT max(id) FROM {table}) - {at_most}"  # noqa: S608

        def write(connection: sqlite3.Connection) -> None:
            if (connection.execute(query, row).lastrowid or 0) % _TRIM_EVERY == 0:
                connection.execute(trim)

        self._transact(write)

    def _begin_anew(self, reason: Exception) -> None:
        try:
            self._path.replace(self._path.with_suffix(".corrupt"))
            for suffix in ("-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            rows = [
                (*path.name.split("."), path.read_bytes())
                for path in sorted(self._headers.iterdir())
                if path.name.count(".") == 1
            ]
            self._connection = self._connect()
            self._attempt(
                lambda c: c.executemany("INSERT OR REPLACE INTO contributions VALUES (?, ?, ?)", rows), True
            )
        except (OSError, sqlite3.DatabaseError) as error:
            raise _refused(error) from error
        self._notices.append(
            f"the index {self._path} was corrupt ({reason}) and set aside; {len(rows)} contributions were "
            "restored from their files, peers give back the rest; counters and history start anew"
        )

    def _back_up(self, shard: str, device: str, encoded: bytes) -> None:
        assert _SAFE_NAME.fullmatch(shard) and _SAFE_NAME.fullmatch(device), (shard, device)
        path = self._headers / f"{shard}.{device}"
        temporary = self._headers / f"{shard}.{device}.tmp"
        try:
            temporary.write_bytes(encoded)
            temporary.replace(path)
        except OSError as error:
            raise _refused(error) from error


def _means_corrupt(error: sqlite3.DatabaseError) -> bool:
    # SQLITE_CORRUPT and SQLITE_NOTADB are the two results that Python maps to the base class itself; error
    # codes are only on exceptions from Python 3.11.
    return type(error) is sqlite3.DatabaseError


def _refused(error: OSError | sqlite3.DatabaseError) -> StorageError:
    text = str(error)
    if isinstance(error, OSError):
        text = error.strerror or text
    if "full" in text or "No space" in text:
        return StorageError(
            "the run's index was not written: the disk is full", "free some space; nothing was lost"
        )
    return StorageError(
        f"the run's index was not read or written: {text}",
        "check the disk (`dmesg`) and who owns the state folder",
    )
