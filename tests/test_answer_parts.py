"""Generated text as thought, text and calls: every form, cut at every place, from ids to OpenAI's client."""

import contextlib
import importlib.util
import itertools
import json
import time
from pathlib import Path

import glm4
import openai
import pytest
import torch
from conftest import CHARACTERS
from test_chat_templates import needs_trl, official_tokenizer
from transformers import GemmaConfig, GemmaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from chatglm_sft import prompt as chatglm_prompt
from chatglm_sft import prompt_glm4
from common.conversation.answer_form import TEXT_ALONE, tools_of
from common.conversation.turns import Call, FormatError, Turn
from common.data.formats import read_row
from common.engine import sampling as engine_sampling
from common.engine.batcher import Batcher
from common.errors import UserError
from common.inference import remote
from common.inference.answer_parts import Parts, Reading, Thought, asked_open
from common.inference.answerer import Answerer, Sampling
from common.inference.text import Wording, decode
from common.serving import openai_requests
from common.serving.app import Service, create_app
from common.serving.openai_messages import read_messages
from common.serving.server import Server
from gemma_sft import make_embedded as make_gemma
from gemma_sft import prompt as gemma_prompt
from qwen2_sft import make_embedded as make_qwen
from qwen2_sft import prompt as qwen_prompt

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "查询",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "more": {"type": "object"}},
                "required": ["city"],
            },
        },
    }
    for name in ("get_weather", "get_time")
]
OFFERED = json.dumps(TOOLS, ensure_ascii=False)
WEATHER = Call("get_weather", '{"city": "北京", "days": 3}')
TIME = Call("get_time", '{"city": "7"}')  # a text that reads as a number
NESTED = Call(
    "get_weather", '{"city": "a\\nb \\"c\\" {,:}", "more": {"list": [1, true, null, "是"], "deep": {"x": 1.5}}}'
)
# templates that show tools, thoughts and calls, such as the official ones do
OFFERS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n' }}OFFERS{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages if m.role != 'system' or m.content %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>\n' }}{{ c.function | tojson }}{{ '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
).replace("OFFERS", OFFERS)
GEMMA4 = (
    "{{ bos_token }}{% if tools %}{{ '<start_of_turn>system\n' }}OFFERS{{ '<end_of_turn>\n' }}{% endif %}"
    "{% for m in messages if m.role != 'system' or m.content %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    "{# <|channel> <|tool_call> enable_thinking #}"
).replace("OFFERS", OFFERS)
GLM45 = glm4.GLM45.replace("<sop>", "<sop>{% if tools %}<|system|>\n" + OFFERS + "{% endif %}{# <tool_call> #}")
GLM4 = glm4.PLAIN + "{# tools #}"


def qwen_tokenizer(template=QWEN3):
    tokenizer = make_qwen.make_tokenizer(CHARACTERS)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    return tokenizer


def gemma_tokenizer():
    tokenizer = make_gemma.make_tokenizer(CHARACTERS)
    marks = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>']
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>", *marks]})
    tokenizer.chat_template = GEMMA4
    return tokenizer


FAMILIES = {  # prompt module, tokenizer
    "qwen": (qwen_prompt, qwen_tokenizer),
    "gemma": (gemma_prompt, gemma_tokenizer),
    "glm45": (prompt_glm4, lambda: glm4.make_tokenizer(CHARACTERS, GLM45)),
    "glm4": (prompt_glm4, lambda: glm4.make_tokenizer(CHARACTERS, GLM4)),
}


@pytest.fixture(scope="module")
def forms():
    return {name: prompt.answer_form(make(), "chat") for name, (prompt, make) in FAMILIES.items()}


def xml(call):
    pairs = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in arguments(call).items()]
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in pairs)
    return f"<tool_call>\n<function={call.name}>\n{inside}</function>\n</tool_call>"


def glm(call, newline="\n"):
    pairs = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in arguments(call).items()]
    inside = "".join(
        f"<arg_key>{key}</arg_key>{newline}<arg_value>{value}</arg_value>{newline}" for key, value in pairs
    )
    return f"<tool_call>{call.name}{newline}{inside}</tool_call>"


def gemma(call):
    return f"<|tool_call>call:{call.name}{gemma_value(arguments(call))}<tool_call|>"


def gemma_value(value):
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma_value, value)) + "]"
    return f'<|"|>{value}<|"|>' if isinstance(value, str) else json.dumps(value)


def as_json(call):
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'


def arguments(call):
    return json.loads(call.arguments)


