"""The errors a person may see: what happened, why, and what to do now, in Chinese and in English.

Code raises these with both texts; whoever shows them (page, command line) picks the language with `message(lang)`.
Everything else that escapes is a bug and may show a traceback.
"""

from __future__ import annotations

from ming_app.reading import whole_text

LANGS = ("en", "zh")


class MingError(Exception):
    """A failure to explain to a person. `en` and `zh` are complete sentences; exit code 1 on the command line.

    They may quote a hostile file: what cannot be sent as UTF-8 is replaced."""

    exit_code = 1

    def __init__(self, en: str, zh: str):
        self.en, self.zh = whole_text(en), whole_text(zh)
        super().__init__(self.en)

    def message(self, lang: str) -> str:
        """The text in `lang` ("zh" or "en"; anything else reads as English)."""
        return self.zh if lang.startswith("zh") else self.en


class UsageError(MingError):
    """Wrong use of a command or function: unknown name, value out of range. Exit code 2 on the command line."""

    exit_code = 2


class FetchError(MingError):
    """Weights could not be obtained: network, wrong hash, no room, cache not writable."""


class WeightsError(MingError):
    """A weights file is damaged, hostile, truncated, or of a kind that is not supported."""


class UnknownModelError(MingError):
    """No model of that name; the message suggests the closest ones."""


class PreflightError(MingError):
    """The model cannot fit this machine; the message names what would."""


class AdapterError(MingError):
    """An adapter or checkpoint is damaged, hostile, incomplete, or made for another base."""


class PromptTooLongError(MingError):
    """The newest message alone does not fit the context; the message gives its token count and the limit."""


class StoppedError(MingError):
    """Work ended early because someone asked for it."""


class TraceError(MingError):
    """A router trace file is damaged, hostile or of an unknown version."""
