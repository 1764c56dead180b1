"""`assess`: is there a danger in what a person has written? Reads their messages of the whole conversation, no model.

Each message becomes the names that hold in it: concepts that are affirmed there (not denied, not long over, not a topic,
not a textbook question, not a figure of speech) and facts that its numbers say. Rules are true or false over the names of
some messages together, so that a danger told in pieces counts. A learned score (score.py) stands beside them: a high one
raises a flag where no rule was written, and a rule that is not certain needs some score to count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ming_app.safety import numbers
from ming_app.safety import score as scoring
from ming_app.safety.rules import Rule, RuleBook, rule_book
from ming_app.safety.text import Clause, clauses, has_chinese, language, plain

MESSAGES = 40
"""messages of a conversation that are read, the last ones"""
WINDOW = 6
"""messages that are read together: a danger may be told in pieces"""


@dataclass(frozen=True)
class Scan:
    """What holds in one message. `words`: concept -> the words that said so."""

    names: frozenset[str]
    conditional: frozenset[str]
    """what holds only under a condition ("if I ...")"""
    words: tuple[tuple[str, str], ...]
    text: str
    """the message as the rules read it"""


@dataclass(frozen=True)
class Flag:
    """A red flag that was found."""

    rule: str
    category: str
    matched: tuple[str, ...]
    """the words that raised it, as the rules read them"""
    source: str


@dataclass(frozen=True)
class Assessment:
    """`flags` by rank, the most pressing first; none when nothing was found. `lang`: "zh" or "en", of the last message."""

    flags: tuple[Flag, ...]
    lang: str

    @property
    def category(self) -> str:
        return self.flags[0].category if self.flags else ""


RANK = (
    "electric", "arrest", "self_harm", "drowning", "anaphylaxis", "airway", "swallowed", "obstetric", "ectopic", "infant",
    "cardiac", "stroke", "poisoning", "seizure", "bites", "head_injury", "trauma", "burns", "heat", "metabolic", "sepsis", "bleeding",
    "consciousness", "clot", "torsion", "cauda_equina", "vision", "limb", "abdomen", "harm_others", "psychosis", "shock",
    "other",
)  # fmt: skip
"""categories; of several, the banner takes the first: what endangers the helper, then who needs resuscitation, then what has a
cause of its own before what may have many"""


@dataclass
class Memory:
    """What was looked through before in one conversation. It belongs to whoever asks, so that no text outlives it."""

    scans: dict[str, Scan] = field(default_factory=dict)
    windows: dict[tuple[str, ...], tuple[Flag, ...]] = field(default_factory=dict)


def assess(messages: Sequence[str], memory: Memory | None = None) -> Assessment:
    """What the person's messages (oldest first) say. Pure: the same messages always give the same answer."""
    known = memory or Memory()
    said = [text for text in messages[-MESSAGES:] if text.strip()]
    found: dict[str, Flag] = {}
    for end in range(1, len(said) + 1):
        window = tuple(said[max(0, end - WINDOW) : end])
        if window not in known.windows:
            known.scans |= {text: scan(text) for text in window if text not in known.scans}
            known.windows[window] = _window([known.scans[text] for text in window])
        for flag in known.windows[window]:
            found.setdefault(flag.rule, flag)
    flags = sorted(found.values(), key=lambda flag: RANK.index(flag.category))
    return Assessment(tuple(flags), language(said[-1]) if said else "en")


def danger(messages: Sequence[str]) -> float:
    """The score of the last messages, from 0 to 1."""
    scans = [scan(text) for text in messages[-3:] if text.strip()]
    lang = language("\n".join(found.text for found in scans))
    return scoring.score(features(scans, lang), lang).value if scans else 0.0


def rules_true(scans: Sequence[Scan]) -> list[Rule]:
    """The rules that are true over all of the messages together."""
    names = frozenset().union(*(found.names for found in scans))
    wider = names.union(*(found.conditional for found in scans))
    return [rule for rule in rule_book().rules if rule.when(wider if rule.intent else names)]


def features(scans: Sequence[Scan], lang: str) -> set[str]:
    """What the score of messages, taken together, is made of."""
    names = frozenset().union(*(found.names for found in scans))
    conditional = frozenset().union(*(found.conditional for found in scans)) - names
    rules = [rule.id for rule in rules_true(scans)]
    words = scoring.text_features("\n".join(found.text for found in scans), lang)
    return words | scoring.name_features(names, conditional, rules)


def _window(scans: Sequence[Scan]) -> tuple[Flag, ...]:
    """Flags of the last message in the light of those before it: rules read all of them, the score the last, and the last
    three together. A rule that is not certain needs some score; a high score counts without a rule."""
    lang = language("\n".join(found.text for found in scans[-3:]))
    model = scoring.weights(lang)
    sizes = sorted({1, min(3, len(scans)), len(scans)})
    best = max((scoring.score(features(scans[-size:], lang), lang) for size in sizes), key=lambda one: one.value)
    words = {name: word for found in scans for name, word in found.words}
    flags = [_flag(rule, words) for rule in rules_true(scans) if rule.certain or best.value >= model.low]
    if not flags and best.value >= model.high:
        flags = [Flag("score", best.category or "other", best.matched, "training/safety_score.py")]
    return tuple(flags)


def _flag(rule: Rule, words: dict[str, str]) -> Flag:
    matched = tuple(dict.fromkeys(words[name] for name in sorted(rule.names) if name in words))
    return Flag(rule.id, rule.category, matched, rule.source)


