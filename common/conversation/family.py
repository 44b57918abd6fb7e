"""What a model family's prompt.py provides: the one place that knows its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from common.conversation.answer_form import AnswerForm
from common.conversation.render import Piece
from common.conversation.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Gguf(NamedTuple):
    """What llama.cpp calls a type of model, and what it takes for granted of it."""

    arch: str
    norm: float = 0.0  # added to the weights of norms, of a model that multiplies by 1 + weight
    period: int = 0  # every n-th layer sees the whole text, the others a window; 0: there are no windows
    local: float = 0.0  # rope_theta of layers with a window; 0: the others'
    wide: int = 0  # layers of the size whose queries are scaled by (hidden_size / heads) ** -0.5; 0: of none
    mixed: bool = False  # heads, windows and shared keys are said of each layer, and rope_freqs is a tensor
    tied: bool = False  # the head is always the embeddings
    own_head: bool = False  # the head is a tensor of its own, also where the model's is the embeddings
    no_lora: tuple[str, ...] = ()  # tensors that are multiplied without their adapters
    normed: bool = False  # the weights of a token's experts are made to add up to 1


class Family(Protocol):
    """The prompt.py of a family, a module; mypy checks each where a recipe hands it to common/."""

    __name__: str
    __file__: str | None

    @property
    def STYLES(self) -> tuple[str, ...]:
        """Values of --prompt_style."""

    @property
    def ONE_ANSWER(self) -> bool:
        """Whether a sequence can teach its last answer only, as where a prompt sees itself in both directions."""

    @property
    def RECIPES(self) -> str:
        """The folder of the recipes that ask so, from the project's root."""

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """`model_type` of the models these recipes are for; of a type that none names, the tokenizer decides.

        Where models of several families say the same, the module that has it as its name has a function too,
        `kinds(config, template)`: what config.json and the tokenizer's own chat template say it may be, as MODEL_TYPES
        name it, the likeliest first.
        """

    @property
    def ENGINES(self) -> Mapping[str, Mapping[str, str]]:
        """{model_type: {engine: a file it needs beside tokenizer.json, or ""}}: what gave transformers' text here."""

    @property
    def UNTRIED_ENGINES(self) -> tuple[str, ...]:
        """What is said to run an exported folder, but was not run here."""

    @property
    def UNTIED_ENGINES(self) -> tuple[str, ...]:
        """Engines of ENGINES that run a head which is not tied to the embeddings."""

    @property
    def GGUF(self) -> Mapping[str, Gguf]:
        """{model_type: Gguf} of models that are written as GGUF."""

    @property
    def GGUF_WORDS(self) -> Mapping[tuple[str, bool], str]:
        """{(the pattern that splits words before a byte-level BPE, its ignore_merges): llama.cpp's name of both}."""

    @property
    def CHAT_TEMPLATE(self) -> str:
        """Jinja chat template that gives the ids of the style chat."""

    def template_for(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The chat template for a tokenizer that has none: CHAT_TEMPLATE, or that of its own generation."""

    def render(self, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str) -> list[Piece]:
        """The pieces of a conversation: FRAME, QUESTION (may be cut), ANSWER (learnt, its last id is a stop id).

        Turns may begin with an answer, a greeting. One with `learn` False is CONTEXT. FormatError where they cannot be
        shown, such as tools in a template that has none.
        """

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase, style: str) -> list[int]:
        """Ids that end an answer, the trained one first; ValueError where the tokenizer lacks one."""

    def answer_form(self, tokenizer: PreTrainedTokenizerBase, style: str) -> AnswerForm:
        """How thought and calls are written in an answer: what vocabulary and chat template of the tokenizer have."""

    def clean(self, text: str, ended: bool = True) -> str:
        """An answer as it is shown; until it has `ended`, what later text could change is kept back.

        What becomes of a character depends on fewer than 32 neighbours: while an answer arrives, only the end of its
        text is cleaned again.
        """