BOTH = (WEATHER, TIME)
ANSWERS = [  # form, prompt ends within a thought, text, thought, text, calls
    ("qwen", False, "你好", "", "你好", ()),
    ("qwen", False, "<think>\n想一想\n\n再想\n</think>\n\n你好", "想一想\n\n再想", "你好", ()),
    ("qwen", False, " \n<think>\n\n</think>\n\n你好", "", "你好", ()),
    ("qwen", True, "想\n</think>\n\n你好", "想", "你好", ()),
    ("qwen", True, "想 < 2 </thin", "想 < 2 </thin", "", ()),
    ("qwen", False, "<think>\n没有完", "没有完", "", ()),
    ("qwen", False, "<thin", "", "<thin", ()),
    ("qwen", False, "标记是 <think> 和 </think>", "", "标记是 <think> 和 </think>", ()),
    ("qwen", True, "想</think>标记是 <think>x</think>", "想", "标记是 <think>x</think>", ()),
    ("qwen", False, as_json(WEATHER), "", "", (WEATHER,)),
    ("qwen", False, f"好的\n{as_json(WEATHER)}\n{as_json(NESTED)}", "", "好的", (WEATHER, NESTED)),
    ("qwen", False, f"<think>\n想\n</think>\n\n查\n\n{xml(WEATHER)}\n{xml(TIME)}", "想", "查", BOTH),
    ("qwen", False, xml(NESTED), "", "", (NESTED,)),
    ("qwen", False, xml(Call("get_time", "{}")), "", "", (Call("get_time", "{}"),)),
    ("qwen", False, f"{as_json(WEATHER)}\n再见", "", "再见", (WEATHER,)),
    ("qwen", False, as_json(WEATHER)[:-3], "", as_json(WEATHER)[:-3], ()),
    ("qwen", False, f"{as_json(WEATHER)}\n{as_json(TIME)[:20]}", "", as_json(TIME)[:20], (WEATHER,)),
    ("qwen", False, '<tool_call>\n{"name": 乱}\n</tool_call>', "", '<tool_call>\n{"name": 乱}\n</tool_call>', ()),
    *(
        ("qwen", False, f"<tool_call>{body}</tool_call>", "", f"<tool_call>{body}</tool_call>", ())
        for body in (
            '{"name": "f", "arguments": {"c": "\\ud83d"}}',
            '{"name": "\\ud83d", "arguments": {}}',
            '{"name": "f", "arguments": {"c": NaN}}',
        )
    ),
    ("qwen", False, "<tool_call>[1]</tool_call>好", "", "<tool_call>[1]</tool_call>好", ()),
    ("qwen", False, "<tool_call>" + "[" * 9000 + "</tool_call>", "", "<tool_call>" + "[" * 9000 + "</tool_call>", ()),
    (
        "qwen",
        False,
        "<tool_call>\n<function=f>乱</function>\n</tool_call>",
    )
    + ("",)
    + ("<tool_call>\n<function=f>乱</function>\n</tool_call>", ()),
    ("gemma", False, "<|channel>thought\n想\n<channel|>你好", "想", "你好", ()),
    ("gemma", False, "<|channel>thought\n<channel|>你好", "", "你好", ()),
    ("gemma", True, "想\n<channel|>你好", "想", "你好", ()),
    ("gemma", False, f"<|channel>thought\n想\n<channel|>{gemma(WEATHER)}{gemma(TIME)}", "想", "", BOTH),
    ("gemma", False, gemma(NESTED), "", "", (NESTED,)),
    ("gemma", False, "<|tool_call>call:f{a:}<tool_call|>", "", "<|tool_call>call:f{a:}<tool_call|>", ()),
    ("gemma", False, "<|tool_call>call:f{", "", "<|tool_call>call:f{", ()),
    ("glm45", False, "\n<think>想</think>\n你好", "想", "你好", ()),
    ("glm45", False, f"\n<think></think>\n查\n{glm(WEATHER)}\n{glm(TIME)}", "", "查", BOTH),
    ("glm45", True, f"想</think>{glm(NESTED, '')}", "想", "", (NESTED,)),
    ("glm45", False, "<tool_call></tool_call>", "", "<tool_call></tool_call>", ()),
    ("glm45", False, "<tool_call>f\n<arg_key>a</tool_call>", "", "<tool_call>f\n<arg_key>a</tool_call>", ()),
    ("glm4", False, "你好", "", "你好", ()),
    ("glm4", False, 'get_weather\n{"city": "北京", "days": 3}', "", "", (WEATHER,)),
    ("glm4", False, f"get_weather \n{WEATHER.arguments}\nget_time\n{TIME.arguments}\n", "", "", BOTH),
    ("glm4", False, 'other\n{"city": "北京"}', "", 'other\n{"city": "北京"}', ()),
    ("glm4", False, 'get_weather\n{"city": "北京"', "", 'get_weather\n{"city": "北京"', ()),
    ("glm4", False, 'get_weather\n{"city": "北京"} 好', "", 'get_weather\n{"city": "北京"} 好', ()),
    ("glm4", False, "Hello, world", "", "Hello, world", ()),
    ("glm4", False, "Hello", "", "Hello", ()),
]
IDS = [f"{name} {text[:24]!r}{number}" for number, (name, _, text, *_) in enumerate(ANSWERS)]


def parts_of(text, opened, form, tools=""):
    return Reading(form, opened, tools).more(text, ended=True)


