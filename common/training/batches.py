"""Batches: rows of like length together, padded on the right; blank rows fill the last batch of an epoch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from common.conversation.render import IGNORED
from common.launch import world_size
from common.training import packing

if TYPE_CHECKING:
    from common.config import SFTConfig

WINDOW = 50  # batches sorted by length together: little padding, yet another order every epoch
BLANK = -1  # number of a blank row: they fill the last batch of an epoch, so that every process has rows of it


def collate(rows: Sequence[Any], pad_id: int) -> dict[str, Any]:
    """A batch of rows, or of packs, padded on the right by length.

    Rows give input_ids, labels and present [B, T] (1: neither padding nor of a blank row), tokens (how many are so),
    where (names). No attention mask: no row looks at what is right of it, and nothing is learnt from what pads give.
    """
    if isinstance(rows[0], list):
        return packing.collate(rows, pad_id)
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), longest)
    ids, labels, present = torch.full(shape, pad_id), torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.long)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[number, :length] = torch.as_tensor(row["input_ids"])
        labels[number, :length] = torch.as_tensor(row["labels"])
        present[number, :length] = int(bool(row["where"]))
    where = [str(row["where"]) for row in rows]
    return {"input_ids": ids, "labels": labels, "present": present, "tokens": int(present.sum()), "where": where}


class RowsAndBlanks(torch.utils.data.Dataset):
    """The rows, or packs, of `rows`; number BLANK is a row that teaches nothing: the first one, its labels ignored."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.blank = _blank(rows.__getitems__([0])[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        kept = [number for number in numbers if number != BLANK]
        return (self.rows.__getitems__(kept) if kept else []) + [self.blank] * (len(numbers) - len(kept))


def _blank(row: Any) -> Any:
    """A row, or the first row of a pack, as a blank one: its labels are ignored, and it has no name."""
    if isinstance(row, list):
        return [_blank(row[0])]
    return {"input_ids": row["input_ids"], "labels": [IGNORED] * len(row["input_ids"]), "where": ""}


def sampler_of(lengths: Sequence[int] | numpy.ndarray, cfg: SFTConfig) -> LengthGroupedSampler:
    """The order in which a run of `cfg` takes rows of these lengths."""
    together = cfg.micro_batch_size * world_size() if world_size() > 1 else 1  # one process takes what is left
    return LengthGroupedSampler(lengths, cfg.batch_size, cfg.seed, together)


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Row numbers in batches (of an optimizer step) of like length.

    The order depends on lengths, batch, seed and epoch alone: it is the same after a resume, and with other numbers of
    micro batches or processes. Blank rows at the end of an epoch make its number of rows a multiple of `multiple`.
    """

    def __init__(self, lengths: Sequence[int] | numpy.ndarray, batch: int, seed: int, multiple: int = 1) -> None:
        self.lengths = numpy.asarray(lengths)  # ids of each row, [N]
        self.batch = batch
        self.seed = seed
        self.epoch = 0
        self.blanks = -len(self.lengths) % multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches():
            yield from batch
        yield from [BLANK] * self.blanks

    def batches(self) -> list[list[int]]:
        """Lists of row numbers, shuffled; the longest row's comes first, a smaller one, if any, last.

        With the longest rows first, a lack of memory shows in the first step, and a CPU's memory is taken once.
        """
        order = numpy.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))
        window = self.batch * WINDOW
        found: list[list[int]] = []
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            rows = rows[numpy.argsort(-self.lengths[rows], kind="stable")]
            found += [rows[at : at + self.batch].tolist() for at in range(0, len(rows), self.batch)]
        smaller = [found.pop()] if found and len(found[-1]) < self.batch else []
        random.Random(self.seed + self.epoch).shuffle(found)
        if found:
            longest = max(range(len(found)), key=lambda number: self.lengths[found[number][0]])
            found.insert(0, found.pop(longest))
        return found + smaller

    def by_weight(self, micro: int, passes: int) -> list[list[int]]:
        """Row numbers of the micro batches of so many passes, those of the fewest ids first, padding included."""
        found: list[list[int]] = []
        for self.epoch in range(passes):
            found += [batch[at : at + micro] for batch in self.batches() for at in range(0, len(batch), micro)]
        return sorted(found, key=self.ids_in)

    def shape(self, numbers: list[int]) -> tuple[int, int]:
        """(rows, length) of a batch of these rows."""
        return len(numbers), int(self.lengths[numbers].max())

    def ids_in(self, numbers: list[int]) -> int:
        """Ids of a batch of these rows, padding included."""
        return math.prod(self.shape(numbers))

    def padding(self, micro: int) -> float:
        """Share of the ids in an epoch that are padding, `micro` rows in one forward pass."""
        parts = [batch[at : at + micro] for batch in self.batches() for at in range(0, len(batch), micro)]
        width = sum(int(self.lengths[part].max()) * len(part) for part in parts)
        return 1 - int(self.lengths.sum()) / width
