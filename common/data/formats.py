"""Rows of every common shape, told by their keys, as one thing: a list of turns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from common.data.turns import FormatError, Turn, check_order

Row = dict[str, Any]
Reader = Callable[[Row], list[list[Turn]]]  # a row's conversations
Shape = frozenset[str]  # the keys a row of it has
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "observation": "user",  # a tool's result is what the model is told
    "tool": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # and a call is what it says
}
UTTERANCE = (("role", "content"), ("from", "value"))  # who speaks and what is said
MOSS_MARKS = re.compile(r"^\s*<\|\w+\|>:\s*|\s*<eo\w>\s*$")
SPEAKER = re.compile(r"<(Human|Assistant) \d+>\s*[:：]\s*(?:[（(](?:字数要求|[Ww]ord count)[^）)]*[）)]\s*)?")


def turns_of(row: object) -> list[list[Turn]]:
    """The conversations in one row: one list of turns, except HC3's rows, which give one for each answer.

    Raises FormatError naming the keys found, or the field that is empty or of the wrong type.
    """
    if not isinstance(row, dict):
        raise FormatError("not-an-object", f"应为对象 an object expected, found {type(row).__name__}")
    conversations = _shape_of(row)(row)
    for turns in conversations:
        check_order(turns)
    return conversations


def _shape_of(row: Row) -> Reader:
    """The one shape whose keys the row has; a shape within another (input+output in alpaca) gives way to it."""
    keys = {key for key, value in row.items() if value is not None}
    if {"A", "B", "answer"} <= keys:
        raise FormatError(
            "multiple-choice",
            "选择题 a multiple-choice row: its options would be lost; it is for scoring, not for training",
        )
    shapes = SHAPES if _asks(row) else SHAPES | TEXT_SHAPES
    fitting = [needs for needs in shapes if needs <= keys]
    widest = [needs for needs in fitting if not any(needs < other for other in fitting)]
    if len(widest) == 1:
        return shapes[widest[0]]
    if widest:
        raise FormatError(
            "ambiguous-keys",
            f"字段有歧义 ambiguous keys: {' or '.join(_names(needs) for needs in widest)}; remove what is not meant",
        )
    null = sorted(key for key in row if key not in keys)
    found = f"{_names(row)}{' (null: ' + _names(null) + ')' if null else ''}"
    raise FormatError(
        "unknown-keys", f"无法识别的字段 unknown keys: {found}; nearest known shape: {_names(_nearest_shape(row))}"
    )


def _asks(row: Row) -> bool:
    """Whether a key says, or beside a response seems to be meant to say (quary), that the row asks something."""
    meant = "response" in row and any(difflib.get_close_matches(str(key), ASKING, cutoff=0.75) for key in row)
    return bool(row.keys() & ASKING) or meant


def _nearest_shape(keys: Collection[str]) -> Shape:
    def likeness(needs: Shape) -> float:
        return sum(max((difflib.SequenceMatcher(None, n, str(k)).ratio() for k in keys), default=0) for n in needs)

    return max(SHAPES, key=lambda needs: likeness(needs) / len(needs))


def _names(keys: Iterable[str]) -> str:
    return "+".join(sorted(map(str, keys)))


def _text(row: Row, key: str, required: bool = True) -> str:
    """The text under a key; "" where there is none and it is not required."""
    value = row.get(key)
    if value is None or value == "":
        if required:
            raise FormatError("empty", f"{key} 是空的 is empty")
        return ""
    if not isinstance(value, str):
        raise FormatError("not-text", f"{key} 应为文字 must be text, found {type(value).__name__} {str(value)[:40]!r}")
    if required and not value.strip():
        raise FormatError("only-blanks", f"{key} 只有空白 is only blanks")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FormatError("half-a-character", f"{key} 有半个字符 holds half a character (a lone surrogate)") from None
    return value


def _list(row: Row, key: str) -> list:
    """The list under a key; [] where there is none."""
    value = row.get(key) or []
    if not isinstance(value, list):
        raise FormatError("not-a-list", f"{key} 应为列表 must be a list, found {type(value).__name__}")
    return value


def _role(said: object) -> str | None:
    """A role by any of its names; None where it is unknown."""
    return ROLES.get(said) if isinstance(said, str) else None


def _opening(row: Row) -> list[Turn]:
    """System text (and the tools on offer, which are part of it), then the history's pairs."""
    tools = _text(row, "tools", required=False)
    parts = [_text(row, "system", required=False), "" if tools.strip() == "[]" else tools]
    system = "\n".join(part for part in parts if part.strip())
    turns = [Turn("system", system)] if system else []
    for pair in _list(row, "history"):
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise FormatError(
                "not-pairs",
                f"history 应为 [问, 答] 的列表 must be pairs of question and answer, found {str(pair)[:40]!r}",
            )
        question, answer = (_text({"history": part}, "history") for part in pair)
        turns += [Turn("user", question), Turn("assistant", answer)]
    return turns


