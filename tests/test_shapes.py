"""Rows as people have them: shapes, names of roles and keys, numbers for text; and nothing of a row is lost unsaid."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from common.checking import check
from common.conversation import render, turns
from common.conversation.turns import Conversation, FormatError, Turn, lessons
from common.data import accounts, dataset, formats
from common.errors import UserError
from gemma_sft import prompt
from gemma_sft.ft_gemma.config import Config


def talk(*texts, system=None):
    """Turns of texts said in turn by user and assistant."""
    spoken = [Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
    return [Turn("system", system), *spoken] if system else spoken


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def asked(role, answerer, first="from", second="value"):
    return [{first: role, second: "水的沸点？"}, {first: answerer, second: "一百度。"}]


BOILING = talk("水的沸点？", "一百度。")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": asked("user", "assistant", "role", "text")}, BOILING),
        ({"conversations": asked("user", "assistant", "from", "text")}, BOILING),
        (
            {
                "messages": [
                    {"role": "user", "content": parts("水的", "沸点？")},
                    {"role": "assistant", "content": parts("一百度。")},
                ]
            },
            talk("水的\n沸点？", "一百度。"),
        ),
        (
            {
                "prompt": [{"role": "system", "content": "简短"}, {"role": "user", "content": "一"}],
                "completion": [{"role": "assistant", "content": "二"}],
            },
            talk("一", "二", system="简短"),
        ),
        ({"messages": json.dumps(asked("user", "assistant", "role", "content"))}, BOILING),
        ({"conversations": json.dumps(asked("human", "gpt"))}, BOILING),
        (
            {"query": "三", "response": "四", "history": asked("user", "assistant", "role", "content")},
            talk("水的沸点？", "一百度。", "三", "四"),
        ),
        ({"query": "三", "response": "四", "history": '[["一", "二"]]'}, talk("一", "二", "三", "四")),
        ({"conversation": asked("user", "assistant", "role", "content")}, BOILING),
        ({"conversation": asked("human", "gpt")}, BOILING),
        (
            {"dialog": asked("user", "assistant", "role", "content"), "system": "简短"},
            talk(*["水的沸点？", "一百度。"], system="简短"),
        ),
        (asked("human", "gpt"), BOILING),  # a row that is the list
        ({"问题": "水的沸点？", "答案": "一百度。"}, BOILING),
        ({"指令": "译", "输入": "天", "输出": "sky"}, talk("译\n天", "sky")),
        ({"指令": "译", "输入": "", "输出": "sky"}, talk("译", "sky")),
        ({"指令": "译", "输出": "sky"}, talk("译", "sky")),
        ({"问题": "水的沸点？", "回答": "一百度。"}, BOILING),
        ({"messages": str(asked("user", "assistant", "role", "content"))}, BOILING),  # as pandas' to_csv writes lists
        ({"query": "三", "response": "四", "history": "[['一', '二']]"}, talk("一", "二", "三", "四")),
        ({"messages": asked("user", "assistant", "role", "content"), "tools": [], "system": {}}, BOILING),
        ({"instruction": "译", "input": [], "output": "sky"}, talk("译", "sky")),
        ({"conversations": [said | {"role": None, "content": None} for said in asked("human", "gpt")]}, BOILING),
        ({"输入": "天", "输出": "sky"}, talk("天", "sky")),
        ({"question": "一加一", "answer": 2}, talk("一加一", "2")),
        ({"instruction": 7, "input": 0, "output": 0.5}, talk("7\n0", "0.5")),
        ({"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": 1.0}]}, talk("1", "1.0")),
        ({"question": "开门吗", "context": "周一休息", "answer": "不开"}, talk("开门吗\n周一休息", "不开")),
        ({"instruction": "概括", "context": "长文", "output": "短"}, talk("概括\n长文", "短")),
        ({"system_prompt": "简短", "query": "一", "response": "二"}, talk("一", "二", system="简短")),
        ({"system": "甲", "system_prompt": "乙", "query": "一", "response": "二"}, talk("一", "二", system="甲\n乙")),
        ({"question": "水的沸点？", "response": "一百度。"}, BOILING),
        ({"user": "水的沸点？", "assistant": "一百度。"}, BOILING),
        ({"user": "水的沸点？", "response": "一百度。"}, BOILING),
        (
            {"prompt": "水的沸点？", "answer": "一百度。", "system": "简短"},
            talk("水的沸点？", "一百度。", system="简短"),
        ),
        ({"问": "水的沸点？", "答": "一百度。"}, BOILING),
        ({"用户": "水的沸点？", "助手": "一百度。", "编号": 1}, BOILING),
        ({"INSTRUCTION": "译", "RESPONSE": "sky", "SOURCE": "x"}, talk("译", "sky")),
        (
            {"Question": "水的沸点？", "Answer": "一百度。", "History": [["一", "二"]]},
            talk("一", "二", "水的沸点？", "一百度。"),
        ),
    ],
)
def test_shapes_people_have(row, expected):
    assert formats.read_row(row).conversations == [expected]


@pytest.mark.parametrize(
    "role",
    [
        "User",
        "USER",
        " user ",
        "Human",
        "用户",
        "用户：",
        "人类",
        "\ufeffuser",
        "tool_response",
        "function",
        "Prompter",
    ],
)
@pytest.mark.parametrize(
    "answerer", ["AI", "ai", "Assistant", "chatgpt", "gpt4", "GPT4", "tool_call", "助手", "机器人"]
)
def test_roles_by_any_name(role, answerer):
    assert formats.read_row({"conversations": asked(role, answerer)}).conversations == [BOILING]


@pytest.mark.parametrize("role", ["System", "developer", "系统"])
def test_system_by_any_name(role):
    row = {"messages": [{"role": role, "content": "简短"}, *asked("user", "assistant", "role", "content")]}
    assert formats.read_row(row).conversations[0][0] == Turn("system", "简短")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]}, ["image_url", "text"]),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}, *parts("一")]}]}, ["input_audio"]),
        ({"messages": [{"role": "user", "content": ["一"]}]}, ["content", "'str'"]),
        ({"messages": '[{"role": '}, ["messages", "must be a list", "str"]),
        ({"messages": '[{"role": "user", "content": "一", "content": "二"}]'}, ["'content'", "occurs twice"]),
        ({"role": "user", "content": "一"}, ["unknown keys", "a message alone", '{"messages": […]}']),
        ({"prompt": [{"role": "user", "content": "一"}], "completion": "二"}, ["completion", "must be a list"]),
        ({"question": "问", "answer": False}, ["answer", "bool 'False'"]),
        ({"question": "问", "answer": float("nan")}, ["answer", "float 'nan'"]),
        ({"question": "问", "answer": ["2", "二"]}, ["answer", "list"]),
        (
            {"conversation": [*asked("human", "gpt"), {"human": "一", "assistant": "二"}]},
            ["role, content", "from, value"],
        ),
        ({"query": "三", "response": "四", "history": [["一", "二"], {"role": "user", "content": "一"}]}, ["history"]),
        ({"messages": [{"role": "user", "message": "水的沸点？"}]}, ["role, content", "水的沸点？"]),
        ({"messages": [{"role": "user", "Content": "水的沸点？"}]}, ["role, content", "Content", "水的沸点？"]),
        ({"messages": [{"role": "user", "content": "一", "text": "二"}]}, ["content", "text", "both hold text"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "content": "一"}]}]}, ["only text parts", "一"]),
        ({"conversation": [{"Human": "一", "Assistant": "二"}]}, ["human 和 assistant", "Human", "二"]),
        ({"conversation": [{"human": "一", "Assistant": "二"}]}, ["Assistant", "is assistant meant"]),
    ],
)
def test_what_cannot_be_read_is_named(row, words):
    with pytest.raises(FormatError) as error:
        formats.read_row(row)
    assert [word for word in words if word not in str(error.value)] == []


# ---------------------------------------------------------------- what no reader used

BOIL = {"question": "水的沸点？", "answer": "一百度。"}
TALK = asked("user", "assistant", "role", "content")


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        (BOIL, []),
        (BOIL | {"id": 3, "source": "书", "category": ["物理"]}, ["category", "id", "source"]),
        (BOIL | {"note": None, "tags": [], "more": {"a": " ", "b": [""]}, "system": ""}, []),
        (BOIL | {"evidence": {"text": ["海平面"]}, "content": "水"}, ["content", "evidence"]),
        (BOIL | {"question_id": "q1", "output_type": "短"}, ["output_type", "question_id"]),
        (
            {"conversation_id": "c1", "conversation": [{"human": "一", "assistant": "二", "n": 1}]},
            ["conversation.n", "conversation_id"],
        ),
        (
            {"messages": [TALK[0] | {"name": "小王"}, TALK[1] | {"id": "m1", "refusal": None}]},
            ["messages.id", "messages.name"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "一", "cache": "x"}]}, TALK[1]]},
            ["messages.content.cache"],
        ),
        ({"dialogue": "<Human 1>:一 <Assistant 1>:二", "reference": "书"}, ["reference"]),
        (
            {"messages": TALK, "prompt": TALK[0]["content"], "prompt_id": "p1"},
            ["prompt", "prompt_id"],
        ),  # said once more
        ({"text": "长文", "title": "题", "url": "u"}, ["title", "url"]),
        ({"text": "短文", "user": "u1"}, ["user"]),  # who wrote it
        ({"问题": "水的沸点？", "回答": "一百度。", "用户": "张三"}, ["用户"]),
        ({"输入": "水的沸点？", "输出": "一百度。", "助手": "小王"}, ["助手"]),
        ({"指令": "水的沸点？", "输出": "一百度。", "用户": "张三"}, ["用户"]),
        (BOIL | {"label": "物理", "thinking": False}, ["label", "thinking"]),
    ],
)
def test_keys_that_nobody_read_are_told(row, unused):
    assert sorted(set(formats.read_row(row).unused)) == unused


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "译", "Input": "天", "output": "sky"}, ["Input", "is input meant"]),
        (BOIL | {"sytem": "简短"}, ["sytem", "is system meant"]),
        (BOIL | {"input": "在高山上"}, ["input", "not read"]),
        (BOIL | {"Answer": "九十度。"}, ["Answer", "is answer meant"]),
        ({"question": "一", "human_answers": ["二"], "chatgpt_answers": [], "history": [["三", "四"]]}, ["history"]),
        (BOIL | {"choices": ["一百度", "九十度"]}, ["choices", "multiple-choice"]),
        (BOIL | {"options": {"A": "一百度"}}, ["options", "multiple-choice"]),
        (BOIL | {"cot": "想一想"}, ["cot", "would be lost"]),
        (BOIL | {"思考": "想一想"}, ["思考", "would be lost", "reasoning_content"]),
        (BOIL | {"reasoning": "想一想", "thinking": "再想想"}, ["row: reasoning_content", "two thoughts"]),
        (BOIL | {"Images": ["a.jpg"]}, ["Images", "only text"]),
        ({"messages": [TALK[0] | {"reasoning_content": "想"}, TALK[1]]}, ["messages.reasoning_content"]),
        ({"messages": [TALK[0] | {"tool_calls": [{"name": "f"}]}, TALK[1]]}, ["messages.tool_calls", "would be lost"]),
        ({"messages": [TALK[0], TALK[1] | {"tool_calls": [{"id": "c"}]}]}, ["messages.tool_calls"]),
        ({"messages": TALK, "videos": ["a.mp4"]}, ["videos"]),
        ({"prompt": "一", "chosen": "二", "rejected": "三"}, ["chosen+rejected", "preference pair"]),
        ({"messages": TALK, "rejected_response": "三"}, ["rejected_response", "preference pair"]),
        ({"messages": TALK, "kto_tag": False}, ["kto_tag", "preference"]),
        ({"prompt": "一", "completion": "二", "label": False}, ["label", "whether the answer is good"]),
        ({"question": "一", "response_j": "二", "response_k": "三"}, ["response_j+response_k", "preference pair"]),
        (BOIL | {"option_a": "一百度", "option_b": "九十度"}, ["option_a", "multiple-choice"]),
        (BOIL | {"candidates": ["一百度"]}, ["candidates", "multiple-choice"]),
        ({"问题": "一", "A": "二", "B": "三", "答案": "A"}, ["multiple-choice"]),
        ({"问题": "一", "选项": ["二", "三"], "答案": "二"}, ["选项", "multiple-choice"]),
        ({"问题": "一", "思考": "想", "答案": "二"}, ["思考", "would be lost"]),
        (BOIL | {"chain_of_thought": "想"}, ["chain_of_thought", "would be lost"]),
        (BOIL | {"Complex_CoT": "想"}, ["Complex_CoT", "would be lost"]),
        ({"messages": [TALK[0], TALK[1] | {"thought": "想"}]}, ["messages.thought", "would be lost"]),
        ({"messages": TALK, "functions": [{"name": "f"}]}, ["functions", "would be lost"]),
        (BOIL | {"image_path": "a.png"}, ["image_path", "only text"]),
        (BOIL | {"图片": "a.png"}, ["图片", "only text"]),
        ({"messages": [{"role": "user", "content": [parts("一")[0] | {"image_url": "a"}]}, TALK[1]]}, ["image_url"]),
        ({"messages": TALK, "system_message": "简短"}, ["system_message", "is system meant"]),
        ({"系统": "简短", "指令": "一", "输出": "二"}, ["系统", "is system meant"]),
        ({"背景": "海边", "问题": "一", "答案": "二"}, ["背景", "is context meant"]),
        ({"prompt": "译", "input": "天", "output": "sky"}, ["prompt", "would be lost", "join it"]),
        ({"messages": TALK, "prompt": "另一问"}, ["prompt", "would be lost"]),
        ({"messages": TALK, "instruction": "译"}, ["instruction", "join it to what is read, or remove it"]),
        ({"text": "很好吃", "label": "正面"}, ["unknown keys", "label+text"]),
        ({"text": "长文", "summary": "短"}, ["unknown keys", "content+summary"]),
        ({"text": "你好", "role": "prompter", "message_id": "1"}, ["unknown keys", "role+text", "a message alone"]),
    ],
)
def test_a_key_that_matters_is_an_error(row, words):
    with pytest.raises(FormatError) as error:
        formats.read_row(row)
    assert [word for word in words if word not in str(error.value)] == []


KEYS = (
    "instruction input output question answer query response context system system_prompt history messages Input id"
    " source cot choices images note evidence inputs 问题 答案 prompt completion text content summary tools"
).split()


def some_value(rng, key, texts):
    """A value for a key, its texts put into `texts`."""

    def text():
        texts.append(f"文{len(texts)}字")
        return texts[-1]

    if key == "messages":
        return [
            {"role": role, "content": text()} | ({"name": text()} if rng.random() < 0.2 else {})
            for role in ("user", "assistant")
        ]
    if key == "history":
        return [[text(), text()]]
    return rng.choice([text, text, text, text, lambda: "", lambda: None, lambda: [text(), {"深": text()}], lambda: 7])()


def test_every_text_of_a_row_is_in_its_turns_or_told():
    """Of random keys, known and unknown: each text is in the turns, or its key is told, or the row is refused."""
    rng, outcomes = random.Random(15), Counter()
    shapes = [sorted(needs) for needs in formats.SHAPES if needs <= set(KEYS)]
    for _ in range(4000):
        keys = dict.fromkeys([*rng.choice(shapes), *rng.sample(KEYS, rng.randrange(4))])
        texts = {key: [] for key in keys}
        base = 0
        row = {}
        for key in keys:
            found = [""] * base
            row[key] = some_value(rng, key, found)
            texts[key], base = found[base:], len(found)
        try:
            reading = formats.read_row(row)
        except FormatError as refused:
            assert str(refused)
            outcomes["refused"] += 1
            continue
        said = "\0".join(turn.text for found in reading.conversations for turn in found)
        for key, parts_of_it in texts.items():
            told = key in reading.unused or f"{key}.name" in reading.unused
            assert all(part in said or told for part in parts_of_it), (key, row)
        outcomes["told" if reading.unused else "read"] += 1
    assert min(outcomes[name] for name in ("refused", "told", "read")) > 300, outcomes


def test_unused_keys_are_counted_once_a_file(tmp_path, tokenizer, capsys):
    rows = [BOIL | {"note": f"第{number}"} for number in range(3)] + [BOIL | {"id": 1}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cfg = Config(data_path=(str(path),), cache_dir=str(tmp_path / "cache"), val_set_size=0)
    for _ in range(2):  # read, and out of the cache
        found = dataset.prepare(cfg, tokenizer, prompt)
        assert found.sources[0]["unused"] == {"id": 1, "note": 3}
        accounts.show_counts(found)
        assert "id: not used in 1 rows; note: not used in 3 rows\n" in capsys.readouterr().out
    report = check.examine(cfg, tokenizer, prompt)[1]
    told = [finding for finding in report["findings"] if finding["kind"] == "unused"]
    assert [(finding["where"], finding["bad"]) for finding in told] == [(str(path), False)] * 2
    assert "note" in told[1]["found"] and "3 rows" in told[1]["found"]


# ---------------------------------------------------------------- answers that are not to be learnt


def rounds(*marks, texts="一二三四五六"):
    """Messages of user and assistant in turn; of each answer its mark, as a dict."""
    found = []
    for number, mark in enumerate(marks):
        found += [{"role": "user", "content": texts[2 * number]}]
        found += [{"role": "assistant", "content": texts[2 * number + 1]} | mark]
    return found


@pytest.mark.parametrize(
    ("row", "learnt"),
    [
        ({"messages": rounds({"loss": False}, {"loss": True})}, [False, True]),
        ({"messages": rounds({"weight": 0}, {"weight": 1})}, [False, True]),
        ({"messages": rounds({"weight": 0.0}, {"weight": 1.0})}, [False, True]),
        ({"messages": rounds({"mask": True}, {"mask": False}, {})}, [False, True, True]),
        ({"messages": rounds({"train": True}, {"train": False})}, [True, False]),
        ({"messages": rounds({"loss": None}, {"loss": 1, "weight": 0})}, [True, False]),
        (
            {
                "conversation": [
                    {"input": "一", "output": "二", "output_with_loss": False},
                    {"input": "三", "output": "四", "output_with_loss": True},
                ]
            },
            [False, True],
        ),
        ({"messages": rounds({}, {}), "loss_mask": [0, 1]}, [False, True]),
        ({"messages": rounds({}, {}), "loss_mask": [0, 0, 1, 0]}, [False, False]),
        ({"messages": rounds({}, {}), "loss_mask": [0, 1, 0, 0]}, [True, False]),
        ({"messages": rounds({}, {}), "system": "简短", "loss_mask": [0, 0, 0, 1]}, [False, True]),
        ({"messages": rounds({}, {}), "system": "简短", "loss_mask": [0, 0, 0, 0, 1]}, [False, True]),
        ({"messages": rounds({}, {}), "weight": 1}, [True, True]),
        ({"messages": rounds({"loss": "False"}, {"weight": "1"})}, [False, True]),  # as CSV has them
        ({"messages": rounds({}, {}), "weight": "0"}, [False, False]),
        ({"messages": rounds({}, {}), "loss": False}, [False, False]),
        ({"messages": rounds({}, {}), "mask": True}, [False, False]),
        ({"messages": rounds({}, {}), "train": "true"}, [True, True]),
    ],
)
def test_marks_are_honoured(row, learnt):
    if not any(learnt):
        with pytest.raises(FormatError, match="every answer of the row is marked"):
            formats.read_row(row)
        return
    (found,) = formats.read_row(row).conversations
    assert [turn.learn for turn in found if turn.role == "assistant"] == learnt
    assert all(turn.learn for turn in found if turn.role != "assistant") and formats.read_row(row).unused == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": rounds({"weight": 0.5})}, ["messages.weight", "0.5"]),
        ({"messages": rounds({"loss": "no"})}, ["messages.loss", "no"]),
        ({"messages": rounds({"Loss": False})}, ["messages.Loss", "is loss meant"]),
        ({"messages": rounds({"trainable": False})}, ["messages.trainable", "write loss: true or false"]),
        ({"messages": rounds({"loss_weight": 0})}, ["messages.loss_weight", "write loss: true or false"]),
        ({"messages": rounds({}), "weight": 2}, ["weight", "2"]),
        ({"messages": rounds({}), "loss_mask": [0, 1, 1]}, ["loss_mask", "2 轮", "3 个标记"]),
        ({"messages": rounds({}), "loss_mask": [0.3]}, ["loss_mask", "0.3"]),
        ({"messages": rounds({}), "weight": 0}, ["every answer", "not to be learnt"]),
        (
            {"conversations": [{"from": "human", "value": "一"}, {"from": "gpt", "value": "二", "mask": True}]},
            ["every answer", "not to be learnt"],
        ),
        ({"conversation": [{"input": "一", "output": "二", "output_with_loss": 3}]}, ["output_with_loss", "3"]),
    ],
)
def test_marks_that_cannot_be_honoured_are_errors(row, words):
    with pytest.raises(FormatError) as error:
        formats.read_row(row)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_mark_of_a_question_changes_nothing():
    messages = rounds({}, {})
    messages[0]["mask"] = messages[2]["weight"] = 0
    assert formats.read_row({"messages": messages}).conversations == [talk(*"一二三四")]


@pytest.mark.parametrize("style", prompt.STYLES)
@pytest.mark.parametrize("loss_on", ["answer", "all", "last"])
def test_the_loss_counts_no_id_of_an_unlearnt_answer(tokenizer, style, loss_on):
    whole, marked = talk("一", "二二", "三", "四"), talk("一", "二二", "三", "四")
    marked[1] = marked[1]._replace(learn=False)
    sample, expected = (
        render.training_sample(tokenizer, prompt, half, style, loss_on, 99, 99) for half in (marked, whole)
    )
    assert sample.input_ids == expected.input_ids
    silent = [
        number for number, pair in enumerate(zip(sample.labels, expected.labels, strict=True)) if len({*pair}) > 1
    ]
    stop = prompt.stop_ids(tokenizer, style)[0]
    answer = [*render.encode_text(tokenizer, "二二"), stop]
    assert [sample.input_ids[number] for number in silent] == ([] if loss_on == "last" else answer)
    assert {sample.labels[number] for number in silent} <= {render.IGNORED}


def test_a_sequence_that_teaches_one_answer_is_made_for_learnt_ones_only():
    half = talk("一", "二", "三", "四")
    half[1] = half[1]._replace(learn=False)
    assert list(lessons([Conversation("f:1", half)], True)) == [("f:1", half)]


# ---------------------------------------------------------------- one reading of a conversation

U, U2, A, A2, S = (
    {"role": role, "content": text}
    for role, text in (("user", "一"), ("user", "三"), ("assistant", "二"), ("assistant", "四"), ("system", "简短"))
)
GREETING = Turn("assistant", "二", learn=False)


@pytest.mark.parametrize(
    ("messages", "expected", "repairs"),
    [
        ([U, A], talk("一", "二"), []),
        ([S, U, A, U2, A2], talk("一", "二", "三", "四", system="简短"), []),
        ([U, U2, A, A2], talk("一\n\n三", "二\n\n四"), [turns.JOINED]),
        ([S, S, U, A], talk("一", "二", system="简短\n\n简短"), [turns.JOINED]),
        ([U, A, U2], talk("一", "二"), [turns.UNANSWERED]),
        ([U, A, U2, U2], talk("一", "二"), [turns.JOINED, turns.UNANSWERED]),
        ([A, U, A2], [GREETING, *talk("一", "四")], [turns.GREETING]),
        (
            [S, A, A, U, A2],
            [Turn("system", "简短"), GREETING._replace(text="二\n\n二"), *talk("一", "四")],
            [turns.JOINED, turns.GREETING],
        ),
        ([U, A, S, U2, A2], talk("一", "二", "简短\n\n三", "四"), [turns.SYSTEM]),
        ([U, S, A], talk("一\n\n简短", "二"), [turns.SYSTEM]),
        ([U, A, S], talk("一", "二"), [turns.SYSTEM, turns.UNANSWERED]),
        ([U, A | {"content": None}, U2, A2], talk("一\n\n三", "四"), [turns.NO_TEXT, turns.JOINED]),
        ([S | {"content": " "}, U, A], talk("一", "二"), [turns.NO_TEXT]),
        ([U, A, U2, A2 | {"content": ""}], talk("一", "二"), [turns.NO_TEXT, turns.UNANSWERED]),
        ([U, {"role": "assistant"}, U2, A2], talk("一\n\n三", "四"), [turns.NO_TEXT, turns.JOINED]),
        (
            [U, {"role": "tool_call", "content": "{}"}, *[{"role": "tool", "content": text} for text in "晴风"], A],
            talk("一", "{}", "晴\n\n风", "二"),
            [turns.JOINED],
        ),
        (
            [U, A | {"loss": False}, A2, U2, A2],
            [Turn("user", "一"), Turn("assistant", "二\n\n四", False), *talk("三", "四")],
            [turns.JOINED],
        ),
    ],
)
def test_an_odd_turn_is_repaired_and_told(messages, expected, repairs):
    reading = formats.read_row({"messages": messages})
    assert (reading.conversations, reading.repaired) == ([expected], repairs)


def test_every_shape_of_a_conversation_is_repaired():
    assert formats.read_row({"query": "三", "response": "四", "history": [["一", ""]]}).conversations == [
        talk("一\n\n三", "四")
    ]
    history = [U | {"content": "一"}]
    assert formats.read_row({"query": "三", "response": "四", "history": history}).conversations == [
        talk("一\n\n三", "四")
    ]
    firefly = [
        {"human": "一", "assistant": "二"},
        {"system": "简短", "human": "三", "assistant": "四"},
        {"human": "五"},
    ]
    assert formats.read_row({"conversation": firefly}).conversations == [talk("一", "二", "简短\n\n三", "四")]


@pytest.mark.parametrize(
    "question, before",
    [
        ("Human: 一\nAssistant: 二\n二\nHuman:三\nAssistant:\n", ("一", "二\n二", "三")),
        ("\nHuman：一\nAssistant：", ("一",)),
        ("Human:一", None),
        ("Human:一\nAssistant:二", None),  # is the rest of it asked for?
        ("Human:一\nHuman:二\nAssistant:", None),
        ("Human:\nAssistant:", None),
        ("译：\nHuman:一\nAssistant:", None),
        ("Assistant:", None),
    ],
)
def test_a_chat_in_one_text_is_its_turns(question, before):
    """BELLE's; a text that only has such words in it stays as it is."""
    (turns,) = formats.read_row({"instruction": question, "input": "", "output": "四"}).conversations
    assert turns == talk(*(before or [question]), "四")


