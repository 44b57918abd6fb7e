"""Rows as people have them: shapes, names of roles and keys, numbers where text is meant."""

import json

import pytest

from common.data import formats
from common.data.turns import FormatError, Turn


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
    ("row", "turns"),
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
        ({"输入": "天", "输出": "sky"}, talk("天", "sky")),
        ({"question": "一加一", "answer": 2}, talk("一加一", "2")),
        ({"instruction": 7, "input": 0, "output": 0.5}, talk("7\n0", "0.5")),
        ({"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": 1.0}]}, talk("1", "1.0")),
        ({"question": "开门吗", "context": "周一休息", "answer": "不开"}, talk("开门吗\n周一休息", "不开")),
        ({"instruction": "概括", "context": "长文", "output": "短"}, talk("概括\n长文", "短")),
        ({"system_prompt": "简短", "query": "一", "response": "二"}, talk("一", "二", system="简短")),
        ({"system": "甲", "system_prompt": "乙", "query": "一", "response": "二"}, talk("一", "二", system="甲\n乙")),
    ],
)
def test_shapes_people_have(row, turns):
    assert formats.turns_of(row) == [turns]


@pytest.mark.parametrize("role", ["User", "USER", " user ", "Human", "用户", "tool_response", "Prompter"])
@pytest.mark.parametrize("answerer", ["AI", "ai", "Assistant", "chatgpt", "gpt4", "GPT4", "tool_call", "助手"])
def test_roles_by_any_name(role, answerer):
    assert formats.turns_of({"conversations": asked(role, answerer)}) == [BOILING]


@pytest.mark.parametrize("role", ["System", "developer", "系统"])
def test_system_by_any_name(role):
    row = {"messages": [{"role": role, "content": "简短"}, *asked("user", "assistant", "role", "content")]}
    assert formats.turns_of(row)[0][0] == Turn("system", "简短")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]}, ["image_url", "text"]),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}, *parts("一")]}]}, ["input_audio"]),
        ({"messages": [{"role": "user", "content": ["一"]}]}, ["content", "'str'"]),
        ({"messages": '[{"role": '}, ["messages", "must be a list", "str"]),
        ({"prompt": [{"role": "user", "content": "一"}], "completion": "二"}, ["completion", "must be a list"]),
        ({"question": "问", "answer": False}, ["answer", "bool 'False'"]),
        ({"question": "问", "answer": float("nan")}, ["answer", "float 'nan'"]),
        ({"question": "问", "answer": ["2", "二"]}, ["answer", "list"]),
        (
            {"conversation": [*asked("human", "gpt"), {"human": "一", "assistant": "二"}]},
            ["role, content", "from, value"],
        ),
        ({"query": "三", "response": "四", "history": [["一", "二"], {"role": "user", "content": "一"}]}, ["history"]),
    ],
)
def test_what_cannot_be_read_is_named(row, words):
    with pytest.raises(FormatError) as error:
        formats.turns_of(row)
    assert [word for word in words if word not in str(error.value)] == []
