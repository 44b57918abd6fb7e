"""GLM-4's prompt, the only place that knows it: training, chat, evaluation and service render through `render`.

    chat  [gMASK]<sop><|system|>\n{system}<|user|>\n{question}<|assistant|>\n{answer}<|user|>
                                      (one text; the line is broken here to be read)

No token ends an answer: the next turn's own does. The last answer of a row ends with <|user|> too, so that it is
learnt. Between two rounds it is there once: it ends the answer and begins the question.

Models that think (GLM-4.5 and later), and conversations with thoughts or tools, are rendered by the tokenizer's own
template, which ends a prompt with <|assistant|>; without thinking (--thinking none) that of

    GLM-4.5, 4.6  {question}/nothink<|assistant|>\n<think></think>\n{answer}
    GLM-4.7       <|user|>{question}<|assistant|></think>{answer}             (no newlines)

Source: the chat templates of THUDM/GLM-4-9B-0414, glm-4-9b-chat-hf, zai-org/GLM-4.5-Air and GLM-4.7. GLM-4's ends a
prompt with <|assistant|> and shows its newline with the answer; here the newline belongs to the prompt.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from common.conversation import through_template
from common.conversation.answer_form import (
    NO_MARKS,
    AnswerForm,
    Parameters,
    call_of,
    knows,
    own_template,
    typed_call,
)
from common.conversation.family import Gguf
from common.conversation.render import ANSWER, CONTEXT, FRAME, QUESTION, Piece, encode_text, frame_ids, special_id
from common.conversation.thinking import leaves_out, switches, thinks
from common.conversation.through_template import Marks
from common.conversation.turns import Call, Turn
from common.launch import rank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("chat",)
ONE_ANSWER = False
RECIPES = "chatglm_sft/ft_glm4"
MODEL_TYPES = ("glm", "glm4", "glm4_moe", "glm4_moe_lite")
ENGINES = {"glm4": {"llama.cpp": ""}, "glm": {"llama.cpp": ""}}  # what gave transformers' text from an export
UNTIED_ENGINES = ("llama.cpp",)
UNTRIED_ENGINES = ()
GGUF = {"glm4": Gguf("glm4"), "glm": Gguf("chatglm")}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GGUF_WORDS = {(WORDS, False): "chatglm-bpe", (WORDS, True): "glm4"}
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}"
    "{% if message['role'] != 'user' or loop.first or loop.previtem['role'] != 'assistant' %}"
    "{{ '<|' + message['role'] + '|>' }}{% endif %}{{ '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|user|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ENDS = ("<|user|>", "<|observation|>", "<|endoftext|>")  # of an answer, the trained one first
ANSWERS = Marks(
    begin=re.compile(r"<\|assistant\|>"),
    end=re.compile("|".join(map(re.escape, ENDS))),
    last="<|user|>",
    last_call="<|observation|>",
    thought=("<think>", "</think>"),
)
CONTROL = re.compile(r"(\[gMASK\]|<sop>|<\|\w+\|>)")
PROBE = [("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "Q")]
FORM = re.compile(  # what PROBE is in the templates known here
    r"(?P<start>(?:\[gMASK\]<sop>)?)<\|system\|>\nS<\|user\|>\nQ<\|assistant\|>\nA<\|user\|>\nQ"
    r"(?:<\|assistant\|>.*)?",  # some ask without being told to
    re.DOTALL,
)
SWITCH = "/nothink"  # behind each question where a template is asked not to think
START, ASK = "[gMASK]<sop>", "<|assistant|>\n"  # before everything, before an answer


# of calls
BARE = re.compile(r"[\w.-]* ?(\n(\{.*)?)?", re.ASCII | re.DOTALL)  # what every beginning of those without marks is
ARGUMENT = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


def template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for a tokenizer that has none."""
    return CHAT_TEMPLATE


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str) -> list[Piece]:
    """The Pieces of a conversation (Turns), in order; after a question comes the header that asks for an answer.

    Each answer's last id is one of `stop_ids`. Typed control tokens stay text.
    """
    start = Piece(_ids(tokenizer, _start(tokenizer)), FRAME)
    if turns[0].role == "text":
        return [start, Piece([*encode_text(tokenizer, turns[0].text), special_id(tokenizer, ENDS[-1])], ANSWER)]
    if through_template.wanted(tokenizer, turns, shows=True):
        return through_template.pieces(tokenizer, _without_switch(tokenizer, turns), ANSWERS)
    roles = ["", *(turn.role for turn in turns)]
    pieces = (_turn(tokenizer, turn, before) for turn, before in zip(turns, roles, strict=False))
    return [start, *(piece for turn in pieces for piece in turn)]


