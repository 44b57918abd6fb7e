"""What was read of the files and what became of it, shown."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from common.data import render
from common.data.dataset import TrainingData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACES = 3  # of a kind of repair are shown


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
