"""`Store`: a person's exam progress: answers, cards, marks, and sittings as they run, kept by the rules of database.py."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_app.database import Database, Schema, StoreError, Words, execute_all
from ming_app.exam import schedule
from ming_app.exam.bank import tag_of
from ming_app.exam.grade import Grade
from ming_app.exam.question import Question, clean
from ming_app.exam.sitting import Response, Sitting

CAUSES = ("knowledge", "misread", "reasoning", "time")
MASTERED = 2  # right answers in a row that take a question out of the wrong book
MAX_NOTE = 2_000


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
    execute_all(db, statements)


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


SCHEMA = Schema(
    tables=TABLES,
    keys=KEYS,
    migrations=(m001_progress,),
    used="answers",
    what=Words("your progress", "学习进度"),
    refused=Words("Your answer could not be kept", "作答未能保存"),
)


@dataclass(frozen=True)
class Mark:
    """What a person wrote at a question."""

    flagged: bool = False
    note: str = ""
    cause: str = ""


class Store(Database):
    """Open one with a path, or ":memory:". Every method may be called from any thread."""

    def __init__(self, path: Path | str, now: Callable[[], float] = time.time):
        super().__init__(path, SCHEMA, now)

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
            db.execute(self.insert("sittings"), list(values.values()))
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
        db.execute(self.insert("answers", "OR IGNORE "), values)
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
            for (place,) in db.execute("SELECT place FROM responses WHERE sitting=?", [name]).fetchall():
                self._touch("responses", name, place)
            self._touch("sittings", name)
            db.execute("DELETE FROM responses WHERE sitting=?", [name])
            db.execute("DELETE FROM sittings WHERE id=?", [name])

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

    def export(self) -> dict[str, Any]:
        """All progress, JSON-ready; progress_file.py takes it back."""
        return {"ming_progress": len(SCHEMA.migrations), **self.dump()}
