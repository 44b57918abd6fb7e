"""Files as trainable rows: read, rendered, cut to length, memory-mapped, split, and every lost row accounted for."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from common import distributed
from common.data import render
from common.data.conversations import draw_rows
from common.data.tokenised import Listed, tokenised, tokenizer_hash
from common.data.turns import Repair, Unusable
from common.errors import UserError
from common.inputs import files_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.data.family import Family

PLACES = 3  # of a kind of repair are shown


class TrainingData(NamedTuple):
    """What there is to train on: `train` and `validation` are datasets of input_ids, labels, length, cut and where."""

    train: Dataset
    validation: Dataset
    sources: list[dict[str, Any]]  # `Tokenised.source` of each file, and how many rows of it are `used`
    rejected: Listed[Unusable]
    repaired: Listed[Repair]


def prepare(cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, prompt: Family) -> TrainingData:
    """The TrainingData of `cfg.data_path`: mixed, sampled where `path#N` asks for it, the validation split taken out.

    Of several processes the first does it for all, and the others find its cache. Raises UserError where nothing can be
    trained on, or more than `cfg.max_dropped` of the rows cannot.
    """
    return distributed.in_turn(lambda: _prepare(cfg, tokenizer, prompt))


def _prepare(cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, prompt: Family) -> TrainingData:
    from datasets import concatenate_datasets

    sources: list[dict[str, Any]] = []
    rejected, repaired = Listed(Unusable), Listed(Repair)
    datasets: list[Dataset] = []
    offsets: dict[str, int] = {}  # of each file: where its rows begin among all rows
    drawn: list[numpy.ndarray] = []  # of each file named: row numbers among all rows
    rng = random.Random(cfg.seed)
    tokenizer_id = tokenizer_hash(tokenizer)
    for path, wanted in files_of(cfg.data_path):
        file = tokenised(path, cfg, tokenizer, tokenizer_id, prompt)
        picked = draw_rows(len(file.rows), wanted, rng)
        sources.append(file.source | {"used": len(picked)})
        rejected.files += file.rejected.files
        repaired.files += file.repaired.files
        if path not in offsets:  # a file named twice is the same rows once more
            offsets[path] = sum(map(len, datasets))
            datasets.append(file.rows)
        drawn.append(offsets[path] + picked)
    _check_counts(cfg, sources, rejected)
    everything, chosen = concatenate_datasets(datasets), numpy.concatenate(drawn)
    lines = _line_ranks(everything)[chosen]  # rows of one line (HC3's answers to a question) stay on one side
    is_held = numpy.isin(lines, _held_lines(numpy.unique(lines), cfg.val_set_size, rng))
    validation = numpy.unique(chosen[is_held])
    return TrainingData(everything.select(chosen[~is_held]), everything.select(validation), sources, rejected, repaired)


def lengths_of(dataset: Dataset) -> numpy.ndarray:
    """The rows' lengths in ids, [N] int32, without a Python number for each."""
    return dataset.with_format("arrow")["length"][:].to_numpy()


def _line_ranks(dataset: Dataset) -> numpy.ndarray:
    """For each row the number of its line, [N]: the rank of its `where` (file:line) among all, sorted."""
    import pyarrow.compute

    where = dataset.data.column("where").dictionary_encode().combine_chunks()
    order = pyarrow.compute.sort_indices(where.dictionary).to_numpy()
    ranks = numpy.empty_like(order)
    ranks[order] = numpy.arange(len(order))
    return ranks[where.indices.to_numpy()]


def _held_lines(lines: numpy.ndarray, size: float, rng: random.Random) -> numpy.ndarray:
    """Which of the lines [N] are kept out of training: `size` of them, or that share."""
    count = int(size) if size >= 1 else max(round(size * len(lines)), 1 if size else 0)
    if count >= len(lines) > 0:
        raise UserError(f"--val_set_size {size:g} 不小于数据行数 leaves no row of {len(lines)} to train on")
    return lines[rng.sample(range(len(lines)), count)]


def _check_counts(cfg: SFTConfig, sources: list[dict[str, Any]], rejected: Listed[Unusable]) -> None:
    """UserError where nothing can be trained on, or more than `cfg.max_dropped` of the rows cannot."""
    rows = sum(source["rows"] for source in sources)
    if sum(source["kept"] for source in sources) == 0:
        first = f"; first: {rejected[0].where}: {rejected[0].reason}" if rejected else ""
        raise UserError(f"{', '.join(cfg.data_path)}: 没有可用的数据 no row can be trained on{first}")
    if len(rejected) > cfg.max_dropped * rows:
        raise UserError(
            f"{len(rejected)} / {rows} 行无法使用 rows cannot be used, more than --max_dropped {cfg.max_dropped}; "
            f"first: {rejected[0].where}: {rejected[0].reason}"
        )


def show_counts(data: TrainingData) -> None:
    """Print what was read of each file and what became of it."""
    for source in data.sources:
        print(
            f"数据 {source['path']}: 读取 rows {source['rows']}, 可用 kept {source['kept']}, "
            f"截断 cut {source['cut']}, 剔除 dropped {source['rows'] - source['kept']}, "
            f"使用 used {source['used']}, token {source['tokens']}, "
            f"计损失 supervised {source['supervised'] / max(source['tokens'], 1):.0%}"
        )
        unused = "; ".join(f"{key}: not used in {rows} rows" for key, rows in source["unused"].items())
        if unused:
            print(f"  没有读的字段 keys that were not read: {unused}")
    reasons = Counter(re.sub(r"\d+", "N", row.reason) for row in data.rejected)
    for reason, count in reasons.most_common(5):
        print(f"  剔除 dropped {count}: {reason}")
    repairs: Counter[str] = Counter()
    places: dict[str, list[str]] = {}  # the first of each kind
    for where, reason in data.repaired:
        repairs[reason] += 1
        if repairs[reason] <= PLACES:
            places.setdefault(reason, []).append(where)
    for reason, count in repairs.items():
        print(f"  修整 repaired {count}: {reason}: {', '.join(places[reason])}")
    print(f"训练 train {len(data.train)}, 验证 validation {len(data.validation)}")


def show_first(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the first training row as text, ids and labels, so that a wrong prompt or mask is seen at once."""
    row = data.train[0]
    supervised = [label for label in row["labels"] if label != render.IGNORED]
    print(f"第一条样本 first sample ({row['where']}):")
    print("text:", repr(render.shown(tokenizer, row["input_ids"])))
    print("input_ids:", row["input_ids"])
    print("labels:", row["labels"])
    print("计损失的文字 supervised text:", repr(render.shown(tokenizer, supervised)))
