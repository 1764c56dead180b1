"""The views: figures that plotly accepts and older plotly.js draws, tables that hold what the statistics say, safe CSV and HTML."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
from synthetic import even, trace_of

from ming_app.molora.trace import Segment
from ming_app.router import panel, views
from ming_app.router.compare import compare
from ming_app.router.groups import groupings
from ming_app.router.statistics import coactivation, flow, load
from ming_app.router.views import Table, View, Where
from ming_app.router.words import PANEL, WORDS, panel_words

TEXTS = ["<|im_start|>", "心", " fever", "37", "。", "\n"] * 12
SEGMENTS = [Segment(0, "a", {"language": "zh"}), Segment(36, "b", {"language": "en"})]


@pytest.fixture(scope="module")
def trace():
    made = trace_of(TEXTS, even(), layers=10, answer_from=40, segments=SEGMENTS)
    sizes = np.random.default_rng(0).random(made.experts.shape).astype(np.float16)
    return dataclasses.replace(made, contributions=sizes)


def every_view(trace, lang: str) -> list[View]:
    found = [
        views.load_view(trace, lang, 1),
        views.vocabulary_view(trace, lang, Where(2, 0)),
        views.together_view(trace, lang, 3, 2),
        views.flow_view(trace, lang, 0, 5),
        views.contribution_view(trace, lang, 2),
        views.compare_view(compare(trace, trace), trace, trace, lang),
        views.alike_view(np.zeros((10, 3, 4, 4), np.float32), trace, lang, 1, 1),
    ]
    found += [views.specialisation_view(trace, lang, grouping) for grouping in groupings(trace)]
    assert all(found)
    return [view for view in found if view]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_view_is_whole(trace, lang: str) -> None:
    found = every_view(trace, lang)
    assert len({view.name for view in found}) == len(found) == 10
    for view in found:
        assert view.title and view.note and "{" not in view.title + view.note
        assert all(len(row) == len(view.table.columns) for row in view.table.rows)
        if view.figure is None:
            continue
        figure = go.Figure(view.figure)  # refuses what plotly does not know
        assert {part.type for part in figure.data} <= {"heatmap", "bar", "scatter", "sankey"}
        assert json.loads(json.dumps(view.figure, allow_nan=False)) == view.figure
    assert lang == "zh" or all(ord(c) < 0x2E80 for view in found for c in view.title + view.note)


def test_pictures_hold_the_statistics(trace) -> None:
    view = views.load_view(trace, "en", 1)
    assert np.allclose(view.figure["data"][0]["z"], load(trace).share[:, 1], atol=1e-4)
    assert len(view.table.rows) == 10 * 3 * 4
    together = views.together_view(trace, "en", 3, 2).figure["data"][0]["z"]
    assert together[0][0] is None and together[1][2] == pytest.approx(coactivation(trace)[3, 2, 1, 2], abs=1e-4)
    sankey = views.flow_view(trace, "en", 0, 5).figure["data"][0]
    counts = flow(trace, 0)
    assert sum(sankey["link"]["value"]) == counts[2:9].sum()  # 8 layers: the last eight that exist
    assert max(sankey["link"]["target"]) < len(sankey["node"]["label"]) == 8 * 4
    assert views.compare_view(compare(trace, trace), trace, trace, "en").note.count("100 %") == 1


def test_what_was_not_recorded_is_not_shown(trace) -> None:
    assert views.contribution_view(dataclasses.replace(trace, contributions=None), "en", 0) is None


def test_a_dead_expert_is_named_in_words() -> None:
    trace = trace_of(TEXTS, lambda token, rng: rng.permutation([0, 1, 3]), layers=1)
    assert "layer 0 gate: 2" in views.load_view(trace, "en").note
    assert "第 0 层 gate：2" in views.load_view(trace, "zh").note


def test_tables_escape_what_tokens_say() -> None:
    table = Table(("t", "n"), [("<b>&", 1.5), ("=HYPERLINK(1)", 2), ('a"b,c', 3)])
    assert "<td>&lt;b&gt;&amp;</td><td>1.5</td>" in table.to_html() and "…" in table.to_html(limit=1)
    assert table.to_csv().splitlines()[1:] == ["<b>&,1.5", "'=HYPERLINK(1),2", '"a""b,c",3']


def test_words_are_there_in_both_languages() -> None:
    for key, (en, zh) in {**WORDS, **PANEL}.items():
        assert bool(en) == bool(zh), key
        assert set(re.findall(r"\{(\w+)\}", en)) == set(re.findall(r"\{(\w+)\}", zh)), key
        assert not re.search(r"[\u4e00-\u9fff]", en), key


def test_the_panel_finds_its_words_and_uses_all() -> None:
    files = panel.template() + panel.script()
    named = set(re.findall(r"""(?:data-t="|say\(")(\w+)""", files))
    assert named <= set(PANEL)
    assert {key for key in PANEL if f'"{key}"' not in files} == set()
    assert panel_words("zh-CN")["title"] == PANEL["title"][1] and panel_words("fr")["title"] == PANEL["title"][0]
