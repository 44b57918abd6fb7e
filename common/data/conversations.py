"""Files as conversations: every row is one, or is unusable for a reason."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy

from common.data import formats
from common.data.sources import Record, read_records
from common.data.turns import Conversation, FormatError, Repair, Unusable, fill_identity, said
from common.inputs import files_of

if TYPE_CHECKING:
    from common.config import SFTConfig


def conversations(path: str, cfg: SFTConfig) -> Iterator[Conversation | Unusable]:
    """Yield what the rows of a file are, in order. Of `cfg`, model_name and model_author are used."""
    for record in read_records(path):
        yield from conversations_in(record, path, cfg)


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
    record: Record, path: str, cfg: SFTConfig, notes: Notes | None = None
) -> Iterator[Conversation | Unusable]:
    """Yield the conversations of one record, or the one Unusable that says why it has none.

    What else there is to say of the record goes into `notes`.
    """
    where = f"{path}:{record.line}"
    if record.problem:
        yield Unusable(where, record.problem, record.value, record.kind)
        return
    try:
        reading = formats.read_row(record.value)
        found = [fill_identity(turns, cfg.model_name, cfg.model_author) for turns in reading.conversations]
    except FormatError as problem:
        yield Unusable(where, problem.reason, record.value, problem.kind)
        return
    if notes is not None:
        notes.add(where, reading)
    for turns in found:
        yield Conversation(where, turns)


def questions(path: str, cfg: SFTConfig) -> Iterator[Conversation | Unusable]:
    """Yield what `conversations` does; a text that asks nothing is unusable."""
    for row in conversations(path, cfg):
        if isinstance(row, Conversation) and row.turns[-1].role == "text":
            yield Unusable(row.where, "没有提问 there is no question to ask", said(row.turns), kind="no-question")
        else:
            yield row


def held_out(cfg: SFTConfig, specs: Sequence[str], limit: int) -> tuple[list[Conversation], list[Unusable]]:
    """The conversations of held-out files, `limit` at most (0: all), and the rows left out."""
    kept: list[Conversation] = []
    left_out: list[Unusable] = []
    for path, wanted in files_of(specs):
        rows = []
        for row in questions(path, cfg):
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
