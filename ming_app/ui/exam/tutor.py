"""The model's help with a question: what it is asked, and what of its answer may be shown. Pure functions of text.

A request states the bank's key where the answer is to explain it: the key stands, whatever the model would have chosen.
A hint is asked for without the key, and whatever would name an option is blotted out, also while it is being written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ming_app.exam.question import Question, language_of
from ming_app.exam.wording import ASK_REASON, relettered, whole_stem

KINDS = ("explain", "hint", "why_not", "similar")
REVEALING = ("explain", "why_not", "similar")
"""what would give the key away before it is revealed"""
BLOT = "▢▢"

# Explanations are asked for in the words the adapters were trained with (wording.ASK_REASON): asked otherwise, a small model
# tends to answer with the letter alone.
_ASK = {
    "zh": {
        "explain": ASK_REASON["zh"][0]
        + "\n\n{question}\n\n（标准答案：{key}。请说明为什么它正确，其他选项为什么不对。）",
        "why_not": ASK_REASON["zh"][0]
        + "\n\n{question}\n\n（标准答案：{key}。请重点说明为什么不选“{option}”，以及它与正确答案的区别。）",
        "hint": "{question}\n\n请给我一个解题提示：指出题干中的关键线索和应当想到的知识点。不要说出答案，也不要提到任何选项。",
        "similar": "{question}\n\n标准答案：{key}。请围绕同一知识点另出一道单项选择题，给出 A 至 E 五个选项、答案和简短解析，不要重复原题。",
    },
    "en": {
        "explain": ASK_REASON["en"][0]
        + "\n\n{question}\n\n(The key is: {key}. Say why it is right, and why each other option is wrong.)",
        "why_not": ASK_REASON["en"][0]
        + "\n\n{question}\n\n(The key is: {key}. Say above all why not \u201c{option}\u201d, and how it differs from the right answer.)",
        "hint": "{question}\n\nGive me a hint for this question: point to the decisive clues in the stem and to what I should know. Do not give the answer and do not mention any of the options.",
        "similar": "{question}\n\nKey: {key}. Write another single best answer question on the same point, with options A to E, the key and a short explanation. Do not repeat this question.",
    },
}


def as_text(question: Question, order: Sequence[str], earlier: Sequence[Question] = ()) -> str:
    """The question as it is shown: case, stem, options lettered in their order."""
    lines = [f"{letter}. {text}" for letter, text in relettered(question, order).items()]
    return "\n".join([whole_stem(question, earlier), *lines])


def request(
    kind: str, question: Question, order: Sequence[str], earlier: Sequence[Question] = (), option: str = ""
) -> str:
    """What the model is asked, in the question's language. `option`: letter of the bank, for why_not."""
    key = "; ".join(question.options[letter] for letter in question.answer)
    shown = as_text(question, order, earlier) if kind != "hint" else whole_stem(question, earlier)
    return _ASK[question.lang][kind].format(question=shown, key=key, option=question.options.get(option, ""))


def about(question: Question, order: Sequence[str], earlier: Sequence[Question] = ()) -> str:
    """The question and its key, as the first message of a chat about it."""
    key = "; ".join(question.options[letter] for letter in question.answer)
    ask = {"zh": "请讲解这道题。标准答案：", "en": "Explain this question. The key: "}[question.lang]
    return f"{as_text(question, order, earlier)}\n\n{ask}{key}"


def blotted(text: str, question: Question, finished: bool) -> str:
    """A hint without what names an option. Of one that is still being written, the end is held back as far as an option's
    text could reach."""
    longest = max((len(option) for option in question.options.values()), default=0)
    shown = text
    for option in sorted(question.options.values(), key=len, reverse=True):
        if len(option) > 1 and language_of(option) == question.lang:
            shown = re.sub(re.escape(option.rstrip("。.")), BLOT, shown, flags=re.I)
    shown = re.sub(
        r"((?:选项?|答案(?:是|为|应为|[：:])*|\boption|\banswer(?:\s+is)?:?|\bchoose)\s*)[(（]?[A-J](?![A-Za-z])[)）]?",
        rf"\g<1>{BLOT}",
        shown,
        flags=re.I,
    )
    return shown if finished else shown[: max(0, len(shown) - longest - 12)]


def final_letter(text: str) -> str:
    """The letter that an explanation ends on ("答案：C", "Answer: C"), as shown; "" where it names none."""
    found = re.findall(
        r"(?:答案|[故应]选|(?i:answer))\s*(?:应?是|应?为|is)?\s*[:：]?\s*[(（]?([A-J])(?![A-Za-z])", text
    )
    return found[-1] if found else ""
