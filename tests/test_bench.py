"""The arithmetic of `bench`, and how it treats peers that are missing, fail or chatter. No model is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ming_app.bench import cases, peers
from ming_app.bench.cases import CASES, Case, choose_cases, result, run_bench
from ming_app.bench.peers import Peer, PeerError, Setup
from ming_app.bench.serving import sized_messages
from ming_app.bench.worker import PEERS
from ming_app.engine.prompt import ChatTokenizer
from ming_app.errors import UsageError
from ming_app.settings import Settings
from tests.tiny import tokenizer_json

ROOT = Path(__file__).resolve().parents[1]


def test_every_case_has_a_peer_and_compares_with_cases_of_its_unit() -> None:
    by_name = {case.name: case for case in CASES}
    assert len(by_name) == len(CASES)
    for case in CASES:
        assert case.peer == "" or case.peer in PEERS
        assert all(by_name[other].unit == case.unit for other in case.against)


def test_ratios_are_medians_of_ratios_within_a_round() -> None:
    case = Case("decode", "engine", "decode", "tokens/s", ("decode-base", "absent"))
    entry = result(case, {"decode": [8.0, 4.0, 9.0], "decode-base": [10.0, 5.0, 9.0]}, "")
    assert (entry["median"], entry["min"], entry["max"]) == (8.0, 4.0, 9.0)
    assert entry["ratio_to"] == {"decode-base": 0.8}  # a busy round halves both sides and leaves the ratio


def test_unknown_cases_are_answered_with_the_closest() -> None:
    assert [case.name for case in choose_cases(["rss", "decode"])] == ["decode", "rss"]
    with pytest.raises(UsageError, match="llama-decode"):
        choose_cases(["lama-decode"])


def test_a_missing_peer_is_reported_and_never_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "why_missing", lambda peer: "not installed" if peer == "llama" else "")
    notes: list[str] = []
    report = run_bench(
        Settings(),
        ["llama-decode", "llama-prefill512"],
        repeat=1,
        tokens=8,
        prompt_tokens=8,
        note=lambda en, zh: notes.append(en),
    )
    assert [(r["name"], r["median"], r["missing"]) for r in report["results"]] == [
        ("llama-decode", None, "not installed"),
        ("llama-prefill512", None, "not installed"),
    ]
    assert report["machine"]["cpu"] and report["machine"]["versions"]["python"] == ".".join(
        map(str, sys.version_info[:3])
    )


@pytest.mark.parametrize("values", [{"repeat": 0}, {"tokens": 1}, {"prompt_tokens": 0}])
def test_counts_must_make_sense(values: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        run_bench(
            Settings(), ["decode"], **{"repeat": 1, "tokens": 8, "prompt_tokens": 8, **values}, note=lambda en, zh: None
        )


def setup(tmp_path: Path, **changes: Any) -> Setup:
    return Setup(Settings(cache_dir=tmp_path, **changes), tokens=4, prompt_tokens=16, prefill_tokens=32)


def test_a_setup_survives_the_pipe(tmp_path: Path) -> None:
    original = setup(tmp_path, model="ming-moe-0.5b", threads=2)
    assert Setup.from_json(original.to_json()) == original


def test_a_peer_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerError) as failure:
        Peer("engine", setup(tmp_path, model="no-such-model"))
    assert "no-such-model" in failure.value.en and "no-such-model" in failure.value.zh


def test_a_peer_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.sys, "executable", shutil.which("false"))
    with pytest.raises(PeerError, match="exit code 1"):
        Peer("engine", setup(tmp_path))


def test_prompts_have_the_length_asked_for() -> None:
    tokenizer = ChatTokenizer(tokenizer_json())
    for wanted in (80, 200, 512):
        _, ids = sized_messages(tokenizer, wanted)
        assert wanted - 4 <= len(ids) <= wanted  # a character is at most four byte tokens here


def test_peak_memory_is_the_process_s_own_and_stays() -> None:
    """In a fresh process: 64 MiB touched and freed again stay in the peak; what this one uses does not enter."""
    code = (
        "from ming_app.bench.peers import peak_rss; before = peak_rss(); block = bytearray(b'x') * (64 << 20); "
        "del block; print(before, peak_rss())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
    )
    before, after = map(int, done.stdout.split())
    assert 60 << 20 < after - before < 96 << 20
    assert before < 200 << 20
