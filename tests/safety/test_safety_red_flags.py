"""Red flags: measured on the test half of the labelled sentences, and each behaviour by itself."""

from __future__ import annotations

import json
import time
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_app.safety import numbers, score
from ming_app.safety.notices import assessed, banner, triage, warning
from ming_app.safety.red_flags import RANK, assess
from ming_app.safety.rules import FOLDER, RuleError, rule_book, truth
from ming_app.safety.text import language, plain
from training.safety_score import read, split


def raised(*messages: str) -> str:
    return assess(messages).category


# -- measured ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lang", ["zh", "en"])
@pytest.mark.parametrize("name", ["labelled", "blind"])
def test_what_was_held_back(lang: str, name: str) -> None:
    """Recall at least 98 %, false alarms at most 5 %, on sentences that neither rules nor weights have seen."""
    held = [sentence for sentence in read(name) if sentence.lang == lang]
    if name == "labelled":
        _, held = split(held)
    found = [bool(assess(sentence.turns).flags) for sentence in held]
    danger = [flag for flag, sentence in zip(found, held, strict=True) if sentence.red_flag]
    harmless = [flag for flag, sentence in zip(found, held, strict=True) if not sentence.red_flag]
    recall, false = sum(danger) / len(danger), sum(harmless) / len(harmless)
    print(f"{name} {lang}: recall {recall:.1%} of {len(danger)}, false alarms {false:.1%} of {len(harmless)}")
    assert len(held) >= 200 and recall >= 0.98 and false <= 0.05


def test_the_sentences_are_many_and_apart() -> None:
    labelled, more = read("labelled"), read("more")
    assert len(labelled) >= 400 and {s.lang for s in labelled} == {"zh", "en"}
    kinds = Counter(sentence.kind for sentence in labelled)
    assert all(kinds[kind] >= 10 for kind in ("near_miss", "study", "negation", "past", "metaphor", "turns", "typo"))
    assert {s.category for s in labelled if s.red_flag} >= set(RANK) - {"other", "arrest"}
    texts = Counter("|".join(sentence.turns) for sentence in labelled + more)
    assert max(texts.values()) == 1


def test_it_is_quick() -> None:
    """Prints what a benchmark would; fails only when it is far off."""
    sentences = [s.turns[-1] for s in read("labelled")][:300]
    assess(["warm up", "预热"])
    begin = time.perf_counter()
    for text in sentences:
        assess([text])
    each = (time.perf_counter() - begin) / len(sentences) * 1000
    print(f"{each:.2f} ms a message")
    assert each < 20


# -- what it must tell apart ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("I have crushing chest pain and I'm sweating", "cardiac"),
        ("我胸口像压了块大石头，出冷汗", "cardiac"),
        ("媽媽突然嘴歪，說話不清，右手抬不起來", "stroke"),
        ("his face is drooping and he can't lift his arm", "stroke"),
        ("我弟不想活了，站在天台上", "self_harm"),
        ("i took about 40 paracetamol an hour ago, feel fine", "poisoning"),
        ("宝宝才40天，发烧38.6度", "infant"),
        ("my baby is 5 weeks old and has a fever of 101.5", "infant"),
        ("my toddler swallowed a button battery", "swallowed"),
        ("考试没考好，我吞了一瓶安眠药", "poisoning"),
        ("老师说我脸歪了，话也说不清", "stroke"),
        ("未婚夫突然昏迷叫不醒", "consciousness"),
        ("我爷爷没有心跳没有呼吸了", "arrest"),
        ("my husband collapsed and isn't breathing", "arrest"),
        ("I don't think I can keep myself safe tonight", "self_harm"),
        ("homework stress made me take 40 paracetamol", "poisoning"),
        ("宝宝被果冻噎住了脸发紫", "airway"),
        ("孕33周，突然流了好多血", "obstetric"),
        ("我怀孕34周，血压165/112", "obstetric"),
        ("我34周孕，今早自己量血压 162/98", "obstetric"),
        ("a stray dog scratched my face", "bites"),
        ("被流浪狗咬破皮了", "bites"),
        ("I woke up and there was a bat in the room, it left a tiny scratch", "bites"),
        ("crushing chest pressure, I took some Tums for it", "cardiac"),
        ("my 3 week old baby has a temperature of 35.4", "infant"),
        ("I vomited blood, it has stopped now", "bleeding"),
        ("my blood pressure is 88/50 and I'm in a cold sweat", "shock"),
        ("he tried to kill himself and is not breathing", "arrest"),
        ("他自杀了，没有呼吸", "arrest"),
        ("he was electrocuted by the overhead line and is not breathing", "electric"),
    ],
)
def test_emergencies_in_lay_words(text: str, category: str) -> None:
    assert raised(text) == category


