"""The panel's payload: decodes back to the trace, grows only at its end, carries text as data."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from ming_app.molora.trace import RouterTrace, TraceToken
from ming_app.router.payload import LivePayload, empty_payload, trace_payload
from ming_app.router.statistics import router_entropy


def make_trace(T: int = 7, L: int = 3, k: int = 2, E: int = 4, texts: list[str] | None = None) -> RouterTrace:
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((T, L, 3, E)), axis=-1)[..., :k].astype(np.uint8)
    raw = np.sort(rng.random((T, L, 3, k)), axis=-1)[..., ::-1]
    weights = (raw / raw.sum(-1, keepdims=True)).astype(np.float16)
    texts = texts or [f"t{i}" for i in range(T)]
    tokens = tuple(
        TraceToken(i, texts[i], "prompt" if i < 3 else "answer", i, None if i < 3 else -0.5) for i in range(T)
    )
    return RouterTrace(experts, weights, tokens, num_experts=E, model="m")


def decode(text: str, payload: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, payload["layers"], 3, payload["k"])


@pytest.mark.parametrize("k,L", [(1, 1), (2, 3), (3, 28)])
def test_payload_holds_what_the_trace_holds(k: int, L: int) -> None:
    trace = make_trace(L=L, k=k)
    payload = trace_payload(trace, "a1")
    assert payload["state"] == "done" and payload["key"] == "a1" and payload["experts"] == 4
    np.testing.assert_array_equal(decode(payload["e"], payload), trace.experts)
    np.testing.assert_allclose(decode(payload["w"], payload) / 255, trace.weights.astype(float), atol=0.5 / 255 + 1e-3)
    rows = [json.loads(line) for line in payload["tokens"].splitlines()]
    assert rows == [[t.id, t.text, int(t.role == "answer"), t.piece, t.logprob] for t in trace.tokens]


def test_streaming_only_appends_and_ends_equal_to_the_whole() -> None:
    trace = make_trace(T=9)
    live = LivePayload("a", 4, "m")
    seen = live.to_dict()
    for i, j in [(0, 3), (3, 4), (4, 4), (4, 8), (8, 9)]:
        live.extend(trace.tokens[i:j], trace.experts[i:j], trace.weights[i:j])
        now = live.to_dict()
        for name in ("tokens", "e", "w"):
            assert now[name].startswith(seen[name])
        assert "=" not in now["e"] + now["w"]
        seen = now
    assert live.to_dict(done=True) == trace_payload(trace, "a")


def test_text_stays_data() -> None:
    texts = ["</script>", "<img src=x onerror=alert(1)>", "\n", '"', "\\", "\u2028", "💧"]
    payload = trace_payload(make_trace(texts=texts), "a")
    lines = payload["tokens"].split("\n")[:-1]
    assert [json.loads(line)[1] for line in lines] == texts


def test_shapes_are_checked() -> None:
    trace = make_trace()
    with pytest.raises(ValueError):
        LivePayload("a", 4).extend(trace.tokens[:2], trace.experts[:3], trace.weights[:3])


def test_size_of_a_long_answer() -> None:
    trace = make_trace(T=500, L=24, texts=["词"] * 500)
    assert len(json.dumps(trace_payload(trace, "a"), ensure_ascii=False).encode()) <= 600_000


def test_empty_payload_has_the_same_keys() -> None:
    assert set(empty_payload()) == set(trace_payload(make_trace(), "a"))


def test_a_measured_trace_carries_contributions_entropy_and_alternatives() -> None:
    trace = make_trace(T=500, L=24)
    rng = np.random.default_rng(1)
    tokens = tuple(
        replace(t, others=tuple((f"word{i}", -0.1 - i) for i in range(5))) if t.logprob else t for t in trace.tokens
    )
    trace = replace(
        trace,
        tokens=tokens,
        contributions=(rng.random(trace.experts.shape) * 0.3).astype(np.float16),
        probabilities=rng.dirichlet(np.ones(4), trace.experts.shape[:3]).astype(np.float16),
    )
    payload = trace_payload(trace, "a")
    added = 4 * (decode(payload["c"], payload) / 255) ** 2
    np.testing.assert_allclose(added, trace.contributions.astype(float), atol=0.01)
    entropy = np.frombuffer(base64.b64decode(payload["h"]), np.uint8).reshape(500, 24, 3) / 255
    np.testing.assert_allclose(entropy, router_entropy(trace), atol=0.5 / 255 + 1e-6)
    last = json.loads(payload["tokens"].splitlines()[-1])
    assert last[5] == [[f"word{i}", -0.1 - i] for i in range(5)]
    assert len(json.dumps(payload, ensure_ascii=False).encode()) <= 600_000
