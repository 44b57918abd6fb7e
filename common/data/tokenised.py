"""A file's rows as ids and labels, made once and kept in a cache under a hash of all that shapes them."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from filelock import FileLock

from common.data import render, workers
from common.data.conversations import conversations_in
from common.data.sources import read_records
from common.errors import UserError
from common.files import file_hash, line_of, stream_jsonl

CHUNK = 1000  # rows tokenised at a time: what a process is handed, and a record batch of rows.arrow


class Rejected(Sequence):
    """The rows left out, one dict each: where, reason, row. They stay in their files and are read when asked for."""

    def __init__(self, files=()):
        self.files = list(files)  # (path of a rejected.jsonl, its rows)

    def __len__(self):
        return sum(count for _, count in self.files)

    def __iter__(self):
        for path, _ in self.files:
            yield from stream_jsonl(path)

    def __getitem__(self, number):
        return list(islice(self, number, number + 1))[0]


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
    found = (row for record in records for row in conversations_in(record, path, cfg))
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
        rejected.append(line_of({"where": where, "reason": reason, "row": found}))
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
