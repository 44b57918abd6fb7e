"""Rendering through a tokenizer's own template: the official templates' ids, in every mode of --thinking.

The templates are those of the package trl, which compares its copies with the originals.
"""

import importlib.util
import itertools
import json
from pathlib import Path

import glm4
import pytest
from conftest import CHARACTERS

from chatglm_sft import prompt as chatglm
from chatglm_sft import prompt_glm4
from common.conversation import render, templates, thinking
from common.conversation.render import IGNORED, encode_text
from common.conversation.turns import Call, FormatError, Turn
from common.errors import UserError
from gemma_sft import make_embedded as small_gemma
from gemma_sft import prompt as gemma
from qwen2_sft import make_embedded as small_qwen
from qwen2_sft import prompt as qwen

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL else None
needs_trl = pytest.mark.skipif(FOLDER is None, reason="the package trl is not here")

CALLED = "<tool_call> </tool_call> <tool_response> </tool_response>".split()
CHANNELS = '<|turn> <turn|> <|channel> <channel|> <|think|> <|tool> <tool|> <|tool_call> <tool_call|> <|"|>'.split()
CHANNELS += ["<|tool_response>", "<tool_response|>"]
PIECES = [*CHARACTERS, "\n\n"]


def qwen_tokenizer():
    tokenizer = small_qwen.make_tokenizer(PIECES)
    tokenizer.add_tokens(["<think>", "</think>", *CALLED])
    return tokenizer


