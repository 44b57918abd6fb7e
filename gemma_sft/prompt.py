"""Gemma's prompt, the only place that knows it: training, chat, evaluation and the service all render through `render`.

    chat        <bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{answer}<end_of_turn>
    plain, log  <bos>{question}{answer}<eos>          (log: what the logs of the first gemma-sft runs show)

Gemma 4, whose tokenizer has <|turn>, has a system role; it is rendered by the tokenizer's own template, with thoughts
and tools where there are any:

    chat  <bos><|turn>system\n{system}<turn|>\n<|turn>user\n{question}<turn|>\n<|turn>model\n{answer}<turn|>

Source of chat: the chat template in google/gemma-2b-it's tokenizer_config.json. That template refuses a system text;
here it is put before the first question with an empty line between, as Gemma 3's own template does. Of Gemma 4: the
templates of google/gemma-4-E2B-it and its sisters, which say the same of these turns in all their revisions.
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
    TEXT_ALONE,
    AnswerForm,
    Parameters,
    call_of,
    knows,
    own_template,
)
from common.conversation.family import Gguf
from common.conversation.render import ANSWER, CONTEXT, FRAME, QUESTION, Piece, encode_text, frame_ids, special_id
from common.conversation.thinking import switches
from common.conversation.through_template import Marks
from common.conversation.turns import Call, Turn, fold_system
from common.launch import rank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("chat", "log", "plain")
ONE_ANSWER = False
RECIPES = "gemma_sft/ft_gemma"
MODEL_TYPES = tuple(
    "gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text "
    "vaultgemma".split()
)
GGUF_ENGINES = {"llama.cpp": "", "ollama": ""}
ENGINES = {  # besides transformers, what gave its text from an exported folder, and the file it needs for that
    "gemma": GGUF_ENGINES | {"mlx": "", "ctranslate2": "", "onnx": "", "keras": "tokenizer.model"},
    "gemma2": GGUF_ENGINES,
    "gemma3_text": GGUF_ENGINES | {"mlx": "", "ctranslate2": "", "keras": ""},
    "gemma4_text": GGUF_ENGINES,
    "gemma4_unified_text": GGUF_ENGINES,
}
UNTRIED_ENGINES = ("vllm",)
UNTIED_ENGINES = ()  # of these, what runs a head of its own: vLLM refuses it, llama.cpp would drop it without a word
GGUF = {
    "gemma": Gguf("gemma", norm=1, tied=True),
    "gemma2": Gguf("gemma2", norm=1, period=2, wide=46, tied=True),
    "gemma3_text": Gguf("gemma3", norm=1, period=6, local=1e4, wide=62),
    "gemma4_text": Gguf("gemma4", mixed=True, no_lora=("per_layer_model_proj",)),
    "gemma4_unified_text": Gguf("gemma4", mixed=True),
}
GGUF_WORDS: dict[tuple[str, bool], str] = {}  # its words are not split
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] | trim + '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if message['role'] == 'user' %}{{ ns.system }}{% set ns.system = '' %}{% endif %}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

CHAT_TEMPLATE_4 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim + '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
ANSWERS = Marks(
    begin=re.compile(r"<start_of_turn>model\n"),
    end=re.compile(r"<end_of_turn>"),
    last="<end_of_turn>",
    last_call="<end_of_turn>",
    thought=("<think>", "</think>"),
)
ANSWERS_4 = Marks(  # after the results of its calls an answer goes on in the same turn
    begin=re.compile(r"<\|turn>model\n|<tool_response\|>(?!<\|tool_response>)"),
    end=re.compile(r"<turn\|>|<\|tool_response>"),
    last="<turn|>",
    last_call="<|tool_response>",
    thought=("<|channel>", "<channel|>"),
)
PROBE = [("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "Q")]
SHOWN_4 = (  # PROBE, and a generation prompt
    "<|turn>system\nS<turn|>\n<|turn>user\nQ<turn|>\n<|turn>model\nA<turn|>\n<|turn>user\nQ<turn|>\n<|turn>model\n"
)


def template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for a tokenizer that has none."""
    return CHAT_TEMPLATE_4 if _is_4(tokenizer) else CHAT_TEMPLATE


