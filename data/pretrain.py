"""Plain-text documents for pre-training: garment texts, copying, general sentences.  None is a fine-tuning row."""

# ruff: noqa: E501 -- a Chinese character counts as two columns; the tables read better in long lines

from __future__ import annotations

import random
from collections.abc import Callable

import entities
import general
import grammar as g
import products

# ----------------------------------------------------------------------------------------------- garment documents

KIND_OF_KEY = {
    "版型": "fit", "材质": "cloth", "颜色": "color", "风格": "style", "图案": "print", "裙型": "cut", "裙领型": "neck", "裙袖长": "sleeve",
    "裙袖型": "sleeve", "裙下摆": "edge", "裙腰型": "waist", "裙款式": "detail", "裙衣门襟": "close", "衣样式": "noun", "衣领型": "neck",
    "衣长": "length", "衣袖长": "sleeve", "衣袖型": "sleeve", "衣门襟": "close", "衣款式": "detail", "裤型": "noun", "裤长": "noun",
    "裤腰型": "waist", "裤款式": "detail", "裤口": "edge", "鞋款": "noun", "鞋跟": "part", "鞋头": "part", "鞋帮": "part",
    "鞋闭合": "close", "鞋款式": "detail", "包款": "noun", "包型": "cut", "包大小": "part", "包闭合": "close", "包肩带": "part",
    "包款式": "detail",
}  # fmt: skip
PLAIN: dict[str, list[str]] = {
    "fit": "它穿起来{v}|大小偏{v}|{v}是它的特点|我觉得它很{v}|它{v}，{b}|试了试，果然{v}|尺码{v}，{b}|因为{v}，所以{b}".split(
        "|"
    ),
    "cloth": "布料用的是{v}|它是{v}做的|料子为{v}，{b}|{v}的手感{b}|摸一摸，是{v}|里外都用{v}|{v}这种料子{b}|材料有{v}|这{v}{b}".split(
        "|"
    ),
    "color": "颜色为{v}|它是{v}的|{v}看着{b}|我挑了{v}|有{v}可选|{v}很耐看|店里只剩{v}|人们觉得{v}{b}|说到{v}，{b}|像{v}这样，{b}".split(
        "|"
    ),
    "style": "走{v}路线|{v}是它的主题|属于{v}一类|有点{v}|看上去{v}|它很{v}|讲究{v}|喜欢{v}的人会爱上它|{v}的味道很浓".split(
        "|"
    ),
    "print": "上面有{v}|印着{v}|{v}很醒目|还能看到{v}|{v}{b}|布面带{v}|那些{v}{b}|仔细看有{v}|少不了{v}，{b}".split(
        "|"
    ),
    "cut": "形状是{v}|裁成了{v}|{v}的样子很好认|{v}的外观{b}|它呈{v}|看轮廓是{v}，{b}|像这样的{v}，{b}".split("|"),
    "neck": "领子是{v}|配的是{v}|{v}很讨喜|看领子，是{v}|这种{v}{b}|选{v}的人不少|{v}的好处是{b}|有了{v}，{b}".split(
        "|"
    ),
    "sleeve": "袖子是{v}|两边是{v}|{v}很好看|看袖子，是{v}|这种{v}{b}|{v}的好处是{b}|有了{v}，{b}|还有{v}，{b}".split(
        "|"
    ),
    "edge": "边上是{v}|底部做了{v}|末端有{v}|{v}在下面|下面的{v}{b}|{v}这一处{b}|最下方是{v}，{b}".split("|"),
    "waist": "腰上是{v}|腰部为{v}|{v}穿着省心|它是{v}的|这种{v}{b}|{v}的好处是{b}|有了{v}，{b}".split("|"),
    "detail": "还带{v}|有{v}|加了{v}|多了{v}|{v}是亮点|另有{v}，{b}|这{v}{b}|看得到{v}|{v}用得巧|缝上{v}，{b}|喜欢它的{v}".split(
        "|"
    ),
    "close": "用{v}来闭合|靠{v}固定|装了{v}|{v}很好用|开口处是{v}|{v}的好处是{b}|有了{v}，{b}|选了{v}，{b}".split("|"),
    "length": "长度是{v}|属于{v}|它是{v}的|{v}刚刚好|看长短，是{v}|{v}的好处是{b}".split("|"),
    "noun": "它是{v}|这是{v}|买的是{v}|{v}一件|今天说{v}|看中了{v}|样子是{v}|算是{v}|一说{v}，{b}|属于{v}|柜子里有{v}".split(
        "|"
    ),
    "part": "有{v}|它是{v}的|用的是{v}|这种{v}{b}|{v}的好处是{b}|看得出是{v}|配{v}，{b}|选了{v}".split("|"),
    "type": "说的是{v}|这是{v}|讲讲{v}|买了{v}|这{v}不错|选{v}要用心|衣柜里有{v}|关于{v}|今天的主角是{v}".split("|"),
}
TYPES = ["裙", "裤", "上衣", "鞋", "包", "连衣裙", "半身裙", "长裙", "短裙", "中长裙"]
HEADS = (
    r"""关键词：{k}\n文案：{t}|要点：{k}\n正文：{t}|词语（{k}）造句：{t}|用“{k}”写一段话：{t}|给出{k}，写成：{t}|【{k}】{t}|词表：{k}。成文：{t}|
已知：{k}\n描述：{t}|{k} → {t}|提到{k}的短文：{t}|标签：{k}\n介绍：{t}|请包含{k}。\n{t}|输入：{k}\n输出：{t}|素材：{k}\n段落：{t}|
题目：把{k}写进文中\n作答：{t}|{t}\n关键词：{k}|{t}（词语：{k}）|主题词：{k}；短文：{t}|卖点：{k}\n说明：{t}|记下：{k}\n写出：{t}|
{k}——{t}|提示：{k}\n内容：{t}|商品特点：{k}\n一段话：{t}|列出的词有{k}，连起来就是：{t}""".replace("\n", "")
    .replace("\\n", "\n")
    .split("|")
)
SEPARATORS = ["、", "，", " ", "/", "；", "|", "、", "、", "+", "-"]


