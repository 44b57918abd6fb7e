"""Files as conversations: every row is one, or is unusable for a reason."""

import random

import numpy

from common.data import formats
from common.data.sources import read_records
from common.data.turns import FormatError, fill_identity
from common.errors import UserError


def split_sample(spec):
    """`path#N` as (path, N); N is None where it is not given."""
    path, mark, count = spec.rpartition("#")
    if mark and count.isdigit():
        if int(count) == 0:
            raise UserError(f"{spec}: 抽样行数应大于 0 the number of rows after # must be above 0")
        return path, int(count)
    return spec, None


def conversations(path, cfg):
    """Yield (where, turns, None) for each conversation of a file and (where, row, reason) for each unusable row."""
    for record in read_records(path):
        yield from conversations_in(record, path, cfg)


def conversations_in(record, path, cfg):
    where = f"{path}:{record.line}"
    if record.problem:
        yield where, record.value, record.problem
        return
    try:
        found = [fill_identity(turns, cfg.model_name, cfg.model_author) for turns in formats.turns_of(record.value)]
    except FormatError as problem:
        yield where, record.value, str(problem)
        return
    for turns in found:
        yield where, turns, None


def questions(path, cfg):
    """Yield what `conversations` does; a text that asks nothing is unusable."""
    for where, found, reason in conversations(path, cfg):
        if reason is None and found[-1].role == "text":
            reason = "没有提问 there is no question to ask"
        yield where, found, reason


def held_out(cfg, specs, limit):
    """(where, turns) of held-out rows, `limit` at most (0: all), and the rows left out as dicts."""
    kept, left_out = [], []
    for spec in specs:
        path, wanted = split_sample(spec)
        rows = []
        for where, found, reason in questions(path, cfg):
            if reason is None:
                rows.append((where, found))
            else:
                left_out.append({"where": where, "reason": reason, "row": found})
        kept += [rows[number] for number in draw_rows(len(rows), wanted, random.Random(cfg.seed))]
    return kept[: limit or None], left_out


def draw_rows(available, wanted, rng):
    """Row numbers: all in order, or `wanted` drawn without repetition until the file is used up, then again."""
    everything = numpy.arange(available)
    if wanted is None or not available:
        return everything
    rounds, rest = divmod(wanted, available)
    drawn = numpy.array(rng.sample(range(available), rest), dtype=everything.dtype)
    return numpy.concatenate([everything] * rounds + [drawn])
