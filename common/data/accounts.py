"""What was read of the files and what became of it, shown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from common.conversation import render
from common.data.dataset import TrainingData

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

    from common.conversation.turns import Repair
    from common.data.cache import Tokenised

PLACES = 3  # of a kind of repair are shown
PERCENTS = (50, 90, 95, 99, 100)


def show_counts(data: TrainingData) -> None:
    """Print what was read of each file and what became of it."""
    for source in data.sources:
        print(
            f"数据 {source['path']}: 读取 rows {source['rows']}, 可用 kept {source['kept']}, "
            f"截断 cut {source['cut']}, 剔除 dropped {source['rows'] - source['kept']}, "
            f"使用 used {source['used']}, token {source['tokens']}, "
            f"计损失 supervised {source['supervised'] / max(source['tokens'], 1):.0%}"
        )
        show_unused(source["unused"])
    reasons = Counter(re.sub(r"\d+", "N", row.reason) for row in data.rejected)
    for reason, count in reasons.most_common(5):
        print(f"  剔除 dropped {count}: {reason}")
    show_repaired(data.repaired)
    print(f"训练 train {len(data.train)}, 验证 validation {len(data.validation)}")


def show_unused(unused: Mapping[str, int]) -> None:
    """Print in how many rows which keys were not read."""
    told = "; ".join(f"{key}: not used in {rows} rows" for key, rows in unused.items())
    if told:
        print(f"  没有读的字段 keys that were not read: {told}")


def show_repaired(repaired: Iterable[Repair]) -> None:
    """Print a line for each kind of repair, with the first places."""
    repairs: Counter[str] = Counter()
    places: dict[str, list[str]] = {}  # the first of each kind
    for where, reason in repaired:
        repairs[reason] += 1
        if repairs[reason] <= PLACES:
            places.setdefault(reason, []).append(where)
    for reason, count in repairs.items():
        print(f"  修整 repaired {count}: {reason}: {', '.join(places[reason])}")


def show_first(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the first training row as text, ids and labels, so that a wrong prompt or mask is seen at once."""
    row = data.train[0]
    supervised = [label for label in row["labels"] if label != render.IGNORED]
    print(f"第一条样本 first sample ({row['where']}):")
    print("text:", repr(render.shown(tokenizer, row["input_ids"])))
    print("input_ids:", row["input_ids"])
    print("labels:", row["labels"])
    print("计损失的文字 supervised text:", repr(render.shown(tokenizer, supervised)))


def lengths(files: Sequence[Tokenised], stop_ids: set[int]) -> dict[str, Any]:
    """{stop_share, lengths, keep_all} of files.

    stop_share: of the kept rows, how many end with an id of `stop_ids`. lengths: percentiles of ids a row; "tokens" and
    "supervised" of the kept rows, "prompt" and "answer" of all rows before anything was cut or left out. keep_all: the
    least limits that neither cut nor leave out a row.
    """
    counted = [_counts(batch, stop_ids) for file in files for batch in file.rows.with_format("arrow").iter(1000)]
    tokens, supervised, ends = (_together([batch[number] for batch in counted]) for number in range(3))
    prompts, answers = (_together([file.whole[:, number] for file in files]) for number in range(2))
    found = {"tokens": tokens, "supervised": supervised, "prompt": prompts, "answer": answers}
    return {
        "stop_share": float(ends.mean()) if len(ends) else 1.0,
        "lengths": {name: _percentiles(values) for name, values in found.items()},
        "keep_all": {"max_length_q": int(prompts.max(initial=0)), "max_length_a": int(answers.max(initial=0))},
    }


def _together(parts: Sequence[numpy.ndarray]) -> numpy.ndarray:
    return numpy.concatenate([numpy.empty(0, int), *parts])


def _counts(batch: pyarrow.Table, stop_ids: set[int]) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Of each row of an Arrow table: number of ids, of supervised ids, and whether the last of these is a stop id."""
    column = batch["labels"].combine_chunks()
    labels, starts = column.flatten().to_numpy(), column.offsets.to_numpy() - column.offsets[0].as_py()
    counted = numpy.flatnonzero(labels != render.IGNORED)
    ends = numpy.searchsorted(counted, starts[1:])  # every kept row has a supervised id
    last = labels[counted[ends - 1]]
    return numpy.diff(starts), numpy.diff(numpy.searchsorted(counted, starts)), numpy.isin(last, list(stop_ids))


def _percentiles(values: numpy.ndarray) -> dict[str, int]:
    return {f"p{p}": int(numpy.percentile(values, p)) for p in PERCENTS} if len(values) else {}
