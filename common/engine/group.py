"""What goes on under one name, and which prompts are read next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.inference.prefix_cache import BLOCK

if TYPE_CHECKING:
    from common.engine.kv_batch import KVBatch
    from common.engine.request import Row
    from common.inference.prefix_cache import PrefixCache


class Group:
    """What goes on under one name (base, or an adapter)."""

    def __init__(self) -> None:
        self.pending: deque[Row] = deque()  # their prompts are to be read
        self.prefills: deque[KVBatch] = deque()  # their prompts are being read
        self.batch: KVBatch | None = None  # they get an id a step

    def rows(self) -> list[Row]:
        """All Rows it has."""
        reading = [row for prefill in self.prefills for row in prefill.rows]
        return [*self.pending, *reading, *(self.batch.rows if self.batch else [])]

    def give_up(self) -> list[Row]:
        """Let go of the rows whose prompts are read, or being read: these Rows."""
        gone = [row for row in self.rows() if row not in self.pending]
        self.prefills, self.batch = deque(), None
        return gone

    def next_prompts(self, prefixes: PrefixCache, most: int) -> list[Row]:
        """Take pending rows to be read together: `most` columns that are not kept yet, pads included, or one row.

        A row waits while another one reads what it begins with too, and then finds it kept.
        """
        reading = [row for prefill in self.prefills for row in prefill.rows]
        taken: list[Row] = []
        left = 0
        for row in list(self.pending):
            known = prefixes.known(row.scope, row.ask.ids)
            more = known + BLOCK
            if more <= prefixes.limit and any(_begin_alike(row, other, more) for other in [*reading, *taken]):
                continue
            left = max(left, len(row.ask.ids) - known)
            if taken and (len(taken) + 1) * left > most:
                break
            taken.append(row)
        self.pending = deque(row for row in self.pending if row not in taken)
        return taken


def width(rows: Sequence[Row]) -> int:
    """Rows of the model's batches that so many answers take."""
    return sum(row.ask.sampling.num_beams for row in rows)


def columns(rows: Sequence[Row]) -> int:
    """Most tokens in the cache of rows that share a batch, pads included."""
    return width(rows) * max((row.width for row in rows), default=0)


def _begin_alike(row: Row, other: Row, count: int) -> bool:
    """Whether two prompts have the same first `count` tokens, and `row` more than these."""
    both = count < len(row.ask.ids) and count <= len(other.ask.ids)
    return both and row.scope == other.scope and row.ask.ids[:count] == other.ask.ids[:count]
