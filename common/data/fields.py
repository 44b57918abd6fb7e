"""The values of a row as text and lists, and which of its keys were read."""

from __future__ import annotations

import ast
import difflib
import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from typing import Any

from common.conversation.turns import FormatError
from common.data.arrays import DECODER, RepeatedError
from common.data.defects import matter_of

ROLES = {  # any letter case
    "system": "system",
    "developer": "system",
    "系统": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "用户": "user",
    "人类": "user",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "assistant": "assistant",
    "gpt": "assistant",
    "gpt4": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "助手": "assistant",
    "机器人": "assistant",
    "function_call": "call",  # what an assistant calls, as a message of its own
    "tool_call": "call",
}
SPEAKERS = ("role", "from")  # keys that say who speaks
SAID = ("content", "value", "text")  # keys that hold what is said
SPOKEN = frozenset(SPEAKERS + SAID)
MARKS = {"loss": True, "weight": True, "train": True, "mask": False}  # whether a mark's true says: learn this answer
MARK_TEXTS = {"true": True, "1": True, "false": False, "0": False}  # as in CSV
OPTIONAL = frozenset({"system", "system_prompt", "history", "tools", "instruction", "input", "context"})
ELSEWHERE = {"content", "value", "text"}  # keys of other shapes, which are near one of OPTIONAL by chance
# what people call keys of OPTIONAL
SYNONYMS = (
    dict.fromkeys(("system_message", "system_text", "sys_prompt", "meta_instruction", "meta_prompt"), "system")
    | dict.fromkeys(("系统", "系统提示", "系统提示词"), "system")
    | dict.fromkeys(("背景", "上下文"), "context")
    | dict.fromkeys(("历史", "历史对话"), "history")
)
# what people call a question and its answer
QUESTIONS = frozenset("question query prompt instruction instruct input user human 问题 提问 问 输入 指令 用户".split())
ANSWERS = frozenset("answer response output completion target reply assistant 答案 回答 答复 回复 答 输出 助手".split())


def role_of(said: object) -> str | None:
    """A role by any of its names; None where it is unknown."""
    if not isinstance(said, str):
        return None
    return ROLES.get(said) or ROLES.get(said.strip(" \t\r\n\u3000\ufeff:：").lower())


def as_text(value: object, name: str, required: bool = True) -> str:
    """A value as text: a number as it is written, "" where it is None or empty and not required.

    `name` is what an error calls it.
    """
    if value is None or value == "":
        if required:
            raise FormatError("empty", f"{name} 是空的 is empty")
        return ""
    if type(value) is not str:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            found = f"{type(value).__name__} {str(value)[:40]!r}"
            remedy = "; 没有值时写 where there is no value write null" if isinstance(value, float) else ""
            raise FormatError("not-text", f"{name} 应为文字 must be text, found {found}{remedy}")
        value = str(value)
    if required and not value.strip():
        raise FormatError("only-blanks", f"{name} 只有空白 is only blanks")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FormatError("half-a-character", f"{name} 有半个字符 holds half a character (a lone surrogate)") from None
    return value


