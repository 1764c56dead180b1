"""Numbers in a message as facts with names: "temp_38", "age_under_90_days", "bp_low". Rules combine them with concepts.

Ages, temperatures (C or F), blood pressure, oxygen, pulse, glucose (mmol/L or mg/dL), tablets, minutes, weeks pregnant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_DIGITS = {"零": 0, "一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9}
_WORDS = dict(
    zip(
        [
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
            "thirty",
            "forty",
            "fifty",
            "sixty",
        ],
        [*range(1, 21), 30, 40, 50, 60],
        strict=True,
    )
)
_WORD_NUMBERS = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b(?:[ -](one|two|three|four|five|six|seven|eight|nine)\b)?")
_ZH_NUMBERS = re.compile(
    r"[一二两三四五六七八九]?百(?:零?[一二三四五六七八九])?[一二三四五六七八九]?十?[一二三四五六七八九]?|[一二两三四五六七八九]?十[一二三四五六七八九]?|[零一二两三四五六七八九]"
)


def digits(text: str) -> str:
    """The text with number words as figures: "thirty-nine" -> 39, "三十九度五" -> 39度5."""

    def english(found: re.Match[str]) -> str:
        first = re.split(r"[ -]", found[0])[0]
        return str(_WORDS[first] + (_WORDS[found[1]] if found[1] and _WORDS[first] >= 20 else 0))

    return _ZH_NUMBERS.sub(lambda found: str(_zh_value(found[0])), _WORD_NUMBERS.sub(english, text))


def _zh_value(text: str) -> int:
    total = number = 0
    for sign in text:
        if sign == "百":
            total, number = total + (number or 1) * 100, 0
        elif sign == "十":
            total, number = total + (number or 1) * 10, 0
        else:
            number = _DIGITS[sign]
    return total + number


_N = r"(\d{1,3}(?:\.\d)?)"
_UNITS = {"d": 1, "天": 1, "日": 1, "w": 7, "周": 7, "星": 7, "礼": 7, "m": 30, "个": 30, "月": 30, "y": 365, "岁": 365}
_AGE = (
    re.compile(
        r"\b(\d{1,3})[ -]?(days?|wks?|weeks?|months?|mths?|mos?|years?|yrs?|yo|y/o|d|w|m|y)[ -]?(?:of age|olds?|o\b|girl|boy|infant|baby|newborn|male|female|man|woman|son|daughter)"
    ),
    re.compile(
        r"(?:baby|infant|newborn|son|daughter|boy|girl|child|grandson|granddaughter|nephew|niece|kid|he|she|aged|age)\W+(?:is|hes|shes|aged|only|just|was|whos|who is|turned|at|my|about|around|,|\s)*\W*(\d{1,3})[ -]?(days?|wks?|weeks?|months?|mths?|mos?|years?|yrs?)\b"
    ),
    re.compile(
        r"(?:宝宝|婴儿|新生儿|宝贝|孩子|小孩|儿子|女儿|娃|孙子|孙女|外甥|侄子|患儿|出生|生下来|刚|才|月龄)\D{0,6}(\d{1,3})个?(天|日|周|星期|礼拜|月|岁)(?!前|后来|以前|左右前)"
    ),
    re.compile(
        r"(\d{1,3})个?(天|日|周|星期|礼拜|月)(?:大|龄|的|多的|多大)\D{0,4}(?:宝宝|婴儿|新生儿|孩子|小孩|娃|儿子|女儿|宝贝|小宝|孙)"
    ),
    re.compile(r"(\d{1,3})个?(天|日|周|星期|礼拜|月)大"),
    re.compile(r"(\d{1,3})(岁)"),
)
_NEWBORN = re.compile(
    r"\bnew ?born\b|\bneonate\b|新生儿|刚出生|没满月|未满月|还没满月|不满月|月子里的?(?:宝宝|孩子|娃)|出生没几天"
)


def ages(text: str) -> Iterator[float]:
    """Ages in days."""
    for pattern in _AGE:
        for found in pattern.finditer(text):
            yield float(found[1]) * _UNITS[found[2][0]]
    if _NEWBORN.search(text):
        yield 14.0


_CELSIUS = re.compile(
    r"(?<![\d.])(3[3-9]|4[0-3])(?:\.(\d)|度(\d)|\s?点\s?(\d))?\s?(?:°|度|℃|c\b|degrees?|摄氏度|celsius|多度)?(?!\s?(?:周|岁|wk|week|year|天|kg|公斤|个|mg|%|斤|次|毫))"
)
_HEAT_WORD = re.compile(
    r"temp|fever|feverish|degrees|celsius|thermomet|°|发烧|发热|体温|高烧|低烧|烧到|烧|℃|度(?!过)|量了|hot|burning up|core|体表"
)
_FAHRENHEIT = re.compile(r"(?<![\d.])(9[0-6]|10[0-9])(?:\.(\d))?\s?(?:°|f\b|degrees?|fahrenheit|fever|temp)?(?![\d/])")


def temperatures(text: str) -> Iterator[float]:
    """Degrees Celsius, where the text speaks of temperature at all."""
    if not _HEAT_WORD.search(text):
        return
    for found in _CELSIUS.finditer(text):
        yield float(found[1]) + float(next(filter(None, found.groups()[1:]), 0)) / 10
    if re.search(r"°\s?f\b|\d\s?f\b|fahrenheit|fever|temp|degrees", text):
        for found in _FAHRENHEIT.finditer(text):
            value = float(found[1]) + float(found[2] or 0) / 10
            if value >= 99 or "f" in found[0] or "temp" in text:
                yield (value - 32) / 1.8


_BP = re.compile(r"(?<![\d/])(\d{2,3})\s?(?:/|over|比|，|,|-|～)\s?(\d{2,3})(?![\d/])")
_BP_HIGH = re.compile(r"(?:高压|收缩压|systolic|top number)\D{0,6}(\d{2,3})")
_BP_WORD = re.compile(r"\bbp\b|blood pressure|血压|高压|低压|收缩压|systolic|mmhg|毫米汞柱")
_SPO2 = re.compile(
    r"(?:spo2|sp02|\bo2\b|sats?|oxygen|oximeter|血氧|氧饱和度)\D{0,22}(\d{2,3})|(\d{2})\s?%?\s?(?:on (?:the )?oximeter|spo2|sats|oxygen)"
)
_PULSE = re.compile(
    r"(?:\bhr\b|pulse|heart ?rate|heart is (?:going|beating|racing)(?: at)?|\bbpm|心率|脉搏|心跳)\D{0,14}(\d{2,3})|(\d{2,3})\s?(?:bpm|beats (?:per|a) min|次/分|次每分)"
)
_GLUCOSE = re.compile(
    r"(?:glucose|sugars?|\bbg\b|\bbm\b|meter|glucometer|血糖)\D{0,22}(\d{1,3}(?:\.\d)?)|(\d{1,3}(?:\.\d)?)\s?(?:mmol|mg/dl)"
)
_TABLETS = re.compile(
    r"(\d{2,3})\s?(?:\+|多|几|来)?\s?(?:of\W+)?(?:\w+\W+){0,3}?(?:pills?|tablets?|tabs|capsules?|paracetamol|tylenol|acetaminophen|ibuprofen|advil|aspirin|panadol|xanax|ambien|benadryl|片|粒|颗|丸)"
)
_MINUTES = re.compile(r"(\d{1,3})\s?(?:\+|多|几|来)?\s?(?:mins?\b|minutes?|分钟|分多钟)")
_HOURS = re.compile(r"(\d{1,3})\s?(?:\+|多|几)?\s?(?:hrs?\b|hours?|个?多?小时|个?钟头)")
_PREGNANT = re.compile(
    r"\b(\d{1,2}) ?(?:weeks?|wks?)\W*(?:\+ ?\d\W*)?(?:pregnant|gestation|along|preg)|pregnant\W+(?:\w+\W+){0,3}(\d{1,2}) ?(?:weeks?|wks?)|(?:怀孕|孕|妊娠)\D{0,4}(\d{1,2})(?:\+\d)?周|(\d{1,2})周(?:的)?(?:孕妇|身孕)|(?:怀孕|孕)\D{0,3}(\d{1,2})个?多?月"
)


def _values(pattern: re.Pattern[str], text: str) -> Iterator[float]:
    for found in pattern.finditer(text):
        yield float(next(filter(None, found.groups())))


def facts(text: str) -> frozenset[str]:
    """The names of what the numbers of a plain text say."""
    found: set[str] = set()
    if not re.search(r"\d", text) and not _NEWBORN.search(text):
        return frozenset()
    for days in ages(text):
        if days <= 90:
            found.add("age_under_90_days")
        if days <= 370:
            found.add("age_under_1_year")
        if days < 6 * 365:
            found.add("age_under_6_years")
        if days >= 50 * 365:
            found.add("age_over_50_years")
    for celsius in temperatures(text):
        found |= {
            name
            for name, low in (("temp_38", 38), ("temp_39", 39), ("temp_40", 40), ("temp_41", 40.9))
            if celsius >= low
        }
        found |= {name for name, high in (("temp_36", 36), ("temp_low", 35)) if celsius < high}
    if _BP_WORD.search(text):
        for pair in _BP.finditer(text):
            high, low = float(pair[1]), float(pair[2])
            if high > low:
                found |= {"bp_high"} if high >= 180 or low >= 120 else set()
                found |= {"bp_160"} if high >= 160 or low >= 110 else set()
                found |= {"bp_raised"} if high >= 140 or low >= 90 else set()
                found |= {"bp_low"} if high <= 90 else set()
        for high in _values(_BP_HIGH, text):
            found |= {"bp_high"} if high >= 180 else set()
            found |= {"bp_160"} if high >= 160 else set()
            found |= {"bp_low"} if high <= 90 else set()
    found |= {"oxygen_low" for value in _values(_SPO2, text) if 40 < value < 92}
    for rate in _values(_PULSE, text):
        found |= {"pulse_high"} if 140 <= rate < 300 else set()
        found |= {"pulse_low"} if 15 < rate < 40 else set()
    if re.search(r"glucose|sugar|\bbg\b|\bbm\b|glucometer|meter|mmol|mg/dl|血糖", text):
        for value in _values(_GLUCOSE, text):
            unit_mg = value > 40 or "mg" in text
            found |= {"sugar_low"} if (value < 55 if unit_mg else value < 3.3) else set()
            found |= {"sugar_high"} if (value >= 300 if unit_mg else value >= 16.7) else set()
    found |= {"tablets_many" for value in _values(_TABLETS, text) if value >= 10}
    found |= {"minutes_5" for value in _values(_MINUTES, text) if value >= 5}
    found |= {"minutes_20" for value in _values(_MINUTES, text) if value >= 20}
    found |= {"hours" for value in _values(_HOURS, text) if value >= 1}
    for found_week in _PREGNANT.finditer(text):
        value = float(next(filter(None, found_week.groups())))
        weeks = value * 4.3 if found_week[5] else value
        found.add("pregnant_late" if weeks >= 20 else "pregnant_early")
    return frozenset(found)
