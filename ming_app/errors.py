"""The errors a person may see: what happened, why, and what to do now, in Chinese and in English.

Code raises these with both texts; whoever shows them (page, command line) picks the language with `message(lang)`.
Everything else that escapes is a bug and may show a traceback.
"""

from __future__ import annotations

import copyreg
from typing import Any

from ming_app.reading import whole_text

LANGS = ("en", "zh")


class MingError(Exception):
    """A failure to explain to a person. `en` and `zh` are complete sentences; exit code 1 on the command line.

    They may quote a hostile file: what cannot be sent as UTF-8 is replaced."""

    exit_code = 1

    def __init__(self, en: str, zh: str):
        self.en, self.zh = whole_text(en), whole_text(zh)
        super().__init__(self.en)

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self), self.en), self.__dict__  # type: ignore[attr-defined]  # whatever its __init__

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


class BusyError(MingError):
    """The model cannot take the request now. `kind`: "full" (too many wait), "visitor" (too many of one visitor's), "closing"
    (the server stops), "lost" (the machine that was answering is gone). `retry_after`: seconds after which trying again may work."""

    def __init__(self, kind: str, retry_after: float, en: str, zh: str):
        super().__init__(en, zh)
        self.kind, self.retry_after = kind, retry_after

    @classmethod
    def full(cls, waiting: int, seconds: float) -> BusyError:
        return cls(
            "full",
            seconds,
            f"{waiting} requests are waiting already, so yours was not taken. Please try again in about {seconds:.0f} seconds.",
            f"当前已有 {waiting} 个请求在排队，暂时无法受理。请约 {seconds:.0f} 秒后再试。",
        )

    @classmethod
    def visitor(cls, allowed: int, seconds: float) -> BusyError:
        return cls(
            "visitor",
            seconds,
            f"You have {allowed} unfinished requests already. Please wait until one of them has ended, or stop it.",
            f"您已有 {allowed} 个未完成的请求。请等待其中一个结束，或将其停止。",
        )

    @classmethod
    def closing(cls) -> BusyError:
        return cls(
            "closing",
            10,
            "The server is being stopped and takes no new requests. Please try again in a moment.",
            "服务器正在停止，不再受理新请求。请稍后再试。",
        )

    @classmethod
    def lost(cls) -> BusyError:
        return cls(
            "lost",
            2,
            "The machine that was answering is no longer there, so this answer ended. Another takes over: please ask again.",
            "正在作答的机器已不可用，本次回答中断。其他机器会接替，请重新提问。",
        )


class NotReadyError(MingError):
    """There is no model yet: it is still being loaded, or (`failed`) could not be."""

    def __init__(self, failed: bool):
        self.failed = failed
        if failed:
            super().__init__(
                "The model could not be loaded; the page and the log say why, and what to do.",
                "模型加载失败；原因与处理办法见页面或日志。",
            )
        else:
            super().__init__("The model is still loading. Please try again in a moment.", "模型仍在加载，请稍后再试。")


class QuotaError(MingError):
    """The GPU time that a visitor may use is used up; the message says until when."""


class TraceError(MingError):
    """A router trace file is damaged, hostile or of an unknown version."""