def holds_something(value: object) -> bool:
    """Whether a value is more than null, blanks, and lists and objects of these."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return any(map(holds_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_something, value))
    return value is not None


def holds_text(value: object) -> bool:
    """Whether there is text in a value, at any depth."""
    if isinstance(value, dict):
        return any(map(holds_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_text, value))
    return isinstance(value, str) and bool(value.strip())


@lru_cache(maxsize=1024)
def meant_by(key: str, known: frozenset[str]) -> str:
    """The known key that `key` is a misspelling of, or is itself; "" where there is none."""
    if key in SYNONYMS:
        return SYNONYMS[key]
    near = difflib.get_close_matches(key.strip().lower(), known, n=1, cutoff=0.85)
    return near[0] if near and abs(len(near[0]) - len(key)) <= 2 else ""


def question_and_answer(keys: Collection[str]) -> tuple[str, str] | None:
    """The key of a question and that of its answer; None unless there is one of each."""
    asked, answered = QUESTIONS.intersection(keys), ANSWERS.intersection(keys)
    return (*asked, *answered) if len(asked) == len(answered) == 1 else None  # type: ignore[return-value]  # two


def nearest(keys: Collection[str], shapes: Iterable[frozenset[str]]) -> str:
    """What is said of keys of no shape: the shape whose keys are most like them, or how keys are named."""

    def alike(need: str) -> float:
        found = max((difflib.SequenceMatcher(None, need, str(key).strip().lower()).ratio() for key in keys), default=0)
        return found if found > 0.6 else 0

    def likeness(needs: frozenset[str]) -> float:
        return sum(map(alike, needs)) / len(needs)

    if not set(SPEAKERS).isdisjoint(keys) and not set(SAID).isdisjoint(keys):
        return '一条消息 a message alone; write a conversation a row, as {"messages": […]}'
    best = max(shapes, key=likeness)
    if likeness(best) < (0.5 if len(best) > 1 else 0.85):
        return "没有相近的 no nearest known shape; name the keys question and answer, or as docs/data.md shows"
    return f"nearest known shape: {'+'.join(sorted(best))}"


def mark_of(value: object, name: str, yes: bool = True) -> bool:
    """Whether a mark (true, false, 1 or 0, also as text) says that an answer is learnt; `yes`: what true says.

    null and "" are no mark.
    """
    if value is None or value == "":
        return True
    if isinstance(value, str):
        value = MARK_TEXTS.get(value.strip().lower(), value)
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value) is yes
    raise FormatError("mark", f"{name} 应为 must be true, false, 1 or 0, found {str(value)[:40]!r}")


class Fields:
    """A row, or an object inside one under `name`, that knows which of its keys were read."""

    def __init__(self, row: dict[str, Any], name: str = "") -> None:
        self.row = row
        self.name = name
        self.read: set[str] = set()
        self.inner: list[str] = []  # keys of objects inside that nobody read

    def get(self, key: str) -> Any:
        """The value under a key as it is; None where there is none."""
        self.read.add(key)
        return self.row.get(key)

    def text(self, key: str, required: bool = True) -> str:
        """The text under a key; "" where there is none and it is not required."""
        self.read.add(key)
        value = self.row.get(key)
        return "" if value in (None, [], {}) and not required else as_text(value, key, required)

    def items(self, key: str) -> list:
        """The list under a key, also where it is written as JSON text, as in CSV; [] where there is none."""
        value = self.get(key)
        if not value:
            return []
        if isinstance(value, str):
            value = parsed(value)
        if not isinstance(value, list):
            raise FormatError("not-a-list", f"{key} 应为列表 must be a list, found {type(value).__name__}")
        return value

    def objects(self, key: str, expected: str, known: frozenset[str]) -> Iterator[Fields]:
        """The objects in the list under a key, as Fields; FormatError, with what is expected, for anything else.

        known: the keys they have.
        """
        for value in self.items(key):
            if not isinstance(value, dict):
                raise FormatError("not-an-utterance", f"{key}: 应有 {expected} expected, found {str(value)[:60]!r}")
            inside = Fields(value, key)
            yield inside
            self.inner += inside.unread(known)

    def unread(self, known: frozenset[str] = frozenset()) -> list[str]:
        """The keys that hold something and were not read; one of an object inside is "messages.name".

        known: keys of the row's shape besides those of OPTIONAL. FormatError where a key changes what the row means,
        or holds text and is near a known one.
        """
        if self.read >= self.row.keys():
            return self.inner  # most rows
        left = [key for key in self.row if key not in self.read and holds_something(self.row[key])]
        if not left:
            return self.inner
        names = {key: f"{self.name}.{key}" if self.name else str(key) for key in left}
        for key, name in names.items():
            kind, why = matter_of(str(key), inside=bool(self.name))
            if kind in ("mark", "preference") or kind and not isinstance(self.row[key], bool):
                raise FormatError(kind, f"{name}: {why}")
            meant = meant_by(str(key), known | OPTIONAL) if holds_text(self.row[key]) else ""
            meant = meant or (meant_by(str(key), frozenset(MARKS)) if self.name else "")
            if meant and key not in known | ELSEWHERE:
                hint = (
                    "join it to what is read, or remove it"
                    if key == meant
                    else f"is {meant} meant? rename or remove it"
                )
                raise FormatError("unread", f"{name}: 没有读 is not read here; {hint}")
        return [*names.values(), *self.inner]

    def is_learnt(self) -> bool:
        """Whether no mark of an utterance says that its text is context only."""
        if MARKS.keys().isdisjoint(self.row):
            return True  # most utterances
        marks = [mark_of(self.get(key), f"{self.name}.{key}", yes) for key, yes in MARKS.items() if key in self.row]
        return all(marks)

    def is_learnt_whole(self) -> bool:
        """Whether no mark of a whole row says that it is context only: `weight`, or another that is true or false."""
        return MARKS.keys().isdisjoint(self.row) or all(
            mark_of(self.get(key), key, yes)
            for key, yes in MARKS.items()
            if key == "weight" or str(self.row.get(key)).lower() in ("true", "false")
        )


def parsed(text: str) -> Any:
    """The value of JSON text, or of a list as Python prints it (pandas' to_csv); the text itself where it is none."""
    for read in (DECODER.decode, literal):
        try:
            return read(text)
        except RepeatedError as problem:
            raise FormatError("broken-json", str(problem)) from None
        except (ValueError, RecursionError):
            continue
    return text


def literal(text: str) -> Any:
    """The value of a literal as Python prints it, in single quotes; ValueError where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unknown escape, such as \\d, which Python keeps
            return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError("no literal of Python") from None