def _question_answer(question_keys: tuple[str, ...], answer_key: str) -> Reader:
    """A reader of rows whose question is the non-empty ones of `question_keys`, a line each."""

    def read(row: Row) -> list[list[Turn]]:
        parts = [_text(row, key, required=False) for key in question_keys]
        question = "\n".join(part for part in parts if part.strip())
        if not question:
            raise FormatError("empty", f"{_names(question_keys)} 是空的 is empty")
        return [[*_opening(row), Turn("user", question), Turn("assistant", _text(row, answer_key))]]

    return read


def _messages(key: str) -> Reader:
    """A reader of rows whose `key` lists utterances {role: …, content: …} or {from: …, value: …}."""

    def read(row: Row) -> list[list[Turn]]:
        turns = _opening(row)
        for message in _list(row, key):
            found = [names for names in UTTERANCE if isinstance(message, dict) and names[0] in message]
            if not found:
                raise FormatError(
                    "not-an-utterance",
                    f"{key}: 应有 role, content 或 from, value expected, found {str(message)[:60]!r}",
                )
            role_key, text_key = found[0]
            role = _role(message[role_key])
            if role is None:
                raise FormatError(
                    "unknown-role", f"{key}: 未知角色 unknown role {message[role_key]!r}; known: {', '.join(ROLES)}"
                )
            turns.append(Turn(role, _text(message, text_key)))
        return [turns]

    return read


def _rounds(row: Row) -> list[list[Turn]]:
    """Firefly's rounds {human, assistant} and XTuner's {system, input, output}."""
    turns = _opening(row)
    for round_ in _list(row, "conversation"):
        if not isinstance(round_, dict):
            raise FormatError(
                "not-an-utterance", f"conversation: 应有 human 和 assistant expected, found {str(round_)[:60]!r}"
            )
        if round_.get("system"):
            turns.append(Turn("system", _text(round_, "system")))
        question, answer = ("input", "output") if "input" in round_ else ("human", "assistant")
        turns += [Turn("user", _text(round_, question)), Turn("assistant", _text(round_, answer))]
    return [turns]


def _many_answers(row: Row) -> list[list[Turn]]:
    """HC3's rows: a conversation for each answer to the question."""
    question = Turn("user", _text(row, "question"))
    answers = _list(row, "human_answers") + _list(row, "chatgpt_answers")
    if not answers:
        raise FormatError("empty", "human_answers 和 chatgpt_answers 都是空的 are both empty")
    return [[question, Turn("assistant", _text({"answers": answer}, "answers"))] for answer in answers]


def _exam(row: Row) -> list[list[Turn]]:
    """COIG's exam questions: task, text and question; answer and explanation."""
    asked = [_text(row, f"textbox_{key}", required=False) for key in ("q_instruction", "q_context", "question")]
    explained = _text(row, "textbox_answer_analysis", required=False)
    answer = "\n".join(part for part in (_text(row, "textbox_answer"), explained) if part.strip())
    return [[Turn("user", "\n".join(part for part in asked if part.strip())), Turn("assistant", answer)]]


