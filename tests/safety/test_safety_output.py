"""Checks of an answer: doses, stopping medicines, certainty, physicians, numbers, loops."""

from __future__ import annotations

import pytest

from ming_app.safety.output import check_answer, loop_start, note_text, sends_to_emergency, without_doses


def checks(text: str) -> list[str]:
    return [note.check for note in check_answer(text)]


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("Take 400 mg of ibuprofen every 6 hours.", "dose"),
        ("每次口服布洛芬0.2g，每日三次。", "dose"),
        ("Take two tablets twice a day.", "dose"),
        ("You should stop taking your blood pressure medication.", "stop"),
        ("您可以停用降压药。", "stop"),
        ("You definitely have lupus.", "certain"),
        ("这肯定是胃炎，不需要就医。", "certain"),
        ("As your doctor, I recommend rest.", "physician"),
        ("作为一名医生，我建议您休息。", "physician"),
        ("Call our helpline at 1-800-555-0199.", "phone"),
        ("加微信13812345678聊。", "phone"),
        ("Dr Li: 13812345678.", "phone"),
        ("您患有高血压。", "certain"),
        ("请拨打咨询热线400-123-4567。", "phone"),
    ],
)
def test_what_needs_a_note(text: str, check: str) -> None:
    assert check in checks(text)
    assert note_text(check, "en") and note_text(check, "zh")


@pytest.mark.parametrize(
    "text",
    [
        "Drink water, rest, and see a doctor if the fever lasts more than three days.",
        "如有胸痛请立即拨打120。多喝水，注意休息。",
        "In the US call 911 or 988; in the UK 999; in Europe 112.",
        "Blood pressure of 120/80 mmHg is normal. The heart beats 60 to 100 times a minute.",
        "正常空腹血糖为3.9～6.1 mmol/L。",
        "Do not stop a medicine without asking your doctor.",
        "如果您患有高血压，请少吃盐，并按医嘱服药。",
        "The trial had registration number 202413812345678901.",
    ],
)
def test_what_needs_none(text: str) -> None:
    assert checks(text) == []


def test_answers_that_send_to_emergency_care() -> None:
    assert sends_to_emergency("Please call 911 right away.") and sends_to_emergency("请立即拨打120。")
    assert not sends_to_emergency("See your doctor next week.") and not sends_to_emergency("建议到消化科门诊。")


def test_loops_are_found_where_they_began() -> None:
    said = "Drink enough water. "
    text = "Here is advice. " + said * 6
    assert text[: loop_start(text)].count(said.strip()) == 1
    zh = "建议多休息。" * 12
    assert zh[: loop_start(zh)] == "建议多休息。"
    counted = "".join(f"{i}. 发作时可能出现异常的反射。\n" for i in range(3, 9))
    assert loop_start("表现：\n" + counted) == len("表现：\n") + counted.index("\n") + 1
    table = "".join(f"| {i} mg | {i * 2} ml |\n" for i in range(10, 30))
    for good in (
        table,
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,",
        "vitamin B1, vitamin B2, vitamin B3, vitamin B5, vitamin B6, vitamin B7, ",
        "",
        "abc",
        "1. a\n2. b\n3. c\n",
        "哈哈哈",
        "-" * 20,
        "The heart. The lungs. The liver. The spleen.",
    ):
        assert loop_start(good) is None


def test_doses_are_left_out() -> None:
    text = "可能是胃炎。每次服用奥美拉唑20mg，每日两次。请到消化科就诊。"
    cleaned = without_doses(text, "zh")
    assert "20mg" not in cleaned and "可能是胃炎" in cleaned and "消化科" in cleaned
    cleaned = without_doses("It may be reflux. Take omeprazole 20 mg daily. See a doctor.", "en")
    assert "20 mg" not in cleaned and "reflux" in cleaned and cleaned.endswith("See a doctor.")
