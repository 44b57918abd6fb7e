"""Rows of every common shape, told by their keys, as one thing: a list of turns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from common.data.fields import MATTERS, ROLES, SPEAKERS, Fields, as_text, mark_of, role_of
from common.data.turns import FormatError, Turn, in_order

Row = dict[str, Any]
Reader = Callable[[Fields], list[list[Turn]]]  # a row's conversations
Shape = frozenset[str]  # the keys a row of it has
OPENING = {"system", "system_prompt", "tools", "history"}
PREFERENCE = {key for key, (kind, _) in MATTERS.items() if kind == "preference"}
MOSS_MARKS = re.compile(r"^\s*<\|\w+\|>:\s*|\s*<eo\w>\s*$")
MOSS_NOTES = ("Inner Thoughts", "Tool Responses")
SPEAKER = re.compile(r"<(Human|Assistant) \d+>\s*[:：]\s*(?:[（(](?:字数要求|[Ww]ord count)[^）)]*[）)]\s*)?")


class Reading(NamedTuple):
    """What a row says: its conversations (one, except for HC3's rows), keys that were not read, what was repaired."""

    conversations: list[Sequence[Turn]]
    unused: list[str]
    repaired: list[str]


def read_row(row: object, asked: bool = False) -> Reading:
    """The Reading of one row.

    asked: the row is one to be asked, so that it may end with a question, and marks of what to learn do not matter.
    Raises FormatError naming the keys found, or the field that is empty, of the wrong type, or would be lost.
    """
    if isinstance(row, list) and row and all(isinstance(message, dict) for message in row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise FormatError("not-an-object", f"应为对象 an object expected, found {type(row).__name__}")
    shape, read = _shape_of(row)
    fields = Fields(row)
    conversations = read(fields)
    if asked:
        mended = [in_order(turns, answered=not _ends_asking(turns)) for turns in conversations]
    else:
        mended = [in_order(_marked(fields, turns)) for turns in conversations]
    repaired = [repair for _, repairs in mended for repair in repairs]
    if not asked and not (mark_of(fields.get("weight"), "weight") and all(_teaches(turns) for turns, _ in mended)):
        raise FormatError("nothing-to-learn", "没有要学的回答 every answer of the row is marked as not to be learnt")
    return Reading([turns for turns, _ in mended], fields.unread(shape), repaired)


def _ends_asking(turns: Sequence[Turn]) -> bool:
    """Whether the last turn that says something is no answer."""
    return next((turn.role for turn in reversed(turns) if turn.text.strip()), "") != "assistant"


def _teaches(turns: Sequence[Turn]) -> bool:
    """Whether something in the turns is learnt."""
    return any(turn.learn and turn.role in ("assistant", "text") for turn in turns)


def _marked(row: Fields, turns: list[Turn]) -> list[Turn]:
    """The turns with the marks of the row's `loss_mask`, one a turn (the system text may lack one) or one an answer."""
    marks = [mark_of(mark, "loss_mask") for mark in row.items("loss_mask")]
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


def _shape_of(row: Row) -> tuple[Shape, Reader]:
    """The one shape whose keys the row has; a shape within another (input+output in alpaca) gives way to it."""
    keys = {key for key, value in row.items() if value is not None}
    if {"A", "B", "answer"} <= keys:
        raise FormatError(
            "multiple-choice",
            "选择题 a multiple-choice row: its options would be lost; it is for scoring, not for training",
        )
    if all(isinstance(value, dict) and "0" in value for value in row.values()) and row:
        raise FormatError(
            "a-whole-file", "整个文件是一个对象 the file is one object of columns; in pandas: to_json(orient='records')"
        )
    if not PREFERENCE.isdisjoint(keys):
        pair = sorted(PREFERENCE & keys)
        raise FormatError(MATTERS[pair[0]][0], f"{_names(pair)}: {MATTERS[pair[0]][1]}")
    widest = _widest(frozenset(keys), _asks(row))
    if len(widest) == 1:
        return widest[0], READERS[widest[0]]
    if widest:
        raise FormatError(
            "ambiguous-keys",
            f"字段有歧义 ambiguous keys: {' or '.join(_names(needs) for needs in widest)}; remove what is not meant",
        )
    inside = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(row) == 1 and inside:
        raise FormatError(
            "a-whole-file", f"各行在 the rows are in {inside[0]}: write that list alone, or an object of it a line"
        )
    null = sorted(key for key in row if key not in keys)
    found = f"{_names(row)}{' (null: ' + _names(null) + ')' if null else ''}"
    raise FormatError(
        "unknown-keys", f"无法识别的字段 unknown keys: {found}; nearest known shape: {_names(_nearest_shape(row))}"
    )


@lru_cache(maxsize=256)
def _widest(keys: Shape, asks: bool) -> list[Shape]:
    """The shapes of a row with these keys, without those that are part of another one of them."""
    fitting = [needs for needs in (SHAPES if asks else READERS) if needs <= keys]
    return [needs for needs in fitting if not any(needs < other for other in fitting)]


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


def _opening(row: Fields) -> list[Turn]:
    """System text (and the tools on offer, which are part of it), then the history."""
    if OPENING.isdisjoint(row.row):
        return []
    tools = row.text("tools", required=False)
    parts = [row.text("system", required=False), row.text("system_prompt", required=False)]
    parts.append("" if tools.strip() == "[]" else tools)
    system = "\n".join(part for part in parts if part.strip())
    turns = [Turn("system", system)] if system else []
    history = row.items("history")
    if history and all(isinstance(message, dict) for message in history):
        return turns + row.utterances("history")
    for pair in history:
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise FormatError(
                "not-pairs",
                f"history 应为 [问, 答] 的列表 must be pairs of question and answer, found {str(pair)[:40]!r}",
            )
        question, answer = (as_text(part, "history", required=False) for part in pair)
        turns += [Turn("user", question), Turn("assistant", answer)]
    return turns


def _question_answer(question_keys: tuple[str, ...], answer_key: str) -> Reader:
    """A reader of rows whose question is the non-empty ones of `question_keys` and `context`, a line each."""

    def read(row: Fields) -> list[list[Turn]]:
        parts = [row.text(key, required=False) for key in (*question_keys, "context")]
        question = "\n".join(part for part in parts if part.strip())
        if not question:
            raise FormatError("empty", f"{_names(question_keys)} 是空的 is empty")
        return [[*_opening(row), Turn("user", question), Turn("assistant", row.text(answer_key))]]

    return read


def _messages(key: str) -> Reader:
    """A reader of rows whose `key` lists utterances."""

    def read(row: Fields) -> list[list[Turn]]:
        said = row.utterances(key)
        return [_opening(row) + said]

    return read


def _prompt_completion(row: Fields) -> list[list[Turn]]:
    """TRL's rows: prompt and completion are texts, or both are lists of messages."""
    if isinstance(row.row["prompt"], list) or isinstance(row.row["completion"], list):
        return [_opening(row) + row.utterances("prompt") + row.utterances("completion")]
    return _question_answer(("prompt",), "completion")(row)


def _rounds(row: Fields) -> list[list[Turn]]:
    """Firefly's rounds {human, assistant}, XTuner's {system, input, output}, or utterances."""
    if any(isinstance(round_, dict) and round_.keys() & set(SPEAKERS) for round_ in row.items("conversation")):
        return [_opening(row) + row.utterances("conversation")]
    turns = _opening(row)
    for round_ in row.objects("conversation", "human 和 assistant"):
        if round_.get("system"):
            turns.append(Turn("system", round_.text("system")))
        question, answer = ("input", "output") if "input" in round_.row else ("human", "assistant")
        learn = mark_of(round_.get("output_with_loss"), "output_with_loss") and round_.is_learnt()
        asked, answered = (round_.text(key, required=False) for key in (question, answer))
        turns += [Turn("user", asked), Turn("assistant", answered, learn)]
    return [turns]


def _many_answers(row: Fields) -> list[list[Turn]]:
    """HC3's rows: a conversation for each answer to the question."""
    question = Turn("user", row.text("question"))
    answers = row.items("human_answers") + row.items("chatgpt_answers")
    if not answers:
        raise FormatError("empty", "human_answers 和 chatgpt_answers 都是空的 are both empty")
    return [[question, Turn("assistant", as_text(answer, "answers"))] for answer in answers]


def _exam(row: Fields) -> list[list[Turn]]:
    """COIG's exam questions: task, text and question; answer and explanation."""
    asked = [row.text(f"textbox_{key}", required=False) for key in ("q_instruction", "q_context", "question")]
    explained = row.text("textbox_answer_analysis", required=False)
    answer = "\n".join(part for part in (row.text("textbox_answer"), explained) if part.strip())
    return [[Turn("user", "\n".join(part for part in asked if part.strip())), Turn("assistant", answer)]]


def _moss(row: Fields) -> list[list[Turn]]:
    """MOSS's chats {turn_1: {Human, MOSS, Commands, …}}, each text between markers such as <|Human|>: and <eoh>."""
    meta = row.text("meta_instruction", required=False)
    turns = [Turn("system", meta)] if meta.strip() else []
    chat = row.get("chat")
    for value in chat.values() if isinstance(chat, dict) else ():
        if not isinstance(value, dict):
            raise FormatError("not-an-utterance", f"chat: 应有 Human 和 MOSS expected, found {str(value)[:60]!r}")
        round_ = Fields(value, "chat")
        command = MOSS_MARKS.sub("", round_.text("Commands", required=False)) or "None"
        if command != "None":
            raise FormatError("plugin-call", f"chat 调用了插件 calls a plugin, which would be lost: {command[:40]!r}")
        question, answer = (MOSS_MARKS.sub("", round_.text(name)) for name in ("Human", "MOSS"))
        turns += [Turn("user", question), Turn("assistant", answer)]
        round_.read |= {name for name in MOSS_NOTES if MOSS_MARKS.sub("", str(value.get(name))) == "None"}
        row.inner += round_.unread()
    return [turns]


def _best_thread(row: Fields) -> list[list[Turn]]:
    """OpenAssistant's trees {prompt: {text, role, replies: [{…, rank}, …]}}: always the reply of the best rank."""
    turns, messages = [], [row.get("prompt")]
    while messages:
        if not all(isinstance(message, dict) and "role" in message for message in messages):
            raise FormatError(
                "not-an-utterance", f"prompt: 应有 role, text 和 replies expected, found {str(messages)[:60]!r}"
            )
        best = min(messages, key=lambda message: (message.get("rank") is None, message.get("rank") or 0))
        role = role_of(best["role"])
        if role is None:
            raise FormatError(
                "unknown-role", f"prompt: 未知角色 unknown role {best['role']!r}; known: prompter, assistant"
            )
        message = Fields(best, "prompt")
        turns.append(Turn(role, message.text("text")))
        row.inner += ["prompt.replies"] if len(messages) > 1 else []
        messages = message.items("replies")
        row.inner += message.unread()
    return [turns]


def _dialogue(row: Fields) -> list[list[Turn]]:
    """RefGPT's dialogues, one text: <start_chat><Human 1>:…<Assistant 1>:…<end_chat>."""
    text = row.text("dialogue").strip().removeprefix("<start_chat>").removesuffix("<end_chat>")
    before, *parts = SPEAKER.split(text)
    if before.strip() or not parts:
        raise FormatError("not-a-dialogue", f"dialogue: 应以 <Human 1>: 开头 must begin with it, found {text[:40]!r}")
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return [[Turn(ROLES[who.lower()], as_text(said.strip(), "dialogue")) for who, said in spoken]]


def _plain_text(key: str) -> Reader:
    return lambda row: [[Turn("text", row.text(key))]]


SHAPES: dict[Shape, Reader] = {
    frozenset({"messages"}): _messages("messages"),
    frozenset({"conversations"}): _messages("conversations"),
    frozenset({"conversation"}): _rounds,
    frozenset({"dialog"}): _messages("dialog"),
    frozenset({"instruction", "output"}): _question_answer(("instruction", "input"), "output"),
    frozenset({"input", "output"}): _question_answer(("input",), "output"),
    frozenset({"instruction", "input", "output"}): _question_answer(("instruction", "input"), "output"),
    frozenset({"instruction", "response"}): _question_answer(("instruction", "input"), "response"),
    frozenset({"content", "summary"}): _question_answer(("content",), "summary"),
    frozenset({"instruct", "query", "answer"}): _question_answer(("instruct", "query"), "answer"),
    frozenset({"query", "response"}): _question_answer(("query",), "response"),
    frozenset({"question", "answer"}): _question_answer(("question",), "answer"),
    frozenset({"question", "std_answer"}): _question_answer(("question",), "std_answer"),
    frozenset({"question", "human_answers", "chatgpt_answers"}): _many_answers,
    frozenset({"input", "target"}): _question_answer(("input",), "target"),
    frozenset({"prompt", "response"}): _question_answer(("prompt",), "response"),
    frozenset({"prompt", "completion"}): _prompt_completion,
    frozenset({"问题", "答案"}): _question_answer(("问题",), "答案"),
    frozenset({"指令", "输出"}): _question_answer(("指令", "输入"), "输出"),
    frozenset({"输入", "输出"}): _question_answer(("输入",), "输出"),
    frozenset({"指令", "输入", "输出"}): _question_answer(("指令", "输入"), "输出"),
    frozenset({"textbox_question", "textbox_answer"}): _exam,
    frozenset({"chat", "num_turns"}): _moss,
    frozenset({"message_tree_id", "prompt"}): _best_thread,
    frozenset({"dialogue", "reference"}): _dialogue,
}
# pre-training text, unless the row has a key of ASKING
TEXT_SHAPES: dict[Shape, Reader] = {frozenset({key}): _plain_text(key) for key in ("response", "text")}
READERS = SHAPES | TEXT_SHAPES
ASKING = {"instruction", "instruct", "input", "query", "question", "prompt", "content", "history"}
