"""Scores of answers: the numbers are nltk's and rouge's own, and every odd answer has one."""

import importlib.metadata
import json
import random
import warnings
from pathlib import Path

import nltk
import pytest
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge import Rouge, rouge_score

from common.evaluation import intervals, metrics

with warnings.catch_warnings():  # its strings have invalid escapes, which Python says where it compiles them
    warnings.simplefilter("ignore")
    import jieba

DATA = Path(__file__).resolve().parents[1] / "data"

OVERLAPS = ["bleu-4", *(f"rouge-{kind}-{stat}" for kind in "12l" for stat in "rpf")]
NAMES = [*OVERLAPS, *(f"word-{name}" for name in OVERLAPS), "chrf", "exact", "distinct-2", "novel-f1", "looping"]
PAIRS = [
    ("这条裙子很好看", "这条黑色的裙子真好看"),
    ("的的的的的", "的"),
    ("a b c", "一件宽松的上衣，颜色是黑色。"),
    ("一件宽松的上衣，颜色是黑色。显瘦。", "一件宽松的上衣，颜色是白色。百搭。"),
    ("好", "不好"),
    ("完全不同", "abcdefg"),
    ("😀👍🏽裙", "😀裙子"),
]


def by_the_libraries(prediction, reference):
    """All NAMES of a pair, from nltk, rouge, sacrebleu and jieba called directly; "." would split rouge's sentences."""
    expected = {}
    for mark, cut in (("", list), ("word-", jieba.lcut)):
        hypothesis, target = ([token for token in cut(text) if token.strip()] for text in (prediction, reference))
        expected[f"{mark}bleu-4"] = sentence_bleu([target], hypothesis, smoothing_function=SmoothingFunction().method1)
        rouge = Rouge().get_scores(" ".join(hypothesis), " ".join(target))[0]
        expected |= {f"{mark}{kind}-{stat}": rouge[kind][stat] for kind in rouge for stat in "rpf"}
    expected["chrf"] = sacrebleu.sentence_chrf(prediction, [reference]).score / 100
    expected["exact"] = float(prediction == reference)
    pairs = list(nltk.bigrams(prediction.replace(" ", "")))
    expected["distinct-2"] = len(set(pairs)) / len(pairs) if pairs else 1.0
    expected["novel-f1"] = pairs_in_common(prediction, reference)
    expected["looping"] = 0.0
    return expected


def pairs_in_common(prediction, reference):
    """F1 of pairs counted one by one; of characters where the reference is one."""
    texts = ["".join(char for char in text if char not in " ，。！？；：、") for text in (prediction, reference)]
    left, right = ([*text] if len(texts[1]) == 1 else [*nltk.bigrams(text)] for text in texts)
    total = len(left) + len(right)
    common = sum(1 for piece in left if piece in right and not right.remove(piece))
    return 2 * common / total if total else 0.0


