"""`Sitting`: one run of practice, or one mock exam, as a state that only its own rules change. Pure: every method takes the
time (`now`, seconds since the epoch, the server's), nothing is read from a clock or written to a disk here.

Tutor mode reveals key and explanation as soon as a question is submitted; exam mode at the end. Answers of an unfolding
case (A4) lock before its next part shows. A deadline is the server's: an answer that comes after it is refused, and the
sitting ends at the deadline, whenever somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ming_app.errors import MingError
from ming_app.exam.bank import option_order
from ming_app.exam.grade import Grade, grade
from ming_app.exam.question import Question

MODES = ("tutor", "exam")
CONFIDENCE = ("sure", "unsure", "guess")
IDLE = 600.0  # seconds at a question that count at most: somebody went away


class SittingError(MingError):
    """An action that the rules of the sitting do not allow; nothing was changed."""


@dataclass(frozen=True)
class Response:
    """What was done with one question. Letters are those of the bank, whatever order they are shown in."""

    chosen: tuple[str, ...] = ()
    seconds: float = 0.0
    confidence: str = ""
    """one of CONFIDENCE, or nothing"""
    flagged: bool = False
    struck: tuple[str, ...] = ()
    final: bool = False
    """submitted, or locked: it cannot change any more"""


@dataclass
class Sitting:
    """A run of questions. `questions` are those of the bank, in the order of this run."""

    id: str
    kind: str
    """practice or mock"""
    mode: str
    bank: str
    title: str
    """name of the mock exam's blueprint"""
    questions: Sequence[Question]
    started: float
    seed: int | None = None
    """of the order of options; None shows them as printed"""
    partial: bool = False
    deadline: float | None = None
    pausable: bool = False
    pass_share: float = 0.6
    paused: float | None = None
    finished: float | None = None
    ending: str = ""
    """submitted or time"""
    position: int = 0
    shown: float = 0.0
    """since when the question at `position` is in view"""
    responses: dict[int, Response] = field(default_factory=dict)

    # -- looking -------------------------------------------------------------------------------------------------

    def response(self, index: int) -> Response:
        return self.responses.get(index, Response())

    def order(self, index: int) -> tuple[str, ...]:
        """The letters of a question's options in the order to show them."""
        return option_order(self.questions[index], self.seed)

    def remaining(self, now: float) -> float | None:
        """Seconds left, None without a deadline. It stands still while paused."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - (self.paused if self.paused is not None else now))

    def revealed(self, index: int) -> bool:
        """Whether key and explanation may be shown."""
        return self.finished is not None or (self.mode == "tutor" and self.response(index).final)

    def hidden(self, index: int) -> bool:
        """A later part of an unfolding case, while an earlier answer can still change."""
        question = self.questions[index]
        if self.finished is not None or not question.kind.locks:
            return False
        return any(not self.response(at).final for at in self.group(index) if at < index)

    def answered(self) -> int:
        return sum(1 for response in self.responses.values() if response.chosen)

    def grades(self) -> list[Grade]:
        """Of every question; unanswered ones are wrong."""
        return [grade(q, self.response(at).chosen, self.partial) for at, q in enumerate(self.questions)]

    def group(self, index: int) -> range:
        """The places of the questions that share this one's group."""
        group = self.questions[index].group_id
        first = last = index
        while group and first and self.questions[first - 1].group_id == group:
            first -= 1
        while group and last + 1 < len(self.questions) and self.questions[last + 1].group_id == group:
            last += 1
        return range(first, last + 1)

    # -- acting --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> bool:
        """Ends the sitting when its time is over; whether it ended now."""
        if self.finished is None and self.paused is None and self.deadline is not None and now >= self.deadline:
            self._spend(self.deadline)
            self._close(self.deadline, "time")
            return True
        return False

    def go(self, index: int, now: float) -> None:
        """Shows another question. Going on to the next part of an unfolding case locks the answer before it."""
        if not 0 <= index < len(self.questions):
            raise SittingError(
                f"There are questions 1 to {len(self.questions)}.", f"题号范围为 1 至 {len(self.questions)}。"
            )
        if self.finished is None:
            self._open(now)
            if self.hidden(index):
                earlier = [at for at in self.group(index) if at < index and not self.response(at).final]
                if earlier != [index - 1] or not self.response(index - 1).chosen or self.mode == "tutor":
                    raise SittingError(
                        "This case unfolds: answer its earlier questions first. Their answers are locked then.",
                        "本题为病例串型题：请先作答前面的小题，进入下一小题后答案将锁定。",
                    )
            self._spend(now)
            if self.hidden(index):
                self.responses[index - 1] = replace(self.response(index - 1), final=True)
        self.position, self.shown = index, now

    def choose(self, index: int, letters: Collection[str], now: float) -> None:
        """Sets what is chosen; nothing chosen takes the answer back."""
        question, response = self._changeable(index, now)
        picked = tuple(sorted(set(letters)))
        if not set(picked) <= set(question.options) or (len(picked) > 1 and not question.kind.multiple):
            raise SittingError("That is not an answer to this question.", "该作答不适用于本题。")
        self.responses[index] = replace(response, chosen=picked)

    def strike(self, index: int, letters: Collection[str], now: float) -> None:
        """Sets which options are struck out."""
        question, response = self._changeable(index, now)
        self.responses[index] = replace(response, struck=tuple(sorted(set(letters) & set(question.options))))

    def rate(self, index: int, confidence: str, now: float) -> None:
        """Sets how sure the answer is."""
        _, response = self._changeable(index, now)
        if confidence not in (*CONFIDENCE, ""):
            raise SittingError("Confidence is sure, unsure or guess.", "把握程度应为：有把握、不确定、猜测。")
        self.responses[index] = replace(response, confidence=confidence)

    def flag(self, index: int, on: bool, now: float) -> None:
        """A flag can be set on a final answer too: it is for coming back."""
        self._open(now)
        self.responses[index] = replace(self.response(index), flagged=on)

    def submit(self, index: int, now: float) -> Grade:
        """Makes the answer final and grades it (in tutor mode it is shown then)."""
        question, response = self._changeable(index, now)
        if not response.chosen:
            raise SittingError("Choose an option first.", "请先选择一个选项。")
        self._spend(now)
        self.responses[index] = replace(self.response(index), final=True)
        return grade(question, response.chosen, self.partial)

    def pause(self, now: float) -> None:
        self._open(now)
        if not self.pausable:
            raise SittingError("This exam cannot be paused.", "本场考试不允许暂停。")
        self._spend(now)
        self.paused = now

    def resume(self, now: float) -> None:
        """The deadline moves by as long as the pause was."""
        if self.paused is None or self.finished is not None:
            return
        if self.deadline is not None:
            self.deadline += max(0.0, now - self.paused)
        self.paused, self.shown = None, now

    def leave(self, now: float) -> None:
        """Nobody looks at the question in view any more."""
        if self.finished is None and self.paused is None:
            self._spend(now)
            self.shown = 0.0

    def come_back(self, now: float) -> None:
        """Somebody looks at it again."""
        if self.finished is None and self.paused is None:
            self.shown = now

    def finish(self, now: float) -> None:
        """Ends the sitting; unanswered questions stay so."""
        self.tick(now)
        if self.finished is None:
            if self.paused is None:
                self._spend(now)
            self._close(now, "submitted")

    def _close(self, at: float, ending: str) -> None:
        self.finished, self.ending, self.paused = at, ending, None

    def _open(self, now: float) -> None:
        """Raises SittingError when nothing can be done any more, or not now."""
        self.tick(now)
        if self.finished is not None:
            time_up = self.ending == "time"
            raise SittingError(
                "The time is over: the exam was handed in with the answers given until then."
                if time_up
                else "This exam was handed in; its answers cannot change.",
                "考试时间已到，已按截止时的答案自动交卷。" if time_up else "本场已交卷，答案不可更改。",
            )
        if self.paused is not None:
            raise SittingError("The exam is paused. Go on first.", "考试已暂停，请先继续。")

    def _changeable(self, index: int, now: float) -> tuple[Question, Response]:
        self._open(now)
        if not 0 <= index < len(self.questions) or self.hidden(index):
            raise SittingError("That question is not open.", "该题尚未开放。")
        response = self.response(index)
        if response.final:
            raise SittingError("This answer is final.", "该题答案已锁定。")
        return self.questions[index], response

    def _spend(self, now: float) -> None:
        """Adds the time since the current question came into view to it."""
        spent = min(max(0.0, now - self.shown), IDLE) if self.shown else 0.0
        response = self.response(self.position)
        if not response.final:
            self.responses[self.position] = replace(response, seconds=response.seconds + spent)
        self.shown = now


