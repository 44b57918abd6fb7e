"""ChatGLM3's prompt, the only place that knows it: training, chat, evaluation and service render through `render`.

    chat  [gMASK]sop<|system|>\n {system}<|user|>\n {question}<|assistant|>\n {answer}<|user|>
                                      (one text; the line is broken here to be read)

The newline behind a role and the text are encoded apart, so that SentencePiece puts its blank before each: the ids
between <|user|> and 你好 are those of "▁", newline and "▁". Control tokens are put there as ids: written in a text they
are ordinary characters.

No token ends an answer: the next turn's own does. The last answer of a row ends with <|user|> too, so that it is
learnt. Between two rounds it is there once: it ends the answer and begins the question.

Source: `get_prefix_tokens`, `build_single_message` and `build_chat_input` of tokenization_chatglm.py, `chat` (what ends
an answer) and `process_response` of modeling_chatglm.py, in THUDM/chatglm3-6b. They end a prompt with <|assistant|>,
and the model goes on with the newline, or with the name of a tool; here the newline belongs to the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatglm_sft import prompt_chatglm2
from common.conversation import through_template
from common.conversation.answer_form import TEXT_ALONE, AnswerForm
from common.conversation.family import Gguf
from common.conversation.render import ANSWER, CONTEXT, FRAME, QUESTION, Piece, encode_text, frame_ids, special_id
from common.conversation.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("chat",)
ONE_ANSWER = False
RECIPES = "chatglm_sft/ft_chatglm3"
MODEL_TYPES = ("chatglm3",)  # as chatglm_sft.prompt.kinds names what calls itself chatglm
ENGINES: dict[str, dict[str, str]] = {}  # besides transformers with the model of models/chatglm2, none has been run
UNTIED_ENGINES = UNTRIED_ENGINES = ()
GGUF: dict[str, Gguf] = {}
GGUF_WORDS: dict[tuple[str, bool], str] = {}
CHAT_TEMPLATE = (
    "[gMASK]sop{% for message in messages %}"
    "{% if message['role'] != 'user' or loop.first or loop.previtem['role'] != 'assistant' %}"
    "{{ '<|' + message['role'] + '|>' }}{% endif %}{{ '\n ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|user|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ENDS = ("<|user|>", "<|observation|>", "</s>")  # of an answer, the trained one first


def template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for a tokenizer that has none."""
    return CHAT_TEMPLATE


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str) -> list[Piece]:
    """The Pieces of a conversation (Turns), in order; after a question comes the header that asks for an answer.

    Each answer's last id is one of `stop_ids`. Typed control tokens stay text.
    """
    start = Piece([special_id(tokenizer, "[gMASK]"), special_id(tokenizer, "sop")], FRAME)
    if turns[0].role == "text":
        return [start, Piece([*encode_text(tokenizer, turns[0].text), special_id(tokenizer, ENDS[-1])], ANSWER)]
    through_template.wanted(tokenizer, turns, shows=False)
    roles = ["", *(turn.role for turn in turns)]
    pieces = (_turn(tokenizer, turn, before) for turn, before in zip(turns, roles, strict=False))
    return [start, *(piece for turn in pieces for piece in turn)]


def stop_ids(tokenizer: PreTrainedTokenizerBase, style: str) -> list[int]:
    """Ids that end an answer, the trained one first; ValueError where the tokenizer is no ChatGLM3's."""
    for token in ("[gMASK]", "sop", "<|system|>", "<|assistant|>"):
        special_id(tokenizer, token)
    return [special_id(tokenizer, token) for token in ENDS]


def answer_form(tokenizer: PreTrainedTokenizerBase, style: str) -> AnswerForm:
    """An answer is text: ChatGLM3 knows no thought, and its tools are not read."""
    return TEXT_ALONE


def clean(text: str, ended: bool = True) -> str:
    """An answer as the original's chat shows it, which is ChatGLM2's way."""
    return prompt_chatglm2.clean(text, ended)


def _turn(tokenizer: PreTrainedTokenizerBase, turn: Turn, before: str) -> list[Piece]:
    """The Pieces of a turn after one of the role `before`, "" for none; the end of an answer begins the next turn."""
    ask = [special_id(tokenizer, "<|assistant|>"), *frame_ids(tokenizer, "\n")]
    text = encode_text(tokenizer, turn.text)
    if turn.role == "assistant":
        header = [] if before == "user" else [Piece(ask, CONTEXT)]  # of a greeting
        return [*header, Piece([*text, special_id(tokenizer, ENDS[0])], ANSWER if turn.learn else CONTEXT)]
    token = [] if before == "assistant" else [special_id(tokenizer, f"<|{turn.role}|>")]
    said = [*token, *frame_ids(tokenizer, "\n"), *text]
    return [Piece(said, FRAME)] if turn.role == "system" else [Piece(said, QUESTION), Piece(ask, FRAME)]
