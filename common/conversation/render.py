"""Conversations as ids: pieces with a part each, limits that only cut what a user wrote, labels by part."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from common.conversation.turns import Turn
from common.errors import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.conversation.family import Family

# one text is encoded at a time: threads of the tokenizer's would be woken for nothing, and warn after a fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FRAME, QUESTION, ANSWER, CONTEXT = "frame", "question", "answer", "context"
IGNORED = -100  # the label of an id the loss does not count


class Piece(NamedTuple):
    """Some ids of a conversation and what they are: FRAME (headers), QUESTION, ANSWER (its stop id included).

    CONTEXT is an answer, or its header, that no loss counts.
    """

    ids: list[int]
    part: str


class Sample(NamedTuple):
    """A row as the model trains on it: ids and labels of equal length, and whether the prompt had to be cut."""

    input_ids: list[int]
    labels: list[int]
    cut: bool


class TooLongError(RowError):
    """A row that cannot be cut to the limits without losing a header, an answer or its stop token."""


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text as text: no special tokens are added, and control tokens typed in it stay ordinary characters."""
    words = template_words(tokenizer, str(tokenizer.chat_template))
    if not any(word in text for word in words):
        return _encoded(tokenizer, text)
    # the tokenizer takes these for text too, but has one id for each: it gets each of them in two parts
    typed = re.finditer("(?=" + "|".join(map(re.escape, words)) + ")", text)
    cuts = [0, *(found.start() + 1 for found in typed), len(text)]
    return [id_ for start, end in pairwise(cuts) for id_ in _encoded(tokenizer, text[start:end])]


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if not tokenizer.is_fast:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    backend = tokenizer.backend_tokenizer  # the same ids in a third of the time
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids  # makes no offsets


@lru_cache(maxsize=8)
def template_words(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    """Control tokens of a template that the tokenizer does not call special, such as <think>. Words are text."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    return tuple(token for token in added if len(token.strip()) > 1 and not token.isalnum() and token in template)


@lru_cache(maxsize=64)
def frame_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a template's own words, as a tuple; the same few texts are asked for in every row."""
    return tuple(encode_text(tokenizer, text))


@lru_cache(maxsize=64)
def special_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a control token; ValueError where the tokenizer has none."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise ValueError(f"分词器没有 the tokenizer has no {token}")
    return found


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Family, turns: Sequence[Turn], style: str, max_length: int
) -> tuple[list[int], bool]:
    """Ids that ask for the answer to `turns` (the last one a question), at most `max_length`: (ids, cut).

    Raises TooLongError where headers and system text alone exceed the limit.
    """
    turns, cut = fit_turns(lambda turns: len(joined(prompt.render(tokenizer, turns, style))), turns, max_length)
    return joined(prompt.render(tokenizer, turns, style)), cut


def training_sample(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Family,
    turns: Sequence[Turn],
    style: str,
    loss_on: str,
    max_length_q: int,
    max_length_a: int,
    pieces: list[Piece] | None = None,
) -> Sample:
    """The Sample of a conversation whose last turn is an answer. Its ids up to the answer are `prompt_ids` of the rest.

    loss_on: "all" ids but the first, every "answer", or the "last" answer. pieces: of the turns, where they have been
    rendered. Raises TooLongError.
    """
    pieces, cut = pieces or prompt.render(tokenizer, turns, style), False
    if sum(len(piece.ids) for piece in pieces[:-1]) > max_length_q:
        asked, cut = fit_turns(
            lambda asked: len(joined(prompt.render(tokenizer, asked, style))), turns[:-1], max_length_q
        )
        pieces = prompt.render(tokenizer, [*asked, turns[-1]], style)
    if len(pieces[-1].ids) > max_length_a:
        length = len(pieces[-1].ids)
        raise TooLongError("long-answer", f"回答有 {length} 个 token, the answer is over --max_length_a {max_length_a}")
    return Sample(joined(pieces), labels_of(pieces, loss_on), cut)


def fit_turns(length: Callable[[Sequence[Turn]], int], turns: Sequence[Turn], limit: int) -> tuple[list[Turn], bool]:
    """Turns whose `length(turns)` is at most `limit`, and whether something was cut: (turns, cut).

    The greeting and the oldest rounds, each a question and all up to the next one, go first, then the middle of the
    last question; the system text stays, and the calls and results after the last question.
    """
    if length(turns) <= limit:
        return list(turns), False
    system, spoken = _apart(turns)
    later = [number for number, turn in enumerate(spoken) if turn.role == "user" and number]
    rounds = [spoken, *(spoken[number:] for number in later)]
    kept = _largest(lambda count: length([*system, *rounds[-count]]) <= limit, len(rounds) - 1)
    spoken = rounds[-max(kept, 1)]
    if length([*system, *spoken]) <= limit:
        return [*system, *spoken], True
    question, *rest = spoken

    def shortened(kept: int) -> list[Turn]:
        return [*system, question._replace(text=_without_middle(question.text, kept)), *rest]

    longest = _largest(lambda kept: length(shortened(kept)) <= limit, len(question.text))
    if longest < 1:
        raise TooLongError(
            "long-prompt", f"提问放不下 not even one character of the question fits in --max_length_q {limit}"
        )
    return shortened(longest), True


def _apart(turns: Sequence[Turn]) -> tuple[Sequence[Turn], Sequence[Turn]]:
    """(the system turn or none, the other turns)."""
    return (turns[:1], turns[1:]) if turns[0].role == "system" else ([], turns)


def _without_middle(text: str, kept: int) -> str:
    """`kept` characters, from both ends: the task of a question is mostly at its start or at its end."""
    head = kept - kept // 2
    return text[:head] + text[len(text) - kept // 2 :]


def _largest(fits: Callable[[int], bool], upper: int) -> int:
    """The largest n in 0..upper for which `fits(n)`, by bisection."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def joined(pieces: Sequence[Piece]) -> list[int]:
    """All ids of the pieces, in order."""
    return [id_ for piece in pieces for id_ in piece.ids]


def labels_of(pieces: Sequence[Piece], loss_on: str) -> list[int]:
    """Labels aligned with the ids. The very first id is predicted from nothing and never counts."""
    last = len(pieces) - 1
    labels: list[int] = []
    for number, (ids, part) in enumerate(pieces):
        counted = loss_on == "all" and part != CONTEXT or part == ANSWER and (loss_on == "answer" or number == last)
        labels += ids if counted else [IGNORED] * len(ids)
    return [IGNORED, *labels[1:]]


def shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids with their control tokens, also those that the tokenizer's own decode leaves out."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    hidden = [bool(token.strip("▁")) and not tokenizer.decode([id_]) for token, id_ in zip(tokens, ids, strict=True)]
    text, start = "", 0
    for number in [number for number, hide in enumerate(hidden) if hide]:
        text += tokenizer.decode(ids[start:number]) + tokens[number]
        start = number + 1
    return text + tokenizer.decode(ids[start:])


def template_text(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str) -> str:
    """A fixed conversation as this style renders it: what the manifest keeps, and what must not change."""
    turns = [
        Turn("system", "{system}"),
        Turn("user", "{question 1}"),
        Turn("assistant", "{answer 1}"),
        Turn("user", "{question 2}"),
        Turn("assistant", "{answer 2}"),
    ]
    return shown(tokenizer, joined(prompt.render(tokenizer, turns, style)))
