"""Groups, divergence against chance, favourite tokens, and comparison of two traces, on traces whose answer is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from synthetic import even, trace_of

from ming_app.errors import TraceError
from ming_app.molora.trace import Segment
from ming_app.router.compare import compare
from ming_app.router.groups import Grouping, content_rows, groupings, token_class
from ming_app.router.specialisation import js_divergence, specialisation, vocabulary
from ming_app.router.statistics import choice_counts, coactivation

WORDS = [f"w{i}" for i in range(300)]
HALF = Grouping("half", ("first", "second"), (np.arange(300) >= 150).astype(int))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("心肌", "han"),
        ("的", "han"),
        (" fever", "latin"),
        ("é", "latin"),
        ("37", "digit"),
        ("。", "punctuation"),
        (" ,", "punctuation"),
        ("+", "punctuation"),
        ("\n\n", "space"),
        ("<|im_start|>", "special"),
        ("β", "other"),
        ("", "other"),
        ("维生素B", "han"),
    ],
)
def test_token_classes(text: str, name: str) -> None:
    assert token_class(text) == name


def by_kind(trace) -> dict[str, Grouping]:
    return {grouping.kind: grouping for grouping in groupings(trace)}


def test_groups_of_an_exam_question() -> None:
    texts = [
        "<|im_start|>",
        "system",
        "\n",
        "A",
        ". help",
        "<|im_end|>",
        "\n",
        "<|im_start|>",
        "user",
        "\n",
        "哪种病?",
        "\n",
    ]
    texts += ["A", ". flu", "\n", "B", ". 感冒", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n", "答案：", "B"]
    found = by_kind(trace_of(texts, even(), answer_from=len(texts) - 2))
    part = found["part"]
    names = [part.names[g] if g >= 0 else "" for g in part.of]
    assert names[8:17] == ["question"] * 4 + ["options"] * 5  # from the user's turn to its end
    assert set(names[:7]) == {""} and set(names[17:]) == {""}
    assert found["role"].sizes() == [len(texts) - 2, 2]
    assert "language" not in found


def test_the_frame_of_a_chat_is_no_content() -> None:
    texts = [
        "<|im_start|>",
        "system",
        "\n",
        "help",
        "<|im_end|>",
        "\n",
        "<|im_start|>",
        "user",
        "\n",
        "病",
        "<|im_end|>",
        "\n",
    ]
    texts += ["<|im_start|>", "assistant", "\n", "ok"]
    found = content_rows(trace_of(texts, even(), answer_from=len(texts) - 1))
    assert [t for t, kept in zip(texts, found, strict=True) if kept and t.strip()] == ["病", "ok"]


def test_labels_of_segments_are_groups() -> None:
    segments = [Segment(0, "a", {"language": "zh"}), Segment(2, "b", {"language": "en"}), Segment(3, "c")]
    found = by_kind(trace_of(["药", "物", "drug", "x"], even(), segments=segments))["language"]
    assert found.names == ("en", "zh") and found.of.tolist() == [1, 1, 0, -1]


def test_divergence_by_definition() -> None:
    counts = np.array([[[30, 10, 0]], [[5, 5, 10]]])
    p, q, w = np.array([0.75, 0.25, 0]), np.array([0.25, 0.25, 0.5]), (40 / 60, 20 / 60)

    def entropy(x: np.ndarray) -> float:
        return -sum(v * math.log2(v) for v in x if v > 0)

    expected = entropy(w[0] * p + w[1] * q) - w[0] * entropy(p) - w[1] * entropy(q)
    assert js_divergence(counts) == pytest.approx([expected])


def test_random_routing_shows_nothing() -> None:
    found = specialisation(trace_of(WORDS, even(), layers=8), HALF)
    assert found and found.beyond_chance < 0.3
    assert found.divergence.mean() == pytest.approx(found.chance.mean(), rel=0.5)


def test_planted_specialisation_is_found_and_measured() -> None:
    def planted(token: int, rng: np.random.Generator) -> list[int]:
        return [0, 1, 2, 3] if token < 150 else [2, 3, 0, 1]

    found = specialisation(trace_of(WORDS, planted), HALF)
    assert found and found.beyond_chance == 1
    assert found.divergence == pytest.approx(np.ones((3, 3)))  # no expert in common: H(1/2, 1/2) = 1 bit
    assert found.largest == pytest.approx(1) and found.chance_high.max() < 0.1
    assert found.share[0, 0, 0] == pytest.approx([0.5, 0.5, 0, 0])


def test_few_texts_do_not_prove_a_language() -> None:
    """Four texts, each with habits of its own, two per language: token for token it looks significant, by text it is not."""
    segments = [Segment(75 * i, str(i), {"language": "zh" if i % 2 else "en"}) for i in range(4)]
    habits = {i: np.random.default_rng(i + 7).permutation(4) for i in range(4)}

    def route(token: int, rng: np.random.Generator):
        return habits[token // 75] if rng.random() < 0.5 else rng.permutation(4)

    trace = trace_of(WORDS, route, segments=segments)
    by_text = specialisation(trace, by_kind(trace)["language"])
    by_token = specialisation(trace_of(WORDS, route), by_kind(trace)["language"])
    assert by_text and by_token and by_token.beyond_chance == 1 and by_text.beyond_chance < 0.5


def test_one_group_has_no_divergence() -> None:
    assert specialisation(trace_of(WORDS, even()), Grouping("x", ("a", "b"), np.zeros(300, int))) is None


def test_a_token_s_own_habit_is_no_specialisation_of_its_group() -> None:
    """Every distinct token has a random route of its own, and its group is decided by a coin: nothing to be found."""
    texts = [f"w{i % 24}" for i in range(480)]
    route = {i: np.random.default_rng(i).permutation(4) for i in range(24)}
    of = np.random.default_rng(5).integers(0, 2, 24)[np.arange(480) % 24]
    trace = trace_of(texts, lambda token, rng: route[token % 24], layers=6)
    found = specialisation(trace, Grouping("coin", ("a", "b"), of))
    assert found and not found.whole_texts and found.beyond_chance < 0.3


def test_favourite_tokens_are_found() -> None:
    texts = [word for i in range(60) for word in (f"x{i % 5}", "drug")] + WORDS[:100]

    def route(token: int, rng: np.random.Generator):
        return [3, 0, 1, 2] if token < 120 and token % 2 else rng.permutation(4)

    favourites = vocabulary(trace_of(texts, route), 1, 2)
    assert [f.text for f in favourites[3]] == ["drug"]
    found = favourites[3][0]
    assert found.times == 60 and found.contexts == 5 and found.share == pytest.approx(1)
    assert found.usual < 0.7 and found.lift == pytest.approx(1 / found.usual)
    assert "w5" not in {f.text for row in favourites for f in row}  # seen once
    alone = vocabulary(trace_of(["the", "drug"] * 60, route), 1, 2)
    assert not any(f.text == "drug" for row in alone for f in row)  # always after the same word


def test_ranks_without_weight_are_no_choices() -> None:
    one = trace_of(WORDS[:20], lambda token, rng: [0, 1, 2, 3], k=1)
    weights = np.zeros((20, 3, 3, 2), np.float16)
    weights[..., 0] = 1
    padded = dataclasses.replace(trace_of(WORDS[:20], lambda token, rng: [0, 1, 2, 3]), weights=weights)
    assert np.array_equal(choice_counts(padded), choice_counts(one))
    assert coactivation(padded)[0, 0, 0].tolist() == [1, 0, 0, 0]
    assert compare(padded, one).same == 1
    two = compare(trace_of(WORDS[:20], lambda token, rng: [0, 1, 2, 3]), one)
    assert two.same == 0 and two.overlap.max() == 0.5


def test_long_texts_are_aligned_quickly() -> None:
    a, b = (
        trace_of(["q", *["x", "y"] * 900, "z"], even(), layers=1),
        trace_of(["q", *["y", "x"] * 900, "z"], even(), layers=1),
    )
    ids = {"q": 0, "x": 1, "y": 2, "z": 3}
    b = dataclasses.replace(b, tokens=tuple(dataclasses.replace(t, id=ids[t.text]) for t in b.tokens))
    assert compare(a, b).pairs.tolist() == [[0, 0], [1801, 1801]]  # too long between: what both begin and end with


def test_comparison_of_the_same_tokens() -> None:
    a = trace_of(WORDS[:20], lambda token, rng: [0, 1, 2, 3])
    b = trace_of(WORDS[:20], lambda token, rng: [0, 2, 1, 3] if token < 10 else [1, 0, 2, 3])
    found = compare(a, b)
    assert found.pairs.tolist() == [[i, i] for i in range(20)] and found.same == pytest.approx(0.5)
    assert found.overlap[0, 0, 0] == 0.5 and found.overlap[19, 0, 0] == 1
    assert found.moved[0, 0, 0] == pytest.approx(0.25, abs=1e-3)  # 0.25 of the weight went from 1 to 2
    assert found.moved[19, 0, 0] == pytest.approx(0.5, abs=1e-3)  # the two changed places
    assert compare(a, a).same == 1 and compare(a, a).divergence == pytest.approx(np.zeros((3, 3)))


def test_comparison_of_different_texts() -> None:
    a, b = trace_of(["q", "x", "y", "z"], even()), trace_of(["q", "y", "z", "end"], even())
    ids = {"q": 0, "x": 1, "y": 2, "z": 3, "end": 4}
    b = dataclasses.replace(b, tokens=tuple(dataclasses.replace(t, id=ids[t.text]) for t in b.tokens))
    found = compare(a, b)
    assert found.pairs.tolist() == [[0, 0], [2, 1], [3, 2]] and (found.only_a, found.only_b) == (1, 1)


def test_traces_of_other_shapes_are_not_compared() -> None:
    with pytest.raises(TraceError):
        compare(trace_of(WORDS[:3], even()), trace_of(WORDS[:3], even(), layers=2))
