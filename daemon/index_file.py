"""The index as an SQLite file: its tables, and how a row is told from what a bad disk makes of it.

SQLite finds damage to its own structures; that a number or a text in them is another one it does not find. So
every row carries a sum over its other columns, and a row with a wrong sum counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Final

Row = tuple[Any, ...]
"""A row as it is stored: its sum comes last. What a damaged file holds may be of any type."""
Rows = dict[str, dict[Row, Row]]
"""Rows by table and key."""

#: Columns before the sum. A kept row carries a sequence number: of two with one key, the greater is newer.
KEPT: Final[Mapping[str, tuple[str, ...]]] = {
    "contributions": ("shard", "device", "encoded", "sequence"),
    "meta": ("key", "value", "sequence"),
}
HISTORY: Final[Mapping[str, tuple[str, ...]]] = {
    "events": ("id", "time", "kind", "text", "fields"),
    "metrics": ("id", "time", "series", "fields"),
}
TABLES: Final = {**KEPT, **HISTORY}
KEY_COLUMNS: Final = {"contributions": 2, "meta": 1, "events": 1, "metrics": 1}

_SCHEMA: Final = (
    "CREATE TABLE contributions (shard TEXT NOT NULL, device TEXT NOT NULL, encoded BLOB NOT NULL, "
    "sequence INTEGER NOT NULL, sum BLOB NOT NULL, PRIMARY KEY (shard, device)) WITHOUT ROWID",
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, sequence INTEGER NOT NULL, "
    "sum BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE events (id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, "
    "text TEXT NOT NULL, fields TEXT NOT NULL, sum BLOB NOT NULL)",
    "CREATE TABLE metrics (id INTEGER PRIMARY KEY, time REAL NOT NULL, series TEXT NOT NULL, "
    "fields TEXT NOT NULL, sum BLOB NOT NULL)",
)
#: SHA-256 of the statements of version 0.1.0, whose rows had neither sequence numbers nor sums.
_FIRST_SCHEMA: Final = "c0a2a32db448dce464f1bf2ca9a3202d692cd7a07a1e2cc7598748ab1dbc5641"
_SUM_BYTES: Final = 8
#: The second is about SQLite's own message, where it quotes a damaged statement.
_DAMAGE: Final = (sqlite3.Error, UnicodeDecodeError)


def with_sum(row: Row) -> Row:
    """The row as it is stored."""
    return (*row, hashlib.sha256(repr(row).encode()).digest()[:_SUM_BYTES])


def is_whole(table: str, row: Row) -> bool:
    """Whether a stored row is what was written."""
    return len(row) == len(TABLES[table]) + 1 and row == with_sum(row[:-1])


def connect(path: Path) -> sqlite3.Connection:
    """Open the file in WAL mode, and have SQLite look at its structures.

    Raises:
        sqlite3.Error: it is damaged, or the disk refused.
    """
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    # What is not UTF-8 is a damaged row, not an error: its sum is wrong.
    connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
    except UnicodeDecodeError as error:
        connection.close()
        raise sqlite3.DatabaseError("its schema is damaged") from error
    except BaseException:
        connection.close()
        raise
    return connection


def prepare(connection: sqlite3.Connection, restored: Rows) -> bool:
    """Make the tables in a file that has none, with what is restored in them; whether it had none.

    Raises:
        sqlite3.Error: it has others, or the disk refused.
    """
    found = [str(row[0]) for row in connection.execute("SELECT sql FROM sqlite_master ORDER BY rowid")]
    if found == list(_SCHEMA):
        return False
    if found:
        if hashlib.sha256("\n".join(found).encode(errors="replace")).hexdigest() != _FIRST_SCHEMA:
            raise sqlite3.DatabaseError("its tables are not those of an index")
        restored = _of_first_version(connection)
        for table in TABLES:
            connection.execute(f"DROP TABLE {table}")
    for statement in _SCHEMA:
        connection.execute(statement)
    for table, rows in restored.items():
        insert(connection, table, rows.values())
    return not found


def insert(connection: sqlite3.Connection, table: str, rows: Iterable[Row]) -> None:
    """Put stored rows into a table, in place of those with the same keys."""
    places = ", ".join("?" * (len(TABLES[table]) + 1))
    connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({places})", rows)  # noqa: S608


def greatest_sequence(connection: sqlite3.Connection) -> int:
    """The greatest sequence number of a whole row; 0 if there is none."""
    return max((row[-2] for table in KEPT for row in whole_rows(connection, table).values()), default=0)


def whole_rows(connection: sqlite3.Connection, table: str) -> dict[Row, Row]:
    """The rows of a table that are what was written, by key."""
    rows = connection.execute(f"SELECT * FROM {table}")  # noqa: S608
    return {row[: KEY_COLUMNS[table]]: row for row in rows if is_whole(table, row)}


def nothing() -> Rows:
    """No rows of any table."""
    return {table: {} for table in TABLES}


def merge(into: Rows, rows: Rows) -> None:
    """Take over the rows whose keys are new, or whose sequence numbers are greater."""
    for table, found in rows.items():
        for key, row in found.items():
            held = into[table].get(key)
            if held is None or (table in KEPT and row[-2] > held[-2]):
                into[table][key] = row


def salvage(path: Path) -> Rows:
    """What can still be read of a damaged file: whole rows, up to the damage from both sides."""
    rows = nothing()
    if not path.exists():
        return rows
    with contextlib.suppress(*_DAMAGE), contextlib.closing(sqlite3.connect(path)) as connection:
        connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")
        for table, order in product(TABLES, ("ASC", "DESC")):
            by = ", ".join(f"{column} {order}" for column in TABLES[table][: KEY_COLUMNS[table]])
            with contextlib.suppress(*_DAMAGE):
                for row in connection.execute(f"SELECT * FROM {table} ORDER BY {by}"):  # noqa: S608
                    if is_whole(table, row):
                        rows[table][row[: KEY_COLUMNS[table]]] = row
    return rows


def _of_first_version(connection: sqlite3.Connection) -> Rows:
    rows = nothing()
    for table, columns in TABLES.items():
        stored = ", ".join("0" if column == "sequence" else column for column in columns)
        found = connection.execute(f"SELECT {stored} FROM {table}").fetchall()  # noqa: S608
        rows[table] = {row[: KEY_COLUMNS[table]]: with_sum(row) for row in found}
    return rows