def shipped_pairs():
    """200 pairs of texts that have much, little or nothing in common."""
    rows = [json.loads(line) for line in (DATA / "product_heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    draw, pairs = random.Random(0), list(PAIRS)
    while len(pairs) < 200:
        one, other = draw.sample(rows, 2)
        texts = [one["summary"], other["summary"], one["content"], one["summary"][5:40] + other["summary"][:9]]
        pairs.append(tuple(draw.choices(texts, k=2)))
    return pairs


def test_numbers_are_those_of_the_libraries():
    for prediction, reference in shipped_pairs():
        expected = by_the_libraries(prediction, reference)
        assert metrics.score(prediction, reference) == pytest.approx(expected, abs=1e-9), (prediction, reference)


def test_the_common_subsequence_is_the_one_rouge_walks_to():
    """Of several longest ones rouge takes one, and its score depends on which."""
    draw = random.Random(1)
    for _ in range(400):
        letters = "ab" if draw.random() < 0.5 else "abcdefg"
        left, right = (draw.choices(letters, k=draw.randrange(1, 30)) for _ in "12")
        ours = metrics.common_subsequence(left, right)
        assert set(ours) == rouge_score._recon_lcs(left, right)._ngrams
        assert len(ours) == rouge_score._len_lcs(left, right)


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
    few_words = {f"word-{name}" for name in OVERLAPS}  # BLEU-4 needs four tokens, ROUGE-2 two
    scores = {name: value for name, value in metrics.score(text, text).items() if name not in few_words}
    assert scores == pytest.approx(dict.fromkeys(set(NAMES) - few_words, 1.0) | {"looping": 0.0}, abs=1e-6)


def test_words_are_those_of_jieba():
    """宽松/的/上衣 against 宽松/的/裤子: two of three words, three of five characters."""
    scores = metrics.score("宽松的上衣", "宽松的裤子")
    assert scores["word-rouge-1-p"] == scores["word-rouge-l-r"] == 2 / 3
    assert scores["word-rouge-2-r"] == 1 / 2
    assert scores["rouge-1-p"] == 3 / 5


def test_blanks_do_not_count():
    """Where they stand between words; "exact" alone minds them."""
    apart, together = (
        metrics.score("一条 裙子\n很　好看", "一条裙子很好看"),
        metrics.score("一条裙子很好看", "一条裙子很好看"),
    )
    assert apart | {"exact": 1.0} == together


@pytest.mark.parametrize("prediction, exact", [("裙子", 1), (" 裙子\n", 1), ("裙 子", 0), ("裙子。", 0), ("", 0)])
def test_exact_match(prediction, exact):
    assert metrics.score(prediction, "裙子")["exact"] == exact


@pytest.mark.parametrize(
    "prediction, share", [("好好好好好", 1 / 4), ("好看好看", 2 / 3), ("好", 1), ("abcd", 1), ("", 0)]
)
def test_distinct_pairs_within_an_answer(prediction, share):
    assert metrics.score(prediction, "好看")["distinct-2"] == share


def test_traditional_characters_are_other_characters():
    scores = metrics.score("這條裙子很漂亮", "这条裙子很漂亮")
    assert scores["rouge-1-f"] == pytest.approx(5 / 7) and scores["exact"] == 0


LONG = "".join(random.Random(2).choices([chr(0x4E00 + number) for number in range(3000)], k=10_000))


@pytest.mark.parametrize(
    "prediction, reference, rouge",
    [
        ("的" * 10_000, "红的裙子", 2 / 5),
        ("红的裙子", "的" * 10_000, 2 / 5),
        (LONG, LONG[:-1] + "。", 1),
        (".", LONG, 0),
    ],
    ids=["looping", "long reference", "both long", "full stop"],
)
def test_ten_thousand_characters(prediction, reference, rouge):
    """rouge itself recurses a level a character, keeps a table of a hundred million entries, and rejects "."."""
    scores = metrics.score(prediction, reference)
    assert list(scores) == NAMES and all(0 <= value <= 1 for value in scores.values())
    assert scores["rouge-l-f"] == pytest.approx(rouge, abs=1e-3)


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


@pytest.mark.parametrize(
    "prediction, share",
    [
        ("类型#裙*颜色#黑色*版型#宽松", 0),
        ("版型#宽松*类型#裙*类型#裙", 0),
        ("类型#裙*颜色#黑色*版型#宽松*这条裙子很宽松", 2 / 3),
        ("类型#裙子，是黑色的", 1 / 3),
        ("裙长#黑色#宽松#裙装", 0),  # what a tuned gemma-3-270m wrote
        ("颜色＃黑色", 0),
        ("黑色的宽松裙" * 9, 0),
    ],
)
def test_what_is_copied_or_looped_names_no_attribute(prediction, share):
    assert metrics.score(prediction, "一条裙子", "类型#裙*颜色#黑色*版型#宽松")["attributes"] == pytest.approx(share)


def test_a_value_within_a_longer_one_is_not_left_over_by_its_copy():
    assert metrics.score("领型#立领*衣领型#小立领", "上衣", "领型#立领*衣领型#小立领")["attributes"] == 0


@pytest.mark.parametrize(
    "prediction, reference, question, f1",
    [
        ("法国的首都是哪里？", "法国的首都是巴黎。", "法国的首都是哪里？", 0),
        ("巴黎", "法国的首都是巴黎。", "法国的首都是哪里？", 2 / 3),  # of 是巴 and 巴黎
        ("法国的首都是巴黎，", "法国的首都是巴黎。", "法国的首都是哪里？", 1),
        ("巴黎" * 10, "法国的首都是巴黎。", "法国的首都是哪里？", 2 / 21),  # 19 pairs, of which one counts
        ("住在临江市", "临江市", "小明住在临江市，他住在哪里？", 2 * 2 / (4 + 2)),  # nothing new: all pairs count
        ("小明住在临江市，他住在哪里？", "临江市", "小明住在临江市，他住在哪里？", 2 * 2 / (11 + 2)),
        ("等于五", "五", "二加三等于几", 1),  # 等 and 于 are the question's
        ("", "五", "二加三等于几", 0),
        ("五", "等于五", "二加三", 0),  # no pair
        ("Paris", "法国的首都是巴黎。", "法国的首都是哪里？", 0),
        ("。。。", "。", "你好", 0),
    ],
)
def test_novel_f1_counts_what_the_question_does_not_say(prediction, reference, question, f1):
    assert metrics.score(prediction, reference, question)["novel-f1"] == pytest.approx(f1)


@pytest.mark.parametrize(
    "prediction, copied",
    [
        ("类型#裙*颜色#黑色", 1),
        ("类型#裙*颜色#黑色" * 5, 1),
        ("类型#裙*颜色#黑色。好的。", 1),
        ("类型#裙*颜色#黑色，这条黑色的裙子很好看，适合夏天穿", 0),  # it goes on to answer
        ("黑色", 0),  # too little of the question
        ("这条黑色的裙子很好看", 0),
        ("", 0),
    ],
)
def test_copied_is_the_question_over_again(prediction, copied):
    assert metrics.score(prediction, "黑色的裙子显瘦", "类型#裙*颜色#黑色")["copied"] == copied


@pytest.mark.parametrize("question, reference", [("", "好"), ("好", "好的"), ("改错：今天天汽好。", "今天天汽好。")])
def test_copied_only_where_the_reference_is_no_copy(question, reference):
    assert "copied" not in metrics.score(question, reference, question)


@pytest.mark.parametrize(
    "prediction, looping",
    [
        ("的" * 20, 1),
        ("的" * 19, 0),
        ("很好 看，\n" * 5, 1),
        ("这条裙子很好看。" + "显瘦又百搭，" * 4 + "显瘦", 1),  # cut off within the piece
        ("显瘦又百搭，" * 9 + "就是这样。", 0),  # it found an end
        ("今天天气很好，我们去公园。今天天气很好，我们去公园。", 0),  # twice
        ("这条裙子采用纯色设计，干净利落，走动时裙摆轻轻摇曳。", 0),
        ("", 0),
    ],
)
def test_looping_is_an_end_that_repeats(prediction, looping):
    assert metrics.score(prediction, "一条裙子")["looping"] == looping


def test_attributes_only_where_they_are_asked_for():
    assert "attributes" not in metrics.score("二", "二", "1+1=")


def test_average_is_over_the_rows_that_have_the_metric():
    rows = [{"bleu-4": 0.5}, {"bleu-4": 0.0, "attributes": 1.0}, {"bleu-4": 0.1, "attributes": 0.0}]
    assert metrics.average(rows) == pytest.approx({"bleu-4": 0.2, "attributes": 0.5})
    assert metrics.average([]) == {}


def test_signature_says_what_was_measured():
    signature = metrics.signature()
    for package in ("nltk", "rouge", "jieba"):
        assert f"{package} {importlib.metadata.version(package)}" in signature
    assert f"nc:6|nw:0|space:no|version:{importlib.metadata.version('sacrebleu')}" in signature
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


# --- intervals ------------------------------------------------------------------------------------------------------


def resampled_by_hand(values, seed):
    """Percentile bootstrap of a mean, one resample after the other."""
    draw = random.Random(seed)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(2000))
    return [means[50], means[1949]]


def test_intervals_are_those_of_a_bootstrap_by_hand():
    draw = random.Random(3)
    values = [draw.random() ** 2 for _ in range(80)]
    found = intervals.intervals([{"bleu-4": value} for value in values], seed=1)["bleu-4"]
    assert found == pytest.approx(resampled_by_hand(values, 4), abs=0.015)
    assert found == intervals.intervals([{"bleu-4": value} for value in values], seed=1)["bleu-4"]
    assert found != intervals.intervals([{"bleu-4": value} for value in values], seed=2)["bleu-4"]


def test_intervals_of_entity_f1_resample_rows():
    """F1 of each resample, not the mean of the rows' F1: a row of 99 entities weighs as much as 99 of one."""
    rows = [metrics.score(p, r) for r, p in ENTITY_ROWS]
    draw, found = random.Random(5), []
    for _ in range(2000):
        found.append(metrics.average(draw.choices(rows, k=len(rows))).get("entity-f1", 0.0))
    found.sort()
    low, high = intervals.intervals(rows, seed=1)["entity-f1"]
    assert (low, high) == pytest.approx((found[50], found[1949]), abs=0.06)


def test_a_change_on_the_same_rows_is_surer_than_its_parts():
    """Each row gains exactly 0.1: the scores are uncertain, their change is not."""
    draw = random.Random(6)
    base = [{"exact": draw.random() / 2} for _ in range(50)]
    tuned = [{"exact": row["exact"] + 0.1} for row in base]
    assert intervals.change_intervals(base, tuned, 0)["exact"] == pytest.approx([0.1, 0.1])
    low, high = intervals.intervals(base, 0)["exact"]
    assert high - low > 0.05


def test_one_row_has_no_interval():
    """Nothing says how a score would move that one row alone has, though others lack it."""
    assert intervals.intervals([], 0) == {}
    assert intervals.intervals([{"exact": 0.5}], 0) == {}
    assert intervals.change_intervals([{"exact": 0.5}], [{"exact": 0.7}], 0) == {}
    rows = [{"exact": 0.5}, {"exact": 0.5, "attributes": 1.0}]
    assert intervals.intervals(rows, 0) == {"exact": [0.5, 0.5]}
    assert intervals.change_intervals(rows, rows, 0) == {"exact": [0.0, 0.0]}