def _vocabulary() -> list[tuple[str, str, str, list[str]]]:
    """List (key, value, sort of statement, selling points) for every key and value."""
    out = []
    for key, (_, table) in g.GROUPS.items():
        values = list(table) if key != "风格" else list(g.STYLE_NP)
        for value in values:
            out.append((key, value, KIND_OF_KEY[key], table.get(value, [])))
    out.append(("图案", "纯色", "print", g.PLAIN))
    return out


VOCABULARY: list[tuple[str, str, str, list[str]]] = _vocabulary()
SHARED = [entry for entry in VOCABULARY if entry[0] in ("版型", "材质", "颜色", "风格", "图案")]
BY_TYPE = {
    kind: SHARED + [e for e in VOCABULARY if e[0].startswith(first)]
    for kind, first in (("裙", "裙"), ("裤", "裤"), ("上衣", "衣"), ("鞋", "鞋"), ("包", "包"))
}
NOUN_FORMS = {**g.MATERIAL_NOUNS, **g.PRINT_NOUNS}


def _statement(entry: tuple[str, str, str, list[str]], rng: random.Random) -> str:
    """State one keyword plainly."""
    key, value, sort, points = entry
    words = rng.choice(NOUN_FORMS[value]) if value in NOUN_FORMS and rng.random() < 0.5 else value
    pattern = rng.choice(PLAIN[sort])
    point = rng.choice(points) if points else ""
    if "{b}" not in pattern:
        return pattern.replace("{v}", words)
    if not point:
        return pattern.partition("{b}")[0].replace("{v}", words).rstrip("，")
    comma = "，" if point in g.FREE_POINTS and not pattern.endswith(("，{b}", "是{b}")) else ""
    return pattern.replace("{v}", words).replace("{b}", comma + point)


