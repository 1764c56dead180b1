"""`Store`: a person's progress in SQLite: answers, cards, marks, and sittings as they run. Nothing of it leaves the machine.

One file in the user's data folder (WAL, every action committed: a killed process loses at most the action in flight), or
in memory for a visitor of a public page, whose browser keeps the export. One writer: a lock in the process, SQLite's own
between processes. A damaged file is set aside, and the newest backup takes its place; `notice` says so.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_app.errors import MingError
from ming_app.exam import schedule
from ming_app.exam.bank import tag_of
from ming_app.exam.grade import Grade
from ming_app.exam.question import Question, clean
from ming_app.exam.sitting import Response, Sitting

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
CAUSES = ("knowledge", "misread", "reasoning", "time")
MASTERED = 2  # right answers in a row that take a question out of the wrong book
BACKUP_EVERY = 86_400.0
MAX_NOTE = 2_000


class StoreError(MingError):
    """Progress could not be kept or read."""


def m001_progress(db: sqlite3.Connection) -> None:
    """Answers, tallies, cards, marks, sittings."""
    statements = """
        CREATE TABLE answers (
            id INTEGER PRIMARY KEY, key TEXT NOT NULL, bank TEXT NOT NULL, at REAL NOT NULL, chosen TEXT NOT NULL,
            correct INTEGER NOT NULL, score REAL NOT NULL, seconds REAL NOT NULL, confidence TEXT NOT NULL,
            kind TEXT NOT NULL, sitting TEXT NOT NULL, type TEXT NOT NULL, lang TEXT NOT NULL, subject TEXT NOT NULL,
            difficulty TEXT NOT NULL, again INTEGER NOT NULL, UNIQUE (sitting, key, at));
        CREATE INDEX answers_at ON answers (at, correct, seconds, again);
        CREATE INDEX answers_groups ON answers (subject, difficulty, type, correct, seconds);
        CREATE INDEX answers_confidence ON answers (confidence, correct);
        CREATE TABLE tally (
            key TEXT PRIMARY KEY, bank TEXT NOT NULL, right INTEGER NOT NULL, wrong INTEGER NOT NULL,
            streak INTEGER NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
        CREATE TABLE cards (
            key TEXT PRIMARY KEY, bank TEXT NOT NULL, state TEXT NOT NULL, due REAL NOT NULL,
            stability REAL NOT NULL) WITHOUT ROWID;
        CREATE INDEX cards_due ON cards (due);
        CREATE TABLE marks (
            key TEXT PRIMARY KEY, bank TEXT NOT NULL, flagged INTEGER NOT NULL DEFAULT 0, note TEXT NOT NULL DEFAULT '',
            cause TEXT NOT NULL DEFAULT '') WITHOUT ROWID;
        CREATE TABLE sittings (
            id TEXT PRIMARY KEY, kind TEXT NOT NULL, mode TEXT NOT NULL, bank TEXT NOT NULL, title TEXT NOT NULL,
            keys TEXT NOT NULL, started REAL NOT NULL, seed INTEGER, partial INTEGER NOT NULL, deadline REAL,
            pausable INTEGER NOT NULL, pass_share REAL NOT NULL, paused REAL, finished REAL, ending TEXT NOT NULL,
            position INTEGER NOT NULL, shown REAL NOT NULL) WITHOUT ROWID;
        CREATE TABLE responses (
            sitting TEXT NOT NULL, place INTEGER NOT NULL, chosen TEXT NOT NULL, seconds REAL NOT NULL,
            confidence TEXT NOT NULL, flagged INTEGER NOT NULL, struck TEXT NOT NULL, final INTEGER NOT NULL,
            graded INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (sitting, place)) WITHOUT ROWID;
        """
    for statement in statements.split(";"):  # not executescript, which would end the transaction
        if statement.strip():
            db.execute(statement)


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (m001_progress,)
"""in order; a file knows how many it has seen (PRAGMA user_version)"""
TABLES: Mapping[str, tuple[str, ...]] = {
    "answers": (
        "key",
        "bank",
        "at",
        "chosen",
        "correct",
        "score",
        "seconds",
        "confidence",
        "kind",
        "sitting",
        "type",
        "lang",
        "subject",
        "difficulty",
        "again",
    ),
    "tally": ("key", "bank", "right", "wrong", "streak", "at"),
    "cards": ("key", "bank", "state", "due", "stability"),
    "marks": ("key", "bank", "flagged", "note", "cause"),
    "sittings": (
        "id",
        "kind",
        "mode",
        "bank",
        "title",
        "keys",
        "started",
        "seed",
        "partial",
        "deadline",
        "pausable",
        "pass_share",
        "paused",
        "finished",
        "ending",
        "position",
        "shown",
    ),
    "responses": ("sitting", "place", "chosen", "seconds", "confidence", "flagged", "struck", "final", "graded"),
}
"""table -> its columns, as an export holds them"""
KEYS: Mapping[str, tuple[str, ...]] = {
    "answers": ("sitting", "key", "at"),
    "tally": ("key",),
    "cards": ("key",),
    "marks": ("key",),
    "sittings": ("id",),
    "responses": ("sitting", "place"),
}
"""table -> the columns that tell its rows apart"""


@dataclass(frozen=True)
class Mark:
    """What a person wrote at a question."""

    flagged: bool = False
    note: str = ""
    cause: str = ""


class Store:
    """Open one with a path, or ":memory:". Every method may be called from any thread."""

    def __init__(self, path: Path | str, now: Callable[[], float] = time.time):
        self.path = None if str(path) == ":memory:" else Path(path)
        self.now = now
        self.notice: StoreError | None = None
        """what happened to the file when it was opened, to be told"""
        self._lock = threading.RLock()
        self.name = uuid.uuid4().hex
        """tells this opening of a store from any other"""
        self._changed: dict[str, set[tuple[Any, ...]]] = {}
        self._gone: list[str] = []
        self._db = self._open()

    # -- opening -------------------------------------------------------------------------------------------------

    @property
    def _backup_path(self) -> Path | None:
        return self.path and self.path.with_name(self.path.stem + ".backup" + self.path.suffix)

    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            return _connected(":memory:")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                db = _connected(self.path)
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode not in DAMAGED:  # busy, full, read-only: the file itself is well
                    raise
                return self._rebuild(self.path)
            self._back_up(db)
            return db
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"Progress cannot be kept in {self.path.parent}: {error}. Set MING_DATA_DIR to a folder that can be written.",
                f"无法在 {self.path.parent} 保存学习进度：{error}。请将 MING_DATA_DIR 设为可写的文件夹。",
            ) from error

    def _rebuild(self, path: Path) -> sqlite3.Connection:
        """Sets a damaged file aside and goes on from the backup, or empty."""
        aside = path.with_name(
            f"{path.stem}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(self.now()))}{path.suffix}"
        )
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.replace(str(path) + ending, str(aside) + ending)
        backup = self._backup_path
        if backup is not None and backup.is_file():
            with suppress(sqlite3.DatabaseError):
                _connected(backup).close()  # raises when it is damaged too
                path.write_bytes(backup.read_bytes())
                made = time.strftime("%Y-%m-%d %H:%M", time.localtime(backup.stat().st_mtime))
                self.notice = StoreError(
                    f"The file of your progress was damaged. It was set aside as {aside.name}, and the backup of {made} took its place.",
                    f"学习进度文件已损坏：原文件已另存为 {aside.name}，并已恢复 {made} 的备份。",
                )
                return _connected(path)
        self.notice = StoreError(
            f"The file of your progress was damaged and there is no backup. It was set aside as {aside.name}; if you have an export, import it.",
            f"学习进度文件已损坏且没有备份：原文件已另存为 {aside.name}。如有导出文件，请重新导入。",
        )
        return _connected(path)

    def _back_up(self, db: sqlite3.Connection) -> None:
        """A copy a day, written under another name and renamed; none of an empty file."""
        backup = self._backup_path
        if backup is None or not db.execute("SELECT 1 FROM answers LIMIT 1").fetchone():
            return
        with suppress(OSError):
            if self.now() - backup.stat().st_mtime < BACKUP_EVERY:
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

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction. Raises StoreError when it cannot be kept; nothing was changed then."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._roll_back()
                raise StoreError(
                    f"Your answer could not be kept ({error}). Check the free space of the disk, then answer again.",
                    f"作答未能保存（{error}）。请检查磁盘空间后重试。",
                ) from error
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):
            self._db.execute("ROLLBACK")

    def _touch(self, table: str, *key: Any) -> None:
        """A row was written; only a store in memory, which somebody else keeps, remembers that."""
        if self.path is None:
            self._changed.setdefault(table, set()).add(key)

    def take_changes(self) -> dict[str, Any]:
        """What happened to a store in memory since the last call: {"store": its name, "rows": by table, as an export has
        them, "gone": ids of sittings that were dropped, "columns", "keys"}; {"store"} alone for nothing."""
        with self._lock:
            changed, gone, self._changed, self._gone = self._changed, self._gone, {}, []
            rows = {table: [row for key in keys for row in self._row(table, key)] for table, keys in changed.items()}
        if not rows and not gone:
            return {"store": self.name}
        return {"store": self.name, "rows": rows, "gone": gone, "columns": TABLES, "keys": KEYS}

    def _row(self, table: str, key: Sequence[Any]) -> list[tuple[Any, ...]]:
        where = " AND ".join(f"{name}=?" for name in KEYS[table])
        return self.rows(f"SELECT {', '.join(TABLES[table])} FROM {table} WHERE {where}", key)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a question to the database."""
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    # -- sittings ------------------------------------------------------------------------------------------------

    def save_sitting(self, sitting: Sitting, changed: Iterable[int] = ()) -> None:
        """The sitting's state, and the responses at these places."""
        with self._write() as db:
            self._put_sitting(db, sitting, changed)

    def _put_sitting(self, db: sqlite3.Connection, sitting: Sitting, changed: Iterable[int]) -> None:
        values = {name: getattr(sitting, name, None) for name in TABLES["sittings"]}
        values["keys"] = " ".join(question.key for question in sitting.questions)
        known = db.execute(
            "UPDATE sittings SET deadline=?, paused=?, finished=?, ending=?, position=?, shown=? WHERE id=?",
            [
                sitting.deadline,
                sitting.paused,
                sitting.finished,
                sitting.ending,
                sitting.position,
                sitting.shown,
                sitting.id,
            ],
        ).rowcount
        if not known:
            db.execute(_insert("sittings"), list(values.values()))
        self._touch("sittings", sitting.id)
        for place in changed:
            self._touch("responses", sitting.id, place)
            r = sitting.response(place)
            db.execute(
                "INSERT INTO responses (sitting, place, chosen, seconds, confidence, flagged, struck, final) "
                "VALUES (?,?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET chosen=excluded.chosen, seconds=excluded.seconds, "
                "confidence=excluded.confidence, flagged=excluded.flagged, struck=excluded.struck, final=excluded.final",
                [sitting.id, place, "".join(r.chosen), r.seconds, r.confidence, r.flagged, "".join(r.struck), r.final],
            )

    def record(self, sitting: Sitting, grades: Mapping[int, Grade], count_empty: bool = False) -> None:
        """Graded answers of a sitting, by place: into the log, the tally and the cards, each once however often it is
        called. Unanswered ones are left out unless `count_empty`."""
        now = self.now()
        with self._write() as db:
            self._put_sitting(db, sitting, grades)
            done = {p for (p,) in db.execute("SELECT place FROM responses WHERE sitting=? AND graded=1", [sitting.id])}
            for place, result in grades.items():
                response = sitting.response(place)
                if place in done or not (response.chosen or count_empty):
                    continue
                db.execute("UPDATE responses SET graded=1 WHERE sitting=? AND place=?", [sitting.id, place])
                self._log(db, sitting, place, result, now)

    def _log(self, db: sqlite3.Connection, sitting: Sitting, place: int, result: Grade, now: float) -> None:
        q, response = sitting.questions[place], sitting.response(place)
        values = [q.key, sitting.bank, now, "".join(response.chosen), result.correct, result.score, response.seconds]
        seen = db.execute("SELECT 1 FROM tally WHERE key=?", [q.key]).fetchone() is not None
        values += [response.confidence, sitting.kind, sitting.id, q.type, q.lang]
        values += [tag_of(q, "subject"), tag_of(q, "difficulty"), seen]
        db.execute(_insert("answers", "OR IGNORE "), values)
        self._touch("answers", sitting.id, q.key, now)
        if place not in sitting.responses:
            return  # never looked at, the time was over: nothing to repeat
        self._touch("tally", q.key)
        self._touch("cards", q.key)
        db.execute(
            "INSERT INTO tally (key, bank, right, wrong, streak, at) VALUES (?,?,?,?,?,?) ON CONFLICT DO UPDATE SET "
            "right=right+excluded.right, wrong=wrong+excluded.wrong, at=excluded.at, "
            "streak=CASE WHEN excluded.streak THEN streak+1 ELSE 0 END",
            [q.key, sitting.bank, result.correct, not result.correct, result.correct, now],
        )
        before = db.execute("SELECT state FROM cards WHERE key=?", [q.key]).fetchone()
        given = schedule.rating(result.correct, response.seconds, response.confidence, q.type)
        card = schedule.review(before and before[0], given, now)
        db.execute(
            "INSERT INTO cards (key, bank, state, due, stability) VALUES (?,?,?,?,?) ON CONFLICT DO UPDATE SET "
            "state=excluded.state, due=excluded.due, stability=excluded.stability",
            [q.key, sitting.bank, card.state, card.due, card.stability],
        )

    def sittings(self, finished: bool | None = None) -> list[dict[str, Any]]:
        """Newest first, without their questions. `finished`: only such ones; None: all."""
        where = {None: "", True: "WHERE finished IS NOT NULL", False: "WHERE finished IS NULL"}[finished]
        names = [name for name in TABLES["sittings"] if name != "keys"]
        found = self.rows(f"SELECT {', '.join(names)} FROM sittings {where} ORDER BY started DESC LIMIT 500")
        return [dict(zip(names, row, strict=True)) for row in found]

    def load_sitting(self, name: str, find: Callable[[str, str], Question | None]) -> Sitting:
        """A sitting as it was left. `find(bank, key)` gives its questions. Raises StoreError when one is gone."""
        columns = TABLES["sittings"]
        found = self.rows(f"SELECT {', '.join(columns)} FROM sittings WHERE id=?", [name])
        if not found:
            raise StoreError("This exam is not there any more.", "该场练习已不存在。")
        values = dict(zip(columns, found[0], strict=True))
        keys = values.pop("keys").split()
        questions = [find(values["bank"], key) for key in keys]
        if any(question is None for question in questions):
            raise StoreError(
                f"Questions of this exam are not in the bank {values['bank']!r} any more. Import the bank again to go on.",
                f"题库 {values['bank']!r} 中已缺少本场的部分题目，请重新导入该题库后继续。",
            )
        sitting = Sitting(questions=tuple(q for q in questions if q is not None), **values)
        sitting.partial, sitting.pausable = bool(sitting.partial), bool(sitting.pausable)
        names = ("place", "chosen", "seconds", "confidence", "flagged", "struck", "final")
        for row in self.rows(f"SELECT {', '.join(names)} FROM responses WHERE sitting=?", [name]):
            place, chosen, seconds, confidence, flagged, struck, final = row
            sitting.responses[place] = Response(
                tuple(chosen), seconds, confidence, bool(flagged), tuple(struck), bool(final)
            )
        return sitting

    def drop_sitting(self, name: str) -> None:
        """Forgets an unfinished sitting; what was graded stays."""
        with self._write() as db:
            db.execute("DELETE FROM responses WHERE sitting=?", [name])
            db.execute("DELETE FROM sittings WHERE id=?", [name])
            if self.path is None:
                self._gone.append(name)

    # -- marks and lists -----------------------------------------------------------------------------------------

    def mark(self, key: str) -> Mark:
        found = self.rows("SELECT flagged, note, cause FROM marks WHERE key=?", [key])
        return Mark(bool(found[0][0]), found[0][1], found[0][2]) if found else Mark()

    def set_mark(self, key: str, bank: str, **values: Any) -> None:
        """`flagged`, `note` or `cause`; the others stay. Raises StoreError for a cause that is none of CAUSES."""
        if values.get("cause", "") not in ("", *CAUSES):
            raise StoreError("A cause is one of " + ", ".join(CAUSES) + ".", "错因应为：知识、审题、推理、时间。")
        if "note" in values:
            values["note"] = clean(str(values["note"])[:MAX_NOTE], "note/笔记", MAX_NOTE)
        with self._write() as db:
            self._touch("marks", key)
            db.execute("INSERT OR IGNORE INTO marks (key, bank) VALUES (?,?)", [key, bank])
            for name in ("flagged", "note", "cause"):
                if name in values:
                    db.execute(f"UPDATE marks SET {name}=? WHERE key=?", [values[name], key])

    # Progress belongs to questions, in whatever bank they are: callers look up the keys that they have.

    def flagged(self) -> set[str]:
        return {key for (key,) in self.rows("SELECT key FROM marks WHERE flagged")}

    def noted(self) -> set[str]:
        """Keys of the questions with a note."""
        return {key for (key,) in self.rows("SELECT key FROM marks WHERE note<>''")}

    def caused(self, causes: Iterable[str]) -> set[str]:
        """Keys of the questions that were wrong for one of these causes."""
        wanted = set(causes)
        found = self.rows("SELECT key, cause FROM marks WHERE cause<>''")
        return {key for key, cause in found if cause in wanted}

    def wrong(self) -> dict[str, int]:
        """The wrong book: key -> misses, of what was missed and not yet answered right MASTERED times in a row since."""
        sql = "SELECT key, wrong FROM tally WHERE wrong>0 AND streak<? ORDER BY wrong DESC, at DESC"
        return dict(self.rows(sql, [MASTERED]))

    def due(self) -> list[str]:
        """Keys of cards due now, longest overdue first."""
        return [key for (key,) in self.rows("SELECT key FROM cards WHERE due<=? ORDER BY due", [self.now()])]

    def weakness(self) -> dict[str, float]:
        """key -> share of wrong answers, smoothed towards one half where there are few; not seen is not listed."""
        found = self.rows("SELECT key, right, wrong FROM tally")
        return {key: (wrong + 1) / (right + wrong + 2) for key, right, wrong in found}

    # -- everything as one file ----------------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        """All progress, JSON-ready; `restore` takes it back."""
        with self._lock:
            tables = {
                name: [list(row) for row in self._db.execute(f"SELECT {', '.join(columns)} FROM {name}")]
                for name, columns in TABLES.items()
            }
        return {"ming_progress": len(MIGRATIONS), "columns": {n: list(c) for n, c in TABLES.items()}, **tables}

    def wipe(self) -> None:
        """Deletes everything, backup and files set aside included."""
        with self._write() as db:
            for name in TABLES:
                db.execute(f"DELETE FROM {name}")
        with self._lock, suppress(sqlite3.Error):
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if self.path is not None:
            for old in (self._backup_path, *self.path.parent.glob(f"{self.path.stem}.damaged-*")):
                if old is not None:
                    old.unlink(missing_ok=True)

    def put_tables(self, tables: Mapping[str, Sequence[Sequence[Any]]]) -> int:
        """Adds checked rows of an export (see progress_file.py); rows that are there already stay. How many are new."""
        added = 0
        for name, rows in tables.items():
            at = [TABLES[name].index(column) for column in KEYS[name]]
            for row in rows:
                self._touch(name, *(row[i] for i in at))
        with self._write() as db:
            for name, rows in tables.items():
                before = db.total_changes
                db.executemany(_insert(name, "OR IGNORE "), rows)
                added += db.total_changes - before
        return added


def _insert(table: str, how: str = "") -> str:
    columns = TABLES[table]
    return f"INSERT {how}INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def _connected(path: Path | str) -> sqlite3.Connection:
    """Opened, checked and brought up to date. Raises sqlite3.DatabaseError for a damaged file, or one of the future."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            damaged = sqlite3.DatabaseError("the file is damaged")
            damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damaged
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreError(
                "The file of your progress was written by a newer version of this app. Update the app, or set MING_DATA_DIR to another folder.",
                "学习进度文件由更新版本的程序写入。请更新本程序，或将 MING_DATA_DIR 指向其他文件夹。",
            )
        if version < len(MIGRATIONS):
            db.execute("BEGIN IMMEDIATE")  # another process may be about to do the same
            version = db.execute("PRAGMA user_version").fetchone()[0]
            for migrate in MIGRATIONS[version:]:
                migrate(db)
            db.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
            db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db


def dumps(progress: Mapping[str, Any]) -> str:
    """An export as text, as small as JSON gets."""
    return json.dumps(progress, ensure_ascii=False, separators=(",", ":"))
