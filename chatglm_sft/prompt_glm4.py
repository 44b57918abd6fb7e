"""GLM-4's prompt, the only place that knows it: training, chat, evaluation and service render through `render`.

    chat  [gMASK]<sop><|system|>\n{system}<|user|>\n{question}<|assistant|>\n{answer}<|user|>
                                      (one text; the line is broken here to be read)

No token ends an answer: the next turn's own does. The last answer of a row ends with <|user|> too, so that it is
learnt. Between two rounds it is there once: it ends the answer and begins the question.

Models that think have other constants around the same turns; those of their template's form without thinking are taken:

    GLM-4.5, 4.6  {question}/nothink<|assistant|>\n<think></think>\n{answer}
    GLM-4.7       <|user|>{question}<|assistant|></think>{answer}             (no newlines)

Source: the chat templates of THUDM/GLM-4-9B-0414, glm-4-9b-chat-hf, zai-org/GLM-4.5-Air and GLM-4.7. They end a
prompt with <|assistant|> and show its newline with the answer; here the newline belongs to the prompt.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from common.conversation.family import Gguf
from common.conversation.render import ANSWER, CONTEXT, FRAME, QUESTION, Piece, encode_text, frame_ids, special_id
from common.conversation.turns import Turn
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
CONTROL = re.compile(r"(\[gMASK\]|<sop>|<\|\w+\|>|</?think>|/nothink)")
PROBE = [("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "Q")]
FORM = re.compile(  # what PROBE is in the templates known here, without thinking
    r"(?P<start>(?:\[gMASK\]<sop>)?)<\|system\|>(?P<newline>\n?)S<\|user\|>(?P=newline)Q(?P<switch>(?:/nothink)?)"
    r"(?P<ask><\|assistant\|>(?:\n|\n<think></think>\n|</think>))A<\|user\|>(?P=newline)Q(?P=switch)"
    r"(?:<\|assistant\|>.*)?",  # some ask without being told to
    re.DOTALL,
)


class Form(NamedTuple):
    """The constant texts around the turns."""

    start: str = "[gMASK]<sop>"  # before everything
    newline: str = "\n"  # between the token of system or user and what is said
    switch: str = ""  # behind a question
    ask: str = "<|assistant|>\n"  # before an answer


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str) -> list[Piece]:
    """The Pieces of a conversation (Turns), in order; after a question comes the header that asks for an answer.

    Each answer's last id is one of `stop_ids`. Typed control tokens stay text.
    """
    form = _form(tokenizer) or Form()
    start = Piece(_ids(tokenizer, form.start), FRAME)
    if turns[0].role == "text":
        return [start, Piece([*encode_text(tokenizer, turns[0].text), special_id(tokenizer, ENDS[-1])], ANSWER)]
    roles = ["", *(turn.role for turn in turns)]
    pieces = (_turn(tokenizer, form, turn, before) for turn, before in zip(turns, roles, strict=False))
    return [start, *(piece for turn in pieces for piece in turn)]


def stop_ids(tokenizer: PreTrainedTokenizerBase, style: str) -> list[int]:
    """Ids that end an answer, the trained one first; ValueError where a token of the template is none here."""
    form = _form(tokenizer) or Form()
    for token in ("<|system|>", *CONTROL.findall(form.start + form.switch + form.ask)):
        special_id(tokenizer, token)
    _tell_form(tokenizer)
    known = tokenizer.get_vocab()
    return [special_id(tokenizer, token) for token in ENDS if token != "<|observation|>" or token in known]


def clean(text: str, ended: bool = True) -> str:
    """An answer as it is shown: as generated."""
    return text.strip()


def _turn(tokenizer: PreTrainedTokenizerBase, form: Form, turn: Turn, before: str) -> list[Piece]:
    """The Pieces of a turn after one of the role `before`, "" for none; the end of an answer begins the next turn."""
    ask = _ids(tokenizer, form.ask)
    if turn.role == "assistant":
        header = [] if before == "user" else [Piece(ask, CONTEXT)]  # of a greeting
        text = turn.text.strip() if "think" in form.ask else turn.text  # as those templates do
        # encoded apart from its header, with which a prompt ends: asked and trained ids are the same
        ids = [*encode_text(tokenizer, text), special_id(tokenizer, ENDS[0])]
        return [*header, Piece(ids, ANSWER if turn.learn else CONTEXT)]
    token = [] if before == "assistant" else [special_id(tokenizer, f"<|{turn.role}|>")]
    # newline and text are encoded as one, as in the official template's text: a text's own newlines join the header's
    if turn.role == "system":
        return [Piece([*token, *encode_text(tokenizer, form.newline + turn.text)], FRAME)]
    text = turn.text.removesuffix(form.switch)  # who has typed it there gets it once, as in those templates
    said = [*token, *encode_text(tokenizer, form.newline + text), *_ids(tokenizer, form.switch)]
    return [Piece(said, QUESTION), Piece(ask, FRAME)]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text of the template, its control tokens as ids."""
    ids: list[int] = []
    for part in CONTROL.split(text):
        ids += [special_id(tokenizer, part)] if CONTROL.fullmatch(part) else frame_ids(tokenizer, part)
    return ids


@lru_cache(maxsize=8)
def _form(tokenizer: PreTrainedTokenizerBase) -> Form | None:
    """The Form of the tokenizer's own template, without thinking, GLM-4's where it has none; None: none known here."""
    if tokenizer.chat_template is None:
        return Form()
    messages = [{"role": role, "content": text} for role, text in PROBE]
    try:
        shown = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    except Exception:  # raise_exception in a template
        return None
    found = FORM.fullmatch(shown)
    return Form(**found.groupdict()) if found else None


@lru_cache(maxsize=8)
def _tell_form(tokenizer: PreTrainedTokenizerBase) -> None:
    """Say in one line on stderr where the tokenizer's template is of no form known here."""
    if _form(tokenizer) is None and not rank():
        print(
            f"{tokenizer.name_or_path}: 聊天模板与这里的不同 its chat template shows a conversation otherwise than "
            f"it is trained and asked here: {Form().start}<|user|>\\n…<|assistant|>\\n…<|user|>",
            file=sys.stderr,
        )
