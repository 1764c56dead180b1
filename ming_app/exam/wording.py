"""How a question is put to the model, as it was trained on such questions: what is asked, stem, lettered options; and the
words its answer begins with, after which the letters are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ming_app.engine.types import Message
from ming_app.exam.question import Question

LETTER_JOIN: Mapping[str, str] = {"zh": "", "en": " "}
"""What stands between the answer prefix and the letter: in English " C" is one token, a bare "C" is not."""
EXPLANATION_PREFIX: Mapping[str, str] = {"zh": "解析：", "en": "Explanation: "}

ASK_LETTER: Mapping[str, tuple[str, ...]] = {
    "zh": (
        "请回答这道医学选择题，只写出正确选项的字母。",
        "请从下列选项中选出正确答案，只需给出字母，不必解释。",
        "医学考试题：直接写出正确选项的字母即可。",
    ),
    "en": (
        "Answer this medical exam question with the letter of the correct option only.",
        "Choose the correct option of this medical question. Write just its letter.",
        "Medical exam question: reply with the letter of the right option and nothing else.",
    ),
}
ASK_REASON: Mapping[str, tuple[str, ...]] = {
    "zh": ("请分析这道医学选择题，先写解析，再写出正确选项的字母。",),
    "en": ("Work through this medical exam question: explain first, then give the letter of the correct option.",),
}
SEVERAL: Mapping[str, str] = {"zh": "（多选题）", "en": " (Several options may be right.)"}


def exam_prompt(ask: str, stem: str, options: Mapping[str, str]) -> str:
    """The user's message: what is asked, a blank line, the stem and the lettered options."""
    return "\n".join([ask, "", stem, *(f"{letter}. {text}" for letter, text in options.items())])


def whole_stem(question: Question, earlier: Sequence[Question] = ()) -> str:
    """Case and stem; of an unfolding case also what its earlier parts told (their stems)."""
    told = [before.stem for before in earlier] if question.kind.locks else []
    return "\n".join(filter(None, [question.shared_stem, *told, question.stem]))


def relettered(question: Question, order: Sequence[str]) -> dict[str, str]:
    """The options in another order, lettered anew from A on."""
    return {chr(ord("A") + at): question.options[letter] for at, letter in enumerate(order)}


def ask_for_letter(question: Question, order: Sequence[str] = (), earlier: Sequence[Question] = ()) -> list[Message]:
    """The question with its options in `order` (file letters; as printed without one), to be answered by a letter."""
    ask = ASK_LETTER[question.lang][0] + (SEVERAL[question.lang] if question.kind.multiple else "")
    options = relettered(question, order or list(question.options))
    return [Message("user", exam_prompt(ask, whole_stem(question, earlier), options))]


def ask_for_reasons(question: Question, earlier: Sequence[Question] = ()) -> list[Message]:
    """The question as printed, to be answered by reasons, then the letter."""
    ask = ASK_REASON[question.lang][0]
    return [Message("user", exam_prompt(ask, whole_stem(question, earlier), question.options))]
