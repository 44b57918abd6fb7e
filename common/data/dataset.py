"""Files as trainable rows: read, rendered, cut to length, memory-mapped, split, and every lost row accounted for."""

import hashlib
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy
from filelock import FileLock

from common import distributed, jsonl
from common.data import formats, render, workers
from common.data.sources import read_records
from common.errors import UserError

CHUNK = 1000  # rows tokenised at a time: what a process is handed, and a record batch of rows.arrow


class Rows(NamedTuple):
    """What there is to train on: `train` and `validation` are datasets of input_ids, labels, length, cut and where."""

    train: object
    validation: object
    sources: list  # one dict a file: path, sha256, rows and counts
    rejected: "Rejected"


class Rejected(Sequence):
    """The rows left out, one dict each: where, reason, row. They stay in their files and are read when asked for."""

    def __init__(self, files=()):
        self.files = list(files)  # (path of a rejected.jsonl, its rows)

    def __len__(self):
        return sum(count for _, count in self.files)

    def __iter__(self):
        for path, _ in self.files:
            yield from jsonl.stream(path)

    def __getitem__(self, number):
        return list(islice(self, number, number + 1))[0]


def prepare(cfg, tokenizer, prompt):
    """The Rows of `cfg.data_path`: mixed, sampled where `path#N` asks for it, the validation split taken out.

    Of several processes the first does it for all, and the others find its cache. Raises UserError where nothing can be
    trained on, or more than `cfg.max_dropped` of the rows cannot.
    """
    return distributed.in_turn(lambda: _prepare(cfg, tokenizer, prompt))


def _prepare(cfg, tokenizer, prompt):
    from datasets import concatenate_datasets

    sources, rejected, datasets, chosen, offsets, total = [], Rejected(), [], [], {}, 0
    rng, tokenizer_id = random.Random(cfg.seed), tokenizer_hash(tokenizer)
    for spec in cfg.data_path:
        path, wanted = split_sample(spec)
        dataset, source, left_out = tokenised(path, cfg, tokenizer, tokenizer_id, prompt)
        picked = _sample(len(dataset), wanted, rng)
        sources.append(source | {"used": len(picked)})
        rejected.files += left_out.files
        if path not in offsets:  # a file named twice is the same rows once more
            offsets[path], total = total, total + len(dataset)
            datasets.append(dataset)
        chosen.append(offsets[path] + picked)
    _check_counts(cfg, sources, rejected)
    everything, chosen = concatenate_datasets(datasets), numpy.concatenate(chosen)
    lines = _line_ranks(everything)[chosen]  # several answers to a question stand in one line and stay on one side
    is_held = numpy.isin(lines, _held_lines(numpy.unique(lines), cfg.val_set_size, rng))
    validation = numpy.unique(chosen[is_held])
    return Rows(everything.select(chosen[~is_held]), everything.select(validation), sources, rejected)


def lengths_of(dataset):
    """The rows' lengths in ids, [N] int32, without a Python number for each."""
    return dataset.with_format("arrow")["length"][:].to_numpy()


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
        yield from _conversations_in(record, path, cfg)


def _conversations_in(record, path, cfg):
    where = f"{path}:{record.line}"
    if record.problem:
        yield where, record.value, record.problem
        return
    try:
        found = [
            formats.fill_identity(turns, cfg.model_name, cfg.model_author) for turns in formats.turns_of(record.value)
        ]
    except formats.ShapeError as problem:
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
        kept += [rows[number] for number in _sample(len(rows), wanted, random.Random(cfg.seed))]
    return kept[: limit or None], left_out


def file_hash(path):
    """sha256 of a file's bytes, hex; UserError where it cannot be opened."""
    try:
        with fsspec.open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: 文件不存在 no such file; check --data_path") from None
    except (OSError, ImportError, ValueError) as problem:
        raise UserError(f"{path}: 无法打开 cannot be opened: {problem}") from None


