"""What train.py --check does: judges every row, shows what the loss sees, tries the heaviest step, gives a verdict."""

import contextlib
import hashlib
import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy

from common.data import conversations, dataset, tokenised
from common.data.render import IGNORED
from common.data.turns import Conversation, Unusable
from common.errors import UserError, is_out_of_memory
from common.launch import world_size
from common.training import rehearsal, tuning
from common.training.check_report import show_rows, show_step, show_verdict

SAMPLES = 3  # rows shown with their mask
PERCENTS = (50, 90, 95, 99, 100)
STEPS = 2  # of a rehearsal; the first is not timed
NO_END = "有的行不以停止符结尾 rows whose last supervised id is no stop id: the model would not stop"
OUT_OF_MEMORY = "--micro_batch_size 1, --gradient_checkpointing true, a smaller --max_length_q or --max_length_a"


class Finding(NamedTuple):
    """A defect: file:line (or file), its kind, what was found and expected, the remedy, whether the verdict is bad."""

    where: str
    kind: str
    found: str
    expected: str
    remedy: str
    bad: bool = True


# words of the reason why a row was left out: (kind, what was expected, remedy); the first that fits is taken
REASONS = {
    "broken JSON line": ("broken line", "one whole JSON object a line", "repair or delete the line"),
    "columns expected": ("broken line", "as many cells as the header", "repair or delete the line, quote commas"),
    "an object expected": ("wrong type", "a JSON object with named fields", "write the row as {…}"),
    "unknown keys": ("unknown keys", "the keys of a known shape", "rename the keys as README's Data section shows"),
    "ambiguous keys": ("ambiguous keys", "the keys of one shape", "remove the keys that are not meant"),
    "multiple-choice": ("unknown keys", "a question and an answer", "score with it, do not train on it"),
    "is not filled": ("identity", "a value for each placeholder", "--model_name 小黄 'Xiao Huang' --model_author …"),
    "there is no question": ("no question", "a question and its answer", "add them or delete the row"),
    "the first turn must": (
        "turn order",
        "user, assistant, user, assistant, …",
        "delete what stands before a question",
    ),
    "the last turn must": ("turn order", "an answer at the end", "add the answer or delete the last question"),
    "must be user": ("turn order", "user, assistant, user, assistant, …", "join or delete turns said in a row"),
    "must be assistant": ("turn order", "user, assistant, user, assistant, …", "join or delete turns said in a row"),
    "unknown role": ("wrong type", "a known role", "rename the role"),
    "must be": ("wrong type", "text, or a list where the shape has one", "write the value as the shape asks"),
    "expected, found": ("wrong type", "an utterance with its role and text", "write it as the shape asks"),
    "empty": ("empty", "text that can be seen", "write it or delete the row"),
    "only blanks": ("empty", "text that can be seen", "write it or delete the row"),
    "half a character": ("broken text", "whole characters", "repair the text where it was cut"),
    "--max_length_a": ("over-long", "an answer within --max_length_a", "a larger --max_length_a or a shorter answer"),
    "--max_length_q": (
        "masked",
        "room for the question: else every label of the row is masked",
        "a larger --max_length_q or a shorter system text",
    ),
    "is supervised": ("masked", "an id that the loss counts", "look at the row's answer and at --loss_on"),
}


def run(cfg, flags, base, tokenizer, prompt):
    """Print what --check found, with `flags.json` as one JSON object; SystemExit(1) where the verdict is bad."""
    if world_size() > 1:
        raise UserError(
            "--check: 用一个进程运行 run it as one process, without a launcher; a step's memory is per process"
        )
    with contextlib.redirect_stdout(sys.stderr) if flags.json else contextlib.nullcontext():
        rows, report = examine(cfg, tokenizer, prompt)
        show_rows(report)
        measured, failures = rehearse(cfg, base, tokenizer, rows) if rows else ({}, [])
        show_step(measured)
        problems = Counter(finding["kind"] for finding in report["findings"] if finding["bad"])
        problems += Counter(failures) + Counter([NO_END] if report["stop_share"] < 1 else [])
        show_verdict(problems)
    report |= measured | {"problems": dict(problems), "verdict": "bad" if problems else "good"}
    if flags.json:
        print(json.dumps(report, ensure_ascii=False))
    if problems:
        raise SystemExit(1)


