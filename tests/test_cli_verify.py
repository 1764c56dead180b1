"""`verify` against the original's logits, against a plain reading of the formula on fresh checkpoints, and against
damaged checkpoints and expected files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from ming_app import cli
from ming_app.molora.checkpoint import Adapter
from tests.molora.test_checkpoint import write_official
from tests.tiny import make_adapter, write_base

KEYS = [
    "max_abs_logit_diff",
    "decode_max_abs_logit_diff",
    "experts_equal",
    "weights_max_abs_diff",
    "decode_ids_equal",
    "batched_max_abs_logit_diff",
]
VOCABULARY = 288


class Literal(nn.Module):
    """MoLoRA read off the formula: every token and expert by itself, softmax over the chosen logits."""

    def __init__(self, base: nn.Linear, adapter: Adapter, layer: int, projection: str) -> None:
        super().__init__()
        self.base, self.config = base, adapter.config
        self.weights = [None if w is None else torch.from_numpy(w) for w in adapter.projection(layer, projection)]
        self.chosen: list[list[int]] = []
        self.shares: list[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        A, B, router, bias, shared_A, shared_B = self.weights
        self.chosen, self.shares = [], []
        rows = []
        for token in x.reshape(-1, x.shape[-1]):
            logits = router @ token + bias
            order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[: self.config.top_k]
            shares = torch.softmax(torch.stack([logits[i] for i in order]), 0)
            y = self.base(token)
            for share, i in zip(shares, order, strict=True):
                y = y + self.config.scale * share * (B[i] @ (A[i] @ token))
            if shared_A is not None:
                y = y + self.config.scale * (shared_B @ (shared_A @ token))
            rows.append(y)
            self.chosen.append(order)
            self.shares.append(shares.tolist())
        return torch.stack(rows).reshape(*x.shape[:-1], -1)


class LiteralLoRA(nn.Module):
    """Attention LoRA, not merged."""

    def __init__(self, base: nn.Linear, a: np.ndarray, b: np.ndarray, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = torch.from_numpy(a), torch.from_numpy(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * ((x @ self.a.T) @ self.b.T)


def expected_of(base: Path, adapter: Adapter, file: Path, steps: int = 5) -> Path:
    """An expected file: each row alone, and greedy decoding without any cache."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for i, layer in enumerate(model.model.layers):
        for name in ("gate", "up", "down"):
            setattr(layer.mlp, f"{name}_proj", Literal(getattr(layer.mlp, f"{name}_proj"), adapter, i, name))
        for target in adapter.config.attention_targets:
            pair = adapter.attention(i, target)
            assert pair is not None
            setattr(layer.self_attn, target, LiteralLoRA(getattr(layer.self_attn, target), *pair, adapter.config.scale))
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, VOCABULARY, (2, 9)))
    tensors: dict[str, np.ndarray] = {"input_ids": ids.numpy()}
    with torch.no_grad():
        rows = [model(row[None]).logits[0] for row in reversed(ids)][::-1]  # row 0 last: its routing is what is kept
        for i, layer in enumerate(model.model.layers):
            for name in ("gate_proj", "up_proj", "down_proj"):
                module = getattr(layer.mlp, name)
                tensors[f"experts.{i}.{name}"] = np.array(module.chosen, np.int64)
                tensors[f"weights.{i}.{name}"] = np.array(module.shares, np.float32)
        text, logits = ids[0], []
        for _ in range(steps):
            logits.append(model(text[None]).logits[0, -1])
            text = torch.cat([text, logits[-1].argmax()[None]])
    tensors |= {
        "prefill_logits": torch.stack(rows).numpy(),
        "decode_ids": text[len(ids[0]) :].numpy(),
        "decode_logits": torch.stack(logits).numpy(),
    }
    save_file(tensors, file)
    return file


@dataclass
class Checkpoint:
    base: Path
    adapter: Path
    expected: Path


def run(capsys: pytest.CaptureFixture[str], paths: Checkpoint) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    words = ["verify", "--base", paths.base, "--adapter", paths.adapter, "--expected", paths.expected, "--json"]
    code = cli.main([str(word) for word in words])
    return code, json.loads(capsys.readouterr().out)


