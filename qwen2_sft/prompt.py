"""Qwen's prompt (ChatML), the only place that knows it: training, chat, evaluation and service render through `render`.

    chat   <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n
           {answer}<|im_end|>            (one text; the line is broken here to be read)
    log    the same, but the newline after `assistant` belongs to the answer, as the logs of qwen1.5-sft show
    plain  {question}{answer}<|endoftext|>

Where the tokenizer's own template thinks, or a conversation has thoughts or tools, chat is what that template shows.

Source of chat: the chat template in Qwen/Qwen1.5-0.5B-Chat's tokenizer_config.json. The system text of a conversation
without one is what the tokenizer's own template puts there: Qwen2.5 has another than Qwen1.5, Qwen3 has none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from common.conversation import through_template
from common.conversation.answer_form import (
    NO_MARKS,
    TEXT_ALONE,
    AnswerForm,
    Parameters,
    json_calls,
    knows,
    own_template,
    typed_call,
)
from common.conversation.family import Gguf
from common.conversation.render import ANSWER, CONTEXT, FRAME, QUESTION, Piece, encode_text, frame_ids, special_id
from common.conversation.thinking import switches
from common.conversation.through_template import Marks
from common.conversation.turns import Call, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("chat", "log", "plain")
ONE_ANSWER = False
RECIPES = "qwen2_sft/ft_qwen2"
MODEL_TYPES = tuple(
    "qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen4_exp "
    "qwen4_exp_text".split()
)
GGUF_ENGINES = {"llama.cpp": "", "ollama": ""}
ENGINES = {  # besides transformers, what gave its text from an exported folder, and the file it needs for that
    "qwen2": GGUF_ENGINES | {"mlx": "", "ctranslate2": "", "keras": "", "onnx": "", "openvino": ""},
    "qwen2_moe": GGUF_ENGINES,
    "qwen3": GGUF_ENGINES | {"mlx": "", "ctranslate2": "", "keras": "", "onnx": "", "openvino": ""},
    "qwen3_moe": GGUF_ENGINES,
    "qwen3_5_text": GGUF_ENGINES,
    "qwen3_5_moe_text": GGUF_ENGINES,
}
UNTRIED_ENGINES = ("vllm",)
UNTIED_ENGINES = tuple(ENGINES["qwen2"])  # of these, what runs a head of its own: the larger Qwen have one
GGUF = {
    "qwen2": Gguf("qwen2"),
    "qwen2_moe": Gguf("qwen2moe", own_head=True),
    "qwen3": Gguf("qwen3"),
    "qwen3_moe": Gguf("qwen3moe", normed=True),
    "qwen3_5_text": Gguf("qwen35", norm=1),
    "qwen3_5_moe_text": Gguf("qwen35moe", norm=1, normed=True),
}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS_35 = WORDS.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")  # from Qwen3.5 on
GGUF_WORDS = {(WORDS, False): "qwen2", (WORDS_35, False): "qwen35"}
ANSWERS = Marks(
    begin=re.compile(r"<\|im_start\|>assistant\n"),
    end=re.compile(r"<\|im_end\|>"),
    last="<|im_end|>",
    last_call="<|im_end|>",
    thought=("<think>", "</think>"),
)
SYSTEM = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# what a call is between its marks where it is no JSON object: Qwen3.5 and later
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for a tokenizer that has none."""
    return CHAT_TEMPLATE


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str) -> list[Piece]:
    """The Pieces of a conversation (Turns), in order; after a question comes the header that asks for an answer.

    Qwen has no bos. Each answer's last id is one of `stop_ids`. Typed control tokens stay text.
    """
    if turns[0].role == "text":
        return [Piece([*encode_text(tokenizer, turns[0].text), special_id(tokenizer, "<|endoftext|>")], ANSWER)]
    if through_template.wanted(tokenizer, turns, shows=style == "chat"):
        return through_template.pieces(tokenizer, turns, ANSWERS)
    if style == "plain":
        return [_plain_turn(tokenizer, turn) for turn in turns]
    if turns[0].role != "system":
        turns = [*_default_system(tokenizer, style), *turns]
    *earlier, last = turns
    pieces: list[Piece] = []
    for number, turn in enumerate(earlier):
        if turn.role == "assistant" and (number == 0 or earlier[number - 1].role == "system"):  # a greeting
            pieces.append(Piece([special_id(tokenizer, "<|im_start|>"), *_asking(tokenizer, style)], CONTEXT))
        pieces += _chat_turn(tokenizer, turn, style, last=False)
    return pieces + _chat_turn(tokenizer, last, style, last=True)


