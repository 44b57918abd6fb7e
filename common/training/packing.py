"""Several rows in one sequence, each with positions of its own and blind to the others."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from common.conversation.render import IGNORED
from common.data.dataset import lengths_of
from common.device import resolve_dtype
from common.errors import UserError
from common.model.layers import causal_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from common.config import SFTConfig

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # shares of the norm: rounding errors
# the same where only the ids of other rows changed, which rounds alike: a share that half a dtype's rounding hides
BLIND = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
STARTS = 16  # ids at the start of a row, nearest to the row before it


class Packs(torch.utils.data.Dataset):
    """`rows` in packs of at most `capacity` ids: item n is the list of pack n's rows. lengths: ids of each pack."""

    def __init__(self, rows: Any, capacity: int, seed: int) -> None:
        """rows: a datasets.Dataset of input_ids, labels, length, where."""
        sizes = lengths_of(rows).tolist()
        self.rows = rows.with_format("numpy")
        self.packs = pack(sizes, capacity, seed)
        self.lengths = [sum(sizes[row] for row in one) for one in self.packs]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitems__(self, numbers: list[int]) -> list[list[dict[str, Any]]]:
        return [[self.rows[row] for row in self.packs[number]] for number in numbers]


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Row numbers of each pack: the longest rows first, each where it leaves the least room (best fit decreasing).

    Rows of equal length are shuffled by `seed`. No length may exceed `capacity`.
    """
    order = numpy.random.default_rng(seed).permutation(len(lengths))
    order = order[numpy.argsort(-numpy.asarray(lengths)[order], kind="stable")].tolist()
    packs: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = {}  # {free ids: packs}
    rooms: list[int] = []  # its keys, sorted
    for row in order:
        at = bisect_left(rooms, lengths[row])
        if at == len(rooms):
            packs.append([])
            room, chosen = capacity, packs[-1]
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[rooms.pop(at)]
        chosen.append(row)
        left = room - lengths[row]
        if left not in with_room:
            insort(rooms, left)
        with_room.setdefault(left, []).append(chosen)
    return packs


def collate(packs: Sequence[Sequence[dict[str, Any]]], pad_id: int) -> dict[str, Any]:
    """A batch of packs: as batches.collate gives rows, and position_ids [B, T].

    Positions start anew with each row, and there is no attention mask: that is how transformers is told to keep them
    apart (masking_utils.find_packed_sequence_indices). A pad has position 0 and is a row of its own. The first label of
    a row is ignored anyway, so that no row is predicted from the one before it.
    """
    longest = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
    shape = (len(packs), longest)
    ids, positions = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    labels, present = torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.long)
    for number, pack in enumerate(packs):
        start = 0
        for row in pack:
            part = slice(start, start := start + len(row["input_ids"]))
            ids[number, part] = torch.as_tensor(row["input_ids"])
            labels[number, part] = torch.as_tensor(row["labels"])
            positions[number, part] = torch.arange(len(row["input_ids"]))
        present[number, :start] = int(bool(pack[0]["where"]))
    where, tokens = [str(row["where"]) for pack in packs for row in pack], int(present.sum())
    tensors = {"input_ids": ids, "position_ids": positions, "labels": labels, "present": present}
    return tensors | {"tokens": tokens, "where": where}


def check_apart(net: PreTrainedModel | PeftModel, packs: Packs, dtype: torch.dtype) -> None:
    """UserError where a row in a pack is not what it is alone: `net` would let the rows see each other.

    The last hidden states of the first pack's rows are compared with those they have alone, and those at its last
    row's start with those they have after other ids. dtype: the torch dtype `net` computes in.
    """
    number = next((number for number, rows in enumerate(packs.packs) if len(rows) > 1), None)
    if number is None:
        return
    (pack,) = packs.__getitems__([number])
    try:
        together, alone = _hidden(net, pack, dtype), torch.cat([_hidden(net, [row], dtype) for row in pack])
        after_others = _hidden(net, [*(_of_other_ids(row) for row in pack[:-1]), pack[-1]], dtype)
    except (TypeError, ValueError) as problem:
        raise UserError(
            f"--packing: 这个模型不能打包 rows of this model cannot be packed: {' '.join(str(problem).split())[:200]}"
        ) from None
    first = len(together) - len(pack[-1]["input_ids"])
    start = slice(first, first + STARTS)
    for found, wanted, tolerance, what in (
        (together, alone, TOLERANCE[dtype], "alone"),
        (together[start], after_others[start], BLIND[dtype], "after other rows"),
    ):
        difference = float((found - wanted).norm() / wanted.norm())
        if not difference <= tolerance:
            raise UserError(
                f"--packing: 样本互相可见 rows see each other: their hidden states differ by {difference:.2%} from "
                f"those they have {what}; this model or attention kernel takes no packed rows; leave --packing out"
            )


def _of_other_ids(row: dict[str, Any]) -> dict[str, Any]:
    """A row as long as this one, with one id of it everywhere."""
    return row | {"input_ids": numpy.full_like(row["input_ids"], row["input_ids"][-1])}


def _hidden(net: PreTrainedModel | PeftModel, pack: Sequence[dict[str, Any]], dtype: torch.dtype) -> torch.Tensor:
    """Last hidden states [T, H], fp32, of one pack, without dropout."""
    causal = causal_of(net)
    batch, was_training = collate([pack], 0), net.training
    inputs = {name: batch[name].to(causal.device) for name in ("input_ids", "position_ids")}
    net.eval()
    with torch.no_grad(), torch.autocast(causal.device.type, dtype, enabled=dtype != torch.float32):
        states = causal.get_decoder()(**inputs, use_cache=False).last_hidden_state
    net.train(was_training)
    return states[0].float()


def training_data(net: PreTrainedModel | PeftModel, rows: Any, cfg: SFTConfig) -> tuple[Any, Any]:
    """(rows or packs, ids of each). With packing, the first pack is tried: its rows must not see each other."""
    if not cfg.packing:
        return rows.with_format("numpy"), lengths_of(rows)
    capacity = cfg.max_length_q + cfg.max_length_a
    packs = Packs(rows, capacity, cfg.seed)
    print(f"打包 packing: {len(rows)} 行 rows → {len(packs)} 个序列 sequences of {capacity} ids at most")
    check_apart(net, packs, resolve_dtype(cfg.dtype))
    return packs, packs.lengths
