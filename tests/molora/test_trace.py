"""RouterTrace: shape contract, files that round-trip, and damaged or hostile files that are refused."""

import contextlib
import io
import json
import zipfile

import numpy as np
import pytest

from ming_app.errors import TraceError
from ming_app.molora.trace import RouterTrace, TraceToken


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


def test_pieces_join_the_tokens_of_one_character():
    assert make().pieces() == [("龘", [0, 1]), (" is", [2]), (" a", [3]), ("🫀", [4, 5])]


def test_top_expert_is_the_first_of_the_row():
    trace = make()
    assert np.array_equal(trace.top_expert(1, "down"), trace.experts[:, 1, 2, 0])


def test_four_thousand_tokens_stay_small(tmp_path):
    path = make(4000, 24).save(tmp_path / "t.npz")
    assert path.stat().st_size < 5_000_000


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
    header = np.frombuffer(json.dumps(trace._header()).encode(), np.uint8)
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
    np.save(header, np.frombuffer(json.dumps(trace._header()).encode(), np.uint8))
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
    )
    for change in changes:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(TraceError):
            RouterTrace.load(path)
    with pytest.raises(TraceError):
        RouterTrace.load(tmp_path / "absent.npz")