def added(parts):
    """(thought, text as it is shown, calls) of Parts that came one after the other."""
    calls = tuple((call.name, arguments(call)) for part in parts for call in part.calls)
    return "".join(part.thought for part in parts), "".join(part.text for part in parts).strip(), calls


@pytest.mark.parametrize(("name", "opened", "text", "thought", "said", "calls"), ANSWERS, ids=IDS)
def test_the_parts_however_the_text_is_cut(forms, name, opened, text, thought, said, calls):
    expected = thought, said, tuple((call.name, arguments(call)) for call in calls)
    assert added([parts_of(text, opened, forms[name], OFFERED)]) == expected
    places = range(len(text) + 1) if len(text) < 999 else range(0, len(text), 500)
    for cut in places:
        reading = Reading(forms[name], opened, OFFERED)
        assert added([*map(reading.more, (text[:cut], text[cut:])), reading.more("", ended=True)]) == expected, cut
    if len(text) < 999:
        reading = Reading(forms[name], opened, OFFERED)
        assert added([*map(reading.more, text), reading.more("", ended=True)]) == expected


def test_a_thought_comes_as_it_is_thought(forms):
    reading = Reading(forms["qwen"])
    assert [reading.more(part) for part in ("<think>", "\n想", "一想", "\n", "</think>", "\n\n", "好")] == [
        *[Parts(thought=part) for part in ("", "想", "一想", "", "")],
        Parts(text="\n\n"),
        Parts(text="好"),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_tools_on_offer_a_call_is_text(forms, name):
    for text in (as_json(WEATHER), gemma(WEATHER), glm(WEATHER), f"get_weather\n{WEATHER.arguments}"):
        assert parts_of(text, False, forms[name]) == Parts(text=text)


def test_tools_of_any_shape_are_on_offer(forms):
    """OpenAI's, functions alone, and what is neither."""
    odd = json.dumps(
        [TOOLS[0], {"name": "get_time", "parameters": {"properties": []}}, 7, {"function": None}, {"name": [1]}]
    )
    assert parts_of(f"get_time\n{TIME.arguments}", False, forms["glm4"], odd).calls == (TIME,)
    assert parts_of(xml(TIME), False, forms["qwen"], odd).calls == (Call("get_time", '{"city": 7}'),), "no schema"


def test_a_family_without_marks_reads_nothing(tokenizer):
    """The embedded tokenizers, ChatGLM's, and every style but chat."""
    assert chatglm_prompt.answer_form(tokenizer, "chat") == TEXT_ALONE
    plain = {gemma_prompt: tokenizer, qwen_prompt: make_qwen.make_tokenizer(CHARACTERS)}
    for prompt, made in plain.items():
        assert Answerer(Scripted([]), made, prompt, "chat", 64).reading([1, 2], OFFERED) is None
    for prompt, make in (FAMILIES["qwen"], FAMILIES["gemma"]):
        assert prompt.answer_form(make(), "plain") == TEXT_ALONE


def test_the_switch_is_one_that_changes_the_prompt(forms):
    assert {name: form.switch for name, form in forms.items()} == {
        "qwen": True,
        "gemma": False,  # named in its template, and without effect
        "glm45": True,
        "glm4": False,
    }
    refusing = qwen_tokenizer("{{ raise_exception('no') if enable_thinking else '' }}<tool_call>")
    assert not qwen_prompt.answer_form(refusing, "chat").switch


def test_a_prompt_that_ends_within_a_thought(forms):
    for name, ends in {
        "qwen": ("<think>\n", "<think>"),
        "gemma": ("<|channel>thought\n",),
        "glm45": ("<think>",),
    }.items():
        prompt, make = FAMILIES[name]
        made = make()
        for end in ends:
            ids = made.encode(f"问 {end}", add_special_tokens=False)
            assert asked_open(made, forms[name], ids)
            closed = made.encode(f"问 {end}{forms[name].thought[1]}\n\n", add_special_tokens=False)
            assert not asked_open(made, forms[name], closed)
    assert not asked_open(qwen_tokenizer(), TEXT_ALONE, [1, 2])


TRL = importlib.util.find_spec("trl")
OFFICIAL = {
    "qwen2_5": "qwen",
    "qwen3": "qwen",
    "qwen3_instruct_2507": "qwen",
    "qwen3_5_think": "qwen",
    "qwen3_8": "qwen",
    "gemma4_v5": "gemma",
    "glm4moe": "glm45",
}


@pytest.mark.skipif(TRL is None, reason="trl, which has copies of the official templates, is not installed")
@pytest.mark.parametrize("calls", [(), (WEATHER,), BOTH, (NESTED,)], ids=len)
@pytest.mark.parametrize("name", OFFICIAL)
def test_what_official_templates_write_is_read(name, calls):
    prompt, make = FAMILIES[OFFICIAL[name]]
    made = make()
    made.chat_template = (Path(TRL.origin).parent / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    form = prompt.answer_form(made, "chat")
    thinks = name not in ("qwen2_5", "qwen3_instruct_2507")
    functions = [{"type": "function", "function": {"name": c.name, "arguments": arguments(c)}} for c in calls]
    answer = {"role": "assistant", "content": "好的", "tool_calls": functions}
    question = {"role": "user", "content": "天气"}
    thought = {"reasoning_content": "想一想"} if thinks else {}
    whole = made.apply_chat_template([question, answer | thought], tools=TOOLS, tokenize=False)
    asked = made.apply_chat_template([question], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert whole.startswith(asked)
    written = whole[len(asked) :]
    for end in ("<|im_end|>\n", "<turn|>\n", "<|tool_response>"):
        written = written.removesuffix(end)
    opened = bool(form.thought[0]) and asked.rstrip().endswith(form.thought[0])
    expected = "想一想" if thinks else "", "好的", tuple((call.name, arguments(call)) for call in calls)
    assert added([parts_of(written, opened, form, OFFERED)]) == expected
    assert form.switch is thinks and form.read_calls is not None


# --- ids ------------------------------------------------------------------------------------------------------------


class Scripted:
    """A net whose `generate` says given ids, one at a time."""

    device = torch.device("cpu")

    def __init__(self, ids):
        self.ids = ids

    def generate(self, input_ids, streamer=None, **kwargs):
        for ids in [input_ids, *(torch.tensor([id_]) for id_ in self.ids)]:
            if streamer:
                streamer.put(ids)
        return torch.cat([input_ids, torch.tensor([self.ids])], dim=1)


ASKED = [Turn("system", "", tools=OFFERED), Turn("user", "天气")]
WRITTEN = {
    "qwen": f"<think>\n想\n</think>\n\n查\n{as_json(WEATHER)}",
    "gemma": f"<|channel>thought\n想\n<channel|>查{gemma(WEATHER)}",
    "glm45": f"\n<think>想</think>\n查\n{glm(WEATHER)}",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_ids_become_parts_streamed_and_whole(name):
    """Marks that are special tokens, which decode leaves out, are there to be read."""
    prompt, make = FAMILIES[name]
    made = make()
    ids = made.encode(WRITTEN[name], add_special_tokens=False)
    answer = Answerer(Scripted(ids), made, prompt, "chat", 999)
    (whole,) = answer([ASKED], Sampling(max_new_tokens=len(ids)))
    assert (whole.thought, whole.text, [call.name for call in whole.calls]) == ("想", "查", ["get_weather"])
    assert arguments(whole.calls[0]) == arguments(WEATHER) and not whole.unanswered
    parts = list(answer.stream(ASKED, Sampling()))
    assert "".join(part.text for part in parts if isinstance(part, Thought)) == "想"
    assert "".join(part for part in parts if isinstance(part, str)) == "查"
    assert [part for part in parts if isinstance(part, Call)] == list(whole.calls)
    (cut,) = Answerer(
        Scripted(ids[: ids.index(made.encode("想", add_special_tokens=False)[-1]) + 1]), made, prompt, "chat", 999
    )([ASKED], Sampling())
    assert (cut.thought, cut.text, cut.unanswered) == ("想", "", True)


def test_marks_are_kept_where_decode_leaves_them_out():
    made = gemma_tokenizer()
    answer = Answerer(Scripted([]), made, gemma_prompt, "chat", 64)
    text = f"{gemma(WEATHER)}<end_of_turn>问"
    ids = made.encode(text, add_special_tokens=False)
    assert decode(made, ids, answer.kept) == text.replace("<end_of_turn>", "")
    assert '<|"|>' not in decode(made, ids)
    words, shown = Wording(made, kept=answer.kept), ""
    for id_ in ids:
        words.ids.append(id_)
        shown += words.more()
    assert shown + words.more(ended=True) == decode(made, ids, answer.kept)


def test_a_character_of_private_use_stays_in_arguments_alone():
    """Such a character hides control tokens from the template, but never one that is there."""
    made = qwen_tokenizer()
    turns = [Turn("user", "天气"), Turn("assistant", "", calls=(Call("f", '{"c": "\ue000"}'),))]
    ids = [id_ for piece in qwen_prompt.render(made, turns, "chat") for id_ in piece.ids]
    assert '{"c": "\ue000"}' in made.decode(ids)


# --- HTTP -----------------------------------------------------------------------------------------------------------


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}


@contextlib.contextmanager
def serving(net, made, prompt):
    """(Batcher, Service, openai client, url) of a model."""
    batcher = Batcher(Answerer(net, made, prompt, "chat", 999), {"base": None})
    service = Service("m", "base", batcher)
    server = Server(create_app(service), "127.0.0.1", 0, 24)
    api = openai.OpenAI(base_url=server.address + "/v1", api_key="-", max_retries=0, timeout=60)
    yield batcher, service, api, server.address
    api.close()
    server.close()
    batcher.close()


@pytest.fixture(scope="module")
def served():
    """A small Qwen with the tokens of Qwen3."""
    made = qwen_tokenizer()
    with serving(Qwen2ForCausalLM(Qwen2Config(vocab_size=len(made), **SMALL)), made, qwen_prompt) as found:
        yield found


def scripted(monkeypatch, batcher, text, end=True):
    """Every answer is this text from now on."""
    ids = batcher.tokenizer.encode(text, add_special_tokens=False) + [batcher.answer.stop_ids[0]] * end
    monkeypatch.setattr(engine_sampling, "next_ids", lambda logits, rows: [ids[len(row.ids)] for row in rows])


@pytest.fixture
def says(served, monkeypatch):
    """says(text): every answer is this text from now on."""
    return lambda text, end=True: scripted(monkeypatch, served[0], text, end)


QUESTION = [{"role": "user", "content": "天气"}]
SAID = f"<think>\n想一想\n</think>\n\n查\n{as_json(WEATHER)}\n{xml(TIME)}"


def chat(api, messages=QUESTION, **fields):
    return api.chat.completions.create(model="base", messages=messages, max_tokens=512, **fields)


def functions_of(calls):
    return [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls]


CALLED = [("function", call.name, arguments(call)) for call in BOTH]


def test_an_answer_that_calls(served, says):
    says(SAID)
    found = chat(served[2], tools=TOOLS)
    (choice,) = found.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "查")
    assert choice.message.reasoning_content == "想一想" and functions_of(choice.message.tool_calls) == CALLED
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2 and all(id_.startswith("call_") for id_ in ids)
    assert found.usage.completion_tokens == len(served[0].tokenizer.encode(SAID, add_special_tokens=False))
    says(as_json(WEATHER))
    (choice,) = chat(served[2], tools=TOOLS).choices
    assert choice.message.content is None and len(choice.message.tool_calls) == 1


def test_an_answer_that_calls_streamed(served, says):
    says(SAID)
    *chunks, last = chat(served[2], tools=TOOLS, stream=True, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "查"
    thoughts = [thought for delta in deltas if (thought := getattr(delta, "reasoning_content", None))]
    assert "".join(thoughts) == "想一想" and len(thoughts) > 1, "as it is thought"
    calls = list(itertools.chain(*(delta.tool_calls or [] for delta in deltas)))
    assert [call.index for call in calls] == [0, 1] and functions_of(calls) == CALLED
    assert len({call.id for call in calls}) == 2
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]
    assert last.usage.completion_tokens == len(served[0].tokenizer.encode(SAID, add_special_tokens=False))


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}], ids=["none offered", "forbidden"])
def test_calls_nobody_asked_for_are_text(served, says, fields):
    says(as_json(WEATHER))
    (choice,) = chat(served[2], **fields).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert choice.message.content == as_json(WEATHER)


