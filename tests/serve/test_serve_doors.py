"""Who may ask the API and how: keys, this machine only, sizes, slow and vanishing clients, a server that stops, fuzzed requests."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import signal
import socket
import threading
import time

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from starlette.datastructures import Headers

from ming_app.errors import UsageError
from ming_app.serve import guard
from ming_app.serve.guard import Guard, from_this_machine, read_keys
from ming_app.serve.server import PatientProtocol

KEYS = "first-key-of-this-server,second-key-of-this-server"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "发烧 cough"}], "temperature": 0, "max_tokens": 8}
ENDLESS = {**ASK, "max_tokens": 300}  # greedy, this model goes on for longer


# -- keys -------------------------------------------------------------------------------------------------------------


def test_with_keys_one_of_them_is_needed(serve) -> None:
    served = serve(api_keys=KEYS)
    for key in KEYS.split(","):
        assert served.client(key).models.list().data[0].id == "tiny"
        assert served.client(key).chat.completions.create(**ASK).choices
    for key in ("wrong-key-of-this-server", KEYS, "first-key-of-this-serve", "ключ"):
        reply = httpx.get(f"{served.url}/v1/models", headers={"authorization": f"Bearer {key}".encode()})
        assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["error"]["code"] == "invalid_api_key" and key not in reply.text
    with pytest.raises(openai.AuthenticationError):
        served.client("x" * 40).chat.completions.create(**ASK)
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    assert httpx.get(f"{served.url}/v1/models", headers={"authorization": KEYS.split(",")[0]}).status_code == 401
    assert httpx.get(f"{served.url}/health").status_code == httpx.get(f"{served.url}/ready").status_code == 200
    page = httpx.get(served.url)
    assert page.status_code == 200 and not any(key in page.text for key in KEYS.split(","))


def test_every_key_is_compared_whichever_it_is(monkeypatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append(len(a)) or real(a, b))
    door = Guard(None, read_keys(KEYS))  # type: ignore[arg-type]
    scope = {"type": "http", "headers": [(b"authorization", b"Bearer first-key-of-this-server")]}
    assert door.visitor(scope) == "key0" and compared == [32, 32]


def test_keys_come_from_a_file_too(tmp_path) -> None:
    path = tmp_path / "keys"
    path.write_text("\n".join(KEYS.split(",")) + "\n\n", encoding="utf-8")
    assert read_keys(f"@{path}") == read_keys(KEYS) and read_keys("") == ()
    for bad in ("short", "short,first-key-of-this-server", f"@{tmp_path}/none", " , ", "ключ-ключ-ключ-ключ"):
        with pytest.raises(UsageError):
            read_keys(bad)


def test_keys_are_not_shown(tmp_path) -> None:
    from ming_app.settings import Settings

    assert "first-key" not in repr(Settings(api_keys=KEYS))


@pytest.mark.parametrize(
    ("client", "headers", "may"),
    [
        ("127.0.0.1", {"host": "127.0.0.1:7860"}, True),
        ("::1", {"host": "[::1]:7860"}, True),
        ("127.0.0.1", {"host": "localhost"}, True),
        ("127.0.0.1", {"host": "localhost", "origin": "http://localhost:7860"}, True),
        ("10.0.0.9", {"host": "127.0.0.1"}, False),
        ("10.0.0.9", {"host": "127.0.0.1", "x-forwarded-for": "127.0.0.1"}, False),
        ("127.0.0.1", {"host": "127.0.0.1", "x-forwarded-for": "127.0.0.1"}, False),
        ("127.0.0.1", {"host": "127.0.0.1", "forwarded": "for=127.0.0.1"}, False),
        ("127.0.0.1", {"host": "rebound.example"}, False),
        ("127.0.0.1", {"host": "127.0.0.1.example.org"}, False),
        ("127.0.0.1", {}, False),
        ("127.0.0.1", {"host": "localhost", "origin": "https://example.org"}, False),
        ("127.0.0.1", {"host": "localhost", "origin": "null"}, False),
        ("127.0.0.1", {"host": "["}, False),
        ("127.0.0.1", {"host": "localhost", "origin": "http://["}, False),
    ],
)
def test_without_keys_only_this_machine_may_ask(client, headers, may) -> None:
    assert from_this_machine({"client": (client, 1)}, Headers(headers)) is may


def test_a_page_of_another_site_cannot_ask(serve) -> None:
    served = serve()
    reply = httpx.post(f"{served.url}/v1/chat/completions", json=ASK, headers={"origin": "https://example.org"})
    assert reply.status_code == 403 and "access-control-allow-origin" not in reply.headers
    assert httpx.get(f"{served.url}/v1/models", headers={"x-forwarded-for": "127.0.0.1"}).status_code == 403
    for path in ("//v1/models", "/v1/../v1/models", "/V1/models", "/%76%31/models"):
        reply = httpx.get(f"{served.url}{path}", headers={"host": "rebound.example"})
        assert "tiny" not in reply.text, path


def test_no_word_and_no_key_is_logged_or_counted(serve, monkeypatch, caplog, capfd, tmp_path) -> None:
    caplog.set_level(logging.DEBUG)
    for noisy in ("httpx", "httpcore", "openai"):  # the client's own, which is not ours
        logging.getLogger(noisy).setLevel(logging.WARNING)
    served = serve(api_keys=KEYS)
    client = served.client(KEYS.split(",")[0])
    words = {"messages": [{"role": "user", "content": "ZEBRAFISH 斑马鱼"}], "user": "QUOKKA"}
    said = client.chat.completions.create(**{**ASK, **words}).choices[0].message.content
    for wrong in ({"model": "NARWHAL"}, {"temperature": 9}, {"stop": [""]}, {"extra_body": {"NARWHAL": "OKAPI"}}):
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(**{**ASK, **words, **wrong})
    with monkeypatch.context() as broken:
        broken.setattr("ming_app.engine.jobs.Sampler.choose", lambda *_: int("ZEBRAFISH"[:4]))
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(**{**ASK, **words})
    counted = httpx.get(f"{served.url}/metrics", headers={"authorization": f"Bearer {KEYS.split(',')[1]}"})
    assert counted.status_code == 200 and said is not None
    out = capfd.readouterr()
    logged = "\n".join(record.getMessage() for record in caplog.records) + out.out + out.err + counted.text
    logged += "\n".join(str(path) for path in tmp_path.rglob("*"))
    assert "a request failed: ValueError" in logged
    for word in ("ZEBRAFISH 斑", "斑马鱼", "QUOKKA", "NARWHAL", "OKAPI", *KEYS.split(",")):
        assert word not in logged, word


# -- sizes and slowness -----------------------------------------------------------------------------------------------


def test_large_bodies_are_refused(serve) -> None:
    served = serve()
    address = f"{served.url}/v1/chat/completions"
    large = json.dumps({**ASK, "messages": [{"role": "user", "content": "a" * guard.MAX_BODY_BYTES}]}).encode()

    def chunks():
        yield large

    for body in (large, chunks()):
        reply = httpx.post(address, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 413 and reply.json()["error"]["code"] == "request_too_large"
    many = {**ASK, "messages": [{"role": "user", "content": "a"}] * 10_000}
    assert httpx.post(address, json=many).status_code == 400
    deep = {**ASK, "messages": [{"role": "user", "content": "x" * 90_000}]}
    assert httpx.post(address, json=deep, timeout=60).json()["error"]["code"] == "context_length_exceeded"
    assert served.client().chat.completions.create(**ASK).choices


def connection(served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_slow_clients_are_let_go(serve, monkeypatch) -> None:
    monkeypatch.setattr("ming_app.serve.server.HEADER_SECONDS", 1.5)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.4)
    served = serve()
    with connection(served) as silent, connection(served) as dripping:
        dripping.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        assert silent.recv(1) == b"" and dripping.recv(1) == b""
    with connection(served) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    with httpx.Client(base_url=served.url) as patient:  # one after the other on the same connection, with a pause
        for _ in range(2):
            assert patient.get("/health").status_code == 200
            time.sleep(0.1)
    assert issubclass(PatientProtocol, asyncio.Protocol)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\x00: 3\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_odd_requests_end_politely(serve_once, sent) -> None:
    with connection(serve_once) as odd:
        odd.sendall(sent)
        assert odd.recv(4096)[9:12] in (b"400", b"431", b"403", b"408", b"501")
    assert httpx.get(f"{serve_once.url}/health").status_code == 200


# -- clients that go away ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(serve, stream) -> None:
    served = serve(pause=0.15, slots=1)
    leaving = begin(served, {**ENDLESS, "stream": stream})
    job = []

    def writing() -> bool:
        job[:] = served.engine._batcher._running()
        return bool(job) and job[0]._new >= 2

    served.until(writing)
    leaving.close()
    seen = job[0]._new
    served.until(lambda: served.engine.load_now() == (0, 0))
    served.until(lambda: len(served.outcomes) == 1)
    assert served.outcomes[0].reason == "cancelled"
    assert served.outcomes[0].new_tokens - seen <= 2
    assert served.client().chat.completions.create(**ASK).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_while_its_prompt_is_read(serve, stream) -> None:
    served = serve(pause=0.5, slots=1)
    long = {"messages": [{"role": "user", "content": "cough " * 50}]}  # two pieces
    leaving = begin(served, {**ENDLESS, **long, "stream": stream})
    served.until(lambda: served.engine.load_now() == (1, 0))
    leaving.close()
    served.until(lambda: len(served.outcomes) == 1)
    assert served.outcomes[0].reason == "cancelled" and served.outcomes[0].new_tokens == 0


def begin(served, asked) -> socket.socket:
    """A connection on which a request was sent."""
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    made = connection(served)
    made.sendall(head.encode() + body)
    return made


def test_who_leaves_the_queue_is_not_answered(serve) -> None:
    served = serve(pause=0.02, slots=1)
    first = served.client().chat.completions.create(**ENDLESS, stream=True)
    next(iter(first))
    with pytest.raises(openai.APITimeoutError):
        served.client(timeout=0.3).chat.completions.create(**ASK)
    served.until(lambda: served.engine.load_now()[1] == 0)
    first.close()
    served.until(lambda: served.engine.load_now() == (0, 0))
    assert [one.new_tokens for one in served.outcomes if one.waited_seconds == one.total_seconds] in ([0], [])


def test_no_two_answers_are_mixed_up(serve) -> None:
    served = serve(slots=4)
    alone = {n: served.client().chat.completions.create(**{**ASK, "seed": n, "temperature": 1}) for n in range(12)}
    found = {}

    def ask(n: int) -> None:
        found[n] = served.client().chat.completions.create(**{**ASK, "seed": n, "temperature": 1})

    threads = [threading.Thread(target=ask, args=(n,)) for n in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: one.choices for n, one in found.items()} == {n: one.choices for n, one in alone.items()}


# -- stopping ---------------------------------------------------------------------------------------------------------


def test_a_stopping_server_finishes_what_runs(serve) -> None:
    served = serve(pause=0.15, slots=2)
    stream = iter(served.client().chat.completions.create(**{**ASK, "max_tokens": 20}, stream=True))
    said = [next(stream)]
    served.server.handle_exit(signal.SIGTERM, None)
    served.until(lambda: httpx.get(f"{served.url}/ready").status_code == 503)
    with pytest.raises(openai.InternalServerError) as caught:
        served.client().chat.completions.create(**ASK)
    assert caught.value.code == "closing" and "retry-after" in caught.value.response.headers
    said += list(stream)
    assert said[-1].ming["finish_reason"] in ("stop", "length")
    served.thread.join(20)
    assert not served.thread.is_alive()


def test_what_does_not_end_in_time_is_cut_and_given(serve) -> None:
    served = serve(pause=0.05, slots=2, drain_seconds=0)
    stream = iter(served.client().chat.completions.create(**ENDLESS, stream=True))
    said = [next(stream), next(stream)]
    served.server.handle_exit(signal.SIGTERM, None)
    said += list(stream)
    assert said[-1].ming["finish_reason"] == "closing" and said[-1].choices[0].finish_reason == "length"
    served.thread.join(20)
    assert not served.thread.is_alive()


# -- requests that nobody would write ---------------------------------------------------------------------------------


def test_fuzzed_requests_never_break_the_server(serve_once) -> None:
    schema = schemathesis.openapi.from_url(f"{serve_once.url}/v1/openapi.json")
    tried = []

    @schema.parametrize()
    def unused(case) -> None: ...

    for made in schema.get_all_operations():
        operation = made.ok()
        if operation.path == "/v1/models/{name}":
            continue

        strategy = operation.as_strategy()
        _fuzz(strategy, tried)
    assert {path for path, _ in tried} == {"/v1/models", "/v1/chat/completions", "/health", "/ready", "/metrics"}
    asked = [status for path, status in tried if path == "/v1/chat/completions"]
    assert len(asked) > 20  # how many of them are answered is a matter of what was made up
    assert serve_once.client().chat.completions.create(**ASK).choices and serve_once.engine.load_now() == (0, 0)


def _fuzz(strategy, tried: list) -> None:
    from hypothesis import given, settings

    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        derandomize=True,
    )
    @given(case=strategy)
    def once(case) -> None:
        if isinstance(case.body, dict):  # most of what is made up fails at its model's name and at its length
            case.body.pop("model", None)
            case.body["max_tokens"] = 2
            case.body.pop("max_completion_tokens", None)
        reply = case.call(timeout=30)
        tried.append((case.operation.path, reply.status_code))
        assert reply.status_code < 500, (case.body, reply.text)
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

    once()