def test_repairs_are_counted_with_their_places(tmp_path, tokenizer, capsys):
    path = tmp_path / "a.jsonl"
    rows = [{"messages": messages} for messages in ([U, A], [U, U, A], [A, U, A], [U, U, A], [U, U, A], [U, U2, A, A])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cfg = Config(data_path=(str(path),), cache_dir=str(tmp_path / "cache"), val_set_size=0)
    for _ in range(2):  # read, and out of the cache
        found = dataset.prepare(cfg, tokenizer, prompt)
        assert found.sources[0]["repaired"] == 5 == len(found.repaired) and found.sources[0]["kept"] == 6
        accounts.show_counts(found)
        out = capsys.readouterr().out
        assert f"repaired 4: {turns.JOINED}: {path}:2, {path}:4, {path}:5\n" in out
        assert f"repaired 1: {turns.GREETING}: {path}:3\n" in out
        with pytest.raises(UserError) as error:
            dataset.prepare(replace(cfg, strict=True), tokenizer, prompt)
        assert str(error.value) == f"{path}:2: {turns.JOINED} (--strict)"
    report = check.examine(cfg, tokenizer, prompt)[1]
    places = [finding["where"] for finding in report["findings"] if finding["kind"] == "repaired"]
    assert places == [f"{path}:{line}" for line in range(2, 7)] and not any(f["bad"] for f in report["findings"])


@pytest.mark.parametrize("style", prompt.STYLES)
def test_a_greeting_is_rendered_first_and_never_learnt(tokenizer, style):
    greeted = [Turn("system", "规则"), Turn("assistant", "您好", learn=False), *talk("一", "二")]
    for loss_on in ("answer", "all"):
        sample = render.training_sample(tokenizer, prompt, greeted, style, loss_on, 99, 99)
        text = render.shown(tokenizer, sample.input_ids)
        opening = "<start_of_turn>model\n您好<end_of_turn>\n<start_of_turn>user\n" if style == "chat" else "您好<eos>"
        assert text.startswith(f"<bos>{opening}规则\n\n一")
        learnt = render.shown(tokenizer, [label for label in sample.labels if label != render.IGNORED])
        assert "您" not in learnt and "model\n您" not in learnt and "二" in learnt
    whole = render.prompt_ids(tokenizer, prompt, greeted[:-1], style, 99)[0]
    asked, cut = render.prompt_ids(tokenizer, prompt, greeted[:-1], style, len(whole) - 1)
    assert cut and "您" not in render.shown(tokenizer, asked) and "规则\n\n一" in render.shown(tokenizer, asked)