def glm_tokenizer():
    tokenizer = glm4.make_tokenizer(PIECES)
    tokenizer.add_tokens([*CALLED, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"])
    return tokenizer


def gemma_tokenizer():
    tokenizer = small_gemma.make_tokenizer(CHARACTERS)
    tokenizer.add_special_tokens({"additional_special_tokens": CHANNELS})
    return tokenizer


QWEN, GLM, GEMMA = (qwen_tokenizer, qwen), (glm_tokenizer, prompt_glm4), (gemma_tokenizer, gemma)
OFFICIAL = {
    "qwen2_5": QWEN,
    "qwen3": QWEN,
    "qwen3_instruct_2507": QWEN,
    "qwen3_5_nothink": QWEN,
    "qwen3_5_think": QWEN,
    "qwen3_6": QWEN,
    "qwen3_8": QWEN,
    "glm4moe": GLM,
    "gemma4": GEMMA,
    "gemma4_v3": GEMMA,
    "gemma4_v4": GEMMA,
    "gemma4_v5": GEMMA,
}
SILENT = {"qwen2_5", "qwen3_instruct_2507"}  # these show no thought
LATE = {"gemma4", "gemma4_v3", "gemma4_v4"}  # these show a thought before a call alone
KNOWS = {"auto": {}, "keep": {"enable_thinking": True}, "none": {"enable_thinking": False}}  # the same, said officially

PROPERTIES = {"c": {"type": "string", "description": "x"}, "n": {"type": "integer"}}
FUNCTION = {"name": "w", "description": "d", "parameters": {"type": "object", "properties": PROPERTIES}}
TOOLS = [{"type": "function", "function": FUNCTION}]
S, OFFER = Turn("system", "s"), Turn("system", "s", tools=json.dumps(TOOLS))
Q, A, Q2, A2 = Turn("user", "q 1"), Turn("assistant", "a 1"), Turn("user", "q 2"), Turn("assistant", "a 2")
CALL = Turn("assistant", "", calls=(Call("w", '{"c": "x", "n": 1}'),))
BOTH = CALL._replace(calls=(*CALL.calls, Call("w", '{"c": "y"}')))
R, R2 = Turn("tool", "r 1"), Turn("tool", '{"r": 2}')


def thought(turn, text="t"):
    return turn._replace(thought=f"{text} {turn.text}".strip())


ENDINGS = [
    [A2],
    [thought(A2)],
    [CALL],
    [thought(CALL)],
    [CALL, R, A2],
    [thought(CALL), R, thought(A2)],
    [BOTH, R, R2, A2],
    [thought(BOTH), R, R2, thought(A2)],
    [CALL, R, CALL, R2, A2],
]
ROWS = [
    [*first, *history, Q2, *ending]
    for first in ([], [S], [OFFER])
    for history in ([], [Q, thought(A)])
    for ending in ENDINGS
]


def official_tokenizer(name, mode="auto"):
    """(tokenizer, prompt module) with an official template, switched to a mode."""
    make, prompt = OFFICIAL[name]
    tokenizer = make()
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    thinking.set_mode(tokenizer, mode, name)
    return tokenizer, prompt


def messages_of(turns, thoughts=True):
    """The turns as OpenAI's messages."""
    messages, ids = [], []
    for number, turn in enumerate(turns):
        message = {"role": turn.role, "content": turn.text}
        if turn.thought and thoughts:
            message["reasoning_content"] = turn.thought
        if turn.calls:
            ids = [f"c{number}{place}" for place in range(len(turn.calls))]
            functions = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in turn.calls]
            calls = zip(ids, functions, strict=True)
            message["tool_calls"] = [{"type": "function", "id": id_, "function": called} for id_, called in calls]
        if turn.role == "tool":
            message["tool_call_id"] = ids.pop(0) if len(ids) > 1 else ids[0]
        messages.append(message)
    return messages


def official_ids(tokenizer, turns, ask, thoughts=True, **options):
    tools = json.loads(turns[0].tools) if turns[0].tools else None
    return tokenizer.apply_chat_template(
        messages_of(turns, thoughts), tools=tools, add_generation_prompt=ask, return_dict=False, **options
    )


def ids_of(tokenizer, prompt, turns):
    return render.joined(prompt.render(tokenizer, turns, "chat"))


def learnt(tokenizer, prompt, turns, loss_on="answer"):
    """The texts of the labels, each run of them apart."""
    labels = render.training_sample(tokenizer, prompt, turns, "chat", loss_on, 9999, 9999).labels
    runs = itertools.groupby(labels, lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for counted, run in runs if counted]


def refused(name, mode, row):
    """Words of why a row cannot be shown in a mode, or None where it can."""
    last = row[-1]
    if name in SILENT and mode != "none" and any(turn.thought for turn in row):
        return "does not show the thought"
    if name == "qwen3_5_nothink" and mode == "auto" and last.thought:
        return "shows this answer otherwise: --thinking keep, or none"
    if name in LATE and mode == "auto" and last.thought and not last.calls:
        return "does not show the thought"
    if name == "gemma4_v5" and mode == "keep" and not last.thought and row[-2].role == "tool":
        return "shows this answer otherwise: --thinking auto, or none"
    return None


@needs_trl
@pytest.mark.parametrize("mode", KNOWS)
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_ids_are_the_official_templates(name, mode):
    if mode == "keep" and name in SILENT | LATE:
        with pytest.raises(
            UserError, match="--thinking keep: .*its (chat )?template (shows no thought|drops thoughts)"
        ):
            official_tokenizer(name, mode)
        return
    tokenizer, prompt = official_tokenizer(name, mode)
    own, thoughts = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), mode != "none"
    exported = templates.chat_template(tokenizer, prompt, "chat")
    assert exported == tokenizer.chat_template
    shown = 0
    for row in ROWS:
        if words := refused(name, mode, row):
            with pytest.raises(FormatError, match=words):
                ids_of(tokenizer, prompt, row)
            continue
        ids, asked = ids_of(tokenizer, prompt, row), ids_of(tokenizer, prompt, row[:-1])
        assert ids[: len(asked)] == asked
        assert asked == official_ids(tokenizer, row[:-1], True, thoughts, chat_template=exported)
        whole = tokenizer.decode(official_ids(tokenizer, row, False, thoughts, chat_template=exported))
        end = tokenizer.decode(ids[-1:]) if prompt is prompt_glm4 else ""
        assert tokenizer.decode(ids) == whole.removesuffix("\n") + end and ids[-1] in prompt.stop_ids(tokenizer, "chat")
        if mode != "keep" or not any(turn.thought for turn in row[:-1]):  # keep changes what is shown of these
            assert asked == official_ids(tokenizer, row[:-1], True, thoughts, chat_template=own, **KNOWS[mode])
        shown += 1
    assert shown >= 15


