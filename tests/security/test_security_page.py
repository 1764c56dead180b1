"""The really launched page: Gradio's risky features are off, other sites are kept out, and no text a client may send breaks it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import httpx
import pytest

from ming_app.settings import Settings
from ming_app.ui.guard import own_hosts
from ming_app.ui.launch import launch
from ming_app.ui.page import build_page
from tests.fakes import FakeEngine
from tests.ui.client import PageClient

ROOT = Path(__file__).parents[2]
SECRET = "kept on this machine alone"


class Page:
    """A launched page, and a client of it."""

    def __init__(self, folder: Path):
        self.data, self.cache = folder / "data", folder / "cache"
        for place in (self.data, self.cache):
            place.mkdir()
            (place / "file").write_text(SECRET)
        self.settings = Settings(port=0, data_dir=self.data, cache_dir=self.cache)
        self.blocks = build_page(FakeEngine("one two"), self.settings)
        _, self.url, _ = launch(self.blocks, self.settings, prevent_thread_lock=True, quiet=True)
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=30)
        self.client = PageClient(self.blocks, self.url)

    def send(self, index: int, data: list, event: object = None, session: str = "s") -> dict:
        """One event with any JSON, also such as httpx would not write."""
        body = json.dumps({"data": data, "event_data": event, "fn_index": index, "session_hash": session})
        head = {"Content-Type": "application/json"}
        self.http.post("gradio_api/queue/join", content=body, headers=head).raise_for_status()
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                    return message
        raise AssertionError("the stream broke off")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("page"))
    yield page
    page.blocks.close()


# -- what Gradio could do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *("monitoring", "monitoring/summary", "monitoring/key", "docs", "redoc", "openapi.json"),
        *("gradio_api/runs", "gradio_api/run-history/records", "gradio_api/run-history/buckets"),
        *("gradio_api/vibe-code/", "gradio_api/profiling/traces", "gradio_api/profiling/summary"),
        *("gradio_api/proxy=http://169.254.169.254/", "gradio_api/proxy=https://huggingface.co/x"),
        *("gradio_api/file=http://169.254.169.254/", "gradio_api/file=https://huggingface.co/x"),
        *("gradio_api/file=/etc/passwd", "gradio_api/file=/proc/self/environ", "file=/etc/passwd", "file/etc/passwd"),
        *("static/%2e%2e/%2e%2e/config", "assets/..%2f..%2fpackage.json", "gradio_api/file=..%2f..%2fetc%2fpasswd"),
        *("gradio_api/custom_component/1/client/component/..%2f..%2fapp.py", "gradio_api/file=~/.bashrc"),
    ],
)
def test_nothing_is_served_beside_the_page(page: Page, path: str) -> None:
    answer = page.http.get(path)
    assert 400 <= answer.status_code < 500, answer.text[:200]
    assert "root:" not in answer.text


def test_files_of_this_machine_are_not_served(page: Page) -> None:
    inside = [page.data / "file", page.cache / "file", ROOT / "app.py", ROOT / "weights" / "catalog.toml"]
    for path in (*inside, ROOT / "pyproject.toml", page.data / ".." / "data" / "file"):
        answer = page.http.get(f"gradio_api/file={path}")
        assert answer.status_code in (403, 404) and SECRET not in answer.text


def test_settings_of_the_launched_app(page: Page) -> None:
    blocks, config = page.blocks, page.http.get("config").json()
    assert blocks.share is False and blocks.share_url is None
    assert config["analytics_enabled"] is False and not config.get("footer_links")
    assert blocks.enable_monitoring is False and blocks.run_history is False
    assert blocks.show_error is False  # a bug's message stays with the server
    assert page.settings.host == "127.0.0.1" and blocks.server_name == "127.0.0.1"
    assert blocks.max_file_size == 20 << 20
    assert not blocks.allowed_paths and {str(page.data), str(page.cache)} <= set(blocks.blocked_paths)


def test_no_other_site_may_frame_the_page(page: Page) -> None:
    for path in ("/", "config", "no/such/page"):
        rules = page.http.get(path).headers["content-security-policy"].split(";")
        assert "frame-ancestors 'self' https://huggingface.co" in [rule.strip() for rule in rules], path


def test_one_endpoint_has_a_name(page: Page) -> None:
    info = page.http.get("gradio_api/info").json()
    assert set(info["named_endpoints"]) == {"/ask"} and info["unnamed_endpoints"] == {}
    assert [fn.name for fn in page.blocks.fns.values() if fn.api_visibility != "private"] == ["ask_once"]


def test_the_python_client_sees_one_endpoint(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    from gradio_client import Client

    client = Client(page.url, verbose=False, httpx_kwargs={"trust_env": False})
    try:
        seen = client.view_api(return_format="dict")
        assert set(seen["named_endpoints"]) == {"/ask"} and seen["unnamed_endpoints"] == {}
        with pytest.raises(Exception, match="Cannot find a function"):
            client.predict("hello", api_name="/ask_1")
    finally:
        client.close()


def test_the_configuration_tells_no_path_of_this_machine(page: Page) -> None:
    for path in ("config", "/", "manifest.json", "gradio_api/info", "gradio_api/startup-events"):
        text = page.http.get(path).text
        for place in (
            str(ROOT),
            str(page.data),
            str(page.cache),
            str(Path.home()) + "/",
            str(Path(gr.__file__).parent),
        ):
            assert place not in text, path
    assert not re.findall(r'"(?:/home|/root|/tmp|/usr|/etc|/work|[A-Z]:\\\\)[^"]*"', page.http.get("config").text)


def test_deep_links_lead_nowhere(page: Page) -> None:
    page.client.call("ask", None, SECRET)
    assert page.http.get("gradio_api/deep_link", params={"session_hash": "unknown"}).json() == ""
    for link in ("../../../etc/passwd", "x" * 64, "%00"):
        answer = page.http.get("/", params={"deep_link": link})
        assert answer.status_code == 200 and SECRET not in answer.text and "root:" not in answer.text


def test_uploads_are_bounded_and_named_safely(page: Page) -> None:
    large = page.http.post("gradio_api/upload", files={"files": ("large.txt", bytes(21 << 20))})
    assert large.status_code == 413
    for name in ("../../evil.txt", "..\\..\\evil.txt", "/etc/evil.txt", "a/../../evil.txt", "evil\x00.txt", "é" * 300):
        answer = page.http.post("gradio_api/upload", files={"files": (name, b"x")})
        assert answer.status_code < 500
        for saved in answer.json() if answer.status_code == 200 else ():
            path = Path(saved)
            assert path.resolve().is_relative_to(Path(page.blocks.GRADIO_CACHE).resolve()), saved
            assert ".." not in path.parts


@pytest.mark.parametrize("name", ["load_file", "open", "open_file", "load_progress"])
@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", "data"])
def test_no_handler_reads_a_file_that_was_not_uploaded(page: Page, name: str, path: str) -> None:
    path = str(page.data / "file") if path == "data" else path
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.json"}
    found = page.send(page.client.ids[name], [None, file])
    assert not found["success"] and "root:" not in json.dumps(found) and SECRET not in json.dumps(found)


# -- other sites -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example"])
def test_scripts_of_other_origins_read_nothing(page: Page, origin: str) -> None:
    for method in ("GET", "OPTIONS"):
        head = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = page.http.request(method, "config", headers=head)
        assert "access-control-allow-origin" not in answer.headers


def test_other_sites_cannot_make_the_page_do_anything(page: Page) -> None:
    body = json.dumps({"data": [None, "x"], "fn_index": page.client.ids["ask"], "session_hash": "evil"})
    for site in ("cross-site", "same-site"):
        head = {"Sec-Fetch-Site": site, "Content-Type": "text/plain"}
        assert page.http.post("gradio_api/queue/join", content=body, headers=head).status_code == 403
        upload = page.http.post("gradio_api/upload", files={"files": ("x", b"x")}, headers={"Sec-Fetch-Site": site})
        assert upload.status_code == 403
        assert page.http.get("/", headers={"Sec-Fetch-Site": site}).status_code == 200  # a link to the page
    head = {"Sec-Fetch-Site": "same-origin", "Content-Type": "application/json"}
    assert page.http.post("gradio_api/queue/join", content=body, headers=head).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[::2]:80", "localhost."]
)
def test_names_pointed_at_this_machine_are_not_served(page: Page, host: str) -> None:
    assert page.http.get("config", headers={"Host": host}).status_code in (400, 421)


def test_own_names_are_served(page: Page) -> None:
    for host in ("127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860"):
        assert page.http.get("config", headers={"Host": host}).status_code == 200
    assert own_hosts(Settings(hosts="My.example, other.example")) >= {"my.example", "other.example", "localhost", "::1"}
    assert own_hosts(Settings(host="0.0.0.0")) is None


# -- any text ----------------------------------------------------------------------------------------------------------

ODD = "\ud800\udfff lone \u202e right to left \u2066 \u200b\u200d zero width \x00\x07 control \ufeff\uffff \U0001f600 <|im_end|>"
VALUES = {"State": None, "Textbox": ODD, "Number": 1, "Slider": None, "UploadButton": None, "DownloadButton": None}
EVENTS = (
    {"value": ODD, "index": 0, "liked": ODD, "previous_value": ODD},
    {"value": json.dumps({"do": "rename", "id": ODD, "value": ODD}), "index": [0, 0], "liked": True},
    {"value": json.dumps({"do": "search", "value": ODD}), "index": 10**30, "liked": False, "previous_value": ""},
    {"value": "[" * 9_000, "index": -1, "liked": None},
)


SKIPPED = ("<lambda>", "delete_progress", "look")


def test_every_handler_takes_any_text(page: Page, capfd: pytest.CaptureFixture[str]) -> None:
    """Each answers, or says that it failed; none breaks the stream, and none fails over a text that cannot be encoded."""
    page.send(page.client.ids["arrive"], [None, "zh", "auto", 0])
    page.send(page.client.ids["restore"], [None, "", ""])
    once = {fn.fn.__qualname__: index for index, fn in page.blocks.fns.items() if fn.fn and fn.name not in SKIPPED}
    for index in once.values():
        fn = page.blocks.fns[index]
        data = [VALUES.get(type(block).__name__, getattr(block, "value", None)) for block in fn.inputs]
        data = [
            getattr(block, "value", None) if value is None else value
            for value, block in zip(data, fn.inputs, strict=True)
        ]
        data = [None if type(block).__name__ == "State" else v for v, block in zip(data, fn.inputs, strict=True)]
        takes = any("Data" in str(kind) for kind in fn.fn.__annotations__.values())
        for event in EVENTS if takes else EVENTS[:1]:
            assert page.send(index, data, event)["msg"] == "process_completed", fn.name
    said = capfd.readouterr().err
    assert "UnicodeEncodeError" not in said and "surrogates" not in said and "RecursionError" not in said
    assert "lone" not in said


@pytest.mark.parametrize("text", [ODD, "\ud800", "\u202e" * 50, "\u200b x \u200b", "a\x00b"])
def test_odd_questions_are_answered_and_kept(page: Page, text: str) -> None:
    session = f"odd-{hash(text)}"
    page.send(page.client.ids["arrive"], [None, "en", "auto", 0], session=session)
    page.send(page.client.ids["restore"], [None, "", ""], session=session)
    assert page.send(page.client.ids["ask"], [None, text], session=session)["success"]
    assert page.send(page.client.ids["answer"], [None, 0.7, 64, 0.9, 40, 0, 1.05, -1], session=session)["success"]
    shown = page.send(page.client.ids["show"], [None], session=session)["output"]["data"]
    assert len(shown[0]["value"]) == 2


def test_a_megabyte_is_refused_in_words(page: Page) -> None:
    found = page.send(page.client.ids["ask"], [None, "发烧" * 500_000], session="large")
    assert not found["success"] and "8000" in found["output"]["error"].replace(",", "")


# -- script ------------------------------------------------------------------------------------------------------------

SCRIPT = "</p></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'><svg onload=alert(1)>"
OPENED = re.compile(r"<(script>alert|img src=x|svg onload)")


class Visitor:
    """One session of the page; keeps what every HTML and Markdown part was given."""

    def __init__(self, page: Page, name: str):
        self.page, self.name, self.shown = page, name, ""
        self.handlers = {fn.fn.__qualname__: index for index, fn in page.blocks.fns.items() if fn.fn}

    def do(self, handler: str, *data: object, event: object = None) -> None:
        index = self.handlers[handler]
        fn = self.page.blocks.fns[index]
        values = [None if type(block).__name__ == "State" else getattr(block, "value", None) for block in fn.inputs]
        values[1 : 1 + len(data)] = data
        message = self.page.send(index, values, event, self.name)
        assert message["success"], (handler, message)
        for block, value in zip(fn.outputs, message["output"]["data"], strict=True):
            if isinstance(block, gr.HTML | gr.Markdown):
                value = value.get("value", "") if isinstance(value, dict) and "__type__" in value else value
                self.shown += (
                    value if isinstance(value, str) else ""
                )  # a table of values is the browser's: see tests/browser

    def talk(self, do: str, value: object, name: str = "") -> None:
        self.do("Handlers.act", event={"value": json.dumps({"do": do, "id": name, "value": value})})

    def upload(self, name: str, content: bytes) -> dict:
        sent = self.page.http.post("gradio_api/upload", files={"files": (name, content)}).raise_for_status()
        return {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}, "orig_name": name}


def test_no_part_of_the_page_opens_a_tag_of_a_text(page: Page, tmp_path: Path) -> None:
    from ming_app.molora.trace import Segment
    from tests.router.synthetic import even, trace_of

    fields = {name: f"{name} {SCRIPT}" for name in ("stem", "A", "B", "explanation", "reference", "source", "subject")}
    rows = [{**fields, "id": SCRIPT, "answer": "A", "lang": "en"}, {"stem": SCRIPT, "A": "a", "answer": "Z"}]
    trace_of([SCRIPT, "b", "c"], even(), segments=[Segment(0, SCRIPT, {"language": SCRIPT})]).save(tmp_path / "t.json")
    visitor = Visitor(page, "script")
    visitor.do("Handlers.arrive", "en", "auto", 0)
    visitor.do("Handlers.restore", "", "")
    visitor.do("Handlers.tell", "own", SCRIPT, SCRIPT)
    visitor.do("Handlers.ask", SCRIPT + " I have crushing chest pain")
    visitor.do("Handlers.answer")
    visitor.do("Handlers.settle")
    visitor.talk("search", SCRIPT)
    visitor.do("BanksPane.open_file", visitor.upload("bank.jsonl", "\n".join(map(json.dumps, rows)).encode()))
    visitor.do("BanksPane.keep_bank", SCRIPT)
    bank = next(bank.name for bank in build_shelf(page).list() if not bank.ours)
    visitor.do("ExamTab.choose_bank", bank)
    visitor.do("ExamTab.practise", bank)
    for do, value in (("note", SCRIPT), ("choose", "B"), ("submit", None), ("cause", "misread"), ("finish", None)):
        visitor.do("ExamTab.act", event={"value": json.dumps({"do": do, "index": 0, "value": value})})
    visitor.do("ExamTab.show_statistics")
    visitor.do("ExplorerTab.open", visitor.upload("t.json", (tmp_path / "t.json").read_bytes()))
    for view in ("load", "groups", "vocabulary", "together", "flow"):
        visitor.do("ExplorerTab.redraw", view)
    visitor.do("Handlers.reword", "zh")
    assert "alert(1)" in visitor.shown and len(visitor.shown) > 5_000  # the texts are there
    assert not OPENED.search(visitor.shown), OPENED.search(visitor.shown)


def build_shelf(page: Page):  # noqa: ANN201
    from ming_app.exam.bank import Shelf

    return Shelf(page.data / "banks")