def assert_equal(report: dict[str, Any]) -> None:
    assert set(KEYS) <= set(report)
    assert report["experts_equal"] is True and report["decode_ids_equal"] is True and report["ok"] is True
    for name in KEYS:
        if name.endswith("_diff"):
            assert report[name] <= 5e-4, name


def test_golden(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run(capsys, Checkpoint(golden / "base", golden / "adapter", golden / "expected.safetensors"))
    assert code == 0 and report["rows"] == 3
    assert_equal(report)


VARIANTS: list[dict[str, Any]] = [
    {"num_experts": 4, "top_k": 2, "rank": 4},
    {"num_experts": 8, "top_k": 3, "rank": 16, "alpha": 32.0},
    {"num_experts": 2, "top_k": 1, "rank": 2, "use_rslora": True},
    {"num_experts": 5, "top_k": 5, "rank": 3, "attention_targets": ("q_proj", "v_proj")},
    {"num_experts": 3, "top_k": 2, "rank": 4, "num_shared_experts": 2},
]


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "E{num_experts}k{top_k}r{rank}".format(**v))
def test_fresh_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str], variant: dict, binary: bool) -> None:
    base = write_base(tmp_path / "base")
    adapter = make_adapter(base, **variant)
    folder = write_official(tmp_path / "adapter", adapter, binary=binary)
    expected = expected_of(base, adapter, tmp_path / "expected.safetensors")
    code, report = run(capsys, Checkpoint(base, folder, expected))
    assert code == 0
    assert_equal(report)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("fresh")
    base = write_base(root / "base")
    adapter = make_adapter(base)
    return Checkpoint(
        base, write_official(root / "adapter", adapter), expected_of(base, adapter, root / "expected.safetensors")
    )


