"""Where a file's ids and labels are kept, under a hash of all that shapes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy

from common.conversation import family
from common.conversation.turns import Repair, Unusable
from common.data.alike import Typed
from common.files import stream_jsonl
from common.knobs import IDS

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.conversation.family import Family

Row = TypeVar("Row")


class Listed(Generic[Row]):
    """Rows left out, or repairs. They stay in their files and are read when asked for."""

    def __init__(self, kind: type[Row], files: Iterable[tuple[Path, int]] = ()) -> None:
        self.kind: type[Row] = kind
        self.files = list(files)  # (path of a rejected.jsonl or repaired.jsonl, its rows)

    def __len__(self) -> int:
        return sum(count for _, count in self.files)

    def __iter__(self) -> Iterator[Row]:
        for path, _ in self.files:
            yield from (self.kind(**row) for row in stream_jsonl(path))

    def __getitem__(self, number: int) -> Row:
        return list(islice(self, number, number + 1))[0]


class Tokenised(NamedTuple):
    """One file of `--data_path`, ready to train on."""

    rows: Dataset  # input_ids, labels, length (in ids), cut (whether the prompt was) and where (file:line)
    # path, sha256, unused {key: rows}, and how many: rows, kept, cut (rows), tokens, supervised (ids), and of each list
    source: dict[str, Any]
    rejected: Listed[Unusable]
    repaired: Listed[Repair]
    typed: Listed[Typed]
    whole: numpy.ndarray  # (ids of the prompt, ids of the last answer) of each row before it is cut or left out, [N, 2]
    digests: numpy.ndarray  # of each conversation that can be read: line, digests of row and question, [N, 3]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides a tokenizer's ids, hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = sorted(tokenizer.get_vocab().items())
    else:
        state = json.loads(backend.to_str())
        del state["padding"]
        del state["truncation"]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def encoding_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides the ids of a conversation but for a family's code: tokenizer and chat template, hex."""
    return hashlib.sha256(f"{tokenizer_hash(tokenizer)} {tokenizer.chat_template}".encode()).hexdigest()


def cache_key(path: str, content: str, cfg: SFTConfig, tokenizer_id: str, prompt: Family) -> str:
    """Name of a file's folder in the cache: a hash of all that its rows' ids, labels and reasons depend on."""
    rooms = [Path(__file__).parent, Path(str(family.__file__)).parent]
    files = [*(file for room in rooms for file in sorted(room.glob("*.py"))), Path(str(prompt.__file__))]
    code = [file.read_text(encoding="utf-8") for file in files]
    knobs = {name: getattr(cfg, name) for name in sorted(IDS)}
    parts = [path, content, tokenizer_id, code, knobs]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
