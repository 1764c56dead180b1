"""The HTTP API against the client it is made for: OpenAI's own, over a real server and the tiny model."""

from __future__ import annotations

import json
import threading

import httpx
import openai
import pytest

from ming_app.engine.types import Finish, Message, SamplingParams
from ming_app.molora.trace import RouterTrace

ASK = [{"role": "user", "content": "发烧 cough"}]
PLAIN = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 24}


def test_one_model_is_listed(serve) -> None:
    client = serve().client()
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.owned_by == "ming-app" and model.ming["num_experts"] == 4
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_an_answer_is_the_engines(serve) -> None:
    served = serve()
    reply = served.client().chat.completions.create(**PLAIN)
    params = SamplingParams(24, temperature=0)
    events = list(served.engine.stream([Message("user", "发烧 cough")], params))
    text, finish = "".join(getattr(event, "text", "") for event in events), events[-1]
    (choice,) = reply.choices
    assert choice.message.content == text and choice.message.role == "assistant"
    assert choice.finish_reason == {"stop": "stop", "length": "length"}[finish.reason]
    assert reply.usage.prompt_tokens == finish.prompt_tokens and reply.usage.completion_tokens == finish.new_tokens
    assert reply.usage.total_tokens == finish.prompt_tokens + finish.new_tokens
    assert reply.object == "chat.completion" and reply.model == "tiny" and reply.system_fingerprint.startswith("fp_")
    assert reply.ming["ai_label"] and reply.ming["warning"] is None and reply.ming["finish_reason"] == finish.reason
    again = served.client().chat.completions.create(**PLAIN)
    assert again.usage.prompt_tokens_details.cached_tokens > 0 and again.choices[0].message.content == text


def test_a_stream_says_the_same(serve) -> None:
    client = serve().client()
    asked = {**PLAIN, "temperature": 0.9, "seed": 7, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].ming["ai_label"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].object == "chat.completion.chunk"
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    told = [one for choice in choices if choice.logprobs for one in choice.logprobs.content or []]
    assert told == whole.choices[0].logprobs.content
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert client.chat.completions.create(**{**asked, "seed": 8}).choices[0].message.content != (
        whole.choices[0].message.content
    )


def test_log_probabilities_are_the_models(serve) -> None:
    client = serve().client()
    reply = client.chat.completions.create(**PLAIN, logprobs=True, top_logprobs=4)
    told = reply.choices[0].logprobs.content
    assert len(told) == reply.usage.completion_tokens
    assert (
        bytes(byte for one in told for byte in one.bytes)
        .decode("utf-8", "replace")
        .startswith(reply.choices[0].message.content[:4])
    )
    for one in told:
        beside = [other.logprob for other in one.top_logprobs]
        assert len(beside) == 4 and beside == sorted(beside, reverse=True) and max(beside) <= 0
        assert one.logprob <= beside[0] + 1e-6
    without = client.chat.completions.create(**PLAIN)
    assert without.choices[0].logprobs is None


def test_stop_texts_end_it(serve) -> None:
    client = serve().client()
    text = client.chat.completions.create(**PLAIN).choices[0].message.content
    assert len(text) > 8
    cut = client.chat.completions.create(**PLAIN, stop=[text[6:8]])
    assert cut.choices[0].message.content == text[: text.index(text[6:8])] and cut.choices[0].finish_reason == "stop"


