"""Files as trainable rows: read, rendered, cut to length, memory-mapped, split, and every lost row accounted for."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
from filelock import FileLock

from common import garbage, workers
from common.conversation import render
from common.conversation.render import Sample
from common.conversation.turns import Conversation, Repair, Unusable, lessons, said
from common.data.alike import Digests, Typed
from common.data.cache import Listed, Tokenised, cache_key, encoding_hash
from common.data.formats import Notes, conversations_in
from common.data.sources import Record, read_records
from common.errors import RowError, UserError
from common.files import file_hash, line_of
from common.inputs import files_of

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.conversation.family import Family

CHUNK = 1000  # rows tokenised at a time: what a process is handed, and a record batch of rows.arrow
LISTS: dict[str, type] = {"rejected": Unusable, "repaired": Repair, "typed": Typed}  # NAME.jsonl in the cache: its rows
# NAME.npy in the cache: `Tokenised.whole`, and `Digests.table`
TABLES: dict[str, numpy.ndarray] = {
    "whole": numpy.empty((0, 2), numpy.int32),
    "digests": numpy.empty((0, 3), numpy.uint64),
}


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
    from common import distributed  # which brings torch: the processes that tokenise go without

    return distributed.in_turn(lambda: _prepare(cfg, tokenizer, prompt))


def _prepare(cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, prompt: Family) -> TrainingData:
    from datasets import concatenate_datasets

    sources: list[dict[str, Any]] = []
    rejected, repaired = Listed(Unusable), Listed(Repair)
    datasets: list[Dataset] = []
    offsets: dict[str, int] = {}  # of each file: where its rows begin among all rows
    drawn: list[numpy.ndarray] = []  # of each file named: row numbers among all rows
    rng = random.Random(cfg.seed)
    tokenizer_id = encoding_hash(tokenizer)
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
    is_held = numpy.isin(lines, _held_lines(numpy.flatnonzero(numpy.bincount(lines)), cfg.val_set_size, rng))
    validation = numpy.unique(chosen[is_held])
    return TrainingData(everything.select(chosen[~is_held]), everything.select(validation), sources, rejected, repaired)


def lengths_of(dataset: Dataset) -> numpy.ndarray:
    """The rows' lengths in ids, [N] int32, without a Python number for each."""
    lengths = dataset.data.column("length").to_numpy()
    chosen = dataset._indices  # what is public makes a slice of the table for each row: seconds for a million
    return lengths if chosen is None else lengths[chosen.column(0).to_numpy()]


def taught(dataset: Dataset, ids: Sequence[int]) -> set[int]:
    """Which of `ids` occur among the labels of the files that the dataset is drawn from."""
    found: set[int] = set()
    for chunk in dataset.data.column("labels").chunks:
        labels = chunk.flatten().to_numpy()
        found.update(labels[numpy.isin(labels, ids)].tolist())
    return found


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
        found = f"--val_set_size {size:g} 不小于数据行数 leaves no row of {len(lines)} to train on"
        raise UserError(f"{found}; more rows, or --val_set_size 0")
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


def conversations(path: str, cfg: SFTConfig, notes: Notes | None = None) -> Iterator[Conversation | Unusable]:
    """Yield what the rows of a file are, in order. Of `cfg`, model_name and model_author are used."""
    for record in read_records(path):
        yield from conversations_in(record, path, cfg, notes)


