"""Batches over many engines give what one engine gives: exam, atlas, evaluation. By Ray Data, and (where ray is not installed
too) by its actors in this process, which then share out the rows in an order that Ray could choose as well."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.scale import atlas, evaluate, grade_bank, pool
from ming_app.atlas import Text, trace_texts, write_atlas
from ming_app.engine.engine import Engine
from ming_app.errors import MingError, UsageError
from ming_app.exam.bank import Shelf
from ming_app.exam.candidate import sit_exam, spread
from ming_app.molora.checkpoint import save_adapter
from ming_app.molora.trace import RouterTrace
from ming_app.settings import Settings
from tests.tiny import make_adapter, write_base
from training.cli import main as training

ROOT = Path(__file__).resolve().parents[2]
WHY = "ray is not installed (requirements-scale.txt)"
TEXTS = [Text(f"What is gout, part {i}?", f"gout {i}", {"language": "en"}, "an answer" * (i % 2)) for i in range(5)]
SUITE = """
name = "small"

[[exam]]
file = "bank.jsonl"
shuffles = 1

[[nlp]]
file = "chats.jsonl"
max_new_tokens = 5

[[generation]]
file = "chats.jsonl"
limit = 20
max_new_tokens = 7
"""


@dataclass
class Tiny:
    """A base and an adapter on disk, and settings that serve them on the CPU engine."""

    base: Path
    adapter: Path
    settings: Settings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("batch")
    base = write_base(folder / "base", max_position_embeddings=4096)
    save_adapter(folder / "adapter", make_adapter(base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MING_CACHE_DIR", str(folder / "cache"))
        patch.setenv("MING_THREADS", "1")
        named = {"model": str(base), "adapter": str(folder / "adapter"), "precision": "8bit"}
        yield Tiny(base, folder / "adapter", Settings.load(named))


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason=WHY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=150 << 20, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(params=["ray", "actors"])
def shared_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "ray":
        if find_spec("ray") is None:
            pytest.skip(WHY)
        request.getfixturevalue("ray_here")
    else:
        for module in (atlas, evaluate, grade_bank):
            monkeypatch.setattr(module, "over_engines", by_hand)
    return request.param


def by_hand(work: pool.Work, rows: Sequence[Any], settings: Settings, *, engines: int, batch: int) -> list[Any]:
    """Two workers, the last rows first, three at a time at most."""
    workers = [pool.Worker(settings, work) for _ in range(engines)]
    found = []
    size = min(batch, 3)
    for turn, start in enumerate(reversed(range(0, len(rows), size))):
        part = [pickle.dumps(row) for row in rows[start : start + size]]
        made = workers[turn % engines]({"at": range(start, start + len(part)), "row": part})
        found += [{"at": at, "made": one} for at, one in zip(made["at"], made["made"], strict=True)]
    for worker in workers:
        if isinstance(worker.engine, Engine):
            worker.engine.close()
    return pool.in_order(found)


@pytest.mark.usefixtures("shared_out")
def test_an_exam(tiny: Tiny) -> None:
    found = grade_bank.grade("clinical-en", tiny.settings, engines=2, limit=6)
    with closing(Engine.load(tiny.settings)) as engine:
        alone, too_long = sit_exam(engine, spread(Shelf().open("clinical-en").questions, 6))
    assert found["attempts"] == [asdict(one) for one in alone] and found["too_long"] == too_long
    assert found["n"] == len(alone) > 0


@pytest.mark.usefixtures("shared_out")
def test_an_atlas(tiny: Tiny, tmp_path: Path) -> None:
    make = partial(atlas.make_atlas, TEXTS, tmp_path / "many", tiny.settings, max_new_tokens=6)
    found = make(engines=2)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "many" / "traces").iterdir()}
    with closing(Engine.load(tiny.settings)) as engine:
        trace = trace_texts(engine, TEXTS, tmp_path / "one", 6)
        write_atlas(trace, tmp_path / "one", tiny.settings.message_lang(), engine.adapter)
    assert found["texts"] == len(kept) == 5 and found["tokens"] == len(trace)
    assert same(RouterTrace.load(tmp_path / "many" / "trace.npz"), trace)
    for path in (tmp_path / "one").iterdir():
        assert path.suffix not in (".csv", ".html") or path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()
    make(engines=1)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "traces were made again"


def same(a: RouterTrace, b: RouterTrace) -> bool:
    """Bit by bit."""
    arrays: list[Callable[[RouterTrace], Any]] = [
        lambda t: t.experts,
        lambda t: t.weights,
        lambda t: t.probabilities,
        lambda t: t.contributions,
    ]
    return a.tokens == b.tokens and a.segments == b.segments and all(np.array_equal(of(a), of(b)) for of in arrays)


def test_an_evaluation(tiny: Tiny, shared_out: str, tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_text(SUITE)
    bank = [
        {"id": f"q{i}", "stem": f"Which is {i}?", "options": {letter: f"{letter} {i}" for letter in "ABCD"}}
        | {"answer": "ABCD"[i % 4], "lang": "en", "type": "A1"}
        for i in range(18)
    ]
    turns = [{"role": "user", "content": "What is gout?"}, {"role": "assistant", "content": "A kind of arthritis."}]
    chats = [
        {
            "id": f"c{i}",
            "lang": "en",
            "source": "own",
            "messages": [{**turns[0], "content": "Gout? " * (i + 1)}, turns[1]],
        }
        for i in range(18)
    ]
    for name, rows in (("bank", bank), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(tiny.base), "--adapter", str(tiny.adapter), "--suite", str(tmp_path / "suite.toml")]
    words += ["--precision", "8bit", *(["--skip-base"] if shared_out == "ray" else [])]  # loading takes it long enough
    assert training(["evaluate", *words, "--out", str(tmp_path / "one")]) == 0
    assert evaluate.main([*words, "--out", str(tmp_path / "many"), "--engines", "2"]) == 0
    one, many = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "many"))
    assert many == one and one["precision"] == {"answers": "8bit", "exam": "8bit"}
    exam = one["exam"]["bank.jsonl"]["adapter"]
    assert exam["n"] == 18 and exam["shuffled"]["consistent"]["n"] == 18 and one["nlp"] and one["generation"]


@pytest.mark.usefixtures("shared_out")
def test_what_stops_an_actor_is_explained(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no experts"):
        atlas.make_atlas(TEXTS[:1], tmp_path, replace(tiny.settings, adapter="none"), engines=1, max_new_tokens=2)


def test_an_engine_that_cannot_be_loaded_is_explained(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(MingError):
        by_hand(evaluate.letters_of, [1], replace(tiny.settings, model=str(tmp_path / "none")), engines=1, batch=1)


def test_wrong_words_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--model", "nothing"]) == 2 and "Say what to measure" in capsys.readouterr().err