def stop_ids(tokenizer: PreTrainedTokenizerBase, style: str) -> list[int]:
    """Ids that end an answer, the trained one first."""
    ends = [special_id(tokenizer, token) for token in ("<|im_end|>", "<|endoftext|>")]
    return ends[::-1] if style == "plain" else ends


def answer_form(tokenizer: PreTrainedTokenizerBase, style: str) -> AnswerForm:
    """Thought from Qwen3 on, calls from Qwen2.5 on: where the tokenizer has the tokens and its template writes them."""
    thought, call = ANSWERS.thought, ("<tool_call>", "</tool_call>")
    template = own_template(tokenizer)
    if style != "chat":
        return TEXT_ALONE
    return AnswerForm(
        thought=thought if knows(tokenizer, thought[0]) else NO_MARKS,
        call=call,
        read_calls=read_calls if call[0] in template else None,
        tokens=thought + call,
        switch=switches(tokenizer),
    )


def read_calls(text: str, parameters: Parameters) -> Sequence[Call]:
    """The call between its marks: a JSON object, or <function=NAME> around <parameter=NAME>."""
    found = FUNCTION.fullmatch(text)
    if not found:
        return json_calls(text, parameters)
    name, inside = found.groups()
    if PARAMETER.sub("", inside).strip():
        return ()
    return [typed_call(name, dict(PARAMETER.findall(inside)), parameters)]


def clean(text: str, ended: bool = True) -> str:
    """An answer as it is shown: as generated."""
    return text.strip()


def _chat_turn(tokenizer: PreTrainedTokenizerBase, turn: Turn, style: str, last: bool) -> list[Piece]:
    start, end = special_id(tokenizer, "<|im_start|>"), special_id(tokenizer, "<|im_end|>")
    newline = frame_ids(tokenizer, "\n")
    if turn.role == "assistant":
        text = "\n" + turn.text if style == "log" else turn.text
        answer = Piece([*encode_text(tokenizer, text), end], ANSWER if turn.learn else CONTEXT)
        return [answer] if last else [answer, Piece([*newline], FRAME)]
    # role and text are encoded as one, as in the official template's text: a text's own newlines join the header's
    said = [start, *encode_text(tokenizer, f"{turn.role}\n{turn.text}"), end, *newline]
    if turn.role == "system":
        return [Piece(said, FRAME)]
    return [Piece(said, QUESTION), Piece([start, *_asking(tokenizer, style)], FRAME)]


def _asking(tokenizer: PreTrainedTokenizerBase, style: str) -> tuple[int, ...]:
    """Ids of the header that asks for an answer, without <|im_start|>."""
    return frame_ids(tokenizer, "assistant" if style == "log" else "assistant\n")


def _plain_turn(tokenizer: PreTrainedTokenizerBase, turn: Turn) -> Piece:
    if turn.role == "assistant":
        part = ANSWER if turn.learn else CONTEXT
        return Piece([*encode_text(tokenizer, turn.text), special_id(tokenizer, "<|endoftext|>")], part)
    return Piece(encode_text(tokenizer, turn.text + ("\n" if turn.role == "system" else "")), QUESTION)


@lru_cache(maxsize=8)
def _default_system(tokenizer: PreTrainedTokenizerBase, style: str) -> tuple[Turn, ...]:
    """The system turn of a conversation without one, as a tuple: none, or one Turn."""
    if style == "log":
        return (Turn("system", SYSTEM),)
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    header, mark, rest = shown.partition("<|im_start|>system\n")
    return (Turn("system", rest.partition("<|im_end|>")[0]),) if mark and not header else ()