def stop_ids(tokenizer: PreTrainedTokenizerBase, style: str) -> list[int]:
    """Ids that end an answer, the trained one first; ValueError where a token of the template is none here."""
    for token in ("<|system|>", *CONTROL.findall(_start(tokenizer) + ASK)):
        special_id(tokenizer, token)
    _tell_form(tokenizer)
    known = tokenizer.get_vocab()
    return [special_id(tokenizer, token) for token in ENDS if token != "<|observation|>" or token in known]


def answer_form(tokenizer: PreTrainedTokenizerBase, style: str) -> AnswerForm:
    """Thought and marked calls of GLM-4.5 and later; before, an answer is a tool's name with its arguments below."""
    thought, call = ANSWERS.thought, ("<tool_call>", "</tool_call>")
    template = own_template(tokenizer)
    marked = call[0] in template
    return AnswerForm(
        thought=thought if knows(tokenizer, thought[0]) else NO_MARKS,
        call=call if marked else NO_MARKS,
        read_calls=read_marked_call if marked else read_bare_calls if "tools" in template else None,
        bare=None if marked else BARE,
        tokens=(*thought, *call, *ARGUMENT),
        switch=switches(tokenizer),
    )


def read_marked_call(text: str, parameters: Parameters) -> Sequence[Call]:
    """The call between its marks: a name, then pairs of <arg_key> and <arg_value>."""
    name, mark, rest = text.partition(ARGUMENT[0])
    if not name.strip() or PAIR.sub("", mark + rest).strip():
        return ()
    return [typed_call(name.strip(), dict(PAIR.findall(mark + rest)), parameters)]


def read_bare_calls(text: str, parameters: Parameters) -> Sequence[Call]:
    """The calls that a whole answer is, each a name on offer and a JSON object on the next line."""
    calls = []
    while text := text.strip():
        name, _, text = text.partition("\n")
        if name.strip() not in parameters or not text.startswith("{"):
            return ()
        arguments, end = json.JSONDecoder().raw_decode(text)
        calls.append(call_of(name.strip(), arguments))
        text = text[end:]
    return calls


def clean(text: str, ended: bool = True) -> str:
    """An answer as it is shown: as generated."""
    return text.strip()


def _turn(tokenizer: PreTrainedTokenizerBase, turn: Turn, before: str) -> list[Piece]:
    """The Pieces of a turn after one of the role `before`, "" for none; the end of an answer begins the next turn."""
    ask = _ids(tokenizer, ASK)
    if turn.role == "assistant":
        header = [] if before == "user" else [Piece(ask, CONTEXT)]  # of a greeting
        # encoded apart from its header, with which a prompt ends: asked and trained ids are the same
        ids = [*encode_text(tokenizer, turn.text), special_id(tokenizer, ENDS[0])]
        return [*header, Piece(ids, ANSWER if turn.learn else CONTEXT)]
    token = [] if before == "assistant" else [special_id(tokenizer, f"<|{turn.role}|>")]
    # newline and text are encoded as one, as in the official template's text: a text's own newlines join the header's
    said = [*token, *encode_text(tokenizer, f"\n{turn.text}")]
    return [Piece(said, FRAME)] if turn.role == "system" else [Piece(said, QUESTION), Piece(ask, FRAME)]


def _without_switch(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns without the switch that a template which is not to think puts there: who has typed it gets it once."""
    if not leaves_out(tokenizer):
        return turns
    return [turn._replace(text=turn.text.removesuffix(SWITCH)) if turn.role == "user" else turn for turn in turns]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text of the template, its control tokens as ids."""
    ids: list[int] = []
    for part in CONTROL.split(text):
        ids += [special_id(tokenizer, part)] if CONTROL.fullmatch(part) else frame_ids(tokenizer, part)
    return ids


def _start(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before everything: some templates have nothing there."""
    found = _form(tokenizer)
    return found["start"] if found else START


@lru_cache(maxsize=8)
def _form(tokenizer: PreTrainedTokenizerBase) -> re.Match[str] | None:
    """PROBE as the tokenizer's own template shows it, where that is GLM-4's form; None where it is not."""
    messages = [{"role": role, "content": text} for role, text in PROBE]
    try:
        return FORM.fullmatch(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # raise_exception in a template, or no template
        return None


@lru_cache(maxsize=8)
def _tell_form(tokenizer: PreTrainedTokenizerBase) -> None:
    """Say in one line on stderr where the tokenizer's template is not of GLM-4's form and does not think."""
    if tokenizer.chat_template and _form(tokenizer) is None and not thinks(tokenizer) and not rank():
        print(
            f"{tokenizer.name_or_path}: 聊天模板与这里的不同 its chat template shows a conversation otherwise than "
            f"it is trained and asked here: {START}<|user|>\\n…<|assistant|>\\n…<|user|>",
            file=sys.stderr,
        )
