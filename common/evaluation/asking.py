"""Rows that are asked: of held-out files, which have the answers, and of files of questions, which may lack them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from common.conversation.turns import Conversation, Unusable, said
from common.data import formats
from common.data.dataset import conversations, draw_rows
from common.data.fields import holds_something
from common.data.formats import Notes, conversations_in
from common.data.sources import read_records
from common.inputs import files_of

if TYPE_CHECKING:
    from common.config import SFTConfig

NOTHING_ASKED = "没有提问 there is no question to ask"
# keys
ANSWERS = set("output response summary answer std_answer target completion 答案 回答 输出 textbox_answer".split())
UNSAID = "\0"  # stands for an answer while a row without one is read


def questions(path: str, cfg: SFTConfig, notes: Notes | None = None) -> Iterator[Conversation | Unusable]:
    """Yield what `conversations` does; a text that asks nothing is unusable."""
    for row in conversations(path, cfg, notes):
        if isinstance(row, Conversation) and row.turns[-1].role == "text":
            yield Unusable(row.where, NOTHING_ASKED, said(row.turns), kind="no-question")
        else:
            yield row


def to_ask(path: str, cfg: SFTConfig, notes: Notes | None = None) -> Iterator[Conversation | Unusable]:
    """Yield conversations that end with the question to be asked, or with the answer the row gives to it."""
    for record in read_records(path):
        for row in conversations_in(record, path, cfg, notes, _read_to_ask):
            if isinstance(row, Conversation) and row.turns[-1].role == "text":
                yield Unusable(row.where, NOTHING_ASKED, record.value, kind="no-question")
            else:
                yield row


def _read_to_ask(row: object) -> formats.Reading:
    """The Reading of a row with or without an answer; in the place of one that is missing there is none."""
    if isinstance(row, dict):
        row = _with_answer(row)
    reading = formats.read_row(row, asked=True)
    asked = [turns[:-1] if turns[-1].text == UNSAID else turns for turns in reading.conversations]
    return reading._replace(conversations=asked)


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """The row, with UNSAID under the key of an answer where that is all it lacks of a shape, or the answer is empty."""
    row = {key: value for key, value in row.items() if key not in ANSWERS or holds_something(value)}
    keys = {key for key, value in row.items() if value is not None}
    if isinstance(row.get("prompt"), list) and not keys & ANSWERS:
        return {"messages" if key == "prompt" else key: value for key, value in row.items()}
    if any(shape <= keys for shape in formats.SHAPES):
        return row
    nearly = [shape for shape in formats.SHAPES if len(shape - keys) == 1 and shape - keys <= ANSWERS]
    return row | dict.fromkeys(max(nearly, key=len) - keys, UNSAID) if nearly else row


def held_out(
    cfg: SFTConfig,
    specs: Sequence[str],
    limit: int,
    notes: Notes | None = None,
    read: Callable[[str, SFTConfig, Notes | None], Iterator[Conversation | Unusable]] = questions,
) -> tuple[list[Conversation], list[Unusable]]:
    """The conversations of held-out files, `limit` at most (0: all), and the rows left out up to the last of these.

    What else there is to say of these conversations goes into `notes`. read: `questions`, or `to_ask`.
    """
    kept: list[Conversation] = []
    left_out: list[Unusable] = []
    said = _NotesByRow()
    for path, wanted in files_of(specs):
        rows: list[Conversation] = []
        for row in read(path, cfg, said):
            if limit and wanted is None and len(kept) + len(rows) >= limit:
                break
            if isinstance(row, Conversation):
                rows.append(row)
            else:
                left_out.append(row)
        kept += [rows[number] for number in draw_rows(len(rows), wanted, random.Random(cfg.seed))]
    kept = kept[: limit or None]
    if notes is not None:
        said.tell(notes, kept)
    return kept, left_out


class _NotesByRow(Notes):
    """Notes that keep what was said of each row, until it is known which rows are asked."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: dict[str, list[formats.Reading]] = {}

    def add(self, where: str, reading: formats.Reading) -> None:
        if reading.unused or reading.repaired:
            self.readings.setdefault(where, []).append(reading)

    def tell(self, notes: Notes, rows: Sequence[Conversation]) -> None:
        """Note in `notes` what was said of `rows`, of each once."""
        for where in dict.fromkeys(row.where for row in rows):
            for reading in self.readings.get(where, ()):
                notes.add(where, reading)