def test_a_call_that_is_cut_off_is_text(served, says):
    says(as_json(WEATHER)[:30])
    (choice,) = chat(served[2], tools=TOOLS).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", as_json(WEATHER)[:30])
    says(f"<think>\n想一想{'想' * 99}", end=False)
    found = served[2].chat.completions.create(model="base", messages=QUESTION, max_tokens=40).choices[0]
    assert (found.finish_reason, found.message.content) == (
        "length",
        "",
    ) and "想一想想" in found.message.reasoning_content


def test_stop_strings_are_of_the_text(served, says):
    says("<think>\n想。再想\n</think>\n\n一。二")
    (choice,) = chat(served[2], stop="。").choices
    assert (choice.message.reasoning_content, choice.message.content) == ("想。再想", "一")


def test_raw_completions_are_as_generated(served, says):
    says(SAID)
    found = served[2].completions.create(model="base", prompt="天气", max_tokens=512)
    assert found.choices[0].text == SAID
    says("好<|im_start|>的")
    for fields, text in (({}, "好的"), ({"extra_body": {"skip_special_tokens": False}}, "好<|im_start|>的")):
        found = served[2].completions.create(model="base", prompt="天气", max_tokens=9, **fields)
        assert found.choices[0].text == text


def test_log_probabilities_are_of_all_that_was_generated(served, says):
    says(SAID)
    found = chat(served[2], tools=TOOLS, logprobs=True)
    whole = [entry.token for entry in found.choices[0].logprobs.content]
    assert len(whole) == found.usage.completion_tokens and {"<think>", "</think>", "<tool_call>"} <= set(whole)
    chunks = chat(served[2], tools=TOOLS, logprobs=True, stream=True)
    assert [entry.token for chunk in chunks for entry in chunk.choices[0].logprobs.content] == whole


