"""`make_question`: what becomes a question, and what is refused."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_app.exam.question import LETTERS, TYPES, QuestionError, make_question

GOOD = {"stem": "Which?", "options": {"A": "one", "B": "two", "C": "three"}, "answer": "B"}
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n....").decode()


@pytest.mark.parametrize(
    ("answer", "letters"),
    [
        ("B", "B"),
        ("b", "B"),
        (" B。", "B"),
        (["B"], "B"),
        ("ac", "AC"),
        ("C、A", "AC"),
        ("A, C", "AC"),
        ("A和C", "AC"),
        ("ＡＣ", "AC"),
        (["C", "A"], "AC"),
        ("two", "B"),
        ("Two", "B"),
    ],
)
def test_answers_in_many_writings(answer: object, letters: str) -> None:
    made = make_question({**GOOD, "answer": answer})
    assert made.answer == tuple(letters)
    assert made.type == ("X" if len(letters) > 1 else "A1")


@pytest.mark.parametrize(("answer", "letter"), [("T", "A"), ("对", "A"), ("√", "A"), (False, "B"), ("错误", "B")])
def test_true_and_false(answer: object, letter: str) -> None:
    made = make_question({"stem": "Water is wet.", "type": "TF", "answer": answer})
    assert made.answer == (letter,) and list(made.options.values()) == ["True", "False"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stem": ""}, "stem is empty"),
        ({"stem": ["x"]}, "not text"),
        ({"stem": "x" * 9000}, "more than 8000"),
        ({"answer": ""}, "no answer"),
        ({"answer": "D"}, "none of the options"),
        ({"answer": "BB"}, "twice"),
        ({"options": {}}, "0 options"),
        ({"options": {"A": "one"}}, "1 options"),
        ({"options": {"A": "one", "C": "two"}}, "not lettered"),
        ({"options": {"A": "one", "B": " "}}, "1 options"),
        ({"options": {"A": " ", "B": "two"}}, "option is empty"),
        ({"options": {"A": "Same", "B": " Same"}}, "say the same"),
        ({"options": "none"}, "no options"),
        ({"lang": "fr"}, "neither zh nor en"),
        ({"type": "essay"}, "not one of"),
        ({"type": "A2", "answer": "AB"}, "one right answer"),
        ({"tags": "cardiology"}, "tags"),
        ({"tags": {str(i): "x" for i in range(40)}}, "tags"),
        ({"image": "https://example.com/a.png"}, "data: URL"),
        ({"image": "data:image/svg+xml;base64,AAAA"}, "data: URL"),
        ({"image": "data:image/png;base64,AAAA"}, "not what its type says"),
        ({"image": "data:image/png;base64,***"}, "not what its type says"),
    ],
)
def test_refused_with_a_reason_in_both_languages(change: dict, reason: str) -> None:
    with pytest.raises(QuestionError, match=reason) as caught:
        make_question({**GOOD, **change})
    assert any("\u4e00" <= char <= "\u9fff" for char in caught.value.zh)


def test_control_characters_and_direction_marks_vanish() -> None:
    made = make_question({**GOOD, "stem": "a\u0000b\u202ec\ufeff\ud800d\r\ne", "explanation": "\x1b[31mred"})
    assert made.stem == "abcd\ne" and made.explanation == "[31mred"


def test_markup_stays_text() -> None:
    stem = "<script>alert(1)</script> is it <b>bold</b>?"
    assert make_question({**GOOD, "stem": stem}).stem == stem


def test_types_of_groups_need_a_group() -> None:
    alone = {kind: make_question({**GOOD, "type": kind}).type for kind in ("A1", "A2", "A3", "A4", "B1")}
    assert alone == {"A1": "A1", "A2": "A2", "A3": "A2", "A4": "A2", "B1": "A1"}
    for name, kind in {
        "A1型题": "A1",
        "A3/A4型题": "A3",
        "单项选择题": "A1",
        "多项选择题": "X",
        "single": "A1",
    }.items():
        assert make_question({**GOOD, "type": name, "group_id": "g"}).type == kind


def test_a_case_without_a_group_joins_the_stem() -> None:
    assert make_question({**GOOD, "shared_stem": "A man."}).stem == "A man.\nWhich?"


def test_images_are_kept() -> None:
    image = f"data:image/png;base64,{PNG}"
    assert make_question({**GOOD, "image": image}).image == image


def test_the_key_follows_the_text_not_the_id() -> None:
    first = make_question({**GOOD, "id": "1"})
    again = make_question({**GOOD, "id": "2", "stem": " WHICH ? ", "options": {"A": "two", "B": "one", "C": "three"}})
    other = make_question({**GOOD, "stem": "Who?"})
    assert first.key == again.key != other.key and len(first.key) == 16


def test_to_dict_and_back() -> None:
    made = make_question(
        {**GOOD, "tags": {"subject": "x"}, "explanation": "because", "group_id": "g", "shared_stem": "s"}
    )
    assert make_question(made.to_dict()) == made


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: json_like
            for name in ("stem", "options", "answer", "type", "lang", "tags", "image", "group_id", "explanation")
        },
    )
)
def test_any_fields_make_a_question_or_a_reason(fields: dict) -> None:
    try:
        made = make_question(fields)
    except QuestionError as error:
        assert error.en and error.zh
    else:
        assert made.type in TYPES and set(made.answer) <= set(made.options) <= set(LETTERS)
        assert make_question(made.to_dict()) == made
