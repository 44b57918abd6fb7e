"""Models that do not answer rank below an honest one in every metric that the report puts first, whatever the rows."""

import pytest

from common.config import EvaluationFlags
from common.conversation.turns import Turn
from common.evaluation import evaluate, metrics
from common.evaluation.tables import LEADING, metric_names
from common.inference.answerer import Answer
from gemma_sft.ft_gemma.config import Config

ROWS = {  # kind: (question, reference, an honest answer that is not the reference, an English one)
    "products": [
        (
            "类型#裙*颜色#纯色*裙长#长裙*风格#文艺",
            "这条长裙采用纯色设计，干净利落，走动时裙摆轻轻摇曳，文艺的气息扑面而来。",
            "纯色设计的长裙干净利落，裙摆轻轻摇曳，很有文艺的气息。",
            "This plain long skirt sways gently as you walk and gives you an artistic look.",
        ),
        (
            "类型#上衣*版型#宽松*材质#棉*图案#条纹",
            "宽松的版型不挑身材，棉质面料柔软透气，经典的条纹让这件上衣百搭耐看。",
            "这件上衣版型宽松，不挑身材，棉质面料柔软，条纹图案百搭耐看。",
            "A loose cotton top with classic stripes, soft and easy to match with anything.",
        ),
        (
            "类型#裤*裤型#阔腿裤*颜色#黑色",
            "黑色的阔腿裤垂感十足，遮住腿部的小缺点，显得双腿修长。",
            "这条黑色阔腿裤垂感十足，显得双腿修长又遮肉。",
            "Black wide-leg trousers that hang well and make your legs look long.",
        ),
    ],
    "facts": [
        ("法国的首都是哪里？", "法国的首都是巴黎。", "是巴黎。", "It is the capital city on the river Seine."),
        ("44-1=", "43", "44-1=43", "The answer is forty-three."),
        ("水在标准大气压下多少度沸腾？", "100摄氏度", "水在100摄氏度沸腾。", "It boils at one hundred degrees."),
        ("三加二等于几？", "五", "等于五", "Three plus two makes five."),
        ("《红楼梦》的作者是谁？", "《红楼梦》的作者是曹雪芹。", "曹雪芹写的。", "It was written in the Qing dynasty."),
    ],
    "entities": [
        (
            "请找出文本中的人名和地名，每行写一个，格式为“实体_类型”。\n文本：赵一鸣昨天从临江市去了青石镇。",
            "赵一鸣_人名\n临江市_地名\n青石镇_地名",
            "临江市_地名\n赵一鸣_人名\n青石镇_地名",
            "The person is Zhao Yiming and the places are Linjiang and Qingshi.",
        ),
        (
            "请找出文本中的人名和地名，每行写一个，格式为“实体_类型”。\n文本：孙小雨和钱大海在南湖县合影。",
            "孙小雨_人名\n钱大海_人名\n南湖县_地名",
            "孙小雨_人名\n钱大海_人名",
            "Two people took a photo together in a county.",
        ),
    ],
    "chat": [
        (
            "最近总是睡不好，怎么办？",
            "睡前少看手机，晚上不喝咖啡，每天按时上床，房间保持安静，一两周后多半会好转。",
            "建议睡前少看手机，晚上不喝咖啡，按时上床，保持安静。",
            "Try to put your phone away before bed and avoid coffee in the evening.",
        ),
        (
            "换一种说法：这本书很有趣。",
            "这本书读起来很有意思。",
            "读起来觉得很有意思。",
            "This book is a lot of fun to read.",
        ),
        ("你好", "你好！有什么可以帮你的吗？", "您好，有什么可以帮您的吗？", "Hello! Nice to meet you."),
    ],
    "extraction": [  # the answer stands in the question
        (
            "文本：店里的苹果三元一斤，香蕉五元一斤，葡萄八元一斤。\n香蕉多少钱一斤？",
            "香蕉五元一斤。",
            "五元一斤。",
            "Five yuan for half a kilogram.",
        ),
        ("小明住在临江市，小红住在青石镇。小明住哪里？", "临江市", "住在临江市。", "He lives in a city by a river."),
    ],
}
ROWS["all"] = [row for rows in ROWS.values() for row in rows]
LIMIT = 200  # characters of a looping answer