def test_the_old_route_gives_thought_apart(served, says):
    client = create_app(served[1]).test_client()
    for text, expected in {
        "<think>\n想\n</think>\n\n好": {"text": "好", "reasoning_content": "想"},
        "<think>\n\n</think>\n\n好": "好",
        "好": "好",
    }.items():
        says(text)
        assert client.post("/nlg/text_generate", json={"instruction": "天气"}).json == expected


def test_what_a_template_refuses_is_named_on_the_old_route(served):
    question = "".join(map(chr, range(0xE000, 0xE100)))
    found = create_app(served[1]).test_client().post("/nlg/text_generate", json={"instruction": question})
    assert (found.status_code, found.json["error"]["param"]) == (400, "instruction")
    assert "U+E0FF" in found.json["error"]["message"]


def test_arguments_have_no_escapes(served, says, asked):
    """What a template shows of them is what a search in the turns finds."""
    says("好")
    chat(served[2], [*QUESTION, calling(("a", Call("f", '{"c":"\\ue000"}'))), tool_message("a", "晴")], tools=TOOLS)
    assert asked[0][0][2].calls == (Call("f", '{"c": "\ue000"}'),)


def test_a_log_that_holds_text_holds_all_of_it(served, says, caplog, monkeypatch):
    monkeypatch.setattr(served[1], "log_text", True)
    says(SAID)
    with caplog.at_level("INFO", "service"):
        chat(served[2], tools=TOOLS)
        for _ in range(500):
            if told := [line for record in caplog.records if "texts" in (line := json.loads(record.message))]:
                break  # the line of an earlier test's request may come before it
            time.sleep(0.01)
    assert told[0]["texts"] == [SAID]


