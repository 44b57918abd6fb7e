"""A conversation as a list of turns, and what is done to one before it is rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from common.data.defects import RowError


class Turn(NamedTuple):
    """One utterance. `role` is system, user, assistant, or text (pre-training text without a question)."""

    role: str
    text: str


class Conversation(NamedTuple):
    """A row that can be used. `where` is file:line; one line may hold several conversations."""

    where: str
    turns: list[Turn]


class Unusable(NamedTuple):
    """A row that cannot be used, as rejected.jsonl keeps it.

    `where` is file:line, `reason` a line for people, `row` what was read, `kind` a key of DEFECTS.
    """

    where: str
    reason: str
    row: object
    kind: str


class FormatError(RowError):
    """A row that cannot be read: what was found and what was expected."""


CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
PLACEHOLDER = re.compile(r"\{\{((?i:name|author))\}\}|<(NAME|AUTHOR)>")


def fill_identity(turns: Sequence[Turn], name: Sequence[str], author: Sequence[str]) -> list[Turn]:
    """Put `name` and `author` for {{name}}, {{AUTHOR}}, <NAME>, …; FormatError where one is needed and empty.

    Each is (Chinese, other) or (); a conversation with Chinese characters takes the first form, any other the second.
    """
    values = {"name": name, "author": author}
    form = 0 if any(CHINESE.search(turn.text) for turn in turns) else 1

    def value(match: re.Match[str]) -> str:
        key = (match[1] or match[2]).lower()
        if not values[key] or not values[key][form].strip():
            raise FormatError("identity", f"{match[0]} 没有填 is not filled: give --model_name and --model_author")
        return values[key][form]

    return [Turn(turn.role, PLACEHOLDER.sub(value, turn.text)) for turn in turns]


def fold_system(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns with the system text before the first question, an empty line between: for models without that role."""
    if turns[0].role != "system":
        return turns
    system, first, *rest = turns
    return [first._replace(text=f"{system.text.strip()}\n\n{first.text.lstrip()}"), *rest]


def check_order(turns: Sequence[Turn]) -> None:
    """FormatError unless the turns can be trained on: [system], user, assistant, user, assistant …, or one text."""
    if len(turns) == 1 and turns[0].role == "text":
        return
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken:
        raise FormatError("no-turns", "没有问答 there is no question and answer")
    if spoken[0] != "user":
        raise FormatError("first-turn", f"第一轮应是 user the first turn must be the user's, found {spoken[0]}")
    if spoken[-1] != "assistant":
        raise FormatError("last-turn", f"最后一轮应是 assistant the last turn must be an answer, found {spoken[-1]}")
    for number, (role, expected) in enumerate(zip(spoken, ("user", "assistant") * len(spoken), strict=False), 1):
        if role != expected:
            raise FormatError(
                "turn-order", f"第 {number} 轮应是 {expected} turn {number} must be {expected}, found {role}"
            )