@pytest.fixture
def copy(fresh: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A copy of the good checkpoint that a test may damage."""
    adapter = Path(shutil.copytree(fresh.adapter, tmp_path / "adapter"))
    return Checkpoint(fresh.base, adapter, Path(shutil.copy(fresh.expected, tmp_path / "expected.safetensors")))


def change_tensors(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = dict(torch.load(file, weights_only=True))
    change(tensors)
    torch.save(tensors, file)


SWITCH = "layers.1.mlp.up_proj.switch.weight"


def full_name(tensors: dict[str, Any], ending: str = SWITCH) -> str:
    return next(name for name in tensors if name.endswith(ending))


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda t: t.pop(full_name(t)), "router.weight"),
    "extra": (lambda t: t.update({full_name(t).replace("switch", "valve"): torch.zeros(2)}), "valve"),
    "wrong shape": (lambda t: t.update({full_name(t): torch.zeros(3, 64)}), "up"),
    "not finite": (lambda t: t[full_name(t)].fill_(float("nan")), "up"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters_are_refused_by_name(
    copy: Checkpoint, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    change, named = DAMAGE[damage]
    change_tensors(copy.adapter / "non_lora_trainables.bin", change)
    code, report = run(capsys, copy)
    assert code == 1 and report["error"]["type"] == "AdapterError"
    assert named in report["error"]["en"] and named in report["error"]["zh"]


def test_a_hostile_pickle_is_refused_and_does_nothing(
    copy: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {mark}",)

    (copy.adapter / "non_lora_trainables.bin").write_bytes(pickle.dumps({"a": Hostile()}))
    code, report = run(capsys, copy)
    assert code == 1 and report["error"]["type"] == "AdapterError" and not mark.exists()


def test_rslora_stated_twice_and_differently_is_refused(copy: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("config.json", True), ("adapter_config.json", False)):
        config = json.loads((copy.adapter / name).read_text())
        (copy.adapter / name).write_text(json.dumps({**config, "use_rslora": value}))
    code, report = run(capsys, copy)
    assert code == 1 and "rslora" in report["error"]["en"].lower()


@pytest.mark.parametrize("part", ["base", "adapter", "expected"])
def test_a_path_that_is_not_there(copy: Checkpoint, capsys: pytest.CaptureFixture[str], part: str) -> None:
    setattr(copy, part, Path("nowhere") / part)
    code, report = run(capsys, copy)
    assert code == 1 and "nowhere" in report["error"]["en"] or part in report["error"]["en"]


def test_another_base_is_refused(copy: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy.base = write_base(tmp_path / "other", num_hidden_layers=3)
    code, report = run(capsys, copy)
    assert code == 1 and report["error"]["type"] == "AdapterError"


# -- the expected file ------------------------------------------------------------------------------------------------


def test_a_difference_is_seen_and_is_exit_1(copy: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(copy.expected)
    tensors["prefill_logits"][1, 3, 5] += 0.01
    tensors["decode_ids"][2] = (tensors["decode_ids"][2] + 1) % VOCABULARY
    tensors["experts.1.up_proj"] = tensors["experts.1.up_proj"][:, ::-1].copy()
    save_file(tensors, copy.expected)
    code, report = run(capsys, copy)
    assert code == 1 and report["ok"] is False and "error" not in report
    assert report["max_abs_logit_diff"] == pytest.approx(0.01, abs=1e-3)
    assert report["batched_max_abs_logit_diff"] == pytest.approx(0.01, abs=1e-3)
    assert report["experts_equal"] is False and report["decode_ids_equal"] is False


def test_what_the_file_lacks_is_null(copy: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(copy.expected)
    save_file({name: tensors[name] for name in ("input_ids", "prefill_logits")}, copy.expected)
    code, report = run(capsys, copy)
    assert code == 0 and report["ok"] is True
    assert (
        report["decode_ids_equal"] is None
        and report["experts_equal"] is None
        and report["weights_max_abs_diff"] is None
    )


def test_rows_of_different_length(copy: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """Causal: the logits of a shortened row are those of the whole one, wherever its padding stands."""
    tensors = load_file(copy.expected)
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    tensors["input_ids"][1, 6:] = 10**6  # padding is never read
    save_file({**tensors, "attention_mask": mask}, copy.expected)
    code, report = run(capsys, copy)
    assert code == 0
    assert_equal(report)


EXPECTED_DAMAGE: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "no ids": lambda t: t.pop("input_ids"),
    "no logits": lambda t: t.pop("prefill_logits"),
    "half of decode": lambda t: t.pop("decode_logits"),
    "ids too large": lambda t: t["input_ids"].fill(VOCABULARY),
    "ids negative": lambda t: t["decode_ids"].fill(-1),
    "ids not whole": lambda t: t.update(input_ids=t["input_ids"].astype(np.float32)),
    "flat ids": lambda t: t.update(input_ids=t["input_ids"].ravel()),
    "no rows": lambda t: t.update(input_ids=t["input_ids"][:0], prefill_logits=t["prefill_logits"][:0]),
    "another vocabulary": lambda t: t.update(prefill_logits=t["prefill_logits"][..., :-1].copy()),
    "not finite": lambda t: t["decode_logits"].fill(np.nan),
    "no such layer": lambda t: t.update({"experts.7.up_proj": t["experts.1.up_proj"]}),
    "another k": lambda t: t.update({"weights.1.up_proj": t["weights.1.up_proj"][:, :1].copy()}),
    "too long": lambda t: t.update(
        input_ids=np.zeros((1, 600), np.int64), prefill_logits=np.zeros((1, 600, VOCABULARY), np.float32)
    ),
    "empty row": lambda t: t.update(attention_mask=np.zeros((2, 9), np.int64)),
}


@pytest.mark.parametrize("damage", EXPECTED_DAMAGE)
def test_malformed_expected_files_are_refused(
    copy: Checkpoint, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    tensors = load_file(copy.expected)
    EXPECTED_DAMAGE[damage](tensors)
    save_file(tensors, copy.expected)
    code, report = run(capsys, copy)
    assert code == 1 and report["error"]["type"] == "ExpectedFileError"
    assert report["error"]["zh"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(100), (1 << 62).to_bytes(8, "little") + b"{}", "cut"])
def test_hostile_expected_files_are_refused(
    copy: Checkpoint, capsys: pytest.CaptureFixture[str], content: bytes | str
) -> None:
    data = copy.expected.read_bytes()[:-1000] if isinstance(content, str) else content
    copy.expected.write_bytes(data)
    code, report = run(capsys, copy)
    assert code == 1 and report["error"]["type"] == "ExpectedFileError"
