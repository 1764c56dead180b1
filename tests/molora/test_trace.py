"""RouterTrace: shape contract, files that round-trip, and damaged or hostile files that are refused."""

import contextlib
import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest

from ming_app.errors import TraceError
from ming_app.molora.trace import RouterTrace, Segment, TraceToken, merge
from ming_app.molora.trace_file import header_of


def make(tokens: int = 6, layers: int = 2, experts: int = 4, k: int = 2) -> RouterTrace:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, layers, 3, experts)), -1)[..., :k].astype(np.uint8)
    weights = np.sort(rng.dirichlet(np.ones(k), (tokens, layers, 3)), -1)[..., ::-1].astype(np.float16)
    texts = ["", "龘", " is", " a", "", "🫀"][:tokens] + ["x"] * max(0, tokens - 6)
    pieces = [0, 0, 1, 2, 3, 3][:tokens] + list(range(4, 4 + max(0, tokens - 6)))
    rows = tuple(
        TraceToken(i, texts[i], "prompt" if i < 2 else "answer", pieces[i], None if i < 2 else -0.5)
        for i in range(tokens)
    )
    return RouterTrace(ids, weights, rows, experts, "m", "f", {"rank": 8})


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_files_round_trip(tmp_path, suffix):
    trace = make()
    back = RouterTrace.load(trace.save(tmp_path / f"t{suffix}"))
    assert np.array_equal(back.experts, trace.experts) and back.experts.dtype == np.uint8
    assert np.abs(back.weights.astype(float) - trace.weights.astype(float)).max() < 1e-3
    assert (back.tokens, back.num_experts, back.model, back.fingerprint, back.config) == (
        trace.tokens,
        trace.num_experts,
        "m",
        "f",
        {"rank": 8},
    )
    assert [p.name for p in tmp_path.iterdir()] == [f"t{suffix}"]


def full(tokens: int = 6, layers: int = 2) -> RouterTrace:
    """A trace with all that can be recorded."""
    trace, rng = make(tokens, layers), np.random.default_rng(1)
    rows = tuple(
        dataclasses.replace(t, others=((" is", -0.25), ("龘", -2.5))) if t.logprob else t for t in trace.tokens
    )
    return dataclasses.replace(
        trace,
        tokens=rows,
        probabilities=rng.dirichlet(np.ones(4), trace.experts.shape[:3]).astype(np.float16),
        contributions=rng.random(trace.experts.shape).astype(np.float16),
        segments=(Segment(0, "first", {"language": "zh"}), Segment(2, "second")),
    )


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_all_that_can_be_recorded_round_trips(tmp_path, suffix):
    trace = full()
    back = RouterTrace.load(trace.save(tmp_path / f"t{suffix}"))
    assert (back.tokens, back.segments) == (trace.tokens, trace.segments)
    for name in ("probabilities", "contributions"):
        ours, theirs = getattr(back, name), getattr(trace, name)
        assert ours.dtype == np.float16 and np.abs(ours.astype(float) - theirs.astype(float)).max() < 1e-3
    assert list(back.segment_of()) == [0, 0, 1, 1, 1, 1]
    assert list(back.is_answer()) == [False, False, True, True, True, True]


def test_a_file_of_schema_1_is_read(tmp_path):
    trace, path = make(), tmp_path / "t.json"
    body = json.loads(trace.save(path).read_text())
    del body["segments"]
    body |= {"schema": 1, "tokens": [row[:5] for row in body["tokens"]]}
    path.write_text(json.dumps(body))
    assert RouterTrace.load(path).tokens == trace.tokens


def test_merged_traces_keep_their_texts_apart():
    one, two = dataclasses.replace(full(), segments=()), make(3)
    merged = merge([(one, Segment(0, "a", {"language": "zh"})), (two, Segment(0, "b"))])
    assert merged.segments == (Segment(0, "a", {"language": "zh"}), Segment(6, "b"))
    assert np.array_equal(merged.experts, np.concatenate([one.experts, two.experts]))
    assert merged.pieces() == one.pieces() + [(text, [i + 6 for i in members]) for text, members in two.pieces()]
    assert merged.probabilities is None and merged.contributions is None  # the second did not record them
    assert merge([(one, Segment(0, "a"))] * 2).contributions.shape[0] == 12
    nested = merge([(two, Segment(0, "b")), (full(), Segment(0, "left out"))])
    assert [(s.start, s.title) for s in nested.segments] == [(0, "b"), (3, "first"), (5, "second")]


def test_only_traces_of_one_model_are_merged():
    other = dataclasses.replace(make(), fingerprint="g")
    for traces in (
        [],
        [(make(), Segment(0, "a")), (other, Segment(0, "b"))],
        [(make(), Segment(0, "a")), (make(6, 3), Segment(0, "b"))],
    ):
        with pytest.raises(TraceError):
            merge(traces)


def test_pieces_join_the_tokens_of_one_character():
    assert make().pieces() == [("龘", [0, 1]), (" is", [2]), (" a", [3]), ("🫀", [4, 5])]


