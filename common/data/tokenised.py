"""A file's rows as ids and labels, made once and kept in a cache under a hash of all that shapes them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from filelock import FileLock

from common.data import render, workers
from common.data.conversations import Notes, conversations_in
from common.data.render import Sample
from common.data.sources import Record, read_records
from common.data.turns import Conversation, Repair, Unusable, said
from common.errors import UserError
from common.files import file_hash, line_of, stream_jsonl
from common.knobs import IDS

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.data.family import Family

CHUNK = 1000  # rows tokenised at a time: what a process is handed, and a record batch of rows.arrow


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
    # path, sha256, and how many: rows, kept, cut (rows), tokens, supervised (ids), unused {key: rows}, repaired
    source: dict[str, Any]
    rejected: Listed[Unusable]
    repaired: Listed[Repair]


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


def tokenised(
    path: str, cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, tokenizer_id: str, prompt: Family
) -> Tokenised:
    """One file, from the cache where its content and all that shapes its ids are the same.

    tokenizer_id: `tokenizer_hash` of the tokenizer. UserError where the file cannot be read, or with `cfg.strict` a
    row cannot be used.
    """
    from datasets import Dataset

    content = file_hash(path)
    folder = Path(cfg.cache_dir).expanduser() / cache_key(path, content, cfg, tokenizer_id, prompt)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # the other processes of a run wait here and find the work done
        if not folder.exists():
            _tokenise(path, cfg, tokenizer, prompt, folder)
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    rejected = Listed(Unusable, [(folder / "rejected.jsonl", record["rows"] - record["kept"])])
    repaired = Listed(Repair, [(folder / "repaired.jsonl", record["repaired"])])
    if cfg.strict and (rejected or repaired):
        first = rejected[0] if rejected else repaired[0]
        raise UserError(f"{first.where}: {first.reason} (--strict)")
    source = {"path": path, "sha256": content, **record}
    return Tokenised(Dataset.from_file(str(folder / "rows.arrow")), source, rejected, repaired)


def cache_key(path: str, content: str, cfg: SFTConfig, tokenizer_id: str, prompt: Family) -> str:
    """Name of a file's folder in the cache: a hash of all that its rows' ids, labels and reasons depend on."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(str(prompt.__file__))]
    code = [file.read_text(encoding="utf-8") for file in files]
    knobs = {name: getattr(cfg, name) for name in sorted(IDS)}
    parts = [path, content, tokenizer_id, code, knobs]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenise(path: str, cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, prompt: Family, folder: Path) -> None:
    """Write rows.arrow, {rejected,repaired}.jsonl and record.json into `folder`, which appears when all are whole."""
    from datasets.arrow_writer import ArrowWriter
    from tqdm import tqdm

    features = _features()
    schema = features.arrow_schema
    counts = Counter(rows=0, kept=0, cut=0, tokens=0, supervised=0, repaired=0)
    unused: Counter[str] = Counter()
    records = read_records(path)
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        with (
            ArrowWriter(features=features, path=str(draft / "rows.arrow")) as writer,
            (draft / "rejected.jsonl").open("w", encoding="utf-8", newline="\n") as rejected,
            (draft / "repaired.jsonl").open("w", encoding="utf-8", newline="\n") as repaired,
            tqdm(desc="编码 tokenising", unit="row", leave=False) as bar,
        ):
            done = workers.map_chunks(_encode, chunks, path, schema, cfg, tokenizer, prompt)
            for table, left_out, counted, told in done:
                writer.write_table(table)
                rejected.writelines(left_out)
                counts.update(counted)
                unused.update(told.unused)
                repaired.writelines(line_of(repair._asdict()) for repair in told.repaired)
                bar.update(counted["rows"])
            writer.finalize()
        record = {**counts, "unused": dict(sorted(unused.items()))}
        (draft / "record.json").write_text(json.dumps(record), encoding="utf-8")
        draft.rename(folder)


def _features() -> Features:
    """The columns of rows.arrow."""
    from datasets import Features, Value
    from datasets import List as ListOf

    return Features(
        input_ids=ListOf(Value("int32")),
        labels=ListOf(Value("int32")),
        length=Value("int32"),
        cut=Value("bool"),
        where=Value("string"),
    )


def _encode(
    records: list[Record],
    path: str,
    schema: pyarrow.Schema,
    cfg: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Family,
) -> tuple[pyarrow.Table, list[str], Counter[str], Notes]:
    """(table of samples, lines of rejected.jsonl, counts, Notes) of some Records of a file."""
    import pyarrow

    columns: dict[str, list] = {name: [] for name in schema.names}
    rejected: list[str] = []
    counts: Counter[str] = Counter()
    notes = Notes()
    found = (row for record in records for row in conversations_in(record, path, cfg, notes))
    for row in lessons(found, prompt.ONE_ANSWER and cfg.loss_on == "answer"):
        counts["rows"] += 1
        sample = _sample_of(row, cfg, tokenizer, prompt)
        if isinstance(sample, Unusable):
            rejected.append(line_of(sample._asdict()))
            continue
        length = len(sample.input_ids)
        counts.update(kept=1, cut=sample.cut, tokens=length, supervised=length - sample.labels.count(render.IGNORED))
        for name, value in {**sample._asdict(), "length": length, "where": row.where}.items():
            columns[name].append(value)
    counts["repaired"] = len(notes.repaired)
    return pyarrow.table(columns, schema), rejected, counts, notes


def lessons(rows: Iterable[Conversation | Unusable], one_answer: bool) -> Iterator[Conversation | Unusable]:
    """The rows; with `one_answer` a conversation gives one for each of its answers to learn, which ends there."""
    for row in rows:
        if not one_answer or isinstance(row, Unusable) or row.turns[-1].role == "text":
            yield row
            continue
        for end, turn in enumerate(row.turns, 1):
            if turn.role == "assistant" and turn.learn:
                yield Conversation(row.where, row.turns[:end])


def _sample_of(
    row: Conversation | Unusable, cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, prompt: Family
) -> Sample | Unusable:
    """A row as ids and labels, or why it cannot be trained on."""
    if isinstance(row, Unusable):
        return row
    try:
        sample = render.training_sample(
            tokenizer, prompt, row.turns, cfg.prompt_style, cfg.loss_on, cfg.max_length_q, cfg.max_length_a
        )
    except render.TooLongError as problem:
        return Unusable(row.where, problem.reason, said(row.turns), problem.kind)
    if sample.labels.count(render.IGNORED) == len(sample.labels):
        reason = "没有可训练的 token no id of the row is supervised"
        return Unusable(row.where, reason, said(row.turns), kind="unsupervised")
    return sample
