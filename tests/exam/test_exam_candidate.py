"""The model as candidate: scoring on a real tiny model, reports, resuming; and the command line around it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ming_app.cli import main
from ming_app.engine.engine import Engine
from ming_app.engine.types import Intervention, Message
from ming_app.errors import StoppedError
from ming_app.exam.candidate import (
    BASE,
    Attempt,
    attempt,
    probabilities,
    read_attempts,
    report,
    sit_exam,
    spread,
    with_earlier,
    write_attempt,
)
from ming_app.exam.formats import read_bank, write_bank
from ming_app.exam.measures import wilson
from ming_app.exam.wording import ask_for_letter, whole_stem
from ming_app.molora.trace import RouterTrace
from ming_app.router.groups import groupings
from tests.exam.conftest import group, mixed, question
from tests.fakes import FakeEngine
from tests.tiny import make_engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(tmp_path_factory.mktemp("exam"), context=2048, max_position_embeddings=2048)


def test_probabilities_are_those_of_the_letters_after_the_prefix(engine: Engine) -> None:
    one = question(1)
    found = probabilities(engine, one, list("ABCDE"))
    assert list(found) == list("ABCDE") and sum(found.values()) == pytest.approx(1)
    prefix = [*ask_for_letter(one), Message("assistant", "Answer:")]
    logs = np.array(engine.score(prefix, [f" {letter}" for letter in "ABCDE"]))
    assert list(found.values()) == pytest.approx((np.exp(logs) / np.exp(logs).sum()).tolist())
    moved = probabilities(engine, one, list("EDCBA"))
    logs = np.array(engine.score([*ask_for_letter(one, "EDCBA"), Message("assistant", "Answer:")], [" A", " E"]))
    assert moved["E"] / moved["A"] == pytest.approx(float(np.exp(logs[0] - logs[1])))
    assert probabilities(engine, one, list("ABCDE"), changes=BASE) != found


def test_an_attempt(engine: Engine) -> None:
    one = question(1, tags={"subject": "Renal"})
    made = attempt(engine, one, shuffles=2)
    assert made.choice == max(made.probabilities, key=lambda x: made.probabilities[x])
    assert made.correct == (made.choice == "B") and made.consistency in (0.0, 0.5, 1.0)
    assert (made.subject, made.answer, made.key) == ("Renal", "B", one.key)
    assert attempt(engine, question(2, "TF", "A"), shuffles=2).consistency is None  # cannot be shuffled


def test_several_answers_are_written() -> None:
    engine = FakeEngine(" ACD because")
    made = attempt(engine, question(1, "X", "ACD"))
    assert (made.choice, made.correct, made.probabilities) == ("ACD", True, {})
    assert "Several options" in engine.calls[0][0][0].content and engine.calls[0][0][-1].content == "Answer:"
    assert attempt(FakeEngine("no idea"), question(1, "X", "ACD")).choice == ""


def test_cases_are_told_and_unfold() -> None:
    a3, a4 = group("A3", 10, 3), group("A4", 20, 3)
    pairs = list(with_earlier([question(1), *a3, *a4, question(2)]))
    assert [len(earlier) for _, earlier in pairs] == [0, 0, 1, 2, 0, 1, 2, 0]
    assert whole_stem(*pairs[3]) == "Case 10.\nQuestion 12?"
    assert whole_stem(*pairs[6]) == "Case 20.\nQuestion 20?\nQuestion 21?\nQuestion 22?"


def test_a_limit_is_spread_over_the_bank() -> None:
    questions = [question(i) for i in range(100)]
    assert [q.id for q, _ in spread(questions, 4)] == ["q0", "q25", "q50", "q75"]
    assert len(spread(questions, 0)) == len(spread(questions, 500)) == 100


def test_the_report_counts() -> None:
    def one(number: int, choice: str, kind: str = "A1", **more: object) -> Attempt:
        q = question(number, kind, tags={"subject": "s"})
        chances = {letter: 0.6 if letter == choice else 0.1 for letter in "ABCDE"}
        return Attempt(q.key, q.id, kind, "en", "s", "B", choice, choice == "B", chances, **more)  # type: ignore[arg-type]

    found = report([one(1, "B", consistency=1.0), one(2, "A", consistency=0.5), one(3, "B", "A2")])
    assert (found["accuracy"], found["n"]) == (2 / 3, 3) and found["confidence95"] == list(wilson(2, 3))
    assert found["by_type"]["A1"]["accuracy"] == 0.5 and found["by_lang"]["en"]["n"] == 3
    assert found["consistency"] == 0.75 and found["calibration"]["ece"] == pytest.approx(abs(0.6 - 2 / 3))
    assert report([])["accuracy"] is None


def test_an_exam_resumes_and_stops(tmp_path: Path) -> None:
    engine, path = FakeEngine(" A"), tmp_path / "answers.jsonl"
    asked = spread(mixed(), 0)
    first, _ = sit_exam(engine, asked[:5], tick=lambda made, *_: write_attempt(path, "m", made))
    with path.open("a") as file:
        file.write('{"by": "m", "key": "cut off')
    done = read_attempts(path, "m")
    assert list(done.values()) == first and read_attempts(path, "other") == {}
    seen: list[str] = []
    everything, _ = sit_exam(engine, asked, done=done, tick=lambda made, number, total: seen.append(made.key))
    assert len(everything) == len(asked) == len(seen) and everything[:5] == first
    import threading

    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        sit_exam(engine, asked, cancel=stop)


# -- the command line -------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str, engine: object = None) -> tuple[int, dict, str]:
    code = main([*words, "--json"], load_engine=lambda settings, progress: engine or FakeEngine(" A"))  # type: ignore[arg-type,return-value]
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


@pytest.fixture
def bank(tmp_path: Path) -> str:
    path = tmp_path / "bank.jsonl"
    path.write_bytes(write_bank(mixed(), "jsonl") + b"{broken\n")
    return str(path)


def test_grade_keeps_its_contract(capsys: pytest.CaptureFixture[str], bank: str) -> None:
    code, values, err = run(capsys, "exam", "grade", "--bank", bank)
    assert code == 0 and values["n"] == len(mixed()) and values["rejected"] == 1
    assert 0 <= values["confidence95"][0] <= values["accuracy"] <= values["confidence95"][1] <= 1
    assert set(values["by_type"]) == {q.type for q in mixed()} and set(values["by_lang"]) == {"en"}
    assert "1 of 15 rows" in err
    code, limited, _ = run(capsys, "exam", "grade", "--bank", bank, "--limit", "3")
    assert code == 0 and limited["n"] == 3


def test_grade_without_the_adapter_and_against_the_base(
    capsys: pytest.CaptureFixture[str], bank: str, engine: Engine
) -> None:
    asked: list[str] = []

    def load(settings, progress):
        asked.append(settings.adapter)
        return FakeEngine(" A")

    assert main(["exam", "grade", "--bank", bank, "--no-adapter", "--json"], load_engine=load) == 0
    capsys.readouterr()
    assert asked == ["none"]
    kept = engine.close
    engine.close = lambda: None  # type: ignore[method-assign]
    code, values, _ = run(capsys, "exam", "grade", "--bank", bank, "--compare", "--limit", "4", engine=engine)
    engine.close = kept  # type: ignore[method-assign]
    assert code == 0 and values["n"] == values["base"]["n"] == 4 and values["experts"] == 4


def test_grade_writes_every_answer_and_resumes(capsys: pytest.CaptureFixture[str], bank: str, tmp_path: Path) -> None:
    out = str(tmp_path / "deep" / "answers.jsonl")
    engine = FakeEngine(" A")
    first = run(capsys, "exam", "grade", "--bank", bank, "--out", out, engine=engine)[1]
    lines = Path(out).read_text().splitlines()
    again = run(capsys, "exam", "grade", "--bank", bank, "--out", out, engine=engine)[1]
    assert len(lines) == len(mixed()) and Path(out).read_text().splitlines() == lines and again == first


def test_grade_saves_which_experts_fired_on_right_and_wrong(
    capsys: pytest.CaptureFixture[str], bank: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "graded.npz")
    code, values, _ = run(capsys, "exam", "grade", "--bank", bank, "--trace", out)
    trace = RouterTrace.load(out)
    labels = [segment.labels["graded"] for segment in trace.segments]
    assert code == 0 and values["trace"] == out and len(labels) == len(mixed())
    assert labels.count("right") == round(values["accuracy"] * values["n"])
    assert "graded" in [grouping.kind for grouping in groupings(trace)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grade", "--bank", "nowhere.jsonl"], "no bank has that name"),
        (["grade", "--bank", "BANK", "--limit", "-1"], "negative"),
        (["grade", "--bank", "BANK", "--trace", "x.txt"], "ends in .npz"),
        (["convert", "--bank", "BANK", "--out", "x.docx"], "must end in"),
    ],
)
def test_wrong_use(capsys: pytest.CaptureFixture[str], bank: str, words: list[str], said: str) -> None:
    code, values, _ = run(capsys, "exam", *[bank if word == "BANK" else word for word in words])
    assert code == 2 and said in values["error"]["en"] and values["error"]["zh"]


def test_check_and_convert(capsys: pytest.CaptureFixture[str], bank: str, tmp_path: Path) -> None:
    code, values, _ = run(capsys, "exam", "check", "--bank", bank)
    assert code == 0 and values["questions"] == len(mixed()) and values["rows"] == len(mixed()) + 1
    assert values["rejected"] == [
        {"line": len(mixed()) + 1, "reason": values["rejected"][0]["reason"], "text": "{broken"}
    ]
    out = tmp_path / "b.xml"
    code, values, _ = run(capsys, "exam", "convert", "--bank", bank, "--out", str(out))
    assert code == 0 and values["format"] == "moodle"
    assert list(read_bank(out.read_bytes(), "b.xml").questions) == mixed()


def test_banks_are_listed_and_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    values = run(capsys, "exam", "banks")[1]
    assert "clinical-en" in [bank["name"] for bank in values["banks"]]
    assert run(capsys, "exam", "check", "--bank", "clinical-en")[1]["questions"] == 40


def test_interventions_reach_the_engine(engine: Engine) -> None:
    off = (Intervention("off"),)
    assert probabilities(engine, question(3), list("ABCDE"), changes=off) != probabilities(
        engine, question(3), list("ABCDE")
    )
