"""`Database`: rows that belong to a person, in one SQLite file of theirs or in memory. Exam progress and conversations are
kept in it by the same rules.

A file (WAL, every action committed: a killed process loses at most the action in flight), or memory for a visitor of a
public page, whose browser keeps the rows: `take_changes` hands them out. One writer: a lock in the process, SQLite's own
between processes. A damaged file is set aside, and the newest backup takes its place; `notice` says so.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_app.errors import MingError
from ming_app.reading import bounded_json

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
MAX_LISTS = 1_500_000  # in an export; a row is one
BACKUP_EVERY = 86_400.0  # seconds


class StoreError(MingError):
    """Something could not be kept or read."""


@dataclass(frozen=True)
class Words:
    """A text in both languages, within the messages of a database."""

    en: str
    zh: str


@dataclass(frozen=True)
class Schema:
    """`tables`: table -> columns, as an export holds them. `keys`: table -> the columns that tell its rows apart.
    `migrations`, in order; a file knows how many it has seen (PRAGMA user_version). `used`: the table that is not empty
    once there is something to back up. `what`: what is kept. `refused`: how a message begins when it could not be."""

    tables: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, tuple[str, ...]]
    migrations: tuple[Callable[[sqlite3.Connection], None], ...]
    used: str
    what: Words
    refused: Words


class Database:
    """Open one with a path, or ":memory:". Every method may be called from any thread."""

    def __init__(self, path: Path | str, schema: Schema, now: Callable[[], float] = time.time):
        self.path = None if str(path) == ":memory:" else Path(path)
        self.now = now
        self.notice: StoreError | None = None
        """what happened to the file when it was opened, to be told"""
        self.name = uuid.uuid4().hex
        """tells this opening of a database from any other"""
        self._schema = schema
        self._lock = threading.RLock()
        self._changed: dict[str, set[tuple[Any, ...]]] = {}
        self._db = self._open()

    # -- opening -------------------------------------------------------------------------------------------------

    @property
    def _backup_path(self) -> Path | None:
        return self.path and self.path.with_name(self.path.stem + ".backup" + self.path.suffix)

    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            return _connected(":memory:", self._schema)
        what = self._schema.what
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                db = _connected(self.path, self._schema)
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode not in DAMAGED:  # busy, full, read-only: the file itself is well
                    raise
                return self._rebuild(self.path)
            self._back_up(db)
            return db
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"{what.en[0].upper()}{what.en[1:]} cannot be kept in {self.path.parent}: {error}. Set MING_DATA_DIR to a folder that can be written.",
                f"无法在 {self.path.parent} 保存{what.zh}：{error}。请将 MING_DATA_DIR 设为可写的文件夹。",
            ) from error

    def _rebuild(self, path: Path) -> sqlite3.Connection:
        """Sets a damaged file aside and goes on from the backup, or empty."""
        what = self._schema.what
        aside = path.with_name(
            f"{path.stem}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(self.now()))}{path.suffix}"
        )
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.replace(str(path) + ending, str(aside) + ending)
        backup = self._backup_path
        if backup is not None and backup.is_file():
            with suppress(sqlite3.DatabaseError):
                _connected(backup, self._schema).close()  # raises when it is damaged too
                path.write_bytes(backup.read_bytes())
                made = time.strftime("%Y-%m-%d %H:%M", time.localtime(backup.stat().st_mtime))
                self.notice = StoreError(
                    f"The file of {what.en} was damaged. It was set aside as {aside.name}, and the backup of {made} took its place.",
                    f"{what.zh}文件已损坏：原文件已另存为 {aside.name}，并已恢复 {made} 的备份。",
                )
                return _connected(path, self._schema)
        self.notice = StoreError(
            f"The file of {what.en} was damaged and there is no backup. It was set aside as {aside.name}; if you have an export, import it.",
            f"{what.zh}文件已损坏且没有备份：原文件已另存为 {aside.name}。如有导出文件，请重新导入。",
        )
        return _connected(path, self._schema)

    def back_up_now(self) -> None:
        """Makes the backup anew where there is one, so that it holds nothing that was deleted."""
        backup = self._backup_path
        if backup is not None and backup.is_file():
            with self._lock:
                self._back_up(self._db, 0.0)

    def _back_up(self, db: sqlite3.Connection, every: float = BACKUP_EVERY) -> None:
        """A copy a day, written under another name and renamed; of an empty file none."""
        backup = self._backup_path
        if backup is None:
            return
        if not db.execute(f"SELECT 1 FROM {self._schema.used} LIMIT 1").fetchone():
            if not every:
                backup.unlink(missing_ok=True)
            return
        with suppress(OSError):
            if self.now() - backup.stat().st_mtime < every:
                return
        part = backup.with_suffix(".part")
        with suppress(OSError, sqlite3.Error):
            part.unlink(missing_ok=True)
            copy = sqlite3.connect(part)
            try:
                db.backup(copy)
            finally:
                copy.close()
            os.replace(part, backup)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # -- writing -------------------------------------------------------------------------------------------------

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction. Raises StoreError when it cannot be kept; nothing was changed then."""
        refused = self._schema.refused
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._roll_back()
                raise StoreError(
                    f"{refused.en} ({error}). Check the free space of the disk, then try again.",
                    f"{refused.zh}（{error}）。请检查磁盘空间后重试。",
                ) from error
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):
            self._db.execute("ROLLBACK")

    def insert(self, table: str, how: str = "") -> str:
        """The statement that adds a row of `table`; `how` such as "OR IGNORE "."""
        columns = self._schema.tables[table]
        return f"INSERT {how}INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"

    def _touch(self, table: str, *key: Any) -> None:
        """A row was written or deleted; only a database in memory, which somebody else keeps, remembers that."""
        if self.path is None:
            self._changed.setdefault(table, set()).add(key)

    def take_changes(self) -> dict[str, Any]:
        """What was written to a database in memory since the last call: {"store": its name, "rows": by table, as an export
        has them, "gone": by table the keys of rows that are not there any more, "columns", "keys"}; {"store"} alone for
        nothing."""
        rows: dict[str, list[tuple[Any, ...]]] = {}
        gone: dict[str, list[tuple[Any, ...]]] = {}
        with self._lock:
            changed, self._changed = self._changed, {}
            for table, keys in changed.items():
                for key in keys:
                    found = self._row(table, key)
                    (rows if found else gone).setdefault(table, []).extend(found or [key])
        if not rows and not gone:
            return {"store": self.name}
        return {
            "store": self.name,
            "rows": rows,
            "gone": gone,
            "columns": self._schema.tables,
            "keys": self._schema.keys,
        }

    def _row(self, table: str, key: Sequence[Any]) -> list[tuple[Any, ...]]:
        where = " AND ".join(f"{name}=?" for name in self._schema.keys[table])
        return self.rows(f"SELECT {', '.join(self._schema.tables[table])} FROM {table} WHERE {where}", key)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a question to the database."""
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    # -- everything at once --------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """All rows by table, and "columns", JSON-ready; `put_tables` takes them back."""
        with self._lock:
            tables = {
                name: [list(row) for row in self._db.execute(f"SELECT {', '.join(columns)} FROM {name}")]
                for name, columns in self._schema.tables.items()
            }
        return {"columns": {name: list(columns) for name, columns in self._schema.tables.items()}, **tables}

    def put_tables(self, tables: Mapping[str, Sequence[Sequence[Any]]]) -> int:
        """Adds checked rows of an export; rows that are there already stay. How many are new."""
        added = 0
        for name, rows in tables.items():
            at = [self._schema.tables[name].index(column) for column in self._schema.keys[name]]
            for row in rows:
                self._touch(name, *(row[i] for i in at))
        with self._write() as db:
            for name, rows in tables.items():
                before = db.total_changes
                db.executemany(self.insert(name, "OR IGNORE "), rows)
                added += db.total_changes - before
        return added

    def wipe(self) -> None:
        """Deletes everything, backup and files set aside included."""
        with self._write() as db:
            for name in self._schema.tables:
                db.execute(f"DELETE FROM {name}")
        with self._lock, suppress(sqlite3.Error):
            self._changed = {}
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if self.path is not None:
            for pattern in (f"{self.path.stem}.damaged-*", f"{self.path.stem}.backup*"):
                for old in self.path.parent.glob(pattern):
                    old.unlink(missing_ok=True)


def _connected(path: Path | str, schema: Schema) -> sqlite3.Connection:
    """Opened, checked and brought up to date. Raises sqlite3.DatabaseError for a damaged file, StoreError for one of the
    future."""
    what = schema.what
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten
        if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            damaged = sqlite3.DatabaseError("the file is damaged")
            damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damaged
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(schema.migrations):
            raise StoreError(
                f"The file of {what.en} was written by a newer version of this app. Update the app, or set MING_DATA_DIR to another folder.",
                f"{what.zh}文件由更新版本的程序写入。请更新本程序，或将 MING_DATA_DIR 指向其他文件夹。",
            )
        if version < len(schema.migrations):
            db.execute("BEGIN IMMEDIATE")  # another process may be about to do the same
            version = db.execute("PRAGMA user_version").fetchone()[0]
            for migrate in schema.migrations[version:]:
                migrate(db)
            db.execute(f"PRAGMA user_version={len(schema.migrations)}")
            db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db


def execute_all(db: sqlite3.Connection, statements: str) -> None:
    """Several statements within the transaction that is open (executescript would end it)."""
    for statement in statements.split(";"):
        if statement.strip():
            db.execute(statement)


def read_export(
    data: bytes, mark: str, newest: int, most: int, foreign: Callable[[str, str], StoreError]
) -> dict[str, Any]:
    """The JSON object of an export that says its version under `mark`. Raises what `foreign` makes of the reason (English,
    Chinese) for a file of more than `most` bytes or of another kind, StoreError for a version after `newest`."""
    if len(data) > most:
        raise foreign(f"more than {most >> 20} MiB", f"超过 {most >> 20} MiB")
    try:
        values = bounded_json(data, MAX_LISTS)
    except (ValueError, RecursionError):
        raise foreign("not JSON", "不是 JSON") from None
    if not isinstance(values, dict) or not isinstance(values.get(mark), int):
        raise foreign("not an export of this app", "不是本程序的导出文件")
    if values[mark] > newest:
        raise StoreError(
            "The file was written by a newer version of this app. Update the app first.",
            "该文件由更新版本的程序导出，请先更新本程序。",
        )
    return values


def dumps(rows: Mapping[str, Any]) -> str:
    """An export as text, as small as JSON gets."""
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
