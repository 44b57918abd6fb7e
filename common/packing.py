"""Several rows in one sequence, each with positions of its own and blind to the others."""

from bisect import bisect_left, insort

import numpy
import torch

from common.errors import UserError
from common.pieces import IGNORED


class Packs(torch.utils.data.Dataset):
    """`rows` in packs of at most `capacity` ids: item n is the list of pack n's rows. lengths: ids of each pack."""

    def __init__(self, rows, capacity, seed):
        sizes = rows["length"][:]
        self.rows, self.packs = rows.with_format("numpy"), pack(sizes, capacity, seed)
        self.lengths = [sum(sizes[row] for row in one) for one in self.packs]

    def __len__(self):
        return len(self.packs)

    def __getitem__(self, number):
        return [self.rows[row] for row in self.packs[number]]


def pack(lengths, capacity, seed):
    """Row numbers of each pack: the longest rows first, each where it leaves the least room (best fit decreasing).

    Rows of equal length are shuffled by `seed`. No length may exceed `capacity`.
    """
    order = numpy.random.default_rng(seed).permutation(len(lengths))
    order = order[numpy.argsort(-numpy.asarray(lengths)[order], kind="stable")].tolist()
    packs, rooms, with_room = [], [], {}  # with_room: {free ids: packs}, rooms: its keys, sorted
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


def collate(packs, pad_id):
    """A batch of packs: input_ids, position_ids, labels [B, T], tokens (how many are no padding) and where (names).

    Positions start anew with each row, and there is no attention mask: that is how transformers is told to keep them
    apart (masking_utils.find_packed_sequence_indices). A pad has position 0 and is a row of its own. The first label of
    a row is ignored anyway, so that no row is predicted from the one before it.
    """
    longest = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
    shape = (len(packs), longest)
    ids, positions = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    labels, tokens = torch.full(shape, IGNORED), 0
    for number, pack in enumerate(packs):
        start = 0
        for row in pack:
            part = slice(start, start := start + len(row["input_ids"]))
            ids[number, part] = torch.as_tensor(row["input_ids"])
            labels[number, part] = torch.as_tensor(row["labels"])
            positions[number, part] = torch.arange(len(row["input_ids"]))
        tokens += start
    where = [str(row["where"]) for pack in packs for row in pack]
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "tokens": tokens, "where": where}


def check_apart(net, packs, dtype):
    """UserError where rows of one pack do not have the loss they have alone: `net` would let them see each other.

    net takes labels as loss.use_supervised_loss makes it. dtype: the torch dtype it computes in.
    """
    pack = next((packs[number] for number in range(len(packs)) if len(packs.packs[number]) > 1), None)
    if pack is None:
        return
    try:
        together, alone = _loss(net, [pack], dtype), sum(_loss(net, [[row]], dtype) for row in pack)
    except (TypeError, ValueError) as problem:
        raise UserError(
            f"--packing: 这个模型不能打包 rows of this model cannot be packed: {' '.join(str(problem).split())[:200]}"
        ) from None
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    if not abs(together - alone) <= tolerance * abs(alone):
        raise UserError(
            f"--packing: 样本互相可见 rows see each other: their loss is {together:.6g} in one sequence, "
            f"{alone:.6g} alone; this model or attention kernel takes no packed rows; leave --packing out"
        )


def _loss(net, packs, dtype):
    """Summed cross entropy of a batch of packs, without dropout."""
    batch = {name: value for name, value in collate(packs, 0).items() if isinstance(value, torch.Tensor)}
    was_training, device = net.training, next(net.parameters()).device
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    net.eval()
    with torch.no_grad(), autocast:
        sums = net(**{name: value.to(device) for name, value in batch.items()}).logits
    net.train(was_training)
    return float(sums[:, 0].sum())