def first_words(text):
    return text[: max(1, len(text) // 2)]


CHEATS = {  # how each answers a row
    "parrot": lambda row: row[0],
    "parrot again and again": lambda row: (row[0] * LIMIT)[:LIMIT],
    "parrot that is polite": lambda row: f"好的。{row[0]}",
    "loops a phrase": lambda row: ("这款很不错，" * LIMIT)[:LIMIT],
    "loops the question's words": lambda row: (first_words(row[0]) * LIMIT)[:LIMIT],
    "loops the reference's words": lambda row: (first_words(row[1]) * LIMIT)[:LIMIT],
    "loops what is asked for": lambda row: ("的".join(metrics.attribute_values(row[0])) or row[0]) * LIMIT,
    "English": lambda row: row[3],
    "silent": lambda row: "",
}


def scores_of(kind, answers):
    """{metric: mean} over the rows of a kind; answers(row) is what is scored."""
    return metrics.average([metrics.score(answers(row), row[1], row[0]) for row in ROWS[kind]])


def leading(*scores):
    return [name for name in metric_names(dict(enumerate(scores))) if LEADING.fullmatch(name)]


@pytest.mark.parametrize("cheat", CHEATS)
@pytest.mark.parametrize("kind", ROWS)
def test_a_cheat_ranks_below_an_honest_answer(kind, cheat):
    honest, found = scores_of(kind, lambda row: row[2]), scores_of(kind, CHEATS[cheat])
    names = leading(honest, found)
    assert names == leading(honest) and "novel-f1" in names
    assert ("attributes" in names, "entity-f1" in names) == (kind in ("products", "all"), kind in ("entities", "all"))
    for name in names:
        margin = 0.05 if cheat == "loops the reference's words" and "entity" in name else 0.2
        assert found[name] + margin < honest[name], name


@pytest.mark.parametrize("metric", ["bleu-4", "rouge-1-f", "rouge-l-f", "chrf", "distinct-2"])
def test_a_question_said_again_beats_an_answer_in_the_others(metric):
    """That is why they come after: the reference says the question's words again."""
    question, reference, honest, _ = ROWS["facts"][0]
    parrot, found = (metrics.score(text, reference, question) for text in (question, honest))
    assert not LEADING.fullmatch(metric) and parrot[metric] >= found[metric]
    assert parrot["novel-f1"] == 0 and parrot["copied"] == 1 and found["copied"] == 0


def test_the_report_puts_these_first(tmp_path, capsys):
    """The same names in the same order for whatever change, in the report and on the console; then the others."""
    honest, parrot = ({row[0]: row[place] for row in ROWS["all"]} for place in (2, 0))

    def answer(conversations, sampling, base=False):
        texts = [(parrot if base else honest)[turns[-1].text] for turns in conversations]
        return [Answer(text, "stop", len(text)) for text in texts]

    rows = [(f"f:{n}", [Turn("user", row[0]), Turn("assistant", row[1])]) for n, row in enumerate(ROWS["all"])]
    cfg = Config(path_model_pretrain="google/gemma-2b-it", model_save_dir=str(tmp_path))
    evaluate.report(answer, rows, cfg, EvaluationFlags(compare=True))
    first, others = [
        [line.split(" | ")[0].strip("| ") for line in table.partition("\n\n")[0].splitlines()[2:]]
        for table in (tmp_path / "eval_report.md").read_text(encoding="utf-8").split("| metric |")[1:]
    ]
    assert first == ["attributes", "entity-f1", "entity-f1 人名", "entity-f1 地名", "novel-f1"]
    assert others[:3] == ["copied", "looping", "stopped"] and "rouge-l-f" in others
    printed = capsys.readouterr().out.partition("metric  ")[2]
    places = [printed.index(f"\n{name} ") for name in (*first, *others)]
    assert places == sorted(places)