def _moss(row: Row) -> list[list[Turn]]:
    """MOSS's chats {turn_1: {Human, MOSS, Commands, …}}, each text between markers such as <|Human|>: and <eoh>."""
    meta = _text(row, "meta_instruction", required=False)
    turns = [Turn("system", meta)] if meta.strip() else []
    chat = row["chat"] if isinstance(row["chat"], dict) else {}
    for round_ in chat.values():
        if not isinstance(round_, dict):
            raise FormatError("not-an-utterance", f"chat: 应有 Human 和 MOSS expected, found {str(round_)[:60]!r}")
        command = MOSS_MARKS.sub("", _text(round_, "Commands", required=False)) or "None"
        if command != "None":
            raise FormatError("plugin-call", f"chat 调用了插件 calls a plugin, which would be lost: {command[:40]!r}")
        question, answer = (MOSS_MARKS.sub("", _text(round_, name)) for name in ("Human", "MOSS"))
        turns += [Turn("user", question), Turn("assistant", answer)]
    return [turns]


def _best_thread(row: Row) -> list[list[Turn]]:
    """OpenAssistant's trees {prompt: {text, role, replies: [{…, rank}, …]}}: always the reply of the best rank."""
    turns, messages = [], [row["prompt"]]
    while messages:
        if not all(isinstance(message, dict) and "role" in message for message in messages):
            raise FormatError(
                "not-an-utterance", f"prompt: 应有 role, text 和 replies expected, found {str(messages)[:60]!r}"
            )
        best = min(messages, key=lambda message: (message.get("rank") is None, message.get("rank") or 0))
        role = _role(best["role"])
        if role is None:
            raise FormatError(
                "unknown-role", f"prompt: 未知角色 unknown role {best['role']!r}; known: prompter, assistant"
            )
        turns.append(Turn(role, _text(best, "text")))
        messages = _list(best, "replies")
    return [turns[:-1] if turns[-1].role == "user" else turns]


def _dialogue(row: Row) -> list[list[Turn]]:
    """RefGPT's dialogues, one text: <start_chat><Human 1>:…<Assistant 1>:…<end_chat>."""
    text = _text(row, "dialogue").strip().removeprefix("<start_chat>").removesuffix("<end_chat>")
    before, *parts = SPEAKER.split(text)
    if before.strip() or not parts:
        raise FormatError("not-a-dialogue", f"dialogue: 应以 <Human 1>: 开头 must begin with it, found {text[:40]!r}")
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return [[Turn(ROLES[who.lower()], _text({"dialogue": said.strip()}, "dialogue")) for who, said in spoken]]


def _plain_text(key: str) -> Reader:
    return lambda row: [[Turn("text", _text(row, key))]]


SHAPES: dict[Shape, Reader] = {
    frozenset({"messages"}): _messages("messages"),
    frozenset({"conversations"}): _messages("conversations"),
    frozenset({"conversation"}): _rounds,
    frozenset({"instruction", "output"}): _question_answer(("instruction", "input"), "output"),
    frozenset({"input", "output"}): _question_answer(("input",), "output"),
    frozenset({"instruction", "input", "output"}): _question_answer(("instruction", "input"), "output"),
    frozenset({"instruction", "response"}): _question_answer(("instruction", "input", "context"), "response"),
    frozenset({"content", "summary"}): _question_answer(("content",), "summary"),
    frozenset({"instruct", "query", "answer"}): _question_answer(("instruct", "query"), "answer"),
    frozenset({"query", "response"}): _question_answer(("query",), "response"),
    frozenset({"question", "answer"}): _question_answer(("question",), "answer"),
    frozenset({"question", "std_answer"}): _question_answer(("question",), "std_answer"),
    frozenset({"question", "human_answers", "chatgpt_answers"}): _many_answers,
    frozenset({"input", "target"}): _question_answer(("input",), "target"),
    frozenset({"prompt", "response"}): _question_answer(("prompt",), "response"),
    frozenset({"prompt", "completion"}): _question_answer(("prompt",), "completion"),
    frozenset({"textbox_question", "textbox_answer"}): _exam,
    frozenset({"chat", "num_turns"}): _moss,
    frozenset({"message_tree_id", "prompt"}): _best_thread,
    frozenset({"dialogue", "reference"}): _dialogue,
}
# pre-training text, unless the row has a key of ASKING
TEXT_SHAPES: dict[Shape, Reader] = {frozenset({key}): _plain_text(key) for key in ("response", "text")}
ASKING = {"instruction", "instruct", "input", "query", "question", "prompt", "content", "history"}
