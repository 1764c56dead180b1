"""In front of the API: who may ask, and how much they may send how slowly. The page passes untouched.

With keys, a request needs one (`Authorization: Bearer`); keys are compared as digests in constant time. Without keys, only this
machine may ask: neither something that a proxy passed on, nor a web page of another site (Origin, DNS rebinding).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ming_app.errors import UsageError
from ming_app.serve.errors import ApiError

MAX_BODY_BYTES = 1 << 20
BODY_SECONDS = 20.0
"""in which a body must have arrived"""
MIN_KEY = 16
PASSED_ON = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via", "cf-connecting-ip")
PREFIXES = ("/v1", "/metrics")


def read_keys(text: str) -> tuple[bytes, ...]:
    """SHA-256 digests of keys: separated by commas, or in a file ("@path", one a line). Raises UsageError."""
    words: Sequence[str] = text.split(",")
    if text.startswith("@"):
        try:
            words = Path(text[1:]).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise UsageError(
                "The file of API keys cannot be read. MING_API_KEYS is keys separated by commas, or @ and a file's path.",
                "无法读取 API 密钥文件。MING_API_KEYS 应为以逗号分隔的密钥，或 @ 加文件路径。",
            ) from None
    keys = [word.strip() for word in words if word.strip()]
    if any(len(key) < MIN_KEY or not key.isascii() for key in keys) or (text.strip() and not keys):
        raise UsageError(
            f"An API key has at least {MIN_KEY} characters, all of them ASCII.",
            f"API 密钥至少 {MIN_KEY} 个字符，且只含 ASCII 字符。",
        )
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


class Guard:
    """ASGI middleware. `scope["state"]["visitor"]` of what it lets through names the key, or is "" for this machine."""

    def __init__(self, app: ASGIApp, keys: Sequence[bytes]):
        self.app, self.keys = app, tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _guarded(scope["path"]):
            await self.app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["visitor"] = self.visitor(scope)
            receive = await _whole(scope, receive)
        except ApiError as error:
            await error.response(language(scope))(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def visitor(self, scope: Scope) -> str:
        """Who asks. Raises ApiError."""
        headers = Headers(scope=scope)
        if not self.keys:
            if not from_this_machine(scope, headers):
                raise ApiError(
                    403,
                    "permission_error",
                    "loopback_only",
                    "Without API keys the API answers this machine only. Set MING_API_KEYS to open it to others.",
                    "未设置 API 密钥时，API 仅限本机使用。如需对外开放，请设置 MING_API_KEYS。",
                )
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.keys]  # all of them, whichever it is
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "authentication_error",
                "invalid_api_key",
                "This needs an API key of this server: Authorization: Bearer KEY.",
                "需要本服务的 API 密钥：Authorization: Bearer KEY。",
            )
        return f"key{matches.index(True)}"


def from_this_machine(scope: Scope, headers: Headers) -> bool:
    """Whether a program on this machine asks: by address, by the name it asked for, and not for a page of another site."""
    client = scope.get("client")
    if not client or not is_loopback(client[0]) or any(name in headers for name in PASSED_ON):
        return False
    try:
        names = [urlsplit(f"//{headers.get('host', '')}").hostname, _origin_host(headers.get("origin"))]
    except ValueError:  # no address at all
        return False
    return all(name is not None and is_loopback(name) for name in names)


def _origin_host(origin: str | None) -> str | None:
    return "localhost" if origin is None else urlsplit(origin).hostname


def is_loopback(host: str) -> bool:
    """Whether the name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def language(scope: Scope) -> str:
    """ "zh" where the client prefers Chinese, else "en"."""
    wanted = Headers(scope=scope).get("accept-language", "")
    return "zh" if wanted.lower().lstrip().startswith("zh") else "en"


def _guarded(path: str) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in PREFIXES)


async def _whole(scope: Scope, receive: Receive) -> Receive:
    """Reads the body; what then gives it to the app, and afterwards what the server says. Raises ApiError."""
    announced = Headers(scope=scope).get("content-length", "")
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            chunks = await _read(receive)
    except TimeoutError:
        raise ApiError(
            408,
            "invalid_request_error",
            "request_timeout",
            f"The request did not arrive within {BODY_SECONDS:.0f} seconds.",
            f"请求未能在 {BODY_SECONDS:.0f} 秒内完整到达。",
        ) from None
    first: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


async def _read(receive: Receive) -> Iterable[bytes]:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":  # the client has gone
            return []
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > MAX_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return chunks


def _too_large() -> ApiError:
    return ApiError(
        413,
        "invalid_request_error",
        "request_too_large",
        f"The request is larger than {MAX_BODY_BYTES >> 20} MB.",
        f"请求超过 {MAX_BODY_BYTES >> 20} MB。",
    )
