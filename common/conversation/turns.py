"""A conversation as a list of turns, and what is done to one before it is rendered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from common.errors import RowError


class Call(NamedTuple):
    """A tool called in an answer: its name and a JSON object of arguments, as text."""

    name: str
    arguments: str


class Turn(NamedTuple):
    """One utterance. `role` is system, user, assistant, tool, or text (pre-training text without a question).

    `learn` is False for an answer that is context only: the loss does not count it. `thought` was thought before an
    answer, `calls` are made at its end; a turn of the role tool is the result of one call, in the calls' order. `tools`
    are on offer from a system turn on, a JSON list as text.
    """

    role: str
    text: str
    learn: bool = True
    thought: str = ""
    calls: tuple[Call, ...] = ()
    tools: str = ""


def said(turns: Sequence[Turn]) -> list[tuple[Any, ...]]:
    """The turns as (role, text), which is what hashes of conversations are made of.

    One with a thought, calls or tools is (role, text, thought, calls, tools).
    """
    return [
        (turn.role, turn.text, turn.thought, turn.calls, turn.tools) if is_more(turn) else (turn.role, turn.text)
        for turn in turns
    ]


def is_more(turn: Turn) -> bool:
    """Whether a turn is more than its text: a thought, calls, tools on offer, or the result of a call."""
    return bool(turn.thought or turn.calls or turn.tools or turn.role == "tool")


def texts_of(turn: Turn) -> list[str]:
    """All texts of a turn: what is said and thought, tools on offer, names and arguments of calls."""
    if is_more(turn):
        return [turn.text, turn.thought, turn.tools, *chain(*turn.calls)]
    return [turn.text]


def says(turn: Turn) -> bool:
    """Whether a turn says something: a text, calls or tools on offer; a result may be empty."""
    return bool(turn.text.strip() or turn.calls or turn.tools or turn.role == "tool")


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


class Repair(NamedTuple):
    """What was changed in a row so that its turns are in order. `where` is file:line, `reason` a line for people."""

    where: str
    reason: str


class FormatError(RowError):
    """A row that cannot be read: what was found and what was expected."""


CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
PLACEHOLDER = re.compile(r"\{\{((?i:name|author))\}\}|<(NAME|AUTHOR)>")


def fill_identity(turns: Sequence[Turn], name: Sequence[str], author: Sequence[str]) -> list[Turn]:
    """Put `name` and `author` for {{name}}, {{AUTHOR}}, <NAME>, …; FormatError where one is needed and empty.

    Each is (Chinese, other) or (); a conversation with Chinese characters takes the first form, any other the second.
    Thoughts, tools and the arguments of calls are filled too.
    """
    if not any(PLACEHOLDER.search(text) for turn in turns for text in texts_of(turn)):
        return list(turns)  # most rows
    values = {"name": name, "author": author}
    form = 0 if any(CHINESE.search(turn.text) for turn in turns) else 1

    def value(match: re.Match[str]) -> str:
        key = (match[1] or match[2]).lower()
        if not values[key] or not values[key][form].strip():
            raise FormatError("identity", f"{match[0]} 没有填 is not filled: give --model_name and --model_author")
        return values[key][form]

    def escaped(match: re.Match[str]) -> str:  # within JSON text
        return json.dumps(value(match), ensure_ascii=False)[1:-1]

    def filled(turn: Turn) -> Turn:
        calls = (call._replace(arguments=PLACEHOLDER.sub(escaped, call.arguments)) for call in turn.calls)
        return turn._replace(
            text=PLACEHOLDER.sub(value, turn.text),
            thought=PLACEHOLDER.sub(value, turn.thought),
            calls=tuple(calls),
            tools=PLACEHOLDER.sub(escaped, turn.tools),
        )

    return [filled(turn) for turn in turns]


def fold_system(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns with the system text before the first question, an empty line between: for models without that role."""
    if turns[0].role != "system":
        return turns
    system, *rest = turns
    at = [turn.role for turn in rest].index("user")
    folded = rest[at]._replace(text=f"{system.text.strip()}\n\n{rest[at].text.lstrip()}")
    return [*rest[:at], folded, *rest[at + 1 :]]


def marked(turns: list[Turn], marks: Sequence[bool]) -> list[Turn]:
    """The turns with marks of which are learnt, one a turn (the system text may lack one) or one an answer, or none."""
    if not marks:
        return turns
    places = range(len(turns))
    answers = [number for number in places if turns[number].role == "assistant"]
    ways = [places, places[turns[0].role == "system" :], answers] if turns else []
    fitting = next((way for way in ways if len(way) == len(marks)), None)
    if fitting is None:
        raise FormatError(
            "mark", f"loss_mask: {len(turns)} 轮 turns, {len(answers)} 个回答 answers, {len(marks)} 个标记 marks found"
        )
    learnt = dict(zip(fitting, marks, strict=True))
    return [
        turn._replace(learn=turn.learn and learnt.get(number, True)) if turn.role == "assistant" else turn
        for number, turn in enumerate(turns)
    ]


