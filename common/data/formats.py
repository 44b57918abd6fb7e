"""Rows of every common shape, told by their keys, as one thing: a list of turns."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from common.conversation.turns import (
    Conversation,
    FormatError,
    Repair,
    Turn,
    Unusable,
    ends_asking,
    fill_identity,
    in_order,
    marked,
    teaches,
)
from common.data.corpora import CORPORA, RARE, Reader, Shape, spoken
from common.data.defects import matter_of
from common.data.fields import (
    QUESTIONS,
    SPEAKERS,
    Fields,
    as_text,
    holds_something,
    mark_of,
    nearest,
    question_and_answer,
)
from common.data.tools import opened
from common.data.utterances import thought_in, thought_of_file, utterances

if TYPE_CHECKING:
    from common.config import SFTConfig
    from common.data.sources import Record

Row = dict[str, Any]
OPENING = {"system", "system_prompt", "tools", "history"}


class Reading(NamedTuple):
    """What a row says: its conversations (one, except for HC3's rows), keys that were not read, what was repaired."""

    conversations: list[Sequence[Turn]]
    unused: list[str]
    repaired: list[str]


@dataclass
class Notes:
    """What else there is to say of the usable rows of a file."""

    unused: Counter[str] = field(default_factory=Counter)  # key that was not read: rows that have it
    repaired: list[Repair] = field(default_factory=list)

    def add(self, where: str, reading: Reading) -> None:
        """Note what was said of the row at `where`, file:line."""
        if reading.unused:
            self.unused.update(set(reading.unused))
        self.repaired += [Repair(where, reason) for reason in dict.fromkeys(reading.repaired)]


def conversations_in(
    record: Record,
    path: str,
    cfg: SFTConfig,
    notes: Notes | None = None,
    read: Callable[[object], Reading] | None = None,
) -> Iterator[Conversation | Unusable]:
    """Yield the conversations of one record, as `read` reads it, or the one Unusable that says why it has none.

    What else there is to say of the record goes into `notes`.
    """
    where = f"{path}:{record.place}"
    if record.problem:
        yield Unusable(where, record.problem, record.value, record.kind)
        return
    try:
        reading = (read or read_row)(record.value)
        found = [fill_identity(turns, cfg.model_name, cfg.model_author) for turns in reading.conversations]
    except FormatError as problem:
        yield Unusable(where, problem.reason, record.value, problem.kind)
        return
    if notes is not None:
        notes.add(where, reading)
    for turns in found:
        yield Conversation(where, turns)


def read_row(row: object, asked: bool = False) -> Reading:
    """The Reading of one row.

    asked: the row is one to be asked, so that it may end with a question, and marks of what to learn do not matter.
    Raises FormatError naming the keys found, or the field that is empty, of the wrong type, or would be lost.
    """
    if isinstance(row, list) and row and all(isinstance(message, dict) for message in row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise FormatError("not-an-object", f"应为对象 an object expected, found {type(row).__name__}")
    row, shape, read = _shape_of(row)
    fields = Fields(row)
    repaired: list[str] = []
    conversations = [[thought_of_file(turn, repaired) for turn in turns] for turns in read(fields)]
    if asked:
        mended = [in_order(turns, answered=not ends_asking(turns)) for turns in conversations]
    else:
        marks = [mark_of(mark, "loss_mask") for mark in fields.items("loss_mask")]
        mended = [in_order(marked(turns, marks)) for turns in conversations]
    repaired += [repair for _, repairs in mended for repair in repairs]
    if not asked and not (fields.is_learnt_whole() and all(teaches(turns) for turns, _ in mended)):
        raise FormatError("nothing-to-learn", "没有要学的回答 every answer of the row is marked as not to be learnt")
    unused = fields.unread(shape)
    _check_asked(row, unused, conversations)
    return Reading([turns for turns, _ in mended], unused, repaired)


def _check_asked(row: Row, unused: list[str], conversations: list[list[Turn]]) -> None:
    """FormatError where a key that asks in another shape was not read, and no turn says what it asks."""
    for key in ASKING.intersection(unused) - {"content"}:
        text = str(row[key]).strip()
        if not any(text in turn.text for turns in conversations for turn in turns):
            raise FormatError(
                "unread", f"{key}: 没有读 is not read here and its text would be lost; join it to what is read"
            )


def _shape_of(row: Row) -> tuple[Row, Shape, Reader]:
    """The row and the one shape whose keys it has; a shape within another (input+output in alpaca) gives way to it.

    The keys are in small letters where only so they are those of a shape.
    """
    keys = {key for key, value in row.items() if value is not None}
    if {"A", "B"} <= keys:
        raise FormatError(
            "multiple-choice",
            "选择题 a multiple-choice row: its options would be lost; it is for scoring, not for training",
        )
    if all(isinstance(value, dict) and "0" in value for value in row.values()) and row:
        raise FormatError(
            "a-whole-file", "整个文件是一个对象 the file is one object of columns; in pandas: to_json(orient='records')"
        )
    pair = _pair(frozenset(keys))
    if pair:
        raise FormatError("preference", f"{_names(pair)}: {matter_of(pair[0])[1]}")
    widest = _widest(frozenset(keys), _asks(frozenset(row)))
    if len(widest) == 1:
        if str(row.get("label")).lower() in ("true", "false"):
            raise FormatError("preference", "label: KTO 的标记 whether the answer is good; keep the good ones")
        return row, widest[0], READERS[widest[0]]
    if widest:
        raise FormatError(
            "ambiguous-keys",
            f"字段有歧义 ambiguous keys: {' or '.join(_names(needs) for needs in widest)}; remove what is not meant",
        )
    inside = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    inside = [key for key in inside if len(row) == 1 or key in OF_ROWS]
    if inside:
        raise FormatError(
            "a-whole-file", f"各行在 the rows are in {_names(inside)}: write that list alone, or an object of it a line"
        )
    if len(row) > 1 and all(isinstance(value, dict) for value in row.values()):
        raise FormatError("a-whole-file", "每个值是一行 each value is a row: write the values as a list")
    for shape, read in RARE.items():
        if shape <= keys:
            return row, shape, read
    if named := question_and_answer(keys):
        return row, frozenset(named), _question_answer(named[:1], named[1])
    small = {str(key).lower(): value for key, value in row.items()}
    known = question_and_answer(small) or any(shape <= small.keys() for shape in SHAPES | RARE)
    if known and len(small) == len(row) and small.keys() != row.keys():
        return _shape_of(small)
    null = sorted(key for key in row if key not in keys)
    found = f"{_names(row)}{' (null: ' + _names(null) + ')' if null else ''}"
    raise FormatError("unknown-keys", f"无法识别的字段 unknown keys: {found}; {_nearest(frozenset(row))}")


@lru_cache(maxsize=256)
def _pair(keys: Shape) -> list[str]:
    """The keys of a preference pair among these."""
    return [key for key in keys if matter_of(str(key))[0] == "preference"]


@lru_cache(maxsize=256)
def _widest(keys: Shape, asks: bool) -> list[Shape]:
    """The shapes of a row with these keys, without those that are part of another one of them."""
    fitting = [needs for needs in (SHAPES if asks else READERS) if needs <= keys]
    return [needs for needs in fitting if not any(needs < other for other in fitting)]


@lru_cache(maxsize=256)
def _asks(keys: Shape) -> bool:
    """Whether a key says, or beside a response seems to be meant to say (quary), that the row is more than a text."""
    near = (difflib.get_close_matches(str(key), ASKING, cutoff=0.75) for key in keys)
    meant = "response" in keys and (not keys.isdisjoint(QUESTIONS) or any(near))
    return bool(keys & ASKING) or meant or "text" in keys and bool(keys & BESIDE_TEXT)


@lru_cache(maxsize=256)
def _nearest(keys: Shape) -> str:
    """`nearest` of the shapes; the rows of a file have mostly the same keys."""
    return nearest(keys, SHAPES)


def _names(keys: Iterable[str]) -> str:
    """The keys in a line that can be read, whatever a file has for keys: a text each, or thousands of them."""
    names = [" ".join(key.split())[:NAME] for key in sorted(map(str, keys))]
    return "+".join(names) if len(names) <= NAMES else f"{'+'.join(names[:NAMES])}+… ({len(names)})"


def _opening(row: Fields) -> list[Turn]:
    """System text and tools on offer, then the history."""
    if OPENING.isdisjoint(row.row):
        return []
    parts = [row.text("system", required=False), row.text("system_prompt", required=False)]
    turns = opened(row, "\n".join(part for part in parts if part.strip()))
    history = row.items("history")
    if history and all(isinstance(message, dict) for message in history):
        return turns + utterances(row, "history")
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
        answer = Turn("assistant", row.text(answer_key), thought=thought_in(row))
        return [[*_opening(row), *spoken(question), answer]]

    return read


def _messages(key: str) -> Reader:
    """A reader of rows whose `key` lists utterances."""

    def read(row: Fields) -> list[list[Turn]]:
        said = utterances(row, key)
        return [_opening(row) + said]

    return read


def _prompt_completion(row: Fields) -> list[list[Turn]]:
    """TRL's rows: prompt and completion are texts, or both are lists of messages."""
    if isinstance(row.row["prompt"], list) or isinstance(row.row["completion"], list):
        return [_opening(row) + utterances(row, "prompt") + utterances(row, "completion")]
    return _question_answer(("prompt",), "completion")(row)


def _rounds(row: Fields) -> list[list[Turn]]:
    """Firefly's rounds {human, assistant}, XTuner's {system, input, output}, or utterances."""
    if any(isinstance(round_, dict) and round_.keys() & set(SPEAKERS) for round_ in row.items("conversation")):
        return [_opening(row) + utterances(row, "conversation")]
    turns = _opening(row)
    for round_ in row.objects("conversation", "human 和 assistant", ROUND):
        if not round_.row.keys() & ROUND and holds_something(round_.row):
            raise FormatError(
                "not-an-utterance", f"conversation: 应有 human 和 assistant expected, found {str(round_.row)[:60]!r}"
            )
        if round_.get("system"):
            turns.append(Turn("system", round_.text("system")))
        question, answer = ("input", "output") if "input" in round_.row else ("human", "assistant")
        learn = mark_of(round_.get("output_with_loss"), "output_with_loss") and round_.is_learnt()
        asked, answered = (round_.text(key, required=False) for key in (question, answer))
        turns += [Turn("user", asked), Turn("assistant", answered, learn)]
    return [turns]


def _plain_text(key: str) -> Reader:
    return lambda row: [[Turn("text", row.text(key))]]


# a question and its answer alone
ASKED = "query question question input input prompt 问题 问题 输入".split()
ANSWERED = "response answer std_answer output target response 答案 回答 输出".split()
SHAPES: dict[Shape, Reader] = {
    frozenset({"messages"}): _messages("messages"),
    frozenset({"conversations"}): _messages("conversations"),
    frozenset({"conversation"}): _rounds,
    frozenset({"dialog"}): _messages("dialog"),
    frozenset({"instruction", "output"}): _question_answer(("instruction", "input"), "output"),
    frozenset({"instruction", "input", "output"}): _question_answer(("instruction", "input"), "output"),
    frozenset({"instruction", "response"}): _question_answer(("instruction", "input"), "response"),
    frozenset({"content", "summary"}): _question_answer(("content",), "summary"),
    frozenset({"instruct", "query", "answer"}): _question_answer(("instruct", "query"), "answer"),
    frozenset({"input", "reasoning_content", "content"}): _question_answer(("input",), "content"),
    frozenset({"prompt", "completion"}): _prompt_completion,
    frozenset({"指令", "输出"}): _question_answer(("指令", "输入"), "输出"),
    frozenset({"指令", "输入", "输出"}): _question_answer(("指令", "输入"), "输出"),
    **{frozenset(pair): _question_answer(pair[:1], pair[1]) for pair in zip(ASKED, ANSWERED, strict=True)},
    **CORPORA,
}
# pre-training text, unless the row has a key of ASKING
TEXT_SHAPES: dict[Shape, Reader] = {frozenset({key}): _plain_text(key) for key in ("response", "text")}
READERS = SHAPES | TEXT_SHAPES
ASKING = {"instruction", "instruct", "input", "query", "question", "prompt", "content", "history"}
# keys that a text belongs to
BESIDE_TEXT = set(
    "label labels summary output answer target completion role from entities entity_list relations spo_list".split()
)
OF_ROWS = set("data rows train test validation dev examples items records".split())  # keys of a whole file
NAMES, NAME = 12, 40  # keys named in a reason, and characters of each
ROUND = frozenset({"system", "human", "assistant", "input", "output"})
