"""Components that know their words in both languages, so that one event can reword the whole page without a reload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from ming_app.ui.text import t

C = TypeVar("C")
Words = Callable[[str], dict[str, Any]]
"""language -> the constructor arguments that carry text, e.g. {"label": ..., "placeholder": ...}"""


class Bilingual:
    """Makes components and remembers how to reword them."""

    def __init__(self, lang: str):
        self.lang = lang
        self._parts: list[tuple[Any, Words]] = []

    def __call__(self, kind: Callable[..., C], words: Words, **options: Any) -> C:
        """`kind(**words(lang), **options)`, reworded by `updates` from now on."""
        made = kind(**words(self.lang), **options)
        self._parts.append((made, words))
        return made

    @property
    def components(self) -> list[Any]:
        """The outputs that `updates` belongs to, in order."""
        return [component for component, _ in self._parts]

    def updates(self, lang: str) -> list[Any]:
        """One update for each of `components`."""
        return [gr.update(**words(lang)) for _, words in self._parts]


def valued(key: str) -> Words:
    """Words of a component whose value is the text of `key`."""
    return lambda lang: {"value": t(lang, key)}


def labelled(key: str) -> Words:
    """Words of a component whose label is the text of `key`."""
    return lambda lang: {"label": t(lang, key)}