# what is said of a repair
JOINED = "相邻同角色的几轮合并 turns of one role in a row are joined"
GREETING = "开头的回答只作上文 a greeting is context only"
NO_TEXT = "空的一轮略去 an empty turn is left out"
UNANSWERED = "末尾没有回答的提问略去 a last question without answer is cut"
NOT_USED = "末尾没有回答的工具结果略去 a last result of a tool without answer is cut"
SYSTEM = "中间的系统提示并入提问 a system text in between is put into a question"


def in_order(turns: Sequence[Turn], answered: bool = True) -> tuple[Sequence[Turn], list[str]]:
    """The turns as [system,] [greeting,] question, answer, question …, and what was repaired to make them so.

    Between an answer that calls tools and the next answer stand the results, each a turn. answered: the last turn has
    to be an answer, and questions and results at the end are cut; else the last one has to be a question or a result.
    Joined answers are learnt if all of them are. FormatError where no question, or no answer, is left, or a call has
    no result.
    """
    roles = [turn.role for turn in turns]
    if answered and roles == ["user", "assistant"] and turns[0].text.strip() and turns[1].text.strip():
        return turns, []  # most rows
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    whole = (len(spoken) % 2 == 0) is answered
    if roles == ["text"] or spoken and whole and _alternate(spoken) and all(map(_is_plain, turns)):
        return turns, []
    repairs: dict[str, None] = {}
    mended: list[Turn] = []
    before = ""  # role of the turn before, as it was said
    for turn in turns:
        if not says(turn):
            repairs[NO_TEXT] = None
            continue
        if before == turn.role != "tool" and turn.text.strip() and mended[-1].text.strip():
            repairs[JOINED] = None
        before = turn.role
        if turn.role == "system" and mended and mended[-1].role != "system":
            repairs[SYSTEM] = None
            turn = turn._replace(role="user")
        if mended and mended[-1].role == turn.role != "tool" and not (turn.role == "assistant" and mended[-1].calls):
            turn = _joined(mended.pop(), turn)
        mended.append(turn)
    mended = _with_ends(mended, answered, repairs)
    _check_calls(mended)
    return mended, list(repairs)


def _is_plain(turn: Turn) -> bool:
    """Whether a turn is a text, and no call waits for its result."""
    return bool(turn.text.strip()) and not turn.calls


def _joined(first: Turn, second: Turn) -> Turn:
    """Two turns of one role as one, an empty line between what they say."""
    texts, thoughts = (
        "\n\n".join(part for part in parts if part.strip())
        for parts in ((first.text, second.text), (first.thought, second.thought))
    )
    learn = first.learn and second.learn
    return Turn(first.role, texts, learn, thoughts, (*first.calls, *second.calls), first.tools or second.tools)


def _check_calls(turns: Sequence[Turn]) -> None:
    """FormatError where a call before the last turn has no result, or a result no call."""
    for number, turn in enumerate(turns):
        before = turns[number - 1] if number else None
        if turn.role == "tool" and not (before and (before.role == "tool" or before.calls)):
            raise FormatError("tool-order", "工具结果前没有调用 a result of a tool without a call before it")
        if before and before.calls and turn.role != "tool":
            raise FormatError("tool-order", f"调用 {before.calls[0].name} 没有结果 has no result: a tool turn expected")


def _alternate(roles: Sequence[str]) -> bool:
    """Whether the roles are user, assistant, user, …"""
    return all(role == ("user", "assistant")[number % 2] for number, role in enumerate(roles))


def _with_ends(turns: list[Turn], answered: bool, repairs: dict[str, None]) -> list[Turn]:
    """The turns with a greeting that is not learnt and the last turn as `in_order` needs it; `repairs` is added to."""
    first = 1 if turns and turns[0].role == "system" else 0
    if len(turns) == first:
        raise FormatError("no-turns", "没有问答 there is no question and answer")
    if turns[first].role == "assistant":
        if len(turns) == first + 1:
            raise FormatError("first-turn", "第一轮应是 user the first turn must be the user's, found assistant alone")
        turns[first] = turns[first]._replace(learn=False)
        repairs[GREETING] = None
    while answered and turns[-1].role in ("user", "tool"):
        repairs[UNANSWERED if turns[-1].role == "user" else NOT_USED] = None
        turns = turns[:-1]
        if "user" not in [turn.role for turn in turns]:
            raise FormatError("last-turn", "最后一轮应是 assistant the last turn must be an answer, found user")
    if not answered and turns[-1].role not in ("user", "tool"):
        raise FormatError("last-turn", "最后一轮应是 the last one must be the user's")
    return turns


def ends_asking(turns: Sequence[Turn]) -> bool:
    """Whether the last turn that says something is no answer."""
    return next((turn.role for turn in reversed(turns) if says(turn)), "") != "assistant"


def teaches(turns: Sequence[Turn]) -> bool:
    """Whether something in the turns is learnt."""
    return any(turn.learn and turn.role in ("assistant", "text") for turn in turns)


def lessons(rows: Iterable[Conversation | Unusable], one_answer: bool) -> Iterator[Conversation | Unusable]:
    """The rows; with `one_answer` a conversation gives one for each of its answers to learn, which ends there."""
    for row in rows:
        if not one_answer or isinstance(row, Unusable) or row.turns[-1].role == "text":
            yield row
            continue
        for end, turn in enumerate(row.turns, 1):
            if turn.role == "assistant" and turn.learn:
                yield Conversation(row.where, row.turns[:end])