def scan(text: str) -> Scan:
    """What holds in one message."""
    return _Reader(rule_book(), text).read()


class _Reader:
    def __init__(self, book: RuleBook, text: str):
        self.book, self.contexts = book, book.contexts
        text = plain(text)
        self.chinese = has_chinese(text)
        self.english = re.search(r"[a-z]{2}", text) is not None
        if self.english or self.chinese:
            text = book.speller(text)
        self.spelled = text
        for lang in self.langs:
            text = self.contexts["figure"][f"all_{lang}"].sub(lambda found: " " * len(found[0]), text)
        self.text = text
        self.clauses = list(clauses(text))

    @property
    def langs(self) -> list[str]:
        return ["zh"] * self.chinese + ["en"] * self.english

    def read(self) -> Scan:
        if self._is_told_of_others():
            return Scan(frozenset(), frozenset(), (), self.spelled)
        affirmed: dict[str, str] = {}
        conditional: set[str] = set()
        for concept in self.book.concepts:
            for lang, pattern in (("zh", concept.zh), ("en", concept.en)):
                if pattern is None or lang not in self.langs:
                    continue
                for found in pattern.finditer(self.text):
                    mood = self._mood(found.start(), found.end())
                    if mood == "plain":
                        affirmed[concept.name] = found[0].strip()
                        break
                    if mood == "conditional":
                        conditional.add(concept.name)
        facts = numbers.facts(numbers.digits(self.text))
        return Scan(frozenset(affirmed) | facts, frozenset(conditional), tuple(affirmed.items()), self.spelled)

    # -- the whole message ---------------------------------------------------------------------------------------

    def _is_told_of_others(self) -> bool:
        """A question of study, or of a story: nobody is in danger, unless someone speaks of themselves or theirs."""
        for section in ("study", "fiction"):
            context = self.contexts[section]
            if any(context[f"message_{lang}"].search(self.text) for lang in self.langs):
                study = self.contexts["study"]
                return not any(study[f"personal_{lang}"].search(self.text) for lang in self.langs)
        return False

    # -- one place -----------------------------------------------------------------------------------------------

    def _mood(self, start: int, end: int) -> str:
        """How the words at [start, end) are meant: "plain", "conditional", or "" where they affirm nothing."""
        clause, at = self._clause(start)
        for lang in self.langs:
            before, after = self.text[clause.start : start], self.text[end : clause.end]
            if (
                self._denied(lang, before, after, at)
                or self._topic(lang, before, after)
                or self._past(lang, clause, before)
            ):
                return ""
        sentence = self.text[clause.begin : clause.finish]
        if any(self.contexts["hypothetical"][f"clause_{lang}"].search(sentence) for lang in self.langs):
            return "conditional"
        return "plain"

    def _clause(self, start: int) -> tuple[Clause, int]:
        for at, clause in enumerate(self.clauses):
            if clause.start <= start < clause.end:
                return clause, at
        return Clause(0, len(self.text), 0, len(self.text)), 0

    def _denied(self, lang: str, before: str, after: str, at: int) -> bool:
        negation = self.contexts["negation"]
        if self._open_negation(lang, before):
            return True
        if re.match(f"(?:{negation[f'after_{lang}'].pattern})", after):
            return True
        # "no fever, cough or chest pain": a denial goes on through a list
        while at > 0 and self.clauses[at - 1].begin == self.clauses[at].begin and self._is_list_item(lang, before):
            at -= 1
            before = self.text[self.clauses[at].start : self.clauses[at].end]
            if self._open_negation(lang, before):
                return True
        return False

    def _open_negation(self, lang: str, before: str) -> bool:
        negation = self.contexts["negation"]
        cleared = negation[f"unless_{lang}"].sub(lambda found: "#" * len(found[0]), before)
        reach = 60 if lang == "en" else 14
        return negation[f"before_{lang}"].search(cleared[-reach:]) is not None

    def _is_list_item(self, lang: str, before: str) -> bool:
        """Nothing before the words but "or", "and": the clause goes on with a list that began before."""
        if lang == "zh":
            return before.strip() in ("", "和", "或", "及", "与", "跟", "也", "以及", "或者", "或是", "还有")
        return re.fullmatch(r"\W*(?:(?:or|and|nor|any|no|even|also)\W*)*(?:[a-z]+\W+)?", before) is not None

    def _topic(self, lang: str, before: str, after: str) -> bool:
        mention = self.contexts["mention"]
        cleared = mention[f"unless_{lang}"].sub(lambda found: "#" * len(found[0]), before)
        reach = 45 if lang == "en" else 10
        return mention[f"before_{lang}"].search(cleared[-reach:]) is not None or bool(
            re.match(f"(?:{mention[f'after_{lang}'].pattern})", after)
        )

    def _past(self, lang: str, clause: Clause, before: str) -> bool:
        past = self.contexts["past"]
        if past[f"before_{lang}"].search(before[-30:]):
            return True
        sentence = self.text[clause.begin : clause.finish]
        if not past[f"clause_{lang}"].search(sentence):
            return False
        own = self.text[clause.start : clause.end]
        if past[f"over_{lang}"].search(sentence):
            return not past[f"now_{lang}"].search(own) or past[f"clause_{lang}"].search(own) is not None
        return past[f"clause_{lang}"].search(own) is not None or not past[f"now_{lang}"].search(sentence)
