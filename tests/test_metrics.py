"""Scores of answers: the numbers are nltk's and rouge's own, and every odd answer has one."""

import importlib.metadata
import random
import sys

import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge import Rouge

from common import metrics

NAMES = ["bleu-4", *(f"rouge-{kind}-{stat}" for kind in "12l" for stat in "rpf")]
PAIRS = [
    ("这条裙子很好看", "这条黑色的裙子真好看"),
    ("的的的的的", "的"),
    ("a b c", "一件宽松的上衣，颜色是黑色。"),
    ("一件宽松的上衣，颜色是黑色。显瘦。", "一件宽松的上衣，颜色是白色。百搭。"),
    ("好", "不好"),
    ("完全不同", "abcdefg"),
    ("😀👍🏽裙", "😀裙子"),
]


@pytest.mark.parametrize("prediction, reference", PAIRS)
def test_numbers_are_those_of_nltk_and_rouge(prediction, reference):
    hypothesis, target = list(prediction.replace(" ", "")), list(reference.replace(" ", ""))
    bleu = sentence_bleu([target], hypothesis, smoothing_function=SmoothingFunction().method1)
    rouge = Rouge().get_scores(" ".join(hypothesis), " ".join(target))[0]
    expected = {"bleu-4": bleu} | {f"{kind}-{stat}": rouge[kind][stat] for kind in rouge for stat in "rpf"}
    assert metrics.score(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_numbers_by_hand():
    """今天天气好 against 今天天气很好: 5 of 6 characters, 3 of 5 pairs."""
    scores = metrics.score("今天天气好", "今天天气很好")
    assert scores["rouge-1-p"] == 1  # sets of n-grams: 今 天 气 好
    assert scores["rouge-1-r"] == 4 / 5
    assert scores["rouge-2-r"] == 3 / 5
    assert scores["rouge-2-p"] == 3 / 4
    precisions = 5 / 5 * 3 / 4 * 2 / 3 * 1 / 2
    assert scores["bleu-4"] == pytest.approx(precisions**0.25 * 2.718281828459045 ** (1 - 6 / 5))


@pytest.mark.parametrize("prediction", ["", " ", "\n\t ", "　", "\u2028", "\x1c"])
def test_an_empty_answer_scores_0(prediction):
    assert metrics.score(prediction, "一条裙子") == dict.fromkeys(NAMES, 0.0)


def test_an_empty_reference_scores_0():
    assert metrics.score("一条裙子", " ") == dict.fromkeys(NAMES, 0.0)


@pytest.mark.parametrize(
    "prediction", [".", "...", "。", "。。。", "😀", "👨‍👩‍👧", "\u200b", "\ufffd", "#*#", "1.5", "a.b.c."]
)
@pytest.mark.parametrize("reference", [".", "。", "版型宽松。", "1.5", "😀"])
def test_odd_answers_have_scores_in_range(prediction, reference):
    scores = metrics.score(prediction, reference)
    assert list(scores) == NAMES
    assert all(0 <= value <= 1 and type(value) is float for value in scores.values())


@pytest.mark.parametrize("text", ["一二三四", "这条黑色的裙子。真好看", "1.5 元. 很 好.", "😀😀😁👍", "abcd\nefg"])
def test_an_equal_answer_scores_1(text):
    assert metrics.score(text, text) == pytest.approx(dict.fromkeys(NAMES, 1.0), abs=1e-6)


def test_blanks_do_not_count():
    assert metrics.score("一条 裙子\n很　好看", "一条裙子很好看") == metrics.score("一条裙子很好看", "一条裙子很好看")


@pytest.mark.parametrize("prediction, reference", [("的" * 10_000, "红的裙子"), ("红的裙子", "的" * 10_000)])
def test_ten_thousand_characters(prediction, reference):
    before = sys.getrecursionlimit()
    scores = metrics.score(prediction, reference)
    assert 0 < scores["rouge-l-f"] < 1
    assert sys.getrecursionlimit() == before


def test_a_long_common_subsequence():
    """rouge recurses a level a character: more than Python allows by itself."""
    text = "".join(chr(0x4E00 + number) for number in range(700))
    assert metrics.score(text, text)["rouge-l-f"] == pytest.approx(1)


@pytest.mark.parametrize(
    "question, values",
    [
        ("类型#裙*颜色#黑色", ["裙", "黑色"]),
        (" 类型#裙\n", ["裙"]),
        ("类型#裙*颜色#黑色*颜色#白色", ["裙", "黑色", "白色"]),
        ("类型#裙*颜色", []),
        ("类型#裙*颜色#", []),
        ("#裙", []),
        ("类型#裙*", []),
        ("类型#裙#长", []),
        ("1+1=", []),
        ("2*3", []),
        ("# 标题", []),
        ("", []),
    ],
)
def test_attribute_values(question, values):
    assert metrics.attribute_values(question) == values


@pytest.mark.parametrize(
    "prediction, share",
    [("黑色的裙子", 2 / 3), ("宽松的黑色裙", 1), ("裤", 0), ("", 0), (" ", 0)],
)
def test_attributes_is_the_share_of_values_named(prediction, share):
    assert metrics.score(prediction, "一条裙子", "类型#裙*颜色#黑色*版型#宽松")["attributes"] == pytest.approx(share)


def test_attributes_only_where_they_are_asked_for():
    assert "attributes" not in metrics.score("二", "二", "1+1=")


def test_average_is_over_the_rows_that_have_the_metric():
    rows = [{"bleu-4": 0.5}, {"bleu-4": 0.0, "attributes": 1.0}, {"bleu-4": 0.1, "attributes": 0.0}]
    assert metrics.average(rows) == pytest.approx({"bleu-4": 0.2, "attributes": 0.5})
    assert metrics.average([]) == {}


def test_signature_says_what_was_measured():
    signature = metrics.signature()
    for package in ("nltk", "rouge"):
        assert f"{package} {importlib.metadata.version(package)}" in signature
    for word in ("characters", "BLEU-4", "method1", "ROUGE", "attributes", "mean", "empty answer = 0", "answers only"):
        assert word in signature


ENTITY_ROWS = [  # reference, prediction
    ("高海立_人名\n福溪乡_地名", "高海立_人名\n福溪乡_地名"),  # order, repetition and blanks do not count
    ("吴芳_人名\n松宁市排球队_机构名", "松宁市排球队_机构名 \n\n松宁市排球队_机构名\n吴芳_地名"),
    ("没有", "云门县_地名"),
    ("没有", "没有"),
    ("云门县_地名", ""),
    ("云门县_地名", "答案是云门县"),
]


def test_entity_f1_is_over_exact_names_and_types():
    scores = metrics.average([metrics.score(prediction, reference) for reference, prediction in ENTITY_ROWS])
    assert scores["entity-p"] == 3 / 5  # right: 高海立, 福溪乡, 松宁市排球队; wrong: 吴芳_地名, 云门县_地名
    assert scores["entity-r"] == 3 / 6
    assert scores["entity-f1"] == pytest.approx(2 * 0.6 * 0.5 / 1.1)
    assert scores["entity-f1 人名"] == pytest.approx(2 / 3)  # right 1, predicted 1, expected 2
    assert scores["entity-f1 地名"] == pytest.approx(2 / 6)  # right 1, predicted 3, expected 3
    assert scores["entity-f1 机构名"] == 1.0
    assert scores["bleu-4"] == pytest.approx(sum(metrics.score(p, r)["bleu-4"] for r, p in ENTITY_ROWS) / 6)


def test_entity_f1_agrees_with_counting_by_hand():
    """Micro F1 recounted entity by entity over random rows."""
    rng = random.Random(0)
    names = [(f"名{number}", kind) for number in range(4) for kind in ("人名", "地名")]
    rows = [(rng.sample(names, rng.randrange(1, 5)), rng.sample(names, rng.randrange(5))) for _ in range(50)]
    right = sum(len(set(expected) & set(found)) for expected, found in rows)
    f1 = 2 * right / sum(len(expected) + len(found) for expected, found in rows)
    scored = [
        metrics.score("\n".join(map("_".join, found)) or "没有", "\n".join(map("_".join, expected)))
        for expected, found in rows
    ]
    assert metrics.average(scored)["entity-f1"] == pytest.approx(f1)


@pytest.mark.parametrize("reference", ["这是一句话。", "foo_bar 是变量名", "人名_\n_地名", "高海立_人名\n其他"])
def test_other_references_have_no_entity_scores(reference):
    assert not [name for name in metrics.average([metrics.score("高海立_人名", reference)]) if "entity" in name]


def test_rows_that_all_say_none_have_no_entity_scores():
    assert "entity-f1" not in metrics.average([metrics.score("没有", "没有")])