def garment_document(rng: random.Random) -> str:
    """Write a keyword list and a plain text that mentions every keyword in another order."""
    kind = rng.choices(("裙", "裤", "上衣", "鞋", "包"), (32, 20, 30, 9, 9))[0]
    pool = BY_TYPE[kind]
    count = rng.choice((2, 3, 3, 4, 4, 5, 5, 6, 7, 8))
    chosen: dict[str, tuple[str, str, str, list[str]]] = {}
    nouns = 0
    for entry in rng.sample(pool, count):
        if entry[2] == "noun":
            nouns += 1
            if nouns > 1:
                continue
        chosen[entry[1]] = entry
    entries = list(chosen.values())
    if nouns == 0 and rng.random() < 0.7:
        name = rng.choice(TYPES[5:]) if kind == "裙" and rng.random() < 0.6 else kind
        entries.append(("", name, "type", []))
    rng.shuffle(entries)
    keywords = rng.choice(SEPARATORS).join(entry[1] for entry in entries)
    if rng.random() < 0.75:
        rng.shuffle(entries)
    text = ""
    for i, entry in enumerate(entries):
        text += _statement(entry, rng)
        text += "。" if i == len(entries) - 1 else rng.choice("，，，。；")
    if len(text) < 45 and rng.random() < 0.6:
        first, second = rng.sample(g.SLOTS["o"], 2)
        text += rng.choice(
            (
                f"{first}{second}都合适。",
                f"去{first}时可以用。",
                f"无论{first}还是{second}都好。",
                f"很多人{first}会选它。",
                f"适合{first}、{second}。",
            )
        )
    return rng.choice(HEADS).replace("{k}", keywords).replace("{t}", text)


def point_document(rng: random.Random) -> str:
    """Explain some words of the domain one by one."""
    entries = [e for e in rng.sample(VOCABULARY, 5) if e[3]][:4]
    verb = rng.choice(("的特点：", "的好处：", "：", "就是", "意味着"))
    lead = rng.choice(("", "说明一下。", "词语解释。", "小知识："))
    return lead + rng.choice(("；", "。", "\n")).join(f"{e[1]}{verb}{rng.choice(e[3])}" for e in entries) + "。"


def product_talk(rng: random.Random) -> str:
    """Write a short dialogue of a buyer and a seller."""
    a, b = rng.sample(VOCABULARY, 2)
    thing = rng.choice(TYPES)
    ask = rng.choice(("有{}的{}吗？", "我想要{}的{}。", "{}的{}好不好？", "哪里有{}的{}？")).format(a[1], thing)
    reply = rng.choice(("有的，{}，还有{}。", "当然，{}，也可以看看{}。", "刚卖完{}，不过{}还有。")).format(a[1], b[1])
    point = rng.choice(b[3]) if b[3] else "很好看"
    return f"顾客：{ask}\n店员：{reply}\n顾客：{b[1]}怎么样？\n店员：{point}，{rng.choice(g.SLOTS['o'])}时用得上。"


# ----------------------------------------------------------------------------------------------- copying documents


def _plain_sentence(rng: random.Random) -> str:
    """Return a sentence to copy: with names, without, or a plain statement about a garment."""
    roll = rng.random()
    if roll < 0.45:
        return entities.sentence(rng)[0]
    if roll < 0.6:
        return entities.filler(rng.choice(entities.EMPTY), rng)
    parts = [_statement(entry, rng) for entry in rng.sample(VOCABULARY, rng.choice((1, 2, 3)))]
    return "，".join(parts) + "。"


def repeat_document(rng: random.Random) -> str:
    """Copy a sentence."""
    text = _plain_sentence(rng)
    if len(text) < 28:
        text += _plain_sentence(rng)
    lead, again = rng.choice(
        (
            ("原文：", "复述："),
            ("原句：", "抄写："),
            ("他说：", "再说一遍："),
            ("句子：", "重复："),
            ("上句：", "同句："),
            ("A：", "B："),
        )
    )
    return f"{lead}{text}\n{again}{text}"


NAME_LABELS = {"人名": "人物", "地名": "地点", "机构名": "单位"}