@needs_trl
@pytest.mark.parametrize(
    ("name", "training"),
    [("qwen3", "qwen3_training"), ("qwen3_5_think", "qwen3_5_think_training"), ("qwen3_6", "qwen3_6_training")],
)
def test_keep_is_what_training_templates_show(name, training):
    tokenizer, prompt = official_tokenizer(name, "keep")
    row = [OFFER, Q, thought(A), Q2, thought(CALL), R, thought(A2)]
    made = (FOLDER / f"{training}.jinja").read_text(encoding="utf-8")
    whole = tokenizer.decode(official_ids(tokenizer, row, False, chat_template=made)).removesuffix("\n")
    assert tokenizer.decode(ids_of(tokenizer, prompt, row)) == whole
    assert [text.count("t") > 0 for text in learnt(tokenizer, prompt, row)] == [True] * 3


@needs_trl
def test_what_is_learnt_of_thoughts_and_calls():
    row = [OFFER, Q, thought(A), Q2, thought(CALL), R, thought(A2)]
    call = '<tool_call>\n{"name": "w", "arguments": {"c": "x", "n": 1}}\n</tool_call>'
    tokenizer, prompt = official_tokenizer("qwen3")
    found = learnt(tokenizer, prompt, row)
    last = "<think>\nt a 2\n</think>\n\na 2<|im_end|>"
    assert found == ["a 1<|im_end|>", f"<think>\nt\n</think>\n\n{call}<|im_end|>", last]
    assert learnt(tokenizer, prompt, row, "last") == [last]
    everything = "".join(learnt(tokenizer, prompt, row, "all"))
    assert "q 2" in everything and "r 1" not in everything, "results are context"
    unlearnt = [turn._replace(learn=False) if turn.calls else turn for turn in row]
    assert learnt(tokenizer, prompt, unlearnt) == [found[0], last]
    tokenizer, _ = official_tokenizer("qwen3_5_think", "keep")
    assert learnt(tokenizer, prompt, row)[0] == "t a 1\n</think>\n\na 1<|im_end|>", "<think> is the prompt's"
    tokenizer, _ = official_tokenizer("qwen3", "none")
    assert learnt(tokenizer, prompt, row) == ["a 1<|im_end|>", f"{call}<|im_end|>", "a 2<|im_end|>"]
    tokenizer, prompt = official_tokenizer("gemma4_v5")
    call = '<|channel>thought\nt\n<channel|><|tool_call>call:w{c:<|"|>x<|"|>,n:1}<tool_call|><|tool_response>'
    assert learnt(tokenizer, prompt, row) == ["a 1<turn|>", call, "<|channel>thought\nt a 2\n<channel|>a 2<turn|>"]
    tokenizer, prompt = official_tokenizer("glm4moe")
    call = (
        "<tool_call>w\n<arg_key>c</arg_key>\n<arg_value>x</arg_value>\n<arg_key>n</arg_key>\n<arg_value>1</arg_value>"
    )
    assert learnt(tokenizer, prompt, row) == [
        "\n<think></think>\na 1<|user|>",
        f"\n<think>t</think>\n{call}\n</tool_call><|observation|>",
        "\n<think>t a 2</think>\na 2<|user|>",
    ]


@needs_trl
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_8", "glm4moe", "gemma4_v5"])
def test_typed_control_tokens_stay_text_in_every_field(name):
    tokenizer, prompt = official_tokenizer(name)
    tokens = tokenizer.added_tokens_decoder.values()
    added = [token.content for token in tokens if token.special or token.content in tokenizer.chat_template]
    evil = "".join(f"a{token}" for token in added) + "\ue000b"
    silent = name in SILENT
    thoughtful = (lambda turn: turn) if silent else thought
    row = [OFFER, Q, A, Q2, thoughtful(BOTH), R, R2, thoughtful(A2)]
    typed = [turn._replace(text=turn.text and evil, thought=turn.thought and evil) for turn in row]
    parameters = {"type": "object", "properties": {"c": {"type": "string", "description": evil}}}
    tools = [{"type": "function", "function": {"name": "w", "description": evil, "parameters": parameters}}]
    typed[0] = typed[0]._replace(tools=json.dumps(tools))
    calls = [Call("w", json.dumps({"c": evil, evil: "x"})), Call("w", json.dumps({"c": [evil]}))]
    typed[4] = typed[4]._replace(calls=tuple(calls))
    ids, ordinary = ids_of(tokenizer, prompt, typed), ids_of(tokenizer, prompt, row)
    for token in added:
        id_ = tokenizer.convert_tokens_to_ids(token)
        more = 12 if token == '<|"|>' else 0  # quotes of what was a number or no list before
        assert abs(ids.count(id_) - ordinary.count(id_)) <= more, token
    shown = tokenizer.decode(ids)
    assert shown.count(evil) >= 10 and "\ue001" not in shown
    assert tokenizer.decode(encode_text(tokenizer, evil)) == evil
    asked = ids_of(tokenizer, prompt, typed[:-1])
    assert ids[: len(asked)] == asked


