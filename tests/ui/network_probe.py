"""Run by test_ui_network.py in a process of its own: launches the page, uses it, prints which addresses were contacted.

An audit hook sees every name lookup, connection and bind of the process, also those of libraries' threads.
"""

from __future__ import annotations

import json
import logging
import sys
import time

contacted: set[str] = set()
bound: set[str] = set()


def watch(event: str, arguments: tuple) -> None:
    if event == "socket.getaddrinfo":
        contacted.add(str(arguments[0]))
    elif event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        contacted.add(str(address[0]) if isinstance(address, tuple) else f"unix:{address}")
    elif event == "socket.bind" and isinstance(arguments[1], tuple):
        bound.add(str(arguments[1][0]))


sys.addaudithook(watch)
logging.basicConfig(level=logging.DEBUG)  # everything any library would log goes to stderr, where the test reads it

from ming_app.settings import Settings  # noqa: E402
from ming_app.ui.launch import launch  # noqa: E402
from ming_app.ui.page import build_page  # noqa: E402
from tests.fakes import FakeEngine  # noqa: E402
from tests.ui.client import PageClient  # noqa: E402

QUESTION = "ZEBRAFISH private symptom 斑马鱼"
ANSWER = "QUOKKA answer 短尾矮袋鼠"

blocks = build_page(FakeEngine(ANSWER), Settings())
_, url, _ = launch(blocks, Settings(port=0), prevent_thread_lock=True, quiet=True)
client = PageClient(blocks, url)
page = client.http.get("/")
assert page.status_code == 200
client.call("arrive", None, "zh", "auto")
client.call("ask", None, QUESTION)
answered = client.call("answer", None, 0.7, 64, 0.9, 40, 0, 1.05, -1)
client.call("ask", None, "")  # a refusal
time.sleep(1)  # threads that phone home would have started by now
shown = json.dumps(answered[-1], ensure_ascii=False)
print("PROBE " + json.dumps({"contacted": sorted(contacted), "bound": sorted(bound), "answered": "QUOKKA" in shown}))
