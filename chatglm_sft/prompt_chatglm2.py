"""ChatGLM2's prompt, the only place that knows it: training, chat, evaluation and service render through `render`.

    chat  [gMASK]sop[Round 1]\n\n问：{question}\n\n答：{answer}</s>
          [gMASK]sop[Round 1]\n\n问：{question}\n\n答：{answer}\n\n[Round 2]\n\n问：…\n\n答：{answer}</s>

[gMASK] and sop are put there as ids: written in a text they are ordinary characters. The text that asks is encoded as
one, and the answer apart from it, so that SentencePiece puts its blank before each. No </s> stands behind an answer of
an earlier round, so that a sequence teaches only its last answer. ChatGLM2 has no system role: a system text is put
before the first question with an empty line between.
Source: `get_prefix_tokens` and `build_prompt` of tokenization_chatglm.py, `process_response` of modeling_chatglm.py, in
THUDM/chatglm2-6b; ptuning/main.py of THUDM/ChatGLM2-6B, which trains prompt, answer and </s> so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatglm_sft.prompt import without_greeting
from common.conversation import through_template
from common.conversation.answer_form import TEXT_ALONE, AnswerForm
from common.conversation.family import Gguf
from common.conversation.render import ANSWER, CONTEXT, FRAME, QUESTION, Piece, encode_text, special_id
from common.conversation.turns import Turn, fold_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("chat",)
ONE_ANSWER = True
RECIPES = "chatglm_sft/ft_chatglm2"
MODEL_TYPES = ("chatglm2",)  # as chatglm_sft.prompt.kinds names what calls itself chatglm
ENGINES: dict[str, dict[str, str]] = {}  # besides transformers with the model of models/chatglm2, none has been run
UNTIED_ENGINES = UNTRIED_ENGINES = ()
GGUF: dict[str, Gguf] = {}
GGUF_WORDS: dict[tuple[str, bool], str] = {}
CHAT_TEMPLATE = (
    "[gMASK]sop{% set ns = namespace(before='', round=0) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.round = ns.round + 1 %}"
    "{% set question = ns.before + (message['content'].lstrip() if ns.before else message['content']) %}"
    "{{ '[Round ' ~ ns.round ~ ']\n\n问：' + question + '\n\n答：' }}{% set ns.before = '' %}"
    "{% elif not ns.round %}{% if message['role'] == 'system' %}"
    "{% set ns.before = ns.before + message['content'] | trim + '\n\n' %}"
    "{% else %}{% set ns.before = message['content'] | trim + '\n\n' + ns.before %}{% endif %}"
    "{% else %}{{ message['content'] + ('' if loop.last else '\n\n') }}{% endif %}{% endfor %}"
)
TRAINED_IN = "[[训练时间]]"
UNSETTLED = re.compile(r"\[\[?[训练时间]*\]?$")  # what may become TRAINED_IN


def template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for a tokenizer that has none."""
    return CHAT_TEMPLATE


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str) -> list[Piece]:
    """The Pieces of a conversation (Turns), in order: [gMASK] and sop, the prompt, and the answer if it is there."""
    start = Piece([special_id(tokenizer, "[gMASK]"), special_id(tokenizer, "sop")], FRAME)
    if turns[0].role == "text":
        return [start, _answer(tokenizer, turns[0])]
    through_template.wanted(tokenizer, turns, shows=False)
    turns = without_greeting(fold_system(turns))
    answered = [_answer(tokenizer, turns[-1])] if turns[-1].role == "assistant" else []
    asked = turns[: len(turns) - len(answered)]
    return [start, Piece(encode_text(tokenizer, prompt_text(asked)), QUESTION), *answered]


def prompt_text(turns: Sequence[Turn]) -> str:
    """The text that asks for the answer to `turns`, user and assistant in turn, the last one a question."""
    text = ""
    for number, turn in enumerate(turns):
        text += f"{turn.text}\n\n" if number % 2 else f"[Round {number // 2 + 1}]\n\n问：{turn.text}\n\n答："
    return text


def stop_ids(tokenizer: PreTrainedTokenizerBase, style: str) -> list[int]:
    """Ids that end an answer; ValueError where the tokenizer is no ChatGLM2's."""
    for token in ("[gMASK]", "sop"):
        special_id(tokenizer, token)
    return [tokenizer.eos_token_id]


def answer_form(tokenizer: PreTrainedTokenizerBase, style: str) -> AnswerForm:
    """An answer is text: ChatGLM2 knows neither thought nor tools."""
    return TEXT_ALONE


def clean(text: str, ended: bool = True) -> str:
    """An answer as the original's chat shows it: [[训练时间]] is a year.

    Until the answer has `ended`, its last characters are kept back where what follows could change them.
    """
    if not ended:
        text = UNSETTLED.sub("", text)
    return text.strip().replace(TRAINED_IN, "2023年")


def _answer(tokenizer: PreTrainedTokenizerBase, turn: Turn) -> Piece:
    return Piece([*encode_text(tokenizer, turn.text), tokenizer.eos_token_id], ANSWER if turn.learn else CONTEXT)