def test_the_routers_trace_is_returned(serve, tmp_path) -> None:
    served = serve()
    client = served.client()
    reply = client.chat.completions.create(**PLAIN, extra_body={"router_trace": True})
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(reply.ming["router_trace"]), encoding="utf-8")
    trace = RouterTrace.load(path)
    *_, finish = served.engine.stream([Message("user", "发烧 cough")], SamplingParams(24, temperature=0))
    assert isinstance(finish, Finish) and (trace.experts == finish.trace.experts).all()
    assert abs(trace.weights - finish.trace.weights).max() < 1e-3 and trace.tokens == finish.trace.tokens
    streamed = list(client.chat.completions.create(**PLAIN, stream=True, extra_body={"router_trace": True}))
    assert streamed[-1].ming["router_trace"]["experts"] == reply.ming["router_trace"]["experts"]
    banned = client.chat.completions.create(**PLAIN, extra_body={"router_trace": True, "interventions": ["ban:2"]})
    used = {one for token in banned.ming["router_trace"]["experts"] for layer in token for p in layer for one in p}
    assert used == {0, 1, 3}
    assert "router_trace" not in client.chat.completions.create(**PLAIN).ming


def test_an_emergency_is_told_before_the_model_speaks(serve) -> None:
    client = serve().client()
    asked = {**PLAIN, "messages": [{"role": "user", "content": "我突然胸口剧痛，出冷汗"}]}
    whole = client.chat.completions.create(**asked)
    assert whole.ming["warning"]["category"] == "cardiac" and "120" in whole.ming["warning"]["action"]
    first = next(iter(client.chat.completions.create(**asked, stream=True)))
    assert first.ming["warning"] == whole.ming["warning"] and first.choices[0].delta.content == ""


def test_a_conversation_may_be_parts_and_may_be_continued(serve) -> None:
    client = serve().client()
    parts = [{"role": "user", "content": [{"type": "text", "text": "发烧 "}, {"type": "text", "text": "cough"}]}]
    whole = client.chat.completions.create(**PLAIN)
    assert client.chat.completions.create(**{**PLAIN, "messages": parts}).choices == whole.choices
    told = [{"role": "developer", "content": "Be brief."}, *ASK, {"role": "assistant", "content": "Rest"}]
    assert client.chat.completions.create(**{**PLAIN, "messages": told}).usage.completion_tokens


@pytest.mark.parametrize(
    ("changed", "status", "param", "code"),
    [
        ({"model": "gpt-5"}, 404, "model", "model_not_found"),
        ({"temperature": 9}, 400, "temperature", "invalid_value"),
        ({"top_p": 0}, 400, "top_p", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"n": 2}, 400, "n", "invalid_value"),
        ({"presence_penalty": 1}, 400, "presence_penalty", "invalid_value"),
        ({"stop": ["a"] * 9}, 400, "stop", "invalid_value"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "system", "content": "x"}] * 2}, 400, None, "invalid_value"),
        ({"messages": [{"role": "user", "content": "cough " * 900}]}, 400, "messages", "context_length_exceeded"),
        ({"extra_body": {"tools": []}}, 400, "tools", "unsupported_parameter"),
        ({"extra_body": {"interventions": ["burn:3"]}}, 400, "interventions", "invalid_value"),
        ({"extra_body": {"interventions": ["ban:9"]}}, 400, None, "invalid_value"),
    ],
)
def test_what_cannot_be_is_refused_by_name(serve_once, changed, status, param, code) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        serve_once.client().chat.completions.create(**{**PLAIN, **changed})
    assert (caught.value.status_code, caught.value.param, caught.value.code) == (status, param, code)
    assert caught.value.type == "invalid_request_error" and len(caught.value.body["message"]) > 8


