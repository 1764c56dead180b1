"""The tree of branches, by properties; the store and its migrations; files out and in."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_app.conversation import consult
from ming_app.conversation.files import from_json, from_rows, to_html, to_json, to_markdown
from ming_app.conversation.presets import OWN, presets, system_of
from ming_app.conversation.store import SCHEMA, ConversationStore, m001_conversations
from ming_app.conversation.tree import Conversation, Turn, whole
from ming_app.database import StoreError


def talked(*texts: str) -> Conversation:
    return Conversation.of(Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts))


def texts(talk: Conversation) -> list[str]:
    return [turn.text for turn in talk.path]


# -- the tree ---------------------------------------------------------------------------------------------------------


def test_editing_and_asking_again_make_branches() -> None:
    talk = talked("q1", "a1", "q2", "a2")
    first, answer = talk.path[0], talk.path[1]
    talk.rewind(first)
    talk.add(Turn("assistant", "a1b"))
    assert texts(talk) == ["q1", "a1b"] and [turn.text for turn in talk.branches(talk.path[1])] == ["a1", "a1b"]
    talk.show(answer)
    assert texts(talk) == ["q1", "a1", "q2", "a2"]
    talk.rewind(None)
    talk.add(Turn("user", "Q1"))
    assert texts(talk) == ["Q1"] and len(talk.branches(talk.path[0])) == 2 and len(talk.nodes) == 6


@given(st.lists(st.tuples(st.sampled_from(["add", "rewind", "show", "drop"]), st.integers(0, 30)), max_size=40))
@settings(max_examples=200, deadline=None)
def test_whatever_is_done_the_tree_stays_one(steps: list[tuple[str, int]]) -> None:
    talk = Conversation()
    for step, number in steps:
        nodes = list(talk.nodes.values())
        if step == "add" or not nodes:
            talk.add(Turn("user" if len(talk.path) % 2 == 0 else "assistant", f"t{len(nodes)}", at=float(len(nodes))))
        elif step == "rewind":
            talk.rewind(nodes[number % len(nodes)] if number % 3 else None)
        elif step == "show":
            turn = nodes[number % len(nodes)]
            talk.show(turn)
            assert turn in talk.path and not any(node.parent == talk.leaf for node in talk.nodes.values())
        elif talk.leaf and not any(node.parent == talk.leaf for node in nodes):
            talk.drop_leaf()
        assert whole(list(talk.nodes.values()))
        path = talk.path
        assert all(after.parent == before.id for before, after in zip(path, path[1:], strict=False))
        assert all(turn in talk.branches(turn) for turn in path)
    (copy,) = from_json(to_json([talk]))
    assert texts(copy) == texts(talk) and len(copy.nodes) == len(talk.nodes)


def test_a_cycle_or_a_missing_parent_is_no_tree() -> None:
    one, two = Turn("user", "a", id="1", parent="2"), Turn("user", "b", id="2", parent="1")
    assert not whole([one, two]) and not whole([Turn("user", "a", id="1", parent="9")])
    assert not whole([Turn("user", "a", id="1"), Turn("user", "b", id="1")])


# -- the store --------------------------------------------------------------------------------------------------------


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "conversations.sqlite"
    store = ConversationStore(path)
    talk = talked("头痛怎么办", "多休息", "还有呢", "喝水")
    talk.rewind(talk.path[1])
    talk.add(Turn("user", "为什么"))
    store.save(talk, *talk.nodes.values())
    store.close()
    again = ConversationStore(path)
    loaded = again.load(talk.id)
    assert texts(loaded) == ["头痛怎么办", "多休息", "为什么"] and len(loaded.nodes) == 5
    assert loaded.title == "头痛怎么办" and again.entries()[0].turns == 5


def test_listing_searching_pinning_renaming_deleting() -> None:
    store = ConversationStore(":memory:")
    for at, text in enumerate(("fever in children", "50% of_patients", "胸痛的原因")):
        talk = talked(text, "answer about ibuprofen" if at == 0 else "ok")
        talk.updated = float(at)
        store.save(talk, *talk.nodes.values())
    titles = [entry.title for entry in store.entries()]
    assert titles == ["胸痛的原因", "50% of_patients", "fever in children"]
    assert [e.title for e in store.entries("IBUPROFEN")] == ["fever in children"]
    assert [e.title for e in store.entries("50% of_")] == ["50% of_patients"] and store.entries("5_%") == []
    assert [e.title for e in store.entries("胸痛")] == ["胸痛的原因"]
    oldest = store.entries()[-1]
    store.pin(oldest.id, True)
    store.rename(oldest.id, "  Kids'\n fever ")
    store.rename(oldest.id, "   ")
    assert store.entries()[0].title == "Kids' fever" and store.entries()[0].pinned
    store.delete(oldest.id)
    assert len(store.entries()) == 2
    with pytest.raises(StoreError, match="not there"):
        store.load(oldest.id)


def test_two_windows_do_not_overwrite_each_other(tmp_path: Path) -> None:
    path = tmp_path / "conversations.sqlite"
    one, two = ConversationStore(path), ConversationStore(path)
    talk = talked("q", "a")
    one.save(talk, *talk.nodes.values())
    other = two.load(talk.id)
    mine = talk.add(Turn("user", "from the first window"))
    theirs = other.add(Turn("user", "from the second window"))
    one.save(talk, mine)
    two.save(other, theirs)
    found = one.load(talk.id)
    assert {"from the first window", "from the second window"} <= {turn.text for turn in found.nodes.values()}
    assert len(found.branches(found.nodes[mine.id])) == 2


def test_a_file_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "conversations.sqlite"
    db = sqlite3.connect(path, isolation_level=None)
    m001_conversations(db)
    db.execute("INSERT INTO conversations VALUES ('c1c1c1c1','old one',1.0,2.0,1,'patient','','t2t2')")
    db.execute("INSERT INTO turns VALUES ('c1c1c1c1','t1t1','','user','q','',1.0,'')")
    db.execute("INSERT INTO turns VALUES ('c1c1c1c1','t2t2','t1t1','assistant','a','stop',2.0,'m')")
    db.execute("PRAGMA user_version=1")
    db.close()
    store = ConversationStore(path)
    talk = store.load("c1c1c1c1")
    assert texts(talk) == ["q", "a"] and talk.mode == "chat" and talk.pinned and talk.path[1].rating == 0
    talk.path[1].rating, talk.path[1].comment = -1, "Wrong"
    store.save(talk, talk.path[1])
    (rated,) = store.feedback()
    assert rated["question"] == "q" and rated["rating"] == -1 and rated["comment"] == "Wrong"
    store.close()
    later = sqlite3.connect(path)
    later.execute(f"PRAGMA user_version={len(SCHEMA.migrations) + 1}")
    later.commit()
    later.close()
    with pytest.raises(StoreError, match="newer version"):
        ConversationStore(path)


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "conversations.sqlite"
    store = ConversationStore(path)
    talk = talked("q", "a")
    store.save(talk, *talk.nodes.values())
    store.close()
    ConversationStore(path).close()  # the day's backup
    path.write_bytes(b"no database" * 500)
    again = ConversationStore(path)
    assert again.notice is not None and "conversations" in again.notice.en and "对话记录" in again.notice.zh
    assert texts(again.load(talk.id)) == ["q", "a"] and list(tmp_path.glob("*.damaged-*"))


def test_a_browser_gets_what_changed_and_gives_it_back() -> None:
    store = ConversationStore(":memory:")
    talk, other = talked("q", "a"), talked("gone", "soon")
    for made in (talk, other):
        store.save(made, *made.nodes.values())
    changes = store.take_changes()
    assert len(changes["rows"]["conversations"]) == 2 and len(changes["rows"]["turns"]) == 4
    store.delete(other.id)
    gone = store.take_changes()["gone"]
    assert gone["conversations"] == [(other.id,)] and len(gone["turns"]) == 2
    tables = json.loads(json.dumps({"columns": changes["columns"], **changes["rows"]}))
    found = {made.id: made for made in from_rows(tables)}
    assert texts(found[talk.id]) == ["q", "a"] and set(found) == {talk.id, other.id}
    assert found[talk.id].path[0].id == talk.path[0].id


@pytest.mark.parametrize(
    "tables",
    [
        None,
        [],
        {"columns": 3},
        {"columns": {"conversations": ["id"]}, "conversations": [["../../etc"]]},
        {
            "columns": {"conversations": ["id"], "turns": ["conversation", "id"]},
            "conversations": [["c" * 9]],
            "turns": [[1]],
        },
    ],
)
def test_hostile_rows_of_a_browser_are_left_out(tables: object) -> None:
    assert all(len(talk.nodes) == 0 for talk in from_rows(tables))


# -- files ------------------------------------------------------------------------------------------------------------

XSS = "<script>alert(1)</script><img src=x onerror=alert(2)> ![x](javascript:alert(3))"


def test_exports_carry_the_label_and_are_inert() -> None:
    talk = talked(XSS, XSS)
    talk.title, talk.summary = XSS, XSS
    for lang, label in (("en", "AI-generated"), ("zh", "人工智能生成")):
        html = to_html(talk, lang)
        assert "<script" not in html and "<img" not in html and html.count(label) >= 2 and 'name="ai-generated"' in html
        markdown = to_markdown(talk, lang)
        assert label in markdown and '"ai_generated": true' in markdown
    values = json.loads(to_json([talk]))
    assert values["metadata"]["ai_generated"] is True
    assert [turn.get("ai_generated") for turn in values["conversations"][0]["turns"]] == [None, True]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"ming_conversations": "1"}',
        b'{"ming_conversations": 1, "conversations": 5}',
        b'{"ming_conversations": 1, "conversations": [{"turns": 1}]}',
        b'{"ming_conversations": 1, "conversations": [{"turns": [{"role": "system", "text": "x", "id": "1"}]}]}',
        b'{"ming_conversations": 1, "conversations": [{"turns": [{"role": "user", "text": "x", "id": "1", "parent": "1"}]}]}',
        b"[" * 100_000,
        b" " * (6 << 20),
    ],
)
def test_files_that_are_none_are_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(StoreError, match="cannot be imported"):
        from_json(data)
    with pytest.raises(StoreError, match="newer version"):
        from_json(b'{"ming_conversations": 99}')


def test_ids_are_given_anew_and_strange_values_are_tamed() -> None:
    data = {
        "ming_conversations": 1,
        "conversations": [
            {
                "title": "t" * 500,
                "pinned": "yes",
                "mode": "root",
                "created": float("1e300"),
                "leaf": 7,
                "turns": [
                    {
                        "role": "user",
                        "text": "a\x00b\x1b[31m",
                        "id": "../x",
                        "parent": "",
                        "at": "soon",
                        "rating": True,
                    },
                    {"role": "assistant", "text": "c", "id": "y", "parent": "../x", "rating": 9, "comment": 4},
                ],
            }
        ],
    }
    (talk,) = from_json(json.dumps(data).encode())
    assert len(talk.title) == 80 and talk.pinned is False and talk.mode == "chat"
    assert talk.path[0].text == "ab[31m" and talk.path[0].rating == 0 and talk.path[1].rating == 0
    assert all(len(turn.id) == 16 for turn in talk.path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_subnormal=False) | st.text(max_size=8),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["ming_conversations", "conversations", "turns", "role", "text", "id", "parent", "title"]
                ),
                x,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_json_is_read_or_refused(value: object) -> None:
    with contextlib.suppress(StoreError):
        from_json(json.dumps(value).encode("utf-8", "surrogatepass"))


# -- presets and consultation -----------------------------------------------------------------------------------------


def test_system_prompts() -> None:
    assert list(presets()) == ["plain", "patient", "tutor", "case"]
    talk = Conversation(preset="patient", system="mine")
    assert "doses" in system_of(talk, "en") and "剂量" in system_of(talk, "zh")
    talk.preset = OWN
    assert system_of(talk, "en") == "mine"
    assert system_of(Conversation(), "en") == "" and system_of(Conversation(preset="nope"), "zh") == ""


def test_the_structure_of_a_consultation() -> None:
    ids = [step.id for step in consult.steps()]
    assert ids == ["complaint", "onset", "course", "associated", "history", "medication", "allergies"]
    talk = Conversation()
    consult.begin(talk, "zh")
    assert talk.mode == "consult" and "不适" in talk.path[0].text
    for text, reason in (("胃痛", "stop"), ("给我开点药", consult.ORDER), ("两个月", "stop")):
        talk.add(Turn("user", text))
        talk.add(Turn("assistant", "?", reason=reason))
    step = consult.pending(talk.path)
    assert step is not None and step.id == "course"  # a request for a drug answers no question
    summary = consult.compose(talk.path, "zh")
    assert summary.splitlines()[:3] == ["主诉：胃痛", "起病：两个月", "经过：（未回答）"]
    talk.summary = summary
    note = consult.note(talk, "zh", "2026-11-27")
    assert "未经专业人员核实" in note and "人工智能" in note and "胃痛" in note


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("When did the pain begin?", True),
        ("When did it begin? Also, take aspirin.", True),
        ("You should rest.", False),
        ("什么时候开始的？", False),
        ("?", False),
        ("Which medicine should I prescribe?", False),
        ("w" * 300 + "?", False),
    ],
)
def test_the_models_wording_is_used_where_it_is_a_question(text: str, good: bool) -> None:
    step = consult.steps()[1]
    said = consult.worded(text, step, "en")
    assert (said != step.asks["en"]) == good and said.endswith("?") and "aspirin" not in said


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("what dose of ibuprofen should I take", True),
        ("please prescribe something", True),
        ("给我开点药", True),
        ("布洛芬一次吃几片", True),
        ("I take metformin every day", False),
        ("My doctor prescribed metformin", False),
        ("I take a prescription blood thinner", False),
        ("医院给我开了降压药", False),
        ("医生开的药吃完了", False),
        ("我在吃降压药", False),
        ("no medicines", False),
        ("没吃什么药", False),
        ("目前没有吃什么药", False),
        ("我该吃什么药", True),
        ("不知道该用什么药", True),
        ("吃多少吐多少", False),
        ("布洛芬要吃多少？", True),
        ("一天吃多少毫克", True),
        ("医生给我配的药", False),
        ("我妈给我买的药", False),
        ("给我点消炎药", True),
        ("Metformin, dosage 500 mg", False),
        ("what is the right dosage of ibuprofen", True),
        ("I don't know what medication it was", False),
        ("I'm not sure which drug", False),
        ("which medicine should I take?", True),
        ("I don't know what medicine to take", True),
        ("what is the maximum safe dosage?", True),
        ("胰岛素打多少单位", True),
        ("一次吃多少个好", True),
        ("吃多少都不觉得饱", False),
        ("吃多少也不胖", False),
        ("吃多少还是饿", False),
        ("医生给我的药", False),
    ],
)
def test_requests_for_drugs(text: str, order: bool) -> None:
    assert consult.asks_for_drug(text) == order
