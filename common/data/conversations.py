"""Files as conversations: every row is one, or is unusable for a reason."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy

from common.data import formats
from common.data.fields import holds_something
from common.data.sources import Record, read_records
from common.data.turns import Conversation, FormatError, Repair, Unusable, fill_identity, said
from common.errors import UserError

if TYPE_CHECKING:
    from common.config import SFTConfig

NOTHING_ASKED = "没有提问 there is no question to ask"
ANSWERS = set("output response summary answer std_answer target completion 答案 输出 textbox_answer".split())  # keys
UNSAID = "\0"  # stands for an answer while a row without one is read


def split_sample(spec: str) -> tuple[str, int | None]:
    """`path#N` as (path, N); N is None where it is not given."""
    path, mark, count = spec.rpartition("#")
    if mark and count.isdigit():
        if int(count) == 0:
            raise UserError(f"{spec}: 抽样行数应大于 0 the number of rows after # must be above 0")
        return path, int(count)
    return spec, None


def conversations(path: str, cfg: SFTConfig, notes: Notes | None = None) -> Iterator[Conversation | Unusable]:
    """Yield what the rows of a file are, in order. Of `cfg`, model_name and model_author are used."""
    for record in read_records(path):
        yield from conversations_in(record, path, cfg, notes)


@dataclass
class Notes:
    """What else there is to say of the usable rows of a file."""

    unused: Counter[str] = field(default_factory=Counter)  # key that was not read: rows that have it
    repaired: list[Repair] = field(default_factory=list)

    def add(self, where: str, reading: formats.Reading) -> None:
        """Note what was said of the row at `where`, file:line."""
        if reading.unused:
            self.unused.update(set(reading.unused))
        self.repaired += [Repair(where, reason) for reason in dict.fromkeys(reading.repaired)]


def conversations_in(
    record: Record,
    path: str,
    cfg: SFTConfig,
    notes: Notes | None = None,
    read: Callable[[object], formats.Reading] = formats.read_row,
) -> Iterator[Conversation | Unusable]:
    """Yield the conversations of one record, as `read` reads it, or the one Unusable that says why it has none.

    What else there is to say of the record goes into `notes`.
    """
    where = f"{path}:{record.line}"
    if record.problem:
        yield Unusable(where, record.problem, record.value, record.kind)
        return
    try:
        reading = read(record.value)
        found = [fill_identity(turns, cfg.model_name, cfg.model_author) for turns in reading.conversations]
    except FormatError as problem:
        yield Unusable(where, problem.reason, record.value, problem.kind)
        return
    if notes is not None:
        notes.add(where, reading)
    for turns in found:
        yield Conversation(where, turns)


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
    """The conversations of held-out files, `limit` at most (0: all), and the rows left out.

    What else there is to say of the rows goes into `notes`. read: `questions`, or `to_ask`.
    """
    kept: list[Conversation] = []
    left_out: list[Unusable] = []
    for spec in specs:
        path, wanted = split_sample(spec)
        rows = []
        for row in read(path, cfg, notes):
            if isinstance(row, Conversation):
                rows.append(row)
            else:
                left_out.append(row)
        kept += [rows[number] for number in draw_rows(len(rows), wanted, random.Random(cfg.seed))]
    return kept[: limit or None], left_out


def draw_rows(available: int, wanted: int | None, rng: random.Random) -> numpy.ndarray:
    """Row numbers [N]: all in order, or `wanted` drawn without repetition until the file is used up, then again."""
    everything = numpy.arange(available)
    if wanted is None or not available:
        return everything
    rounds, rest = divmod(wanted, available)
    drawn = numpy.array(rng.sample(range(available), rest), dtype=everything.dtype)
    return numpy.concatenate([everything] * rounds + [drawn])