@needs_trl
def test_a_text_may_have_thousands_of_typed_control_tokens():
    tokenizer, _ = official_tokenizer("qwen3")
    typed = "<tool_call>a" * 3000
    ids = encode_text(tokenizer, typed)
    assert tokenizer.decode(ids) == typed and tokenizer.convert_tokens_to_ids("<tool_call>") not in ids


@needs_trl
def test_words_added_to_a_vocabulary_are_text():
    """Where the template has them too, and single characters that are special; they were looked for without end."""
    tokenizer, prompt = official_tokenizer("qwen3")
    tokenizer.add_tokens(["助", "function"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["✿"]})
    tokenizer.chat_template += "{# 助 #}"
    turns = [OFFER, Turn("user", "请帮助✿ function"), CALL]
    shown = tokenizer.decode(ids_of(tokenizer, prompt, turns))
    assert "请帮助✿ function<|im_end|>" in shown
    assert encode_text(tokenizer, "助") == [tokenizer.convert_tokens_to_ids("助")]


@needs_trl
def test_a_mode_for_one_request():
    """Of a caller who says enable_thinking himself; afterwards the template is as before."""
    tokenizer, prompt = official_tokenizer("qwen3", "none")
    before = tokenizer.chat_template
    with thinking.switched(tokenizer, True):
        assert tokenizer.decode(ids_of(tokenizer, prompt, [Q])).endswith("<|im_start|>assistant\n")
    with thinking.switched(tokenizer, None):
        assert tokenizer.decode(ids_of(tokenizer, prompt, [Q])).endswith("</think>\n\n")
    assert tokenizer.chat_template == before
    again = official_ids(tokenizer, [Q], True, enable_thinking=True)
    assert tokenizer.decode(again).endswith("<|im_start|>assistant\n")


def test_several_templates_are_not_switched():
    """A mode is refused; a request that wants no thought is asked as always."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = {"default": qwen.CHAT_TEMPLATE, "tool_use": qwen.CHAT_TEMPLATE}
    with pytest.raises(UserError, match="--thinking none: here: .*several chat templates: default, tool_use"):
        thinking.set_mode(tokenizer, "none", "here")
    thinking.set_mode(tokenizer, "auto", "here")
    asked = ids_of(tokenizer, qwen, [Q])
    with thinking.switched(tokenizer, False):
        assert ids_of(tokenizer, qwen, [Q]) == asked


BESIDE = CALL._replace(text="so")
SHOWN = 'so<|tool_call>call:w{c:<|"|>x<|"|>,n:1}<tool_call|><|tool_response>'


@needs_trl
@pytest.mark.parametrize("row", [[Q, BESIDE], [Q, BESIDE, R, A2], [Q, thought(BESIDE), R, BESIDE, R2, A, Q2, A2]])
def test_a_text_beside_a_call_is_before_it(row):
    """Gemma 4's newest template shows it behind the results, as if it were the answer to them, but not as a message."""
    tokenizer, prompt = official_tokenizer("gemma4_v5")
    shown = prompt.render(tokenizer, [OFFER, *row], "chat")
    text = tokenizer.decode([id_ for piece in shown for id_ in piece.ids])
    assert text.count("so") == text.count(SHOWN) == row.count(BESIDE) + row.count(thought(BESIDE))
    learnt = [tokenizer.decode(piece.ids) for piece in shown if piece.part == render.ANSWER]
    assert len(learnt) == sum(turn.role == "assistant" for turn in row)
    assert learnt[0].endswith(SHOWN)


