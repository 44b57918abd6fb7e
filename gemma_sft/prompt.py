"""Gemma's prompt, the only place that knows it: training, chat, evaluation and the service all render through `render`.

    chat        <bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{answer}<end_of_turn>
    plain, log  <bos>{question}{answer}<eos>          (log: what the logs of the first gemma-sft runs show)

Source of chat: the chat template in google/gemma-2b-it's tokenizer_config.json. That template refuses a system text;
here it is put before the first question with an empty line between, as Gemma 3's own template does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.conversation.family import Gguf
from common.conversation.render import ANSWER, CONTEXT, FRAME, QUESTION, Piece, encode_text, frame_ids, special_id
from common.conversation.turns import Turn, fold_system

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
    "gemma": GGUF_ENGINES | {"mlx": "", "ctranslate2": "", "keras": "tokenizer.model"},
    "gemma2": GGUF_ENGINES,
    "gemma3_text": GGUF_ENGINES | {"mlx": "", "ctranslate2": "", "keras": ""},
}
UNTRIED_ENGINES = ("vllm",)
UNTIED_ENGINES = ()  # of these, what runs a head of its own: vLLM refuses it, llama.cpp would drop it without a word
GGUF = {
    "gemma": Gguf("gemma", norm=1, tied=True),
    "gemma2": Gguf("gemma2", norm=1, period=2, wide=46, tied=True),
    "gemma3_text": Gguf("gemma3", norm=1, period=6, local=1e4, wide=62),
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


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str) -> list[Piece]:
    """The Pieces of a conversation (Turns), in order; after a question comes the header that asks for an answer.

    Exactly one bos, at the start. Each answer's last id is one of `stop_ids`. Typed control tokens stay text.
    """
    pieces = [Piece([tokenizer.bos_token_id], FRAME)]
    if turns[0].role == "text":
        return [*pieces, Piece([*encode_text(tokenizer, turns[0].text), tokenizer.eos_token_id], ANSWER)]
    render_turn = _chat_turn if style == "chat" else _plain_turn
    *earlier, last = fold_system(turns)
    if style == "chat" and (earlier or [last])[0].role == "assistant":  # a greeting
        header = [special_id(tokenizer, "<start_of_turn>"), *frame_ids(tokenizer, "model\n")]
        pieces.append(Piece(header, CONTEXT))
    for turn in earlier:
        pieces += render_turn(tokenizer, turn, last=False)
    return pieces + render_turn(tokenizer, last, last=True)


def clean(text: str, ended: bool = True) -> str:
    """An answer as it is shown: as generated."""
    return text.strip()


def stop_ids(tokenizer: PreTrainedTokenizerBase, style: str) -> list[int]:
    """Ids that end an answer, the trained one first."""
    if style == "chat":
        return [special_id(tokenizer, "<end_of_turn>"), tokenizer.eos_token_id]
    return [tokenizer.eos_token_id]


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
