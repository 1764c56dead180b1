"""Run by test_security_leaks.py in a process of its own: a visit to the launched page with secrets in everything a person can
write, and with failures on the way. Prints which addresses were contacted and the names of all files that were made.

An audit hook sees every name lookup, connection and bind of the process; every logger writes to stderr at its lowest level.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

contacted: set[str] = set()
opened: set[str] = set()


def watch(event: str, arguments: tuple) -> None:
    if event == "socket.getaddrinfo":
        contacted.add(str(arguments[0]))
    elif event in ("socket.connect", "socket.sendto"):
        contacted.add(str(arguments[1][0]) if isinstance(arguments[1], tuple) else f"unix:{arguments[1]}")
    elif event in ("open", "os.mkdir") and isinstance(arguments[0], str):
        opened.add(arguments[0])
    elif event == "os.rename":
        opened.add(str(arguments[1]))


sys.addaudithook(watch)
logging.basicConfig(level=1)

from ming_app.settings import Settings  # noqa: E402
from ming_app.ui.launch import launch  # noqa: E402
from ming_app.ui.page import build_page  # noqa: E402
from ming_app.ui.talks import Talks  # noqa: E402
from tests.fakes import FakeEngine  # noqa: E402
from tests.security.planted import SECRETS, secret  # noqa: E402
from tests.ui.client import PageClient  # noqa: E402


class Breaking(FakeEngine):
    """Fails in the middle of an answer, and its exception quotes question and answer, when the question asks for it."""

    def stream(self, messages: Any, params: Any, cancel: threading.Event | None = None) -> Iterator[Any]:
        for n, event in enumerate(super().stream(messages, params, cancel)):
            if n > 2 and any(message.content.startswith("break") for message in messages):
                raise ValueError(f"bad: {messages} {self.script}")
            yield event


def broken(*_: Any) -> None:
    raise KeyError(secret("handler"))


settings = Settings.load({"port": 0})
blocks = build_page(Breaking(f"one two three {secret('answer')}"), settings)
_, url, _ = launch(blocks, settings, prevent_thread_lock=True, quiet=True)
client = PageClient(blocks, url)
sampling = (0.7, 64, 0.9, 40, 0, 1.05, -1)
said: list[str] = []


def call(name: str, *data: Any, event: Any = None) -> bool:
    last = client.call(name, None, *data, event_data=event)[-1]
    said.append(json.dumps(last, ensure_ascii=False))
    return bool(last["success"])


def talks(do: str, value: Any, name: str = "") -> bool:
    return call("act", event={"value": json.dumps({"do": do, "id": name, "value": value})})


def upload(content: str) -> dict[str, Any]:
    files = {"files": ("bank.jsonl", content.encode())}
    path = client.http.post("gradio_api/upload", files=files).raise_for_status().json()[0]
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "bank.jsonl"}


done: dict[str, bool] = {"page": client.http.get("/").status_code == 200}
done["arrive"] = call("arrive", "zh", "auto", 0)
done["restore"] = call("restore", "", "")
done["system"] = call("tell", "own", secret("system"), secret("start"))
done["ask"] = call("ask", secret("question")) and call("answer", *sampling)
done["save_trace"] = call("save")
done["ask_broken"] = call("ask", f"break {secret('question')}") and call("answer", *sampling)
done["settle"] = call("settle")
shown = json.loads(said[-1])["output"]["data"]
[listed] = [one for one in shown if isinstance(one, dict) and "items" in one]
talk = listed["items"][0]["id"]
done["rename"] = talks("rename", secret("title"), talk)
done["search"] = talks("search", secret("search"))
for kind in ("markdown", "html", "json", "all", "feedback"):
    done[f"export_{kind}"] = talks("export", kind)
row = {name: secret(f"bank_{name}") for name in ("stem", "A", "B", "explanation")}
done["open_bank"] = call("open_file", upload(json.dumps({**row, "answer": "A"})))
done["keep_bank"] = call("keep_bank", "Bank")
done["save_progress"] = call("save_progress")
# what a client of somebody's own may send, and bugs
done["forged_choice_refused"] = not call("choose_mode", secret("forged"))
done["forged_number_refused"] = not call("answer", secret("forged"), *sampling[1:])
done["forged_bank_refused"] = not call("choose_bank", secret("forged"))
done["forged_path_refused"] = not call(
    "load_file", {"path": f"/etc/{secret('path')}", "meta": {"_type": "gradio.FileData"}}
)
Talks._search = broken  # type: ignore[method-assign]
import ming_app.ui.talks as talks_module  # noqa: E402

talks_module._ACTIONS = {**talks_module._ACTIONS, "search": broken}  # type: ignore[assignment]
done["bug_in_a_handler"] = not talks("search", secret("search"))
for method, path, body in (
    ("GET", f"/gradio_api/file={quote(secret('path'))}", None),
    ("GET", f"/config?x={quote(secret('path'))}", None),
    ("POST", "/gradio_api/queue/join", f'{{"data": "{secret("forged")}'.encode()),
):
    http = HTTPConnection("127.0.0.1", urlsplit(url).port)  # httpx would log what it asks for
    http.request(method, path, body, {"Content-Type": "application/json", "Cookie": f"a={quote(secret('header'))}"})
    http.getresponse().read()
shown = "".join(said)
blocks.close()
made = sorted(
    {
        str(path)
        for root in (tempfile.gettempdir(), os.environ["MING_DATA_DIR"], os.environ["MING_CACHE_DIR"])
        for path in Path(root).rglob("*")
    }
)
report = {
    "done": done,
    "contacted": sorted(contacted),
    "files": made,
    "opened": sorted(name for name in opened if any(word in name for word in SECRETS)),
    "answered": secret("answer") in shown,
}
print("PROBE " + json.dumps(report, ensure_ascii=True))