def test_top_expert_is_the_first_of_the_row():
    trace = make()
    assert np.array_equal(trace.top_expert(1, "down"), trace.experts[:, 1, 2, 0])


def test_four_thousand_tokens_stay_small(tmp_path):
    assert make(4000, 24).save(tmp_path / "t.npz").stat().st_size < 5_000_000
    assert full(4000, 24).save(tmp_path / "all.npz").stat().st_size < 10_000_000


def test_wrong_arrays_are_refused():
    good = make()
    for changes in (
        {"experts": good.experts[:-1]},
        {"experts": good.experts.astype(np.int64)},
        {"experts": np.full_like(good.experts, 4)},
        {"weights": np.full_like(good.weights, np.nan)},
        {"tokens": good.tokens[:-1]},
        {"num_experts": 0},
        {"projections": ("gate", "down", "up")},
        {"probabilities": full().probabilities[..., :3]},
        {"contributions": full().contributions.astype(np.float32)},
        {"contributions": np.full_like(good.weights, -1)},
        {"segments": (Segment(1, "late"),)},
        {"segments": (Segment(0, "a"), Segment(6, "beyond"))},
    ):
        fields = {"experts": good.experts, "weights": good.weights, "tokens": good.tokens, "num_experts": 4, **changes}
        with pytest.raises(TraceError):
            RouterTrace(**fields)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(TraceError, match="npz"):
        make().save(tmp_path / "t.pickle")


def repack(path, **members) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in members.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=True)
            archive.writestr(f"{name}.npy", buffer.getvalue())


def test_hostile_archives_are_refused(tmp_path):
    trace, path = make(), tmp_path / "t.npz"
    header = np.frombuffer(json.dumps(header_of(trace)).encode(), np.uint8)
    repack(path, header=np.array([{"x": 1}], dtype=object), experts=trace.experts, weights=trace.weights)
    with pytest.raises(TraceError):
        RouterTrace.load(path)
    repack(path, header=header, experts=trace.experts)
    with pytest.raises(TraceError, match="must hold"):
        RouterTrace.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # a bomb: little on disk, much when unpacked
        for name in ("header", "weights"):
            archive.writestr(f"{name}.npy", b"")
        archive.writestr("experts.npy", b"\0" * (1 << 27))
    with pytest.raises(TraceError, match="more than a trace may hold"):
        RouterTrace.load(path)


def test_an_array_that_claims_more_than_it_holds_is_refused(tmp_path):
    trace, path = make(), tmp_path / "t.npz"
    liar = io.BytesIO()
    np.lib.format.write_array_header_1_0(liar, {"descr": "|u1", "fortran_order": False, "shape": (1 << 46,)})
    header = io.BytesIO()
    np.save(header, np.frombuffer(json.dumps(header_of(trace)).encode(), np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("header", header), ("experts", liar), ("weights", liar)):
            archive.writestr(f"{name}.npy", data.getvalue())
    with pytest.raises(TraceError, match="what its header says"):
        RouterTrace.load(path)


def test_any_flipped_byte_is_refused_or_harmless(tmp_path):
    path = make().save(tmp_path / "t.npz")
    good = path.read_bytes()
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        with contextlib.suppress(TraceError):
            RouterTrace.load(path)


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"{", b"[]", b"[" * 100_000, b'{"experts": 1, "weights": 2}', b"\xff\xfe"]
)
def test_damaged_files_are_refused(tmp_path, data):
    path = tmp_path / "t.json"
    path.write_bytes(data)
    with pytest.raises(TraceError):
        RouterTrace.load(path)


def test_tampered_json_is_refused(tmp_path):
    path = make().save(tmp_path / "t.json")
    good = json.loads(path.read_text())
    changes = (
        {"schema": 99},
        {"format": "x"},
        {"tokens": good["tokens"][:-1] + [["a", "b", "prompt", 0, None]]},
        {"tokens": good["tokens"][:-1] + [[1, "b", "oracle", 0, None]]},
        {"tokens": [[1]]},
        {"experts": [[[[900]]]]},
        {"experts": "zzz"},
        {"num_experts": "4"},
        {"config": []},
        {"segments": [[0, "a", ["zh"]]]},
        {"segments": [[0, "a"]]},
        {"tokens": good["tokens"][:-1] + [[1, "b", "answer", 0, None, [["x", 5]]]]},
        {"tokens": good["tokens"][:-1] + [[1, "b", "answer", 0, None, [["x", -1]] * 50]]},
        {"probabilities": [[[[1]]]]},
        {"segments": [[0, "a", {"a/b": "x"}]]},
        {"segments": [[0, "\ud800", {}]]},
        {"model": "\ud800"},
        {"experts": np.zeros_like(good["experts"]).tolist()},
        {"experts": [[[[]]]] * 6, "weights": [[[[]]]] * 6},
    )
    for change in changes:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(TraceError):
            RouterTrace.load(path)
    with pytest.raises(TraceError):
        RouterTrace.load(tmp_path / "absent.npz")