# of a call of Gemma 4
CALL = re.compile(r"\s*call:([^\s{]+)(\{.*\})\s*", re.DOTALL)
KEY = re.compile(r'(?<=[{,])([^\s{}\[\]",:]+):')
QUOTE = '<|"|>'


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str) -> list[Piece]:
    """The Pieces of a conversation (Turns), in order; after a question comes the header that asks for an answer.

    Exactly one bos, at the start. Each answer's last id is one of `stop_ids`. Typed control tokens stay text.
    """
    pieces = [Piece([tokenizer.bos_token_id], FRAME)]
    if turns[0].role == "text":
        return [*pieces, Piece([*encode_text(tokenizer, turns[0].text), tokenizer.eos_token_id], ANSWER)]
    new = style == "chat" and _is_4(tokenizer)
    if through_template.wanted(tokenizer, turns, shows=style == "chat") or new:
        return through_template.pieces(tokenizer, turns, ANSWERS_4 if new else ANSWERS)
    render_turn = _chat_turn if style == "chat" else _plain_turn
    *earlier, last = fold_system(turns)
    if style == "chat" and (earlier or [last])[0].role == "assistant":  # a greeting
        header = [special_id(tokenizer, "<start_of_turn>"), *frame_ids(tokenizer, "model\n")]
        pieces.append(Piece(header, CONTEXT))
    for turn in earlier:
        pieces += render_turn(tokenizer, turn, last=False)
    return pieces + render_turn(tokenizer, last, last=True)


def answer_form(tokenizer: PreTrainedTokenizerBase, style: str) -> AnswerForm:
    """Thought and calls of Gemma 4; those before it have none."""
    thought, call = ("<|channel>thought\n", "<channel|>"), ("<|tool_call>", "<tool_call|>")
    template = own_template(tokenizer)
    if style != "chat":
        return TEXT_ALONE
    return AnswerForm(
        thought=thought if knows(tokenizer, "<|channel>") else NO_MARKS,
        call=call,
        read_calls=read_calls if call[0] in template else None,
        tokens=("<|channel>", "<channel|>", *call, QUOTE),
        switch=switches(tokenizer),
    )


def read_calls(text: str, parameters: Parameters) -> Sequence[Call]:
    """The call between its marks: call:NAME{key:value,…}, JSON but for bare keys and QUOTE around a text."""
    found = CALL.fullmatch(text)
    if not found:
        return ()
    parts = found[2].split(QUOTE)  # texts are every other part
    as_json = "".join(json.dumps(part) if n % 2 else KEY.sub(r'"\1":', part) for n, part in enumerate(parts))
    return [call_of(found[1], json.loads(as_json))]


def clean(text: str, ended: bool = True) -> str:
    """An answer as it is shown: as generated."""
    return text.strip()


def stop_ids(tokenizer: PreTrainedTokenizerBase, style: str) -> list[int]:
    """Ids that end an answer, the trained one first."""
    if style != "chat":
        return [tokenizer.eos_token_id]
    if not _is_4(tokenizer):
        return [special_id(tokenizer, "<end_of_turn>"), tokenizer.eos_token_id]
    _tell_form(tokenizer)
    ends = [special_id(tokenizer, "<turn|>"), tokenizer.eos_token_id]
    calls = [special_id(tokenizer, "<|tool_response>")] if "<|tool_response>" in tokenizer.get_vocab() else []
    return list(dict.fromkeys([*ends, *calls]))


@lru_cache(maxsize=8)
def _is_4(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer is Gemma 4's."""
    return "<|turn>" in tokenizer.get_vocab()


@lru_cache(maxsize=8)
def _tell_form(tokenizer: PreTrainedTokenizerBase) -> None:
    """Say in one line on stderr where Gemma 4's template shows a conversation otherwise than those known here."""
    messages = [{"role": role, "content": text} for role, text in PROBE]
    try:
        shown = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as problem:  # raise_exception in a template
        shown = str(problem)
    if shown != f"{tokenizer.bos_token}{SHOWN_4}" and not rank():
        print(
            f"{tokenizer.name_or_path}: 聊天模板与已知的不同 its chat template shows a conversation otherwise than "
            f"Gemma 4's known ones; it is trained and asked as its own says: {shown[:200]!r}",
            file=sys.stderr,
        )


def _chat_turn(tokenizer: PreTrainedTokenizerBase, turn: Turn, last: bool) -> list[Piece]:
    start, end = special_id(tokenizer, "<start_of_turn>"), special_id(tokenizer, "<end_of_turn>")
    text = encode_text(tokenizer, turn.text.strip())
    if turn.role == "user":
        header = [start, *frame_ids(tokenizer, "user\n")]
        model = [end, *frame_ids(tokenizer, "\n"), start, *frame_ids(tokenizer, "model\n")]
        return [Piece(header, FRAME), Piece(text, QUESTION), Piece(model, FRAME)]
    answer = Piece([*text, end], ANSWER if turn.learn else CONTEXT)
    return [answer] if last else [answer, Piece([*frame_ids(tokenizer, "\n")], FRAME)]


def _plain_turn(tokenizer: PreTrainedTokenizerBase, turn: Turn, last: bool) -> list[Piece]:
    text = encode_text(tokenizer, turn.text)
    if turn.role == "user":
        return [Piece(text, QUESTION)]
    return [Piece([*text, tokenizer.eos_token_id], ANSWER if turn.learn else CONTEXT)]