@pytest.mark.parametrize(
    "text",
    [
        "no chest pain, no shortness of breath, just a runny nose",
        "没有胸痛，也没有胸闷，就是嗓子有点干",
        "Which of the following is the most likely diagnosis? A 55-year-old man presents with crushing chest pain. A. MI B. PE C. GERD",
        "患者，男，62岁，突发胸骨后压榨性疼痛2小时，大汗。最可能的诊断是 A.心肌梗死 B.肺炎 C.胃炎",
        "I had a heart attack ten years ago and I am fine now, can I fly?",
        "我爷爷十年前中风，现在恢复得挺好，平时饮食注意什么",
        "this exam is killing me, any tips for focus",
        "笑死我了，这个段子太好笑",
        "What are the symptoms of a stroke?",
        "血压118/76，心率72，正常吗",
    ],
)
def test_study_denial_past_and_figures_of_speech(text: str) -> None:
    assert raised(text) == ""


def test_a_danger_told_in_pieces() -> None:
    told = ["我妈今天早上说胸口有点不舒服", "刚才开始出冷汗", "现在左胳膊也麻，脸色发白"]
    assert raised(*told) == "cardiac"
    assert raised(*told, "谢谢") == "cardiac"  # and it stays
    assert raised("how do vaccines work?", "thanks") == ""


def test_playing_it_down_does_not_silence_it() -> None:
    assert raised("my wife says it's nothing, but my chest feels crushed and I'm drenched in sweat") == "cardiac"
    assert raised("他说没事睡一觉就好，可是他嘴歪了，说话也说不清") == "stroke"


def test_other_writings_of_the_same_words() -> None:
    for text in (
        "我喘不過氣，嘴唇發紫",
        "我喘不过气，嘴唇发紫",
        "我喘不过气，嘴唇发紫\u200b",
        "Ｉ ｃａｎ’ｔ ｂｒｅａｔｈｅ, lips are blue",
    ):
        assert raised(text) == "airway", text
    assert "胸" in plain("胸\u200b悶") and plain("Can’t BREATHE") == "cant breathe"
    assert language("胸口疼 chest pain") == "zh" and language("hello") == "en"


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("体温三十九度五", "temp_39"),
        ("temp of 104.2", "temp_40"),
        ("bp 82/50", "bp_low"),
        ("血压 190/125", "bp_high"),
        ("spo2 is 84%", "oxygen_low"),
        ("血糖 2.1", "sugar_low"),
        ("blood sugar is 480 mg/dl", "sugar_high"),
        ("my 3 week old baby", "age_under_90_days"),
        ("宝宝两个月大", "age_under_90_days"),
        ("34 weeks pregnant", "pregnant_late"),
    ],
)
def test_numbers(text: str, fact: str) -> None:
    assert fact in numbers.facts(numbers.digits(plain(text)))


def test_numbers_that_say_nothing() -> None:
    assert numbers.facts("i am 38 years old and paid 40 dollars") == frozenset()
    assert "temp_38" not in numbers.facts(plain("孕38周"))


# -- the contract -----------------------------------------------------------------------------------------------------