@pytest.fixture
def asked(served, monkeypatch):
    """[(turns, thinking)] of the prompts that were encoded."""
    found, encoder = [], served[0].encoder

    def whole_ids(turns, thinking=None):
        found.append((list(turns), thinking))
        return [1, 2, 3]

    monkeypatch.setattr(encoder, "whole_ids", whole_ids)
    return found


def tool_message(id_, text):
    return {"role": "tool", "tool_call_id": id_, "content": text}


def calling(*calls, **fields):
    functions = [
        {"id": id_, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for id_, call in calls
    ]
    return {"role": "assistant", "content": None, "tool_calls": functions} | fields


CALLING = calling(("a", WEATHER), ("b", TIME), reasoning_content="想")
RESULTS = [tool_message("b", "七点"), tool_message("a", [{"type": "text", "text": "晴"}])]


def test_a_round_of_calls_as_turns(served, says, asked):
    """Results stand in the order of their calls, whatever order they came in."""
    says("晴")
    chat(served[2], [{"role": "system", "content": "简短"}, *QUESTION, CALLING, *RESULTS], tools=TOOLS)
    rounds = [Turn("assistant", "", thought="想", calls=BOTH), Turn("tool", "晴"), Turn("tool", "七点")]
    assert asked == [([Turn("system", "简短", tools=OFFERED), Turn("user", "天气"), *rounds], None)]
    assert tools_of(asked[0][0]) == OFFERED
    last = [{"role": "assistant", "content": "晴"}, {"role": "user", "content": "再见"}]
    chat(served[2], [*QUESTION, CALLING, *RESULTS, *last])
    assert asked[1][0] == [Turn("user", "天气"), *rounds, Turn("assistant", "晴"), Turn("user", "再见")]


@pytest.mark.parametrize("text", ["<think>\n想\n</think>\n\n好", "好 <think>想</think>", "<think>想"])
def test_a_thought_in_a_text_is_one_as_in_a_file(forms, text):
    """Half a thought, an error in a file, stays text: an answer that was cut off may be sent back."""
    row = [*QUESTION, {"role": "assistant", "content": text}, *QUESTION]
    sent = read_messages(row, forms["qwen"])
    if "</think>" in text:
        (filed,) = read_row({"messages": [*row, {"role": "assistant", "content": "是"}]}).conversations
        assert sent == list(filed[:-1])
        assert sent[1].thought == ("想" if text[0] == "<" else "")
    else:
        assert sent[1] == Turn("assistant", text)
    assert read_messages(row)[1] == Turn("assistant", text), "of a model that does not think"


def test_a_thought_that_differs_from_its_field_is_named(served):
    client = create_app(served[1]).test_client()
    answer = {"role": "assistant", "content": "<think>想</think>好", "reasoning_content": "又想"}
    found = client.post("/v1/chat/completions", json={"messages": [*QUESTION, answer, *QUESTION]})
    assert (found.status_code, found.json["error"]["param"]) == (400, "messages[1].content")
    assert "two thoughts of one answer" in found.json["error"]["message"]


def test_tools_on_offer_as_turns(served, says, asked):
    says("好")
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    chat(served[2], tools=strict, tool_choice="auto")
    assert asked[0][0] == [Turn("system", "", tools=json.dumps(TOOLS[:1], ensure_ascii=False)), Turn("user", "天气")]
    chat(served[2], tools=TOOLS, tool_choice="none")
    assert asked[1][0] == [Turn("user", "天气")]


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({}, None),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {}}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": False}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": None}, None),
    ],
)
def test_thinking_is_switched_by_a_request(served, says, asked, fields, thinking):
    says("好")
    chat(served[2], extra_body=fields)
    assert asked == [(asked[0][0], thinking)]


