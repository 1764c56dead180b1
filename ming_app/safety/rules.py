"""The rules of the safety layer, read from rules/*.toml and compiled once: concepts, contexts, red flags.

A damaged file raises RuleError by name of the entry: rules are part of the program, and a test reads them all.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ming_app.safety.text import Speller

FOLDER = Path(__file__).parent / "rules"
NO_EN = "no|not|isnt|doesnt|dont|didnt|never|without|arent|wasnt|hasnt|havent|denies"
GAP_EN = rf"(?:\W+(?!(?:{NO_EN})\b)[a-z0-9]+){{0,4}}\W+"
GAP_ZH = r"[^,。!?;:.\n不没无未]{0,8}"
LOOSE_ZH = r"[^。!?\n不没无未]"  # what `.` with a count stands for in a Chinese pattern

Truth = Callable[[frozenset[str]], bool]


class RuleError(ValueError):
    """An entry of rules/*.toml cannot be used; says which and why."""


@dataclass(frozen=True)
class Concept:
    """What people say when they mean one thing. `zh` is searched in texts with Chinese, `en` in texts with Latin letters."""

    name: str
    en: re.Pattern[str] | None
    zh: re.Pattern[str] | None


@dataclass(frozen=True)
class Rule:
    """A red flag: true where `when` is, given the names that hold."""

    id: str
    category: str
    source: str
    when: Truth
    names: frozenset[str]
    """what `when` speaks of"""
    intent: bool = False
    """true under a condition too"""
    certain: bool = False
    """counts whatever the score says"""


@dataclass(frozen=True)
class RuleBook:
    concepts: tuple[Concept, ...]
    rules: tuple[Rule, ...]
    contexts: Mapping[str, Mapping[str, re.Pattern[str]]]
    """section of context.toml -> its entries"""
    speller: Speller


def expand(pattern: str, lang: str) -> str:
    """`~`, and in Chinese `.{m,n}`, as what may stand between two words of a pattern: no denial."""
    if lang == "en":
        return pattern.replace("~", GAP_EN)
    return pattern.replace("~", GAP_ZH).replace(".{", LOOSE_ZH + "{")


def compiled(patterns: list[str], lang: str, where: str) -> re.Pattern[str]:
    """One pattern for all of them; English ones match whole words."""
    body = "|".join(expand(pattern, lang) for pattern in patterns)
    try:
        return re.compile(rf"(?<![a-z])(?:{body})(?![a-z])" if lang == "en" else body)
    except re.error as error:
        raise RuleError(f"{where}: {error}") from error


def truth(text: str, where: str) -> tuple[Truth, frozenset[str]]:
    """`when` as a function of the names that hold, and the names it speaks of. Raises RuleError for anything but names
    with and, or, not."""

    def walk(node: ast.AST) -> Truth:
        match node:
            case ast.Name(id=name):
                return lambda held: name in held
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = walk(operand)
                return lambda held: not inner(held)
            case ast.BoolOp(op=op, values=values):
                parts, every = [walk(value) for value in values], isinstance(op, ast.And)
                return lambda held: (all if every else any)(part(held) for part in parts)
        raise RuleError(f"{where}: only names with and, or, not are allowed")

    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise RuleError(f"{where}: {error.msg}") from error
    names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    return walk(tree), names


def _table(name: str) -> dict[str, Any]:
    try:
        return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RuleError(f"{name}.toml: {error}") from error


@lru_cache(maxsize=1)
def rule_book() -> RuleBook:
    """Everything in rules/, compiled. Raises RuleError."""
    concepts = tuple(
        Concept(
            name,
            compiled(entry["en"], "en", f"{name}.en") if entry.get("en") else None,
            compiled(entry["zh"], "zh", f"{name}.zh") if entry.get("zh") else None,
        )
        for name, entry in _table("concepts").items()
    )
    rules = []
    for entry in _table("red_flags")["rule"]:
        when, names = truth(entry["when"], entry["id"])
        rules.append(
            Rule(
                entry["id"],
                entry["category"],
                entry["source"],
                when,
                names,
                entry.get("intent", False),
                entry.get("certain", False),
            )
        )
    contexts = {
        section: {
            key: compiled([value] if isinstance(value, str) else value, key[-2:], f"{section}.{key}")
            for key, value in entries.items()
        }
        for section, entries in _context_tables().items()
    }
    spelling = _table("spelling")
    words = frozenset(spelling["words"])
    return RuleBook(concepts, tuple(rules), contexts, Speller(words, frozenset(spelling["real"]), spelling["swaps"]))


def _context_tables() -> dict[str, dict[str, Any]]:
    tables = _table("context")
    figure = tables["figure"]
    tables["figure"] = {f"all_{lang}": figure[lang] for lang in ("en", "zh")}
    return tables
