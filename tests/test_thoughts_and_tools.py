"""Rows with thoughts, tools, calls and results: read in every form, in order, cut, and told where broken."""

import json

import pytest

from common.conversation import turns
from common.conversation.render import TooLongError, fit_turns
from common.conversation.turns import Call, FormatError, Turn, ends_asking, fill_identity, in_order, said
from common.data import formats, utterances

ASKED = {"role": "user", "content": "杭州天气"}
FUNCTION = {"name": "weather", "description": "查天气", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
OFFER = Turn("system", "", tools=json.dumps(TOOLS, ensure_ascii=False))
Q, RESULT, ANSWER = Turn("user", "杭州天气"), Turn("tool", "晴"), Turn("assistant", "晴天。")
CALL = Turn("assistant", "", calls=(Call("weather", '{"city": "杭州"}'),))
BOTH = Turn("assistant", "", calls=(Call("weather", '{"city": "杭州"}'), Call("weather", '{"city": "苏州"}')))


def message(role, text, **more):
    return {"role": role, "content": text} | more


def call(city, id_=None, arguments=None):
    given = {"name": "weather", "arguments": {"city": city} if arguments is None else arguments}
    return {"type": "function", "function": given} | ({"id": id_} if id_ else {})


def shared(*texts):
    """ShareGPT's messages of (from, value)."""
    return [{"from": who, "value": text} for who, text in texts]


CALLED = '{"name": "weather", "arguments": {"city": "杭州"}}'
ROWS = {
    "OpenAI": (
        {"messages": [ASKED, message("assistant", None, tool_calls=[call("杭州", "a")]), message("tool", "晴")]},
        [Q, CALL],
    ),
    "answered": (
        {
            "messages": [
                ASKED,
                message("assistant", None, tool_calls=[call("杭州", "a", '{"city": "杭州"}')]),
                message("tool", "晴", tool_call_id="a", name="weather"),
                message("assistant", "晴天。"),
            ]
        },
        [Q, CALL, RESULT, ANSWER],
    ),
    "results in another order": (
        {
            "messages": [
                ASKED,
                message("assistant", "", tool_calls=[call("杭州", "a"), call("苏州", "b")]),
                message("tool", "雨", tool_call_id="b"),
                message("tool", "", tool_call_id="a"),
                message("assistant", "晴天。"),
            ]
        },
        [Q, BOTH, Turn("tool", ""), Turn("tool", "雨"), ANSWER],
    ),
    "a text before the call": (
        {"messages": [ASKED, message("assistant", "我查一下", tool_calls=[call("杭州")])]},
        [Q, CALL._replace(text="我查一下")],
    ),
    "ShareGPT": (
        {
            "conversations": shared(
                ("human", "杭州天气"), ("function_call", CALLED), ("observation", "晴"), ("gpt", "晴天。")
            ),
            "tools": json.dumps([FUNCTION], ensure_ascii=False),
        },
        [OFFER, Q, CALL, RESULT, ANSWER],
    ),
    "ShareGPT, a list of calls": (
        {"conversations": shared(("human", "杭州天气"), ("function_call", f"[{CALLED}]"))},
        [Q, CALL],
    ),
    "ms-swift": (
        {
            "messages": [
                ASKED,
                message("tool_call", CALLED),
                message("tool_call", CALLED.replace("杭", "苏")),
                message("tool_response", "晴"),
                message("tool", "雨"),
                message("assistant", "晴天。"),
            ],
            "tools": TOOLS,
        },
        [OFFER, Q, BOTH, RESULT, Turn("tool", "雨"), ANSWER],
    ),
    "ms-swift, a text before the call": (
        {"messages": [ASKED, message("assistant", "我查一下"), message("tool_call", CALLED)]},
        [Q, CALL._replace(text="我查一下")],
    ),
    "tools beside a system text": (
        {"messages": [message("system", "简短"), ASKED, message("assistant", "好")], "tools": TOOLS},
        [OFFER._replace(text="简短"), Q, Turn("assistant", "好")],
    ),
    "tools of a question": (
        {"query": "杭州天气", "response": "好", "system": "简短", "tools": json.dumps(TOOLS)},
        [OFFER._replace(text="简短"), Q, Turn("assistant", "好")],
    ),
    "no call in it": (
        {
            "conversations": shared(
                ("human", "杭州天气"), ("function_call", "查天气"), ("observation", "晴"), ("gpt", "好")
            )
        },
        [Q, Turn("assistant", "查天气"), Turn("user", "晴"), Turn("assistant", "好")],
    ),
    "thought": (
        {"messages": [ASKED, message("assistant", "好", reasoning_content="想想")]},
        [Q, Turn("assistant", "好", thought="想想")],
    ),
    "thought by another name": (
        {"messages": [ASKED, message("assistant", "好", reasoning="想想", thinking=None)]},
        [Q, Turn("assistant", "好", thought="想想")],
    ),
    "thought, said twice": (
        {"messages": [ASKED, message("assistant", "<think>\n想想\n</think>\n\n好", reasoning_content="想想")]},
        [Q, Turn("assistant", "好", thought="想想")],
    ),
    "thought in an answer": (
        {"instruction": "杭州天气", "output": "<think>\n想\n\n想\n</think>\n\n好 "},
        [Q, Turn("assistant", "好 ", thought="想\n\n想")],
    ),
    "thought of earlier answers": (
        {"query": "杭州天气", "response": "好", "history": [["一", "<think>想</think>二"]]},
        [Turn("user", "一"), Turn("assistant", "二", thought="想"), Q, Turn("assistant", "好")],
    ),
    "thought without its beginning": (
        {"question": "杭州天气", "answer": "想\n\n想\n</think>\n\n好"},
        [Q, Turn("assistant", "好", thought="想\n\n想")],
    ),
    "no thought": (
        {"question": "杭州天气", "answer": "<think>\n\n</think>\n\n好"},
        [Q, Turn("assistant", "好")],
    ),
    "thought and call": (
        {"messages": [ASKED, message("assistant", "<think>查</think>", tool_calls=[call("杭州")])]},
        [Q, CALL._replace(thought="查")],
    ),
    "typed in the middle": (
        {"question": "杭州天气", "answer": "写 <think>想</think>"},
        [Q, Turn("assistant", "写 <think>想</think>")],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_form_is_read(name):
    row, expected = ROWS[name]
    reading = formats.read_row(row)
    assert reading.conversations == [expected] and reading.unused == []
    repairs = {"OpenAI": [turns.NOT_USED], "thought without its beginning": [utterances.BEGUN]}
    assert reading.repaired == repairs.get(name, [])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [ASKED, message("assistant", "好", reasoning_content="一", reasoning="二")]}, ["two thoughts"]),
        (
            {"messages": [ASKED, message("assistant", "<think>一</think>好", reasoning_content="二")]},
            ["two thoughts", "<think>"],
        ),
        ({"question": "问", "answer": "<think>一"}, ["has no </think>"]),
        ({"question": "问", "answer": "<think>一</think>\n"}, ["a thought without an answer"]),
        ({"question": "问", "answer": "用 </think> 结束"}, ["no <think> before it", "remove </think>"]),
        ({"question": "问", "answer": "一\n</think>\n二</think>"}, ["no <think> before it", "remove </think>"]),
        ({"question": "问", "answer": "一\n</think>\n"}, ["a thought without an answer"]),
        (
            {
                "messages": [
                    ASKED,
                    message("assistant", "", tool_calls=[call("杭州", "a"), call("苏州", "b")]),
                    message("tool", "雨", tool_call_id="b"),
                    message("assistant", "好"),
                ]
            },
            ["id 'a'", "has no result"],
        ),
        (
            {"messages": [ASKED, message("assistant", None, reasoning_content="想")]},
            ["a thought without an answer"],
        ),
        (
            {"messages": [ASKED, message("assistant", "", tool_calls=[call("杭", arguments="杭")])]},
            ["tool_calls", "name"],
        ),
        (
            {"messages": [ASKED, message("assistant", "", tool_calls=[call("杭", arguments='{"n": NaN}')])]},
            ["tool_calls", "arguments"],
        ),
        ({"messages": [ASKED, message("assistant", "", tool_calls=[call("杭", arguments=[1])])]}, ["tool_calls"]),
        ({"messages": [ASKED, message("assistant", "", tool_calls=["f"])]}, ["tool_calls"]),
        ({"messages": [ASKED, message("assistant", "好")], "tools": [{"x": 1}]}, ["tools", "list of functions"]),
        (
            {
                "messages": [
                    ASKED,
                    message("assistant", "", tool_calls=[call("杭", "a")]),
                    message("tool", "晴", tool_call_id="b"),
                    message("assistant", "好"),
                ]
            },
            ["tool_call_id 'b'", "no call before has it"],
        ),
        (
            {"messages": [ASKED, message("assistant", "", tool_calls=[call("杭")]), message("assistant", "好")]},
            ["weather", "has no result"],
        ),
        (
            {
                "messages": [
                    ASKED,
                    message("assistant", "", tool_calls=[call("杭")]),
                    message("user", "快"),
                    message("assistant", "好"),
                ]
            },
            ["weather", "has no result"],
        ),
    ],
)
def test_what_is_broken_is_told(row, words):
    with pytest.raises(FormatError) as error:
        formats.read_row(row)
    assert [word for word in words if word not in str(error.value)] == [] and "\n" not in str(error.value)


