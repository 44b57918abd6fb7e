"""ChatGLM-6B's prompt, the only place that knows it: training, chat, evaluation and service render through `render`.

    chat   {question}[gMASK]<sop>{answer}<eop>                                          without history
           [Round 0]\n问：{question}\n答：{answer}\n[Round 1]\n问：{question}\n答：[gMASK]<sop>{answer}<eop>

[gMASK] and <sop> are put there as ids: written in a text they are ordinary characters. Everything before <sop> sees
itself in both directions, so that a sequence can teach only its last answer. ChatGLM has no system role: a system text
is put before the first question with an empty line between. It has no thoughts and no tools.
Source: `build_prompt`, `stream_chat` and `process_response` of THUDM/chatglm-6b, as described in FACTS of its port.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatglm_sft.models import CHATGLM2_FIELDS
from common.conversation import through_template
from common.conversation.answer_form import TEXT_ALONE, AnswerForm
from common.conversation.family import Gguf
from common.conversation.render import ANSWER, CONTEXT, FRAME, QUESTION, Piece, encode_text
from common.conversation.turns import Turn, fold_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("chat",)
ONE_ANSWER = True
RECIPES = "chatglm_sft/ft_chatglm"
MODEL_TYPES = ("chatglm",)
ENGINES: dict[str, dict[str, str]] = {}  # besides transformers with the model of this folder, nothing runs it
UNTIED_ENGINES = UNTRIED_ENGINES = ()
GGUF: dict[str, Gguf] = {}
GGUF_WORDS: dict[tuple[str, bool], str] = {}
CHAT_TEMPLATE = (  # the prompt's text; calling the tokenizer on it adds [gMASK] and <sop>
    "{% set ns = namespace(system='', greeting='', round=0, asked=false) %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] | trim + '\n\n' %}"
    "{% elif message['role'] == 'user' %}{% set ns.asked = true %}{% set before = ns.greeting + ns.system %}"
    "{% set question = before + (message['content'].lstrip() if before else message['content']) %}"
    "{% if messages | selectattr('role', 'equalto', 'user') | list | length > 1 %}"
    "{{ '[Round ' ~ ns.round ~ ']\n问：' + question + '\n答：' }}"
    "{% else %}{{ question }}{% endif %}{% set ns.system = '' %}{% set ns.greeting = '' %}"
    "{% elif not ns.asked %}{% set ns.greeting = message['content'] | trim + '\n\n' %}"
    "{% elif not loop.last %}{{ message['content'] + '\n' }}{% set ns.round = ns.round + 1 %}{% endif %}{% endfor %}"
)


def template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for a tokenizer that has none."""
    return CHAT_TEMPLATE


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str) -> list[Piece]:
    """The Pieces of a conversation (Turns), in order: the prompt, [gMASK] and <sop>, and the answer if it is there."""
    ask = Piece([tokenizer.gmask_token_id, tokenizer.bos_token_id], FRAME)
    if turns[0].role == "text":
        return [ask, _answer(tokenizer, turns[0].text)]
    through_template.wanted(tokenizer, turns, shows=False)
    turns = without_greeting(fold_system(turns))
    last = turns[-1]
    answered = [_answer(tokenizer, last.text, last.learn)] if last.role == "assistant" else []
    asked = turns[: len(turns) - len(answered)]
    return [Piece(encode_text(tokenizer, prompt_text(asked)), QUESTION), ask, *answered]


def prompt_text(turns: Sequence[Turn]) -> str:
    """The text that asks for the answer to `turns`, user and assistant in turn, the last one a question."""
    if len(turns) == 1:
        return turns[0].text
    text = ""
    for number, turn in enumerate(turns):
        text += f"{turn.text}\n" if number % 2 else f"[Round {number // 2}]\n问：{turn.text}\n答："
    return text


def stop_ids(tokenizer: PreTrainedTokenizerBase, style: str) -> list[int]:
    """Ids that end an answer; ValueError where the tokenizer is no ChatGLM's."""
    if not hasattr(tokenizer, "gmask_token_id"):
        raise ValueError("分词器没有 the tokenizer has no gmask_token_id")
    return [tokenizer.eos_token_id]


def answer_form(tokenizer: PreTrainedTokenizerBase, style: str) -> AnswerForm:
    """An answer is text: ChatGLM-6B knows neither thought nor tools."""
    return TEXT_ALONE


def clean(text: str, ended: bool = True) -> str:
    """An answer as the original's chat shows it: punctuation beside Chinese is full-width, [[训练时间]] is a year.

    Until the answer has `ended`, its last characters are kept back where what follows could change them.
    """
    if not ended:
        text = UNSETTLED.sub("", text)
    text = text.strip().replace("[[训练时间]]", "2023年")
    return HALF_WIDTH.sub(lambda found: FULL_WIDTH[found[0]], text)


def without_greeting(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns with a greeting before the first question, an empty line between: a round begins with a question."""
    if turns[0].role != "assistant":
        return turns
    greeting, first, *rest = turns
    return [first._replace(text=f"{greeting.text.strip()}\n\n{first.text.lstrip()}"), *rest]


def kinds(config: dict, template: str | None) -> tuple[str, ...]:
    """Which generations of ChatGLM a config.json may be of, as MODEL_TYPES name them: all three say "chatglm".

    The second and the third are one architecture, and told apart by the name that the published config.json keeps, or
    by the tokenizer's own chat template, where it has one.
    """
    if not CHATGLM2_FIELDS & config.keys():
        return MODEL_TYPES
    hints = f"{config.get('_name_or_path')} {template}".lower()
    second, third = (any(hint in hints for hint in told) for told in (("chatglm2", "[round"), ("chatglm3", "<|user|>")))
    return ("chatglm2", "chatglm3") if second == third else ("chatglm2",) if second else ("chatglm3",)


def _answer(tokenizer: PreTrainedTokenizerBase, text: str, learn: bool = True) -> Piece:
    return Piece([*encode_text(tokenizer, text), tokenizer.eos_token_id], ANSWER if learn else CONTEXT)


FULL_WIDTH = dict(zip(",!:;?", "，！：；？", strict=True))
HALF_WIDTH = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
UNSETTLED = re.compile(r"(\[\[?[训练时间]*\]?|[,!:;?])$")
