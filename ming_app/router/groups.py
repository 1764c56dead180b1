"""Which tokens belong together: by role, text, label, script, or part of an exam question. Groups are what the views compare.

Token classes need no tagger: they are read off the characters. A token in no group has index -1 and is left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ming_app.molora.trace import RouterTrace

CLASSES = ("han", "latin", "digit", "punctuation", "space", "special", "other")
MAX_GROUPS = 24  # of one kind of label; more cannot be told apart in a picture
CONTROL = re.compile(r"<\|[^|>]*\|>")
OPTION = re.compile(r"^[ \t]*\(?([A-H])[.、．:：)）]", re.MULTILINE)


@dataclass(frozen=True)
class Grouping:
    """`of` int [T]: index into `names` of every token, -1 for none."""

    kind: str
    names: tuple[str, ...]
    of: np.ndarray

    def sizes(self) -> list[int]:
        """Tokens of each group."""
        return np.bincount(self.of[self.of >= 0], minlength=len(self.names)).tolist()


def token_class(text: str) -> str:
    """han, latin, digit, punctuation, space, special (a control token) or other, by most of its visible characters."""
    if CONTROL.fullmatch(text):
        return "special"
    counts = dict.fromkeys(CLASSES, 0)
    for character in text:
        counts[_character_class(character)] += 1
    space = counts.pop("space")
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "space" if space else "other"


def content_rows(trace: RouterTrace) -> np.ndarray:
    """bool [T]: words of the question or the answer; not the chat's frame (control tokens, role names, system message),
    which is the same in every text."""
    content = np.ones(len(trace), bool)
    system, opened = False, False
    for index, token in enumerate(trace.tokens):
        if opened:  # the role's name
            system = token.text.strip() == "system"
        content[index] = not (system or opened or CONTROL.fullmatch(token.text))
        opened = token.text == "<|im_start|>"
        system = system and token.text != "<|im_end|>"
    return content


def groupings(trace: RouterTrace) -> list[Grouping]:
    """Every grouping in which at least two groups have tokens."""
    found = [_by_role(trace), _by_class(trace), _by_part(trace)]
    found += [g for g in _by_label(trace) if len(g.names) <= MAX_GROUPS and g.kind not in {own.kind for own in found}]
    return [grouping for grouping in found if sum(size > 0 for size in grouping.sizes()) > 1]


def _character_class(character: str) -> str:
    if character.isspace():
        return "space"
    category = unicodedata.category(character)
    if "\u3400" <= character <= "\u9fff" or "\U00020000" <= character <= "\U0003ffff" or character in "〇々":
        return "han"
    if category.startswith("L"):
        return "latin" if unicodedata.name(character, "").startswith(("LATIN", "FULLWIDTH LATIN")) else "other"
    if category == "Nd":
        return "digit"
    return "punctuation" if category[0] in "PS" else "other"


def option_letters(text: str) -> list[str]:
    """Letters of the options that a question lists, from A on; empty unless there are two at least."""
    return [chr(ord("A") + i) for i in range(len(_options(text)))]


def _by_role(trace: RouterTrace) -> Grouping:
    return Grouping("role", ("prompt", "answer"), trace.is_answer().astype(int))


def _by_class(trace: RouterTrace) -> Grouping:
    """The tokens of a character that is split over several are classed by that character."""
    of = np.full(len(trace), -1)
    for text, members in trace.pieces():
        of[members] = CLASSES.index(token_class(text))
    return Grouping("class", CLASSES, of)


def _by_part(trace: RouterTrace) -> Grouping:
    """Question against options in the prompts that list lettered options, from A on."""
    of = np.full(len(trace), -1)
    for members in _texts(trace):
        prompt = [i for i in members if trace.tokens[i].role == "prompt"]
        begins = np.cumsum([0, *(len(trace.tokens[i].text) for i in prompt)])
        text = "".join(trace.tokens[i].text for i in prompt)
        options = _options(text)
        if not options:
            continue
        end = text.find("<|im_end|>", options[-1])
        begin = text.rfind("<|im_start|>", 0, options[0]) + 1
        for index, at in zip(prompt, begins, strict=False):
            if begin <= at < (end if end >= 0 else len(text)):
                of[index] = int(at >= options[0])
    return Grouping("part", ("question", "options"), of)


def _options(text: str) -> list[int]:
    """Places of the last run of options A, B, C, ... in a text; empty unless there are two at least."""
    run: list[int] = []
    for match in OPTION.finditer(text):
        if match[1] == "A":
            run = [match.start()]
        elif run and match[1] == chr(ord("A") + len(run)):
            run.append(match.start())
    return run if len(run) > 1 else []


def _by_label(trace: RouterTrace) -> list[Grouping]:
    """One grouping per kind of label of the segments: language, stream, ..."""
    kinds = sorted({kind for segment in trace.segments for kind in segment.labels})
    found = []
    for kind in kinds:
        values = [segment.labels.get(kind) for segment in trace.segments]
        names = tuple(sorted({value for value in values if value is not None}))
        index = np.array([-1 if value is None else names.index(value) for value in values])
        found.append(Grouping(kind, names, index[trace.segment_of()]))
    return found


def _texts(trace: RouterTrace) -> list[Sequence[int]]:
    """Token indices of each segment."""
    of = trace.segment_of()
    return [np.flatnonzero(of == segment).tolist() for segment in range(max(len(trace.segments), 1))]