def test_a_result_needs_a_call():
    with pytest.raises(FormatError, match="without a call before it"):
        in_order([Q, ANSWER, RESULT], answered=False)


def test_results_ask():
    asked = [Q, CALL, RESULT]
    assert in_order(asked, answered=False) == (asked, []) and ends_asking(asked) and not ends_asking([Q, CALL])
    assert in_order([OFFER, Q], answered=False) == ([OFFER, Q], [])
    assert in_order(asked) == ([Q, CALL], [turns.NOT_USED])
    assert in_order([*asked, RESULT, ANSWER]) == ([*asked, RESULT, ANSWER], []), "parallel results stay apart"


def test_an_unlearnt_call_is_context():
    row = {"messages": [ASKED, message("assistant", "", tool_calls=[call("杭州")], loss=False), message("tool", "晴")]}
    row["messages"].append(message("assistant", "晴天。"))
    (found,) = formats.read_row(row).conversations
    assert [turn.learn for turn in found] == [True, False, True, True]
    marked = {"messages": [message | {"loss": None} for message in row["messages"]], "loss_mask": [0, 1]}
    assert [turn.learn for turn in formats.read_row(marked).conversations[0]] == [True, False, True, True]


def test_placeholders_are_filled_everywhere():
    made = [
        OFFER._replace(tools='["{{name}}"]'),
        Q,
        CALL._replace(thought="我是{{name}}", calls=(Call("f", '{"a": "<NAME>"}'),)),
    ]
    name = 'the "one"'
    found = fill_identity(made, (name, name), ())
    assert json.loads(found[0].tools) == [name] and json.loads(found[2].calls[0].arguments) == {"a": name}
    assert found[2].thought == f"我是{name}"