# -- mock exams -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """So many questions of one type ("" any) and subject ("" any)."""

    count: int
    type: str = ""
    subject: str = ""

    def fits(self, question: Question) -> bool:
        return self.type in ("", question.type) and self.subject in ("", question.tags.get("subject", ""))


@dataclass(frozen=True)
class Blueprint:
    """What a mock exam is made of. `minutes` for all of its questions; fewer questions get less time in proportion."""

    name: str
    titles: Mapping[str, str]
    minutes: float
    parts: tuple[Part, ...]
    pass_share: float = 0.6
    """share of the points that passes; 0: there is no pass line"""
    pausable: bool = False

    @property
    def size(self) -> int:
        return sum(part.count for part in self.parts)


PRESETS: tuple[Blueprint, ...] = (
    Blueprint("short", {"zh": "短测验", "en": "Short test"}, 20, (Part(20),), pausable=True),
    # Four units of 150 questions; 360 of 600 points pass.
    Blueprint(
        "physician",
        {"zh": "执业医师 · 一个单元", "en": "Chinese physician, one unit"},
        150,
        (Part(45, "A1"), Part(60, "A2"), Part(15, "A3"), Part(10, "A4"), Part(20, "B1")),
    ),
    Blueprint(
        "physician-full",
        {"zh": "执业医师 · 四个单元连考", "en": "Chinese physician, all four units in a row"},
        600,
        (Part(180, "A1"), Part(240, "A2"), Part(60, "A3"), Part(40, "A4"), Part(80, "B1")),
        pausable=True,
    ),
    Blueprint(
        "assistant",
        {"zh": "执业助理医师 · 一个单元", "en": "Chinese assistant physician, one unit"},
        150,
        (Part(60, "A1"), Part(60, "A2"), Part(10, "A3"), Part(20, "B1")),
    ),
    # Best choice 40, matching 50, case analysis 20, several answers 10; 72 of 120 points pass.
    Blueprint(
        "pharmacist",
        {"zh": "执业药师 · 一个科目", "en": "Chinese pharmacist, one subject"},
        150,
        (Part(40, "A1"), Part(50, "B1"), Part(20, "A3"), Part(10, "X")),
    ),
    # Blocks of half an hour since May 2026, of an hour before; no share of right answers is published as a pass line.
    Blueprint(
        "usmle",
        {"zh": "USMLE 单个 block", "en": "USMLE-style block"},
        30,
        (Part(16, "A2"), Part(4, "A1")),
        pass_share=0,
    ),
    Blueprint(
        "usmle-former",
        {"zh": "旧版 USMLE block", "en": "Former USMLE block"},
        60,
        (Part(32, "A2"), Part(8, "A1")),
        pass_share=0,
    ),
)
"""Shaped like the exams they name; how many of a type come in a real one changes from year to year."""