def names_document(rng: random.Random) -> str:
    """Write a sentence and the names in it, in a form other than that of the entity files."""
    text, names = entities.sentence(rng)
    listed = "、".join(name for name, _ in names)
    roll = rng.random()
    if roll < 0.3:
        return f"句子：{text}\n其中的名字：{listed}"
    if roll < 0.5:
        return f"{text}\n这句话提到了{listed}。"
    if roll < 0.8:
        return text + "\n" + "；".join(f"{NAME_LABELS[kind]}：{name}" for name, kind in names)
    return text + "\n" + "".join(f"{name}是{NAME_LABELS[kind]}的名字。" for name, kind in names)


def names_table(rng: random.Random) -> str:
    """List names by kind, or say of each what it is."""
    letters = rng.choices("PPLSOCUHT", k=rng.choice((3, 4, 5)))
    names = [(entities.draw_name(letter, rng), entities.MAKERS[letter][1]) for letter in letters]
    if rng.random() < 0.5:
        return "\n".join(f"{name}，{kind}" for name, kind in names)
    kind = rng.choice(names)[1]
    return f"名单：{'、'.join(n for n, _ in names)}\n{kind}有：{'、'.join(n for n, k in names if k == kind)}"


def list_document(rng: random.Random) -> str:
    """Reverse, count or index a list of words."""
    words = [entry[1] for entry in rng.sample(VOCABULARY, rng.choice((4, 5, 6, 7)))]
    if rng.random() < 0.3:
        words = [entities.draw_name("P", rng) for _ in words]
    joined = "、".join(words)
    roll = rng.random()
    if roll < 0.3:
        return f"词语：{joined}\n倒序：{'、'.join(reversed(words))}"
    if roll < 0.7:
        i = rng.randrange(len(words))
        j = rng.randrange(len(words))
        return f"词语：{joined}\n第{i + 1}个：{words[i]}\n第{j + 1}个：{words[j]}\n最后一个：{words[-1]}"
    if roll < 0.85:
        left = rng.choice(words)
        return f"词语：{joined}\n去掉{left}：{'、'.join(word for word in words if word != left)}"
    return f"{joined}\n一共{len(words)}个，开头是{words[0]}，结尾是{words[-1]}。再写一遍：{joined}"


def quote_document(rng: random.Random) -> str:
    """Quote a sentence in a report."""
    who, text = entities.draw_name("P", rng), _plain_sentence(rng)
    return f"{who}说：“{text}”\n问：{who}说了什么？\n答：{who}说的是“{text}”"


def alphabet_document(characters: list[str], position: list[int], rng: random.Random) -> str:
    """Copy a run of characters; the runs go round the whole alphabet so that every character is met."""
    run = []
    for _ in range(14):
        if position[0] % len(characters) == 0:
            rng.shuffle(characters)
        run.append(characters[position[0] % len(characters)])
        position[0] += 1
    text = "".join(run).strip() or "字"
    lead, again = rng.choice((("字：", "照抄："), ("字符：", "相同："), ("看：", "写："), ("", "")))
    return f"{lead}{text}\n{again}{text}"


# ----------------------------------------------------------------------------------------------- general documents

FACTS = general.facts()
REWRITING = general.rewriting()
ROBOTS = "小助手 阿福 小云 晨星 知知 百灵 小白 木木 一一 青青".split()
MAKERS_OF_ROBOTS = "一群学生 一家工厂 开发小组 几位工程师 老师们 学校 一位朋友".split()


def facts_document(rng: random.Random) -> str:
    """Write questions with answers, a few in a row."""
    q, a = rng.choice((("问：", "答："), ("Q：", "A："), ("题：", "解："), ("甲：", "乙："), ("", "")))
    return "\n".join(
        f"{q}{question}{a or ' '}{answer}" for question, answer in rng.sample(FACTS, rng.choice((2, 3, 3)))
    )


def rewriting_document(rng: random.Random) -> str:
    """Write rewriting pairs."""
    return "\n".join(f"{question}\n{answer}" for question, answer in rng.sample(REWRITING, 2))


