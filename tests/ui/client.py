"""Drives a launched page over HTTP as a browser does (Gradio's queue protocol), so that no browser is needed."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import gradio as gr
import httpx


class PageClient:
    """One visitor. `call(name, ...)` runs the event whose handler has that function name and gives its messages."""

    def __init__(self, blocks: gr.Blocks, url: str):
        self.ids: dict[str, int] = {}
        for index, fn in blocks.fns.items():
            if fn.api_visibility == "private":
                self.ids.setdefault(fn.name or "", index)
        self.session = uuid.uuid4().hex[:10]
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def call(self, name: str, *data: Any, event_data: Any = None) -> list[dict[str, Any]]:
        return list(self.stream(name, *data, event_data=event_data))

    def stream(self, name: str, *data: Any, event_data: Any = None) -> Iterator[dict[str, Any]]:
        """Messages of the event stream, up to process_completed."""
        body = {"data": list(data), "event_data": event_data, "fn_index": self.ids[name], "session_hash": self.session}
        self.http.post("gradio_api/queue/join", json=body).raise_for_status()
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line[5:])
                    yield message
                    if message["msg"] == "process_completed":
                        return
