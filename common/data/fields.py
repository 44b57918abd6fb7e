"""The values of a row as text, lists and utterances, and which of its keys were read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from common.data.turns import FormatError, Turn

ROLES = {  # any letter case
    "system": "system",
    "developer": "system",
    "系统": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "用户": "user",
    "observation": "user",  # a tool's result is what the model is told
    "tool": "user",
    "tool_response": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "gpt4": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "助手": "assistant",
    "function_call": "assistant",  # and a call is what it says
    "tool_call": "assistant",
}
SPEAKERS = ("role", "from")  # keys that say who speaks
SAID = ("content", "value", "text")  # keys that hold what is said


def role_of(said: object) -> str | None:
    """A role by any of its names; None where it is unknown."""
    return ROLES.get(said.strip().lower()) if isinstance(said, str) else None


def as_text(value: object, name: str, required: bool = True) -> str:
    """A value as text: a number as it is written, "" where it is None or empty and not required.

    `name` is what an error calls it.
    """
    if value is None or value == "":
        if required:
            raise FormatError("empty", f"{name} 是空的 is empty")
        return ""
    if not isinstance(value, str):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            found = f"{type(value).__name__} {str(value)[:40]!r}"
            raise FormatError("not-text", f"{name} 应为文字 must be text, found {found}")
        value = str(value)
    if required and not value.strip():
        raise FormatError("only-blanks", f"{name} 只有空白 is only blanks")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FormatError("half-a-character", f"{name} 有半个字符 holds half a character (a lone surrogate)") from None
    return value


class Fields:
    """A row, or an object inside one under `name`, that knows which of its keys were read."""

    def __init__(self, row: dict[str, Any], name: str = "") -> None:
        self.row = row
        self.name = name
        self.read: set[str] = set()

    def get(self, key: str) -> Any:
        """The value under a key as it is; None where there is none."""
        self.read.add(key)
        return self.row.get(key)

    def text(self, key: str, required: bool = True) -> str:
        """The text under a key; "" where there is none and it is not required."""
        return as_text(self.get(key), key, required)

    def list(self, key: str) -> list:
        """The list under a key, also where it is written as JSON text, as in CSV; [] where there is none."""
        value = self.get(key) or []
        if isinstance(value, str):
            value = _parsed(value)
        if not isinstance(value, list):
            raise FormatError("not-a-list", f"{key} 应为列表 must be a list, found {type(value).__name__}")
        return value

    def objects(self, key: str, expected: str) -> Iterator[Fields]:
        """The objects in the list under a key, as Fields; FormatError, with what is expected, for anything else."""
        for value in self.list(key):
            if not isinstance(value, dict):
                raise FormatError("not-an-utterance", f"{key}: 应有 {expected} expected, found {str(value)[:60]!r}")
            yield Fields(value, key)

    def utterances(self, key: str) -> list[Turn]:
        """The turns in a list of {role: …, content: …} or {from: …, value: …}."""
        return [self._utterance(message) for message in self.objects(key, "role, content 或 from, value")]

    def _utterance(self, message: Fields) -> Turn:
        """The turn of one message; "" is its text where the content is null or empty."""
        name = message.name
        speaker = next((key for key in SPEAKERS if key in message.row), None)
        if speaker is None:
            found = str(message.row)[:60]
            raise FormatError(
                "not-an-utterance", f"{name}: 应有 role, content 或 from, value expected, found {found!r}"
            )
        role = role_of(message.get(speaker))
        if role is None:
            raise FormatError(
                "unknown-role", f"{name}: 未知角色 unknown role {message.row[speaker]!r}; known: {', '.join(ROLES)}"
            )
        said = next((key for key in SAID if key in message.row), "content")
        value = message.get(said)
        if isinstance(value, list):
            value = self._parts(value, said)
        return Turn(role, as_text(value, said))

    def _parts(self, parts: list, name: str) -> str:
        """The text of a content that is a list of text parts, a line each."""
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text":
                raise FormatError("not-text", f"{name}: 只读文字 only text parts are read, found {kind!r}")
        return "\n".join(as_text(part.get("text"), name, required=False) for part in parts)


def _parsed(text: str) -> Any:
    """The value of JSON text; the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text