def test_hashes_of_plain_conversations_are_the_same_as_ever():
    assert said([Q, ANSWER]) == [("user", "杭州天气"), ("assistant", "晴天。")]
    assert len({json.dumps(said([turn])) for turn in (ANSWER, CALL, BOTH, ANSWER._replace(thought="想"), RESULT)}) == 5


def test_whole_rounds_are_cut_and_the_last_one_keeps_its_results():
    def length(cut):
        return sum(len(turn.text) + len(turn.calls) for turn in cut)

    older = [Q, CALL, RESULT, ANSWER]
    last = [Turn("user", "那苏州和南京呢"), BOTH, RESULT, RESULT]
    assert fit_turns(length, [OFFER, *older, *last], 14) == ([OFFER, *last], True)
    cut, _ = fit_turns(length, [OFFER, *older, *last], 8)
    assert cut == [OFFER, Turn("user", "那苏京呢"), *last[1:]]
    with pytest.raises(TooLongError):
        fit_turns(length, last, 4)


@pytest.mark.parametrize("limit", [1, 7, 101, 1999])
def test_a_long_conversation_is_not_rendered_for_each_of_its_rounds(limit):
    """A chat of 120 rounds took 3.6 s to be cut."""
    spoken = [turn for _ in range(1000) for turn in (Turn("user", "问"), Turn("assistant", "答"))]
    measured = []

    def length(said):
        measured.append(len(said))
        return len(said)

    cut, was_cut = fit_turns(length, [*spoken, Turn("user", "问")], limit)
    assert len(cut) == limit and was_cut and len(measured) < 20