@dataclass(frozen=True)
class Drawn:
    """The questions of one mock exam; `short` lists the parts for which the bank has too few: (part, how many it has)."""

    questions: tuple[Question, ...]
    minutes: float
    short: tuple[tuple[Part, int], ...]


def draw(questions: Sequence[Question], blueprint: Blueprint, seed: int) -> Drawn:
    """Draws by the blueprint, groups whole, in the order of its parts. What a part lacks is filled with other questions of
    the bank (such as have several answers, or are true or false, only where the blueprint has them too), so that the exam
    has its length wherever the bank has the questions."""
    from ming_app.exam.bank import shuffled, units

    left = units(shuffled(questions, seed))
    taken: list[list[Question]] = []
    short: list[tuple[Part, int]] = []
    for part in blueprint.parts:
        there = sum(part.fits(question) for question in questions)
        if there < part.count:
            short.append((part, there))
        got, left = _take(left, part.count, part.fits)
        taken += got
    asked = {part.type for part in blueprint.parts}
    rare = {"X", "TF"} - asked if "" not in asked else set()
    missing = blueprint.size - sum(map(len, taken))
    more, _ = _take(left, missing, lambda question: question.type not in rare)
    drawn = [question for unit in [*taken, *more] for question in unit]
    share = min(1.0, len(drawn) / blueprint.size)
    return Drawn(tuple(drawn), max(1.0, blueprint.minutes * share), tuple(short))


def _take(
    left: list[list[Question]], count: int, fits: Callable[[Question], bool]
) -> tuple[list[list[Question]], list[list[Question]]]:
    """Units that fit, up to `count` questions; a group that would go beyond is passed over."""
    taken: list[list[Question]] = []
    rest: list[list[Question]] = []
    for unit in left:
        if fits(unit[0]) and len(unit) <= count:
            taken.append(unit)
            count -= len(unit)
        else:
            rest.append(unit)
    return taken, rest