def tokenizer_hash(tokenizer):
    """sha256 of what decides a tokenizer's ids, hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = sorted(tokenizer.get_vocab().items())
    else:
        state = json.loads(backend.to_str())
        state.pop("padding"), state.pop("truncation")
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def tokenised(path, cfg, tokenizer, tokenizer_id, prompt):
    """(dataset, source, rejected) of one file, from the cache where its content and all that shapes it are the same."""
    from datasets import Dataset

    content = file_hash(path)
    key = _cache_key(path, content, cfg, tokenizer_id, prompt)
    folder = Path(cfg.cache_dir).expanduser() / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # the other processes of a run wait here and find the work done
        if not folder.exists():
            _tokenise(path, cfg, tokenizer, prompt, folder)
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    rejected = Rejected([(folder / "rejected.jsonl", record["rows"] - record["kept"])])
    if cfg.strict and rejected:
        raise UserError(f"{rejected[0]['where']}: {rejected[0]['reason']} (--strict)")
    return Dataset.from_file(str(folder / "rows.arrow")), {"path": path, "sha256": content, **record}, rejected


def _cache_key(path, content, cfg, tokenizer_id, prompt):
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(prompt.__file__)]
    code = [file.read_text(encoding="utf-8") for file in files]
    knobs = [cfg.prompt_style, cfg.loss_on, cfg.max_length_q, cfg.max_length_a, cfg.model_name, cfg.model_author]
    parts = [path, content, tokenizer_id, code, knobs]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenise(path, cfg, tokenizer, prompt, folder):
    """Write rows.arrow, rejected.jsonl and record.json into `folder`, which appears only when all three are whole."""
    from datasets import Features, Value
    from datasets import List as ListOf
    from datasets.arrow_writer import ArrowWriter
    from tqdm import tqdm

    features = Features(
        input_ids=ListOf(Value("int32")),
        labels=ListOf(Value("int32")),
        length=Value("int32"),
        cut=Value("bool"),
        where=Value("string"),
    )
    counts = Counter(rows=0, kept=0, cut=0, tokens=0, supervised=0)
    records = read_records(path)
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        with (
            ArrowWriter(features=features, path=str(draft / "rows.arrow")) as writer,
            (draft / "rejected.jsonl").open("w", encoding="utf-8", newline="\n") as rejected,
            tqdm(desc="编码 tokenising", unit="row", leave=False) as bar,
        ):
            schema = features.arrow_schema
            for table, left_out, counted in workers.map_chunks(_encode, chunks, path, schema, cfg, tokenizer, prompt):
                writer.write_table(table)
                rejected.writelines(left_out)
                counts.update(counted)
                bar.update(counted["rows"])
            writer.finalize()
        (draft / "record.json").write_text(json.dumps(counts), encoding="utf-8")
        draft.rename(folder)


def _encode(records, path, schema, cfg, tokenizer, prompt):
    """(table of samples, lines of rejected.jsonl, counts) of some Records of a file."""
    import pyarrow

    columns, rejected, counts = {name: [] for name in schema.names}, [], Counter()
    found = (row for record in records for row in _conversations_in(record, path, cfg))
    for row in _lessons(found, prompt.ONE_ANSWER and cfg.loss_on == "answer"):
        _put_row(*row, cfg, tokenizer, prompt, columns, rejected, counts)
    return pyarrow.table(columns, schema), rejected, counts


def _lessons(rows, one_answer):
    """The rows; with `one_answer` a conversation gives one for each of its answers, which ends there."""
    for where, found, reason in rows:
        answers = [number for number, turn in enumerate(found, 1) if turn.role == "assistant"] if not reason else []
        for end in answers if one_answer and answers else [None]:
            yield where, found if end is None else found[:end], reason


def _put_row(where, found, reason, cfg, tokenizer, prompt, columns, rejected, counts):
    """Put one row where it belongs, among the samples or the rejected, and count it."""
    counts["rows"] += 1
    sample, reason = (None, reason) if reason else _sample_of(found, cfg, tokenizer, prompt)
    if reason:
        rejected.append(jsonl.line_of({"where": where, "reason": reason, "row": found}))
        return
    length = len(sample.input_ids)
    counts.update(kept=1, cut=sample.cut, tokens=length, supervised=length - sample.labels.count(render.IGNORED))
    row = {"input_ids": sample.input_ids, "labels": sample.labels, "length": length}
    row |= {"cut": sample.cut, "where": where}
    for name, value in row.items():
        columns[name].append(value)


def _sample_of(turns, cfg, tokenizer, prompt):
    """(Sample, None), or (None, why the row cannot be trained on)."""
    try:
        sample = render.training_sample(
            tokenizer, prompt, turns, cfg.prompt_style, cfg.loss_on, cfg.max_length_q, cfg.max_length_a
        )
    except render.TooLong as problem:
        return None, str(problem)
    if sample.labels.count(render.IGNORED) == len(sample.labels):
        return None, "没有可训练的 token no id of the row is supervised"
    return sample, None


def _sample(available, wanted, rng):
    """Row numbers: all in order, or `wanted` drawn without repetition until the file is used up, then again."""
    everything = numpy.arange(available)
    if wanted is None or not available:
        return everything
    rounds, rest = divmod(wanted, available)
    drawn = numpy.array(rng.sample(range(available), rest), dtype=everything.dtype)
    return numpy.concatenate([everything] * rounds + [drawn])


def _line_ranks(dataset):
    """For each row, in which of the dataset's lines it stands: the line's rank in the order of their names, [N]."""
    import pyarrow.compute

    where = dataset.data.column("where").dictionary_encode().combine_chunks()
    order = pyarrow.compute.sort_indices(where.dictionary).to_numpy()
    ranks = numpy.empty_like(order)
    ranks[order] = numpy.arange(len(order))
    return ranks[where.indices.to_numpy()]


def _held_lines(lines, size, rng):
    """Which of the lines are kept out of training: `size` of them, or that share."""
    count = int(size) if size >= 1 else max(round(size * len(lines)), 1 if size else 0)
    if count >= len(lines) > 0:
        raise UserError(f"--val_set_size {size:g} 不小于数据行数 leaves no row of {len(lines)} to train on")
    return lines[rng.sample(range(len(lines)), count)]


def _check_counts(cfg, sources, rejected):
    rows = sum(source["rows"] for source in sources)
    if sum(source["kept"] for source in sources) == 0:
        first = f"; first: {rejected[0]['where']}: {rejected[0]['reason']}" if rejected else ""
        raise UserError(f"{', '.join(cfg.data_path)}: 没有可用的数据 no row can be trained on{first}")
    if len(rejected) > cfg.max_dropped * rows:
        raise UserError(
            f"{len(rejected)} / {rows} 行无法使用 rows cannot be used, more than --max_dropped {cfg.max_dropped}; "
            f"first: {rejected[0]['where']}: {rejected[0]['reason']}"
        )


def show_counts(rows):
    """Print what was read of each file and what became of it."""
    for source in rows.sources:
        print(
            f"数据 {source['path']}: 读取 rows {source['rows']}, 可用 kept {source['kept']}, "
            f"截断 cut {source['cut']}, 剔除 dropped {source['rows'] - source['kept']}, "
            f"使用 used {source['used']}, token {source['tokens']}, "
            f"计损失 supervised {source['supervised'] / max(source['tokens'], 1):.0%}"
        )
    reasons = Counter(re.sub(r"\d+", "N", row["reason"]) for row in rows.rejected)
    for reason, count in reasons.most_common(5):
        print(f"  剔除 dropped {count}: {reason}")
    print(f"训练 train {len(rows.train)}, 验证 validation {len(rows.validation)}")


def show_first(rows, tokenizer):
    """Print the first training row as text, ids and labels, so that a wrong prompt or mask is seen at once."""
    row = rows.train[0]
    supervised = [label for label in row["labels"] if label != render.IGNORED]
    print(f"第一条样本 first sample ({row['where']}):")
    print("text:", repr(render.shown(tokenizer, row["input_ids"])))
    print("input_ids:", row["input_ids"])
    print("labels:", row["labels"])
    print("计损失的文字 supervised text:", repr(render.shown(tokenizer, supervised)))