def tokenised(
    path: str, cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, tokenizer_id: str, prompt: Family
) -> Tokenised:
    """One file, from the cache where its content and all that shapes its ids are the same.

    tokenizer_id: `encoding_hash` of the tokenizer. UserError where the file cannot be read, or with `cfg.strict` a
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
    lists: dict[str, Listed] = {
        name: Listed(kind, [(folder / f"{name}.jsonl", record[name])]) for name, kind in LISTS.items()
    }
    strict = [row for name in ("rejected", "repaired") for row in islice(lists[name], 1)] if cfg.strict else []
    if strict:
        raise UserError(f"{strict[0].where}: {strict[0].reason} (--strict)")
    tables = {name: numpy.load(folder / f"{name}.npy", mmap_mode="r") for name in TABLES}
    rows = Dataset.from_file(str(folder / "rows.arrow"))
    found: dict[str, Any] = {**lists, **tables}
    return Tokenised(rows, {"path": path, "sha256": content, **record}, **found)


def _tokenise(path: str, cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, prompt: Family, folder: Path) -> None:
    """Write `folder`: rows.arrow, the files of LISTS and TABLES, record.json; it appears when all are whole."""
    from datasets.arrow_writer import ArrowWriter
    from tqdm import tqdm

    features = _features()
    counts = Counter(dict.fromkeys(("rows", "kept", "cut", "tokens", "supervised", *LISTS), 0))
    unused: Counter[str] = Counter()
    tables = {name: [empty] for name, empty in TABLES.items()}
    records = read_records(path)
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        with ExitStack() as opened:
            writer = opened.enter_context(ArrowWriter(features=features, path=str(draft / "rows.arrow")))
            lists = {name: (draft / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") for name in LISTS}
            for file in lists.values():
                opened.enter_context(file)
            bar = opened.enter_context(tqdm(desc="编码 tokenising", unit="row", leave=False))
            for chunk in workers.map_chunks(_encode, chunks, path, features.arrow_schema, cfg, tokenizer, prompt):
                writer.write_table(chunk.table)
                for name, file in lists.items():
                    file.writelines(chunk.lists[name])
                for name, parts in tables.items():
                    parts.append(chunk.tables[name])
                counts.update(chunk.counts)
                unused.update(chunk.unused)
                bar.update(chunk.counts["rows"])
            writer.finalize()
        for name, parts in tables.items():
            numpy.save(draft / f"{name}.npy", numpy.concatenate(parts))
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


class Encoded(NamedTuple):
    """Some Records of a file: their samples as a table, and what is to be said of them.

    lists: lines of the files of LISTS. tables: parts of the arrays of TABLES. counts: rows, kept, …, and the lines.
    unused: key that was not read: rows that have it.
    """

    table: pyarrow.Table
    lists: dict[str, list[str]]
    tables: dict[str, numpy.ndarray]
    counts: Counter[str]
    unused: Counter[str]


@garbage.not_looked_for()
def _encode(
    records: list[Record],
    path: str,
    schema: pyarrow.Schema,
    cfg: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Family,
) -> Encoded:
    import pyarrow

    columns: dict[str, list] = {name: [] for name in schema.names}
    rejected: list[Unusable] = []
    counts: Counter[str] = Counter()
    notes, texts = Notes(), Digests(tokenizer)
    whole: list[tuple[int, int]] = []
    found = (texts.noted(row) for record in records for row in conversations_in(record, path, cfg, notes))
    for row in lessons(found, prompt.ONE_ANSWER and cfg.loss_on == "answer"):
        counts["rows"] += 1
        sample = _sample_of(row, cfg, tokenizer, prompt, whole)
        if isinstance(sample, Unusable):
            rejected.append(sample)
            continue
        values = sample.input_ids, sample.labels, len(sample.input_ids), sample.cut, row.where
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    told: dict[str, list] = {"rejected": rejected, "repaired": notes.repaired, "typed": texts.typed}
    lists = {name: [line_of(row._asdict()) for row in rows] for name, rows in told.items()}
    counts.update({name: len(lines) for name, lines in lists.items()})
    table = pyarrow.table(columns, schema)
    supervised = (table["labels"].combine_chunks().flatten().to_numpy() != render.IGNORED).sum()
    tokens = sum(columns["length"])
    counts.update(kept=len(table), cut=sum(columns["cut"]), tokens=tokens, supervised=int(supervised))
    lengths = numpy.array(whole, numpy.int32).reshape(-1, 2)
    tables = {"whole": lengths, "digests": texts.table()}
    return Encoded(table, lists, tables, counts, notes.unused)


def _sample_of(
    row: Conversation | Unusable,
    cfg: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Family,
    whole: list[tuple[int, int]],
) -> Sample | Unusable:
    """A row as ids and labels, or why it cannot be trained on; its uncut lengths go into `whole`."""
    if isinstance(row, Unusable):
        return row
    try:
        pieces = prompt.render(tokenizer, row.turns, cfg.prompt_style)
        whole.append((sum(len(piece.ids) for piece in pieces[:-1]), len(pieces[-1].ids)))
        limits = cfg.max_length_q, cfg.max_length_a
        sample = render.training_sample(
            tokenizer, prompt, row.turns, cfg.prompt_style, cfg.loss_on, *limits, pieces=pieces
        )
    except RowError as problem:
        return Unusable(row.where, problem.reason, said(row.turns), problem.kind)
    if sample.labels.count(render.IGNORED) == len(sample.labels):
        reason = "没有可训练的 token no id of the row is supervised"
        return Unusable(row.where, reason, said(row.turns), kind="unsupervised")
    return sample


def draw_rows(available: int, wanted: int | None, rng: random.Random) -> numpy.ndarray:
    """Row numbers [N]: all in order, or `wanted` drawn without repetition until the file is used up, then again."""
    everything = numpy.arange(available)
    if wanted is None or not available:
        return everything
    rounds, rest = divmod(wanted, available)
    drawn = numpy.array(rng.sample(range(available), rest), dtype=everything.dtype)
    return numpy.concatenate([everything] * rounds + [drawn])