def test_a_tool_may_have_a_chinese_name(served, says, asked):
    """As in a file that was trained on."""
    says(as_json(Call("查天气", "{}")))
    (choice,) = chat(served[2], tools=[{"type": "function", "function": {"name": "查天气"}}]).choices
    call = choice.message.tool_calls[0]
    assert call.function.name == "查天气"
    chat(served[2], [*QUESTION, calling((call.id, Call("查天气", "{}"))), tool_message(call.id, "晴")])
    assert asked[1][0][1].calls == (Call("查天气", "{}"),)


def test_messages_that_a_template_refuses(served, monkeypatch):
    def refuse(turns, thinking=None):
        raise FormatError("template", "模板不接受 the template takes no such turns")

    monkeypatch.setattr(served[0].encoder, "whole_ids", refuse)
    with pytest.raises(openai.BadRequestError) as caught:
        chat(served[2], tools=TOOLS)
    assert caught.value.param == "messages" and "takes no such turns" in str(caught.value)


def test_a_conversation_that_a_template_refuses(monkeypatch):
    def refuse(tokenizer, turns, style):
        raise FormatError("template", "模板不接受 the template takes no such turns")

    answer = Answerer(Scripted([]), qwen_tokenizer(), qwen_prompt, "chat", 64)
    monkeypatch.setattr(qwen_prompt, "render", refuse)
    with pytest.raises(UserError, match="takes no such turns"):
        answer([ASKED], Sampling())


def test_a_model_that_always_thinks_cannot_be_told_not_to(served, says, monkeypatch):
    opened = served[0].tokenizer.encode("问<think>\n", add_special_tokens=False)
    monkeypatch.setattr(served[0].encoder, "whole_ids", lambda turns, thinking=None: opened)
    says("想</think>好")
    (choice,) = chat(served[2]).choices
    assert (choice.message.reasoning_content, choice.message.content) == ("想", "好")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(served[2], extra_body={"enable_thinking": False})
    assert caught.value.param == "enable_thinking" and "always thinks" in str(caught.value)


