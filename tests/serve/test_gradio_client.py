"""The page's one endpoint, /ask, through the real gradio_client: over `serve`, and over the page alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from ming_app.engine.types import Message, SamplingParams
from ming_app.safety.notices import AI_LABEL
from ming_app.ui.launch import launch
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import build_page
from tests.fakes import FakeEngine, long_text
from tests.serve.conftest import settings

KEYS = {"text", "finish_reason", "warning", "notes", "ai_label"}


def connect(url: str) -> Client:
    return Client(url, verbose=False)


@pytest.fixture
def page(tmp_path) -> Iterator[Callable[[Any], Client]]:
    """`page(engine or loader)`: a client of the page alone."""
    opened = []

    def open_page(engine: Any) -> Client:
        loader = engine if isinstance(engine, EngineLoader) else EngineLoader.of(engine)
        chosen = settings(tmp_path)
        blocks = build_page(loader, chosen)
        opened.append(blocks)
        _, url, _ = launch(blocks, chosen, prevent_thread_lock=True)
        return connect(url)

    yield open_page
    for blocks in opened:
        blocks.close()


def refused(client: Client, **asked: Any) -> str:
    with pytest.raises(AppError) as caught:
        client.predict(api_name="/ask", **asked)
    return str(caught.value)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def test_an_answer_over_serve_is_the_engines(serve) -> None:
    served = serve()
    client = connect(served.url)
    said = client.predict("发烧 cough", "zh", 24, 7, api_name="/ask")
    events = list(served.engine.stream([Message("user", "发烧 cough")], SamplingParams(24, seed=7)))
    assert set(said) == KEYS and said["text"] == "".join(getattr(event, "text", "") for event in events)
    assert said["finish_reason"] == events[-1].reason and said["ai_label"] == AI_LABEL["zh"]
    assert client.predict("发烧 cough", "zh", 24, 7, api_name="/ask") == said


def test_over_serve_a_cancelled_job_frees_the_model(serve) -> None:
    served = serve(pause=0.02)
    job = connect(served.url).submit("发烧 cough", "en", 400, 3, api_name="/ask")
    served.until(lambda: served.engine.load_now()[0] == 1 and len(job.outputs()) > 1)
    assert job.cancel()
    served.until(lambda: served.engine.load_now() == (0, 0))
    assert served.outcomes[-1].reason == "cancelled" and served.outcomes[-1].new_tokens < 400


def test_an_answer_streams_and_ends_complete(page) -> None:
    engine = FakeEngine(long_text(60), delay=0.02)
    job = page(engine).submit("我突然胸口剧痛，出冷汗", lang="zh", api_name="/ask")
    said = list(job)
    assert len(said) > 3 and said[-1]["text"] == long_text(60) and said[-1]["finish_reason"] == "stop"
    assert said[0]["text"] == "" and all("120" in one["warning"] for one in said), "the warning comes before any word"
    assert all(later["text"].startswith(one["text"]) for one, later in itertools.pairwise(said))
    assert {one["finish_reason"] for one in said[:-1]} == {None}


def test_notes_stand_beside_an_answer(page) -> None:
    said = page(FakeEngine("Take 500 mg of ibuprofen twice daily.")).predict("What helps?", api_name="/ask")
    assert len(said["notes"]) == 1 and said["warning"] == ""


def test_what_cannot_be_asked_is_refused_in_words(page) -> None:
    engine = FakeEngine()
    client = page(engine)
    assert refused(client, question=" ", lang="zh") == "请先输入问题。"
    assert (
        refused(client, question="q" * 9000)
        == "The question has 9000 characters; at most 8000 can be sent. Please shorten it."
    )
    for wrong in ({"a": 1}, ["q"], 3, None):
        assert refused(client, question=wrong) == "The question must be text."
        assert refused(client, question=wrong, lang="zh") == "问题应为文本。"
    for wrong in ("x", 2.5, True, None, {"secret": "s"}):
        assert refused(client, question="q", max_new_tokens=wrong) == "max_new_tokens must be a whole number."
        assert refused(client, question="q", seed=wrong) == "seed must be a whole number."
    assert "between 1 and" in refused(client, question="q", max_new_tokens=0)
    assert refused(client, question="q", seed=1 << 70) == "seed must be a whole number from 0 up."
    assert engine.calls == [] and engine.load_now() == (0, 0)
    assert client.predict("q", {"no": "language"}, 5.0, -1.0, api_name="/ask")["ai_label"] == AI_LABEL["en"]


def test_before_there_is_a_model_it_says_so(page) -> None:
    client = page(EngineLoader(lambda progress: FakeEngine()))
    assert refused(client, question="q").startswith("The model is still loading.")


def test_a_failure_is_named_without_the_persons_words(page) -> None:
    def breaks(messages: Any) -> str:
        raise KeyError(messages[-1].content)

    said = refused(page(FakeEngine(breaks)), question="my private illness")
    assert "(KeyError)" in said and "private" not in said


def test_a_cancelled_job_frees_the_engine(page) -> None:
    engine = FakeEngine(long_text(2000), delay=0.01)
    job = page(engine).submit("q", max_new_tokens=4000, api_name="/ask")
    until(lambda: engine.open_streams == 1 and len(job.outputs()) > 1)
    assert job.cancel()
    until(lambda: engine.open_streams == 0 and engine.load_now() == (0, 0))


def test_no_other_endpoint_is_named(page) -> None:
    client = page(FakeEngine())
    api = client.view_api(return_format="dict", print_info=False)
    assert set(api["named_endpoints"]) == {"/ask"} and api["unnamed_endpoints"] == {}
    names = [one["parameter_name"] for one in api["named_endpoints"]["/ask"]["parameters"]]
    assert names == ["question", "lang", "max_new_tokens", "seed"]
    for guessed in ("/answer", "/ask_1", "/load"):
        with pytest.raises(ValueError, match="Cannot find a function"):
            client.predict("q", api_name=guessed)
    private = [index for index, one in client.endpoints.items() if one.is_valid and one.api_name != "/ask"]
    assert private == []