def examine(cfg, tokenizer, prompt):
    """(what there is to train on or None, the report about every row of data_path and eval_data_path)."""
    cfg = replace(cfg, strict=False, max_dropped=1.0)
    files, findings = _files(cfg, tokenizer, prompt)
    lost = {row.where for file in files for row in file.rejected}
    known, asked, same = {}, set(), []
    findings += _judge_texts(cfg, lost, tokenizer, known, asked, same)
    overlap = _held_out_overlap(cfg, known, asked, findings)
    try:
        rows = dataset.prepare(cfg, tokenizer, prompt)
    except UserError as problem:
        rows = None
        if not findings:
            findings.append(_unreadable(problem))
    validation = set(rows.validation["where"]) if rows else set()
    straddling = [pair for pair in same if len(validation & set(pair)) == 1]
    findings += [_on_both_sides(first, second) for first, second in straddling]
    totals = {
        name: sum(file.source[name] for file in files) for name in ("rows", "kept", "cut", "tokens", "supervised")
    }
    report = {
        "rows": {name: totals[name] for name in ("rows", "kept", "cut")}
        | {"dropped": totals["rows"] - totals["kept"], "duplicates": len(same)}
        | ({"train": len(rows.train), "validation": len(rows.validation)} if rows else {}),
        "overlap": overlap | {"validation": len(straddling)},
        **_shares(files, totals, set(prompt.stop_ids(tokenizer, cfg.prompt_style))),
        "kinds": dict(Counter(finding.kind for finding in findings)),
        "findings": [finding._asdict() for finding in sorted(findings, key=_place)],
        "samples": _samples(rows, tokenizer, cfg.seed) if rows else [],
    }
    return rows, report


def _files(cfg, tokenizer, prompt):
    """The Tokenised of the readable files of data_path; the Findings of their rows."""
    files, findings, tokenizer_id = [], [], tokenised.tokenizer_hash(tokenizer)
    for path in dict.fromkeys(conversations.split_sample(spec)[0] for spec in cfg.data_path):
        try:
            files.append(tokenised.tokenised(path, cfg, tokenizer, tokenizer_id, prompt))
        except UserError as problem:
            findings.append(_unreadable(problem))
            continue
        rows = files[-1].rows
        findings += [_left_out(row) for row in files[-1].rejected]
        findings += [_cut(cfg, where) for where, cut in zip(rows["where"], rows["cut"], strict=True) if cut]
    return files, findings


def _left_out(row):
    kind, expected, remedy = next(
        (said for words, said in REASONS.items() if words in row.reason),
        ("unusable", "a known shape", "see README, Data"),
    )
    return Finding(row.where, kind, row.reason, expected, remedy)


def _unreadable(problem):
    where, _, found = str(problem).partition(": ")
    return Finding(where, "unreadable file", found, "a whole file in UTF-8", "repair it or check the path")


def _cut(cfg, where):
    found = "提问太长，中间或最早的轮次被截去 older turns or the question's middle are cut"
    return Finding(
        where, "cut", found, f"a prompt within --max_length_q {cfg.max_length_q}", "a larger --max_length_q", bad=False
    )


def _on_both_sides(first, second):
    found = f"训练与验证各有一份 in training and in validation: {first} and {second}"
    return Finding(second, "validation overlap", found, "each row on one side", "delete one of the two", bad=False)