def test_errors_speak_the_clients_language(serve_once) -> None:
    for lang, word in (("zh-CN,zh;q=0.9", "没有"), ("fr", "no ")):
        reply = httpx.get(f"{serve_once.url}/v1/nothing", headers={"accept-language": lang})
        assert reply.status_code == 404 and word in reply.json()["error"]["message"]
    assert httpx.delete(f"{serve_once.url}/v1/models").status_code in (404, 405)
    for body in (
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 99999,
    ):
        reply = httpx.post(
            f"{serve_once.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error", body[:20]


def test_health_readiness_and_counters(serve) -> None:
    served = serve()
    served.client().chat.completions.create(**PLAIN)
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/ready").json() == {"status": "ready", "running": 0, "waiting": 0}
    served.until(lambda: len(served.outcomes) == 1)
    counters = httpx.get(f"{served.url}/metrics")
    assert counters.headers["content-type"].startswith("text/plain")
    outcome = served.outcomes[0]
    assert f'ming_requests_total{{reason="{outcome.reason}"}} 1.0' in counters.text
    assert f'ming_tokens_total{{kind="new"}} {float(outcome.new_tokens)}' in counters.text
    assert "ming_first_token_seconds_count 1.0" in counters.text and "process_resident_memory_bytes" in counters.text


def test_a_full_queue_is_429_with_a_time(serve) -> None:
    served = serve(pause=0.02, slots=1, max_waiting=1)
    endless = {**PLAIN, "max_tokens": 300}
    done: list[object] = []
    threads = [
        threading.Thread(target=lambda: done.append(served.client().chat.completions.create(**endless)))
        for _ in range(2)
    ]
    for count, thread in enumerate(threads, 1):
        thread.start()
        served.until(lambda: sum(served.engine.load_now()) == count)  # noqa: B023 (asked at once)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            served.client().chat.completions.create(**PLAIN, stream=stream)
        assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "queue_full"
    for thread in threads:
        thread.join()
    assert len(done) == 2


def test_one_user_does_not_take_all_places(serve) -> None:
    served = serve(pause=0.02, slots=1, per_visitor=1)
    first = served.client().chat.completions.create(**{**PLAIN, "max_tokens": 300}, user="ann", stream=True)
    next(iter(first))
    with pytest.raises(openai.RateLimitError) as caught:
        served.client().chat.completions.create(**PLAIN, user="ann")
    assert caught.value.code == "too_many_requests"
    first.close()
    served.until(lambda: served.engine.load_now() == (0, 0))
    assert served.client().chat.completions.create(**PLAIN, user="ann").choices


def test_while_the_model_loads_or_failed(tmp_path) -> None:
    from ming_app.errors import FetchError
    from ming_app.ui.loader import EngineLoader, LoadState
    from tests.serve.conftest import run_server, settings, stop

    loader = EngineLoader(lambda progress: None)
    served = run_server(loader, settings(tmp_path))
    for state, code in ((LoadState(), "loading"), (LoadState(error=FetchError("no", "no")), "failed")):
        loader.state = state
        with pytest.raises(openai.InternalServerError) as caught:
            served.client().chat.completions.create(**PLAIN)
        assert caught.value.status_code == 503 and caught.value.code == code
        assert int(caught.value.response.headers["retry-after"]) > 0
        ready = httpx.get(f"{served.url}/ready")
        assert ready.status_code == 503 and ready.json() == {"status": code}
        assert httpx.get(f"{served.url}/health").status_code == 200
    stop(served)


def test_a_bug_fails_that_request_alone_and_says_no_words(serve, monkeypatch, caplog) -> None:
    served = serve()
    good = served.client().chat.completions.create(**PLAIN).choices[0].message.content
    words = "secret words"
    with monkeypatch.context() as broken:
        broken.setattr("ming_app.engine.jobs.Sampler.choose", lambda *_: int(words))
        for stream in (False, True):
            with pytest.raises((openai.InternalServerError, openai.APIError)) as caught:
                list(served.client().chat.completions.create(**PLAIN, stream=stream))
            assert "ValueError" in str(caught.value) and "secret" not in str(caught.value)
    assert "secret" not in caplog.text and "ValueError" in caplog.text
    assert served.client().chat.completions.create(**PLAIN).choices[0].message.content == good
    with monkeypatch.context() as broken:
        broken.setattr(served.engine.backend, "forward", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no")))
        with pytest.raises(openai.InternalServerError):
            served.client().chat.completions.create(**PLAIN)
    assert served.client().chat.completions.create(**PLAIN).choices[0].message.content == good
    assert served.engine.load_now() == (0, 0)
