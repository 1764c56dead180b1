"""`plain_text`: what an HTML fragment says, without its markup; script and style say nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

MAX_FRAGMENT = 40_000  # characters
_BREAKS = {"br", "p", "div", "li", "tr", "h1", "h2", "h3", "h4", "table", "ul", "ol"}
_SILENT = {"script", "style", "head", "title", "iframe", "object", "svg", "math", "template", "noscript"}


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.images = 0
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SILENT:
            self._silent += 1
        elif tag in _BREAKS:
            self.parts.append("\n")
        self.images += tag == "img"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts.append("\n" if tag in _BREAKS else "")
        self.images += tag == "img"

    def handle_endtag(self, tag: str) -> None:
        if tag in _SILENT:
            self._silent = max(0, self._silent - 1)
        elif tag in _BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def plain_text(html: str) -> str:
    """The words of an HTML fragment; blocks become lines."""
    return html_words(html)[0]


def html_words(html: str) -> tuple[str, int]:
    """The words, and how many images the fragment shows."""
    if "<" not in html and "&" not in html:
        return html.strip(), 0
    html = html[:MAX_FRAGMENT]
    words = _Words()
    try:
        if html.count("<") > html.count(">") + 50:  # no markup: the parser would search the rest again for each of them
            return html.strip(), 0
        words.feed(html)
        words.close()
    except AssertionError:  # of the standard library, over a marked section that makes no sense
        return html.strip(), 0
    lines = re.sub(r"[ \t\u00a0]+", " ", "".join(words.parts)).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.strip() for line in lines)).strip(), words.images