WRONG = {  # what is sent, the field to blame, a word of the reason
    "a choice that must call": ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", "auto"),
    "a named choice": ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "auto"),
    "one call at most": ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls", "leave it out"),
    "a tool that is none": ({"tools": [{"type": "retrieval"}]}, "tools[0]", "function"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "1 to 64"),
    "a tool with odd parameters": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters",
        "JSON schema",
    ),
    "tools that are no list": ({"tools": {"name": "f"}}, "tools", "list"),
    "no result": ({"messages": [*QUESTION, CALLING, RESULTS[0]]}, "messages[1].tool_calls", "'a'"),
    "no result before a question": (
        {"messages": [*QUESTION, CALLING, RESULTS[0], *QUESTION]},
        "messages[1].tool_calls",
        "'a'",
    ),
    "a result of nothing": ({"messages": [*QUESTION, RESULTS[0]]}, "messages[1].tool_call_id", "'b'"),
    "a result twice": (
        {"messages": [*QUESTION, CALLING, RESULTS[0], RESULTS[0]]},
        "messages[3].tool_call_id",
        "'b'",
    ),
    "a result without an id": (
        {"messages": [*QUESTION, CALLING, {"role": "tool", "content": "晴"}]},
        "messages[2].tool_call_id",
        "None",
    ),
    "calls with one id": (
        {"messages": [*QUESTION, calling(("a", WEATHER), ("a", TIME))]},
        "messages[1].tool_calls",
        "twice",
    ),
    "arguments that are no JSON": (
        {"messages": [*QUESTION, calling(("a", Call("f", "{")))]},
        "messages[1].tool_calls[0].function.arguments",
        "JSON object",
    ),
    "arguments with a number that is none": (
        {"messages": [*QUESTION, calling(("a", Call("f", '{"n": NaN}')))]},
        "messages[1].tool_calls[0].function.arguments",
        "JSON object",
    ),
    "arguments with half a character": (
        {"messages": [*QUESTION, calling(("a", Call("f", '{"c": "\\ud800"}'))), tool_message("a", "晴")]},
        "messages[1].tool_calls[0].function.arguments",
        "JSON object",
    ),
    "a tool with half a character": (
        {"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]},
        "tools",
        "half a character",
    ),
    "more characters of private use than one can hide": (
        {"messages": [{"role": "user", "content": "".join(map(chr, range(0xE000, 0xE100)))}]},
        "messages",
        "U+E0FF",
    ),
    "a thought that is no text": (
        {"messages": [*QUESTION, {"role": "assistant", "content": "好", "reasoning_content": [1]}, *QUESTION]},
        "messages[1].reasoning_content",
        "text",
    ),
    "another switch": (
        {"chat_template_kwargs": {"preserve_thinking": True}},
        "chat_template_kwargs",
        "preserve_thinking",
    ),
    "a switch both ways": (
        {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
        "enable_thinking",
        "different things",
    ),
    "an effort of no thinking": (
        {"enable_thinking": True, "reasoning_effort": "none"},
        "enable_thinking",
        "different things",
    ),
}


@pytest.mark.parametrize(("body", "param", "word"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(served, body, param, word):
    client = create_app(served[1]).test_client()
    found = client.post("/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 2} | body)
    error = found.json["error"]
    assert (found.status_code, error["param"]) == (400, param) and word in error["message"]
    assert "\n" not in error["message"] and any("\u4e00" <= char <= "\u9fff" for char in error["message"])


def test_tools_where_the_template_takes_none(small_gemma):
    from gemma_sft.ft_gemma import predict
    from gemma_sft.ft_gemma.config import Config

    answer = predict.load_answer(Config(path_model_pretrain=str(small_gemma), model_save_dir="/nowhere"), base=True)
    batcher = Batcher(answer, {"base": None})
    client = create_app(Service("m", "base", batcher)).test_client()
    for body, param in (
        ({"messages": QUESTION, "tools": TOOLS}, "tools"),
        ({"messages": [*QUESTION, CALLING, *RESULTS]}, "messages[1].tool_calls"),
        ({"messages": QUESTION, "chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ):
        found = client.post("/v1/chat/completions", json=body)
        assert (found.status_code, found.json["error"]["param"]) == (400, param)
        assert "leave it out" in found.json["error"]["message"]
    for effort in ("none", "high"):  # nothing to switch
        body = {"messages": QUESTION, "reasoning_effort": effort, "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    thought = [*QUESTION, {"role": "assistant", "content": "好", "reasoning_content": "想"}, *QUESTION]
    assert client.post("/v1/chat/completions", json={"messages": thought, "max_tokens": 2}).status_code == 200
    batcher.close()


def test_a_server_asked_by_predict_and_evaluation(served, says):
    batcher, _, _, url = served
    says(f"<think>\n想\n</think>\n\n查\n{as_json(WEATHER)}")
    there = remote.Remote(url + "/v1", batcher.tokenizer, qwen_prompt, "chat", 999)
    (found,) = there([ASKED], Sampling(max_new_tokens=256))
    assert (found.thought, found.text, found.calls) == ("想", "查", (WEATHER,))
    assert list(there.stream(ASKED, Sampling(max_new_tokens=256))) == [Thought("想"), "查", WEATHER]


def test_a_server_that_would_leave_the_marks_out(monkeypatch):
    """Gemma 4's are special tokens: it is asked for them."""
    made = gemma_tokenizer()
    net = GemmaForCausalLM(GemmaConfig(vocab_size=len(made), head_dim=16, **SMALL))
    with serving(net, made, gemma_prompt) as (batcher, _, _, url):
        bodies, read = [], openai_requests.read_completion
        monkeypatch.setattr(
            openai_requests, "read_completion", lambda body, *rest: bodies.append(body) or read(body, *rest)
        )
        scripted(monkeypatch, batcher, WRITTEN["gemma"])
        there = remote.Remote(url + "/v1", made, gemma_prompt, "chat", 999)
        (found,) = there([ASKED], Sampling(max_new_tokens=256))
    assert (found.thought, found.text, found.calls) == ("想", "查", (WEATHER,))
    assert [body["skip_special_tokens"] for body in bodies] == [False]


@needs_trl
@pytest.mark.parametrize("name", ["gemma4_v4", "gemma4_v5"])
def test_a_text_beside_a_call_may_be_sent_back(name, monkeypatch):
    """The prompt goes on where that answer ended; of earlier templates, which move the text, the line says the way."""
    made, _ = official_tokenizer(name)
    net = GemmaForCausalLM(GemmaConfig(vocab_size=len(made), head_dim=16, **SMALL))
    with serving(net, made, gemma_prompt) as (batcher, _, api, _):
        prompts, encode = [], batcher.encoder.whole_ids

        def whole_ids(*given, **more):
            prompts.append(encode(*given, **more))
            return prompts[-1]

        monkeypatch.setattr(batcher.encoder, "whole_ids", whole_ids)
        scripted(monkeypatch, batcher, WRITTEN["gemma"])
        message = chat(api, tools=TOOLS).choices[0].message
        assert message.content == "查" and message.tool_calls
        sent = [*QUESTION, message.model_dump(exclude_none=True), tool_message(message.tool_calls[0].id, "晴")]
        if name == "gemma4_v5":
            chat(api, sent, tools=TOOLS)
            first, second = map(made.decode, prompts)
            assert second.startswith(f"{first}{WRITTEN['gemma']}<|tool_response>response:get_weather")
            return
        with pytest.raises(openai.BadRequestError, match="without a text .content null."):
            chat(api, sent, tools=TOOLS)
        sent[1]["content"] = None
        chat(api, sent, tools=TOOLS)
