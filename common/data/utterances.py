"""Messages as turns: who speaks, what is said, what was thought before it, what is called and what that gave."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from common.conversation.turns import FormatError, Turn
from common.data.defects import matter_of
from common.data.fields import ROLES, SAID, SPEAKERS, SPOKEN, Fields, as_text, holds_something, role_of
from common.data.tools import calls_in, calls_of

THOUGHT = ("reasoning_content", "reasoning", "thinking", "complex_cot")  # keys that hold what was thought
OPEN, CLOSE = "<think>", "</think>"  # around a thought at the start of an answer
ENDS = re.compile(rf"^{CLOSE}\s*$", re.MULTILINE)
BEGUN = f"{CLOSE} 前没有 no {OPEN} before it: 之前的文字当作思考 what stands before it is read as the thought"
KNOWN = SPOKEN | {*THOUGHT, "tool_calls", "tool_call_id"}


class Uttered(NamedTuple):
    """A message: its turn, of the role "call" where it is a call alone, and the ids of its calls, or of the one call
    whose result it is."""

    turn: Turn
    ids: tuple[str, ...] = ()


def utterances(row: Fields, key: str) -> list[Turn]:
    """The turns in the list under a key, of {role: …, content: …} or {from: …, value: …}."""
    plain = [_plain(message) for message in row.items(key)]
    said = [message for message in plain if message]
    if len(said) < len(plain):
        said = [_uttered(message) for message in row.objects(key, "role, content 或 from, value", KNOWN)]
    return _with_calls(said)


def thought_of_file(turn: Turn, repairs: list[str]) -> Turn:
    """`thought_apart` of a turn in a file; what is repaired is added to `repairs`.

    What serves a model whose prompt ends with <think> leaves that out of the answer: where </think> has a line for
    itself, what stands before it is a thought. FormatError too where it stands elsewhere and no <think> before it.
    """
    if turn.role == "assistant" and not turn.thought and CLOSE in turn.text and OPEN not in turn.text:
        if turn.text.count(CLOSE) > 1 or not ENDS.search(turn.text):
            raise FormatError("thought", f"{CLOSE} 前没有 no {OPEN} before it; begin the thought, or remove {CLOSE}")
        repairs.append(BEGUN)
        turn = turn._replace(text=OPEN + turn.text)
    return thought_apart(turn)


def thought_apart(turn: Turn) -> Turn:
    """An answer that begins with <think>…</think>, with its thought apart; any other turn as it is.

    What stands around thought and answer is left out as the templates of such models do. FormatError where the thought
    has no end, or there is another one under a key.
    """
    text = turn.text.lstrip() if turn.role == "assistant" else ""
    if text.startswith(OPEN):
        thought, end, answer = text.removeprefix(OPEN).partition(CLOSE)
        if not end:
            raise FormatError("thought", f"{OPEN} 没有结束 has no {CLOSE}; end the thought, or remove {OPEN}")
        thought = thought.strip("\n")
        if turn.thought and thought and thought != turn.thought:
            raise FormatError("thought", f"{OPEN} 与 {THOUGHT[0]} 不同 two thoughts of one answer; keep one")
        turn = turn._replace(text=answer.lstrip("\n"), thought=turn.thought or thought)
    if turn.thought and not turn.text.strip() and not turn.calls:
        raise FormatError("empty", "思考后没有回答 a thought without an answer")
    return turn


def _plain(message: object) -> Uttered | None:
    """A message of a known role and a text alone, as most are; None for others, and `_uttered` reads."""
    if not isinstance(message, dict) or len(message) != 2:
        return None
    for speaker, said in (("role", "content"), ("from", "value")):
        role = role_of(message.get(speaker))
        if role and type(message.get(said)) is str:
            return Uttered(Turn(role, as_text(message[said], said, required=False)))
    return None


def _uttered(message: Fields) -> Uttered:
    """One message; "" is its text where the content is null or empty."""
    name = message.name
    row = {key: value for key, value in message.row.items() if value is not None}
    speaker = next((key for key in SPEAKERS if key in row), None)
    saying = [key for key in SAID if key in row]
    silent = SPOKEN.isdisjoint(message.row.keys() - {*SPEAKERS}) and "tool_calls" not in row
    if speaker is None or silent and _says_something(message.row):
        raise FormatError(
            "not-an-utterance", f"{name}: 应有 role, content 或 from, value expected, found {str(row)[:60]!r}"
        )
    if len([key for key in saying if holds_something(row[key])]) > 1:
        raise FormatError("ambiguous-keys", f"{name}: {' 和 and '.join(saying)} 都有文字 both hold text; keep one")
    role = role_of(message.get(speaker))
    if role is None:
        raise FormatError(
            "unknown-role", f"{name}: 未知角色 unknown role {message.row[speaker]!r}; known: {', '.join(ROLES)}"
        )
    said = next((key for key in saying if holds_something(row[key])), saying[0] if saying else "content")
    value = message.get(said)
    if isinstance(value, list):
        value = _text_of(message, value, said)
    text = as_text(value, said, required=False)
    learn = message.is_learnt() or role not in ("assistant", "call")
    if role == "tool":
        message.read.add("name")  # of the function that was called, which the call says
        id_ = message.text("tool_call_id", required=False)
        return Uttered(Turn(role, text), (id_,) if id_ else ())
    if role != "assistant":
        return Uttered(Turn(role, text, learn))
    calls, ids = calls_of(message)
    return Uttered(Turn(role, text, learn, thought_in(message), calls), ids)


def thought_in(said: Fields) -> str:
    """What was thought before the answer in a message or a row, under any of its keys; FormatError where two differ."""
    if said.row.keys().isdisjoint(THOUGHT):
        return ""  # most
    thoughts = {said.text(key) for key in THOUGHT if isinstance(said.row.get(key), str) and said.row[key]}
    if len(thoughts) > 1:
        raise FormatError("thought", f"{said.name or 'row'}: {', '.join(THOUGHT)} 不同 hold two thoughts; keep one")
    return next(iter(thoughts), "")


def _text_of(message: Fields, parts: list[Any], name: str) -> str:
    """The text of a content that is a list of text parts, a line each."""
    texts = []
    for value in parts:
        part = Fields(value if isinstance(value, dict) else {"type": type(value).__name__}, f"{message.name}.{name}")
        kind = part.get("type")
        if kind != "text" or "text" not in part.row:
            found = repr(kind) if kind != "text" else f"text 没有 text without one: {str(part.row)[:60]}"
            raise FormatError("not-text", f"{name}: 只读文字 only text parts are read, found {found}")
        texts.append(part.text("text", required=False))
        message.inner += part.unread()
    return "\n".join(texts)


def _says_something(message: dict[str, Any]) -> bool:
    """Whether a message has a text under a key of its own, which no reader knows."""
    others = [key for key in message if key not in SPEAKERS and not matter_of(str(key), inside=True)[0]]
    return any(type(message[key]) is str and message[key].strip() for key in others)


def _with_calls(said: Sequence[Uttered]) -> list[Turn]:
    """The turns of messages: calls in one answer, each result a turn, in the calls' order.

    A message of calls alone that holds none is what the assistant says, and results that follow no call are what the
    user says.
    """
    turns: list[Turn] = []
    results: list[Uttered] = []
    ids: tuple[str, ...] = ()  # of the calls before
    for message in said:
        role = message.turn.role
        if role == "tool" and turns and turns[-1].calls:
            results.append(message)
            continue
        turns += _in_order(results, ids)
        results = []
        if role == "call":
            _add_call(turns, message.turn)
        else:
            turns.append(message.turn._replace(role="user") if role == "tool" else message.turn)
        ids = message.ids
    return turns + _in_order(results, ids)


def _add_call(turns: list[Turn], turn: Turn) -> None:
    """Add a message of calls alone to the answer before it, or as an answer of its own."""
    calls = calls_in(turn.text)
    if calls and turns and turns[-1].role == "assistant" and turns[-1].learn == turn.learn:
        turns[-1] = turns[-1]._replace(calls=(*turns[-1].calls, *calls))
    else:
        turns.append(turn._replace(role="assistant", text="" if calls else turn.text, calls=calls))


def _in_order(results: list[Uttered], ids: tuple[str, ...]) -> list[Turn]:
    """The results' turns in the order of the calls' `ids`; as they are where nothing says whose they are."""
    if not ids or not all(result.ids for result in results):
        return [result.turn for result in results]
    given = [result.ids[0] for result in results]
    for id_ in given:
        if id_ not in ids:
            raise FormatError("tool-order", f"tool_call_id {id_[:40]!r}: 没有这个调用 no call before has it")
    for id_ in ids:
        if id_ not in given:
            raise FormatError("tool-order", f"id {id_[:40]!r}: 这个调用没有结果 the call has no result behind it")
    return [result.turn for result in sorted(results, key=lambda result: ids.index(result.ids[0]))]