def arithmetic_document(rng: random.Random) -> str:
    """Write sums in a row."""
    lines = []
    for _ in range(rng.choice((5, 7, 9))):
        left, sign, right = general.sum_of(rng)
        lines.append(f"{left}{sign}{right}={general.compute(left, sign, right)}")
    if rng.random() < 0.3:
        question, answer = general.arithmetic(rng)
        lines.append(f"{question}\n{answer}")
    return rng.choice(("，", "\n", "；", " ")).join(lines)


def news_document(rng: random.Random) -> str:
    """Write a few news-like sentences in a row."""
    count = rng.choice((2, 3))
    parts = [_news_sentence(rng) for _ in range(count)]
    return "".join(parts)


def _news_sentence(rng: random.Random) -> str:
    """Write one sentence with names, or now and then without."""
    return entities.filler(rng.choice(entities.EMPTY), rng) if rng.random() < 0.3 else entities.sentence(rng)[0]


def robot_document(rng: random.Random) -> str:
    """Write a self-introduction of some made-up helper, in words other than the identity rows."""
    name, maker = rng.choice(ROBOTS), rng.choice(MAKERS_OF_ROBOTS)
    asks = rng.choice(
        ("你叫什么", "你是谁", "谁做了你", "请介绍一下自己", "你会做什么", "Who are you?", "What is your name?")
    )
    if asks.isascii():
        return f"{asks}\nI am a helper. People call me {name}. I can read, write and answer questions. 这里的人叫我{name}。"
    friend = entities.draw_name("P", rng)
    return rng.choice((
        f"{friend}问：{asks}？\n{name}答：我叫{name}，{maker}做出了我，我可以陪人聊天、写文案。",
        f"大家好，我是{name}，{maker}训练的助手。{friend}常来找我聊天，让我改写句子。",
        f"{friend}：{asks}\n{name}：我是{name}，是{maker}开发的程序，不是真人。",
        f"{name}是{maker}做的语言模型，会算数，也会回答问题。{friend}第一次见面就问：“{asks}？”",
    ))  # fmt: skip


def talk_document(rng: random.Random) -> str:
    """Write a dialogue of two people about a fact and about plans."""
    first, second = entities.draw_name("P", rng), entities.draw_name("P", rng)
    question, answer = rng.choice(FACTS)
    occasion, day = rng.choice(g.SLOTS["r"]), rng.choice(g.SLOTS["d"])
    return rng.choice((
        f"{first}：{question}\n{second}：{answer}\n{first}：谢谢，{day}一起去{occasion}吧。",
        f"{first}：{day}去{occasion}吗？\n{second}：好的。对了，{question}\n{first}：{answer}",
    ))  # fmt: skip


Maker = Callable[[random.Random], str]
WEIGHTED: list[tuple[Maker, float]] = [
    (garment_document, 50), (point_document, 2.5), (product_talk, 2.5),
    (repeat_document, 5), (names_document, 5.5), (names_table, 2), (list_document, 3), (quote_document, 2),
    (facts_document, 5), (rewriting_document, 0.7), (arithmetic_document, 5), (news_document, 7.3), (robot_document, 3), (talk_document, 4),
]  # fmt: skip
ALPHABET_SHARE, SHOP_SHARE = 0.025, 0.45
SHOP_HEADS = [
    ("关键词", "文案"),
    ("卖点", "介绍"),
    ("标签", "段落"),
    ("要点", "正文"),
    ("素材", "成文"),
    ("词语", "描述"),
]
SHOP_MARKS = ["、", "，", " ", "/", "|", "；", "+", "-"]


def shop_document(barred: list[frozenset[products.Attribute]], rng: random.Random) -> str:
    """Return keywords in any order and a shop text that holds them all; never a ``barred`` combination of attributes."""
    while True:
        row = products.sample_attributes(rng)
        chosen = frozenset(row)
        text = None if any(chosen <= other or other <= chosen for other in barred) else products.describe(row, rng)
        if text is not None:
            break
    head, tail = rng.choice(SHOP_HEADS)
    values = [value for _, value in row]
    rng.shuffle(values)
    return f"{head}：{rng.choice(SHOP_MARKS).join(values)}\n{tail}：{text}"