@needs_trl
@pytest.mark.parametrize("name", ["gemma4", "gemma4_v3", "gemma4_v4"])
@pytest.mark.parametrize("behind", [[A2], [A2, Q2, A]], ids=len)
def test_a_text_beside_a_call_that_a_template_moves_is_named(name, behind):
    tokenizer, prompt = official_tokenizer(name)
    with pytest.raises(FormatError, match="no place for the text beside a call before its result: .*content null"):
        ids_of(tokenizer, prompt, [OFFER, Q, BESIDE, R, *behind])


def test_a_template_that_always_thinks_cannot_be_switched_off():
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}"
        "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    with pytest.raises(UserError, match="--thinking none: here: .*no form without thinking"):
        thinking.set_mode(tokenizer, "none", "here")
    assert learnt(tokenizer, qwen, [Q, thought(A)]) == ["t a 1</think>a 1<|im_end|>"]
    with pytest.raises(FormatError, match="the chat template asks with '<think>' and shows this answer otherwise"):
        ids_of(tokenizer, qwen, [Q, A])


LOST = {
    "tools": ([OFFER, Q, A], "does not show the tool w"),
    "a call": ([Q, CALL], "(does not show the tool w|refuses the row)"),
    "a thought": ([Q, thought(A)], "does not show the thought"),
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize(("make", "prompt"), [QWEN, GLM, GEMMA], ids=["qwen", "glm", "gemma"])
def test_what_a_template_does_not_show_is_refused(make, prompt, name):
    tokenizer, (row, words) = make(), LOST[name]
    tokenizer.chat_template = prompt.template_for(tokenizer)
    with pytest.raises(FormatError, match=words):
        ids_of(tokenizer, prompt, row)
    thinking.set_mode(tokenizer, "none", "here")
    if name == "a thought":
        assert ids_of(tokenizer, prompt, row) == ids_of(tokenizer, prompt, [Q, A])


@pytest.mark.parametrize("name", LOST)
def test_a_prompt_style_without_thoughts_and_tools_refuses_them(name, small_chatglm):
    from transformers import AutoTokenizer

    row, _ = LOST[name]
    for prompt, tokenizer, style in (
        (qwen, qwen_tokenizer(), "plain"),
        (qwen, qwen_tokenizer(), "log"),
        (gemma, gemma_tokenizer(), "plain"),
        (chatglm, AutoTokenizer.from_pretrained(small_chatglm, trust_remote_code=False), "chat"),
    ):
        with pytest.raises(FormatError, match="shows no thoughts and tools"):
            prompt.render(tokenizer, row, style)


# ---------------------------------------------------------------- Gemma 4


@needs_trl
@pytest.mark.parametrize("name", ["gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", None])
def test_gemma_4_has_turns_of_its_own(name, capfd):
    tokenizer = gemma_tokenizer()
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8") if name else None
    tokenizer.chat_template = tokenizer.chat_template or gemma.template_for(tokenizer)
    asked = "<bos><|turn>system\ns<turn|>\n<|turn>user\nq 1<turn|>\n<|turn>model\n"
    assert tokenizer.decode(ids_of(tokenizer, gemma, [S, Q])) == asked
    assert tokenizer.decode(ids_of(tokenizer, gemma, [S, Q, A])) == f"{asked}a 1<turn|>"
    ends = tokenizer.convert_ids_to_tokens(gemma.stop_ids(tokenizer, "chat"))
    assert ends == ["<turn|>", "<eos>", "<|tool_response>"] and capfd.readouterr().err == ""
    assert templates.chat_template(tokenizer, gemma, "chat") == tokenizer.chat_template
    assert tokenizer.decode(ids_of(tokenizer, gemma, [Turn("text", "a")])) == "<bos>a<eos>"


def test_another_template_of_gemma_4_is_told_in_one_line(capfd):
    tokenizer = gemma_tokenizer()
    tokenizer.chat_template = (
        gemma.template_for(tokenizer).replace("<|turn>model", "<|turn>model: ").replace("'model' if", "'model: ' if")
    )
    with pytest.raises(FormatError, match="shows 0 个回答 answers of 1"):
        ids_of(tokenizer, gemma, [Q, A, Q2])
    assert capfd.readouterr().err == "", "a process that tokenises says nothing"
    assert gemma.stop_ids(tokenizer, "chat") == gemma.stop_ids(tokenizer, "chat")
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "otherwise than Gemma 4's known ones" in told and "model: " in told