def test_triage_says_what_to_do() -> None:
    found = triage("我突然胸痛，出冷汗，左胳膊麻")
    assert found["red_flag"] and found["category"] == "cardiac" and found["lang"] == "zh" and found["matched"]
    assert "120" in found["message"]
    assert "999" in triage("he is not breathing", "uk")["message"]
    assert triage("how much sleep do I need?") == {
        "red_flag": False,
        "category": "",
        "lang": "en",
        "matched": [],
        "message": "",
    }


def test_every_category_has_its_words_in_every_region() -> None:
    table = tomllib.loads((FOLDER / "actions.toml").read_text(encoding="utf-8"))
    for category in RANK:
        assert category in table
        for lang in ("zh", "en"):
            for region in ("auto", *table["numbers"]):
                shown = banner(category, lang, region)
                assert shown.title and shown.action and "{" not in shown.text
    assert "12356" in banner("self_harm", "zh").text and "988" in banner("self_harm", "en", "us").text


def test_rules_are_whole() -> None:
    book = rule_book()
    known = {concept.name for concept in book.concepts}
    facts = {
        "age_under_90_days age_under_1_year age_under_6_years age_over_50_years temp_38 temp_39 temp_40 temp_41 temp_36 temp_low "
        "bp_high bp_160 bp_raised bp_low oxygen_low pulse_high pulse_low sugar_low sugar_high tablets_many minutes_5 minutes_20 hours "
        "pregnant_late pregnant_early"
    }.pop()
    for rule in book.rules:
        assert rule.names <= known | set(facts.split()), rule.id
        assert rule.category in RANK and len(rule.source) > 5
    assert len({rule.id for rule in book.rules}) == len(book.rules)
    for bad in ("a(b)", "a + b", "a and", "__import__('os')", "a.b"):
        with pytest.raises(RuleError):
            truth(bad, "x")


def test_weights_are_what_the_trainer_writes() -> None:
    for lang in ("zh", "en"):
        model = score.weights(lang)
        assert len(model.weights) > 5_000 and 0 < model.low <= model.high < 1
        assert all(category in RANK for category, _ in model.categories.values())


@given(st.text(max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_text_is_read(text: str) -> None:
    found = assess([text])
    assert found == assess([text])
    assert all(flag.category in RANK for flag in found.flags)
    json.dumps(triage(text))


def test_long_and_hostile_texts_are_read_in_time() -> None:
    begin = time.perf_counter()
    for text in (
        "a" * 1_000_000,
        "no " * 300_000,
        "胸" * 500_000,
        "，" * 400_000,
        "my chest " * 100_000,
        "1/" * 200_000,
        "\ud800x",
    ):
        assess([text])
    assert time.perf_counter() - begin < 30


def test_a_very_long_message_is_read_at_both_ends() -> None:
    filler = "we talked about the weather and the garden. " * 400
    assert raised(filler + " I can't breathe and my lips are blue") == "airway"


def test_sentences_are_ours_and_labelled(tmp_path: Path) -> None:
    for sentence in read("labelled"):
        assert sentence.turns and all(turn.strip() for turn in sentence.turns)
        assert bool(sentence.category) == sentence.red_flag


@pytest.mark.parametrize(
    ("said", "first"),
    [
        (["he tried to kill himself and is not breathing"], "arrest"),
        (
            ["I was electrocuted by the overhead line an hour ago", "I want to die, I am going to kill myself"],
            "electric",
        ),
        (["我被高压线电到了", "我不想活了，想自杀"], "electric"),
    ],
)
def test_a_crisis_line_is_there_whatever_comes_first(said: list[str], first: str) -> None:
    found = assess(said)
    assert found.category == first
    for lang, line in (("en", "12356"), ("zh", "12356")):
        shown = assessed(found, lang, "cn")
        assert shown is not None and line in shown.text
    said_there = warning(said, "us")
    assert said_there is not None and all("988" in text for text in said_there)