def _judge_texts(cfg, lost, tokenizer, known, asked, same):
    """Findings about what rows say: repeated rows, typed control tokens.

    Fills `known` {digest of a row: where}, `asked` {digest of a question} and `same` [(first, again)].
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = re.compile("|".join([*map(re.escape, special), r"<\|\w+\|>"]))  # the last: what most templates use
    findings = []
    for where, turns in _conversations(cfg):
        if where in lost:
            continue
        digest = _digest(turns)
        if turns[:-1]:  # plain text asks nothing
            asked.add(_digest(turns[:-1]))
        first = known.setdefault(digest, where)
        if first != where:
            same.append((first, where))
            found = f"与 {first} 相同 the same row as {first}"
            findings.append(Finding(where, "duplicate", found, "each row once", "delete one of the two", bad=False))
        typed = sorted({match for turn in turns for match in control.findall(turn.text)})
        if typed:
            found = f"文字里有控制符 control tokens typed in the text: {' '.join(typed)}"
            remedy = "delete them if a template was applied before; as text they are kept"
            findings.append(Finding(where, "control tokens", found, "text without a template", remedy, bad=False))
    return findings


def _held_out_overlap(cfg, known, asked, findings):
    """{held_out: equal rows, held_out_questions: equal questions}; equal and unusable held-out rows join `findings`."""
    same_rows = same_questions = 0
    for spec in cfg.eval_data_path:
        path = conversations.split_sample(spec)[0]
        try:
            for row in conversations.conversations(path, cfg):
                if isinstance(row, Unusable):
                    findings.append(_left_out(row))
                    continue
                same_questions += _digest(row.turns[:-1]) in asked
                twin = known.get(_digest(row.turns))
                if twin:
                    same_rows += 1
                    said = f"也是留出数据 {row.where} also a held-out row: {row.where}"
                    findings.append(Finding(twin, "held-out overlap", said, "rows of one file only", "delete one"))
        except UserError as problem:
            findings.append(_unreadable(problem))
    return {"held_out": same_rows, "held_out_questions": same_questions}


def _conversations(cfg):
    """The usable rows of data_path; a file that breaks off has been reported already."""
    for path in dict.fromkeys(conversations.split_sample(spec)[0] for spec in cfg.data_path):
        with contextlib.suppress(UserError):
            for row in conversations.conversations(path, cfg):
                if isinstance(row, Conversation):
                    yield row


def _digest(turns):
    text = json.dumps([(turn.role, turn.text.strip()) for turn in turns])
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def _place(finding):
    path, _, line = finding.where.rpartition(":")
    return (path, int(line)) if line.isdigit() else (finding.where, 0)


def _shares(files, totals, stop_ids):
    """Supervised and stop-token share of the kept rows, and percentiles of ids and supervised ids a row."""
    counts = [_counts(batch, stop_ids) for file in files for batch in file.rows.with_format("arrow").iter(1000)]
    lengths, supervised, ends = (
        (numpy.concatenate(column) for column in zip(*counts, strict=True)) if counts else [[]] * 3
    )
    return {
        "supervised_share": totals["supervised"] / max(totals["tokens"], 1),
        "stop_share": float(numpy.mean(ends)) if len(ends) else 1.0,
        "lengths": {"tokens": _percentiles(lengths), "supervised": _percentiles(supervised)},
    }


def _counts(batch, stop_ids):
    """Of each row of an Arrow table: number of ids, of supervised ids, and whether the last of these is a stop id."""
    column = batch["labels"].combine_chunks()
    labels, starts = column.flatten().to_numpy(), column.offsets.to_numpy() - column.offsets[0].as_py()
    counted = numpy.flatnonzero(labels != IGNORED)
    ends = numpy.searchsorted(counted, starts[1:])  # every kept row has a supervised id
    last = labels[counted[ends - 1]]
    return numpy.diff(starts), numpy.diff(numpy.searchsorted(counted, starts)), numpy.isin(last, list(stop_ids))


def _percentiles(values):
    return {f"p{p}": int(numpy.percentile(values, p)) for p in PERCENTS} if len(values) else {}


def _samples(rows, tokenizer, seed):
    """[{where, tokens: [[text, supervised], …]}] of the first row and others drawn with the seed."""
    count = len(rows.train)
    drawn = random.Random(seed).sample(range(1, count), min(SAMPLES, count) - 1)
    chosen = [rows.train[number] for number in [0, *drawn]]
    return [{"where": row["where"], "tokens": masked_tokens(tokenizer, row)} for row in chosen]


def masked_tokens(tokenizer, row):
    """[[text, supervised]] of a row's ids, one entry an id; the bytes of one character stand together."""
    found, held, state = [], [], None
    for id_, label in zip(row["input_ids"], row["labels"], strict=True):
        counted = label != IGNORED
        if held and counted != state:
            found.append([tokenizer.decode(held), state])
            held = []
        held, state = [*held, id_], counted
        text = tokenizer.decode(held)
        if "\ufffd" not in text:
            found.append([text, state])
            held = []
    return found + ([[tokenizer.decode(held), state]] if held else [])


def rehearse(cfg, base, tokenizer, rows):
    """({step, memory} of training on the heaviest micro batch of the run, what went wrong as a list of texts)."""
    try:
        return rehearsal.rehearse(tuning.make_trainable(base, cfg), rows, cfg, tokenizer, STEPS), []
    except UserError as problem:
        return {}, [str(problem)]
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        return {}, [f"内存不足 out of memory on the heaviest micro batch; remedy: {OUT_OF_MEMORY}"]
