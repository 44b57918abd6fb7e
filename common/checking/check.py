"""What train.py --check does: judges every row, shows what the loss sees, tries the heaviest step, gives a verdict."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from common.checking import rehearsal
from common.checking.check_report import show_rows, show_step, show_verdict
from common.conversation.render import IGNORED
from common.conversation.turns import Repair, Unusable
from common.data import accounts, cache, dataset
from common.data.alike import Known, Typed, digests_of, number_of
from common.data.defects import DEFECTS
from common.errors import UserError, is_out_of_memory
from common.inputs import files_of
from common.launch import world_size
from common.model import template_tokens
from common.training import tuning

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.config import SFTConfig, TrainFlags
    from common.conversation.family import Family
    from common.data.cache import Tokenised
    from common.data.dataset import TrainingData

Report = dict[str, Any]  # what --json prints
UNREADABLE = "unreadable file"  # a kind of Finding
SAMPLES = 3  # rows shown with their mask
PLACE = re.compile(r"\d+(\.\d+)?")  # of a row in its file: line, or line.part
NO_END = "有的行不以停止符结尾 rows whose last supervised id is no stop id: the model would not stop"
OUT_OF_MEMORY = "--micro_batch_size 1, --gradient_checkpointing true, a smaller --max_length_q or --max_length_a"


class Finding(NamedTuple):
    """A defect: file:line (or file), its kind, what was found and expected, and the remedy.

    `bad` makes the verdict bad. `lost` is a row that is left out: of those, only too many make it bad.
    """

    where: str
    kind: str
    found: str
    expected: str
    remedy: str
    bad: bool = True
    lost: bool = False


def run(
    cfg: SFTConfig,
    flags: TrainFlags,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Family,
    parent: Path | None = None,
) -> None:
    """Print what --check found, with `flags.json` as one JSON object; SystemExit(1) where the verdict is bad."""
    if world_size() > 1:
        raise UserError(
            "--check: 用一个进程运行 run it as one process, without a launcher; a step's memory is per process"
        )
    with contextlib.redirect_stdout(sys.stderr) if flags.json else contextlib.nullcontext():
        rows, report = examine(cfg, tokenizer, prompt)
        show_rows(report)
        measured, failures = rehearse(cfg, base, tokenizer, prompt, rows, parent) if rows else ({}, [])
        show_step(measured)
        report |= measured | _judged(cfg, report, failures)
        show_verdict(report)
    if flags.json:
        print(json.dumps(report, ensure_ascii=False))
    if report["problems"]:
        raise SystemExit(1)


def _judged(cfg: SFTConfig, report: Report, failures: list[str]) -> Report:
    """{problems, losses: {what: count}, verdict}: bad where training would stop, or would make a bad model."""
    problems = Counter(finding["kind"] for finding in report["findings"] if finding["bad"])
    problems += Counter(failures) + Counter([NO_END] if report["stop_share"] < 1 else [])
    losses = Counter(finding["kind"] for finding in report["findings"] if finding["lost"])
    rows = report["rows"]
    if rows["dropped"] > cfg.max_dropped * rows["rows"] or not rows["kept"]:
        problems += losses
    elif cfg.strict and (losses or report["kinds"].get("repaired")):
        problems["--strict"] += 1
    verdict = "bad" if problems else "usable with losses" if losses else "good"
    return {"problems": dict(problems), "losses": dict(losses), "verdict": verdict}


def examine(cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, prompt: Family) -> tuple[TrainingData | None, Report]:
    """(what there is to train on or None, the report about every row of data_path and eval_data_path)."""
    cfg = replace(cfg, strict=False, max_dropped=1.0)
    files, findings = _files(cfg, tokenizer, prompt)
    known = _said_by(files)
    same = known.repeated()
    findings += [_repeated(*pair) for pair in same]
    overlap, unfit = _held_out_overlap(cfg, known)
    findings += unfit
    rows: TrainingData | None = None
    try:
        rows = dataset.prepare(cfg, tokenizer, prompt)
    except UserError as problem:
        kept = sum(file.source["kept"] for file in files)
        if kept and not any(finding.kind == UNREADABLE for finding in findings):
            findings.append(_all_held_out(cfg, problem))
        elif not findings:
            findings.append(_unreadable(problem))
    validation = set(rows.validation["where"]) if rows else set()
    straddling = [pair for pair in same if len(validation & set(pair)) == 1]
    findings += [_on_both_sides(first, second) for first, second in straddling]
    counted = ("rows", "kept", "cut", "tokens", "supervised")
    totals = {name: sum(file.source[name] for file in files) for name in counted}
    report: Report = {
        "rows": {name: totals[name] for name in ("rows", "kept", "cut")}
        | {"dropped": totals["rows"] - totals["kept"], "duplicates": len(same)}
        | ({"train": len(rows.train), "validation": len(rows.validation)} if rows else {}),
        "overlap": overlap | {"validation": len(straddling)},
        "usable_share": totals["kept"] / max(totals["rows"], 1),
        "supervised_share": totals["supervised"] / max(totals["tokens"], 1),
        **accounts.lengths(files, set(prompt.stop_ids(tokenizer, cfg.prompt_style))),
        "kinds": dict(Counter(finding.kind for finding in findings)),
        "findings": [finding._asdict() for finding in sorted(findings, key=_place)],
        "samples": _samples(rows, tokenizer, cfg.seed) if rows else [],
    }
    return rows, report


def _files(cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, prompt: Family) -> tuple[list[Tokenised], list[Finding]]:
    """The readable files of data_path, and the Findings of their rows."""
    files: list[Tokenised] = []
    findings: list[Finding] = []
    tokenizer_id = cache.encoding_hash(tokenizer)
    for path in _paths(cfg.data_path, findings):
        try:
            files.append(dataset.tokenised(path, cfg, tokenizer, tokenizer_id, prompt))
        except UserError as problem:
            findings.append(_unreadable(problem))
            continue
        findings += [_left_out(row) for row in files[-1].rejected]
        lost = {row.where for row in files[-1].rejected}
        findings += [_typed(row) for row in files[-1].typed if row.where not in lost]
        findings += [_mended(repair) for repair in files[-1].repaired]
        findings += [_unused(path, key, count) for key, count in files[-1].source["unused"].items()]
        findings += [_cut(cfg, where) for where in _cut_rows(files[-1])]
    return files, findings


def _cut_rows(file: Tokenised) -> Sequence[str]:
    """Where the rows stand that were cut; of the others no value is made."""
    numbers = numpy.flatnonzero(file.rows.with_format("numpy")["cut"][:])
    return file.rows.select(numbers)["where"][:]


def _paths(specs: Sequence[str], findings: list[Finding]) -> list[str]:
    """The files that `specs` name, each once; a Finding is added for each spec that names none."""
    paths: dict[str, None] = {}
    for spec in specs:
        try:
            paths.update(dict.fromkeys(path for path, _ in files_of([spec])))
        except UserError as problem:
            findings.append(_unreadable(problem))
    return list(paths)


def _left_out(row: Unusable) -> Finding:
    defect = DEFECTS[row.kind]
    return Finding(row.where, defect.group, row.reason, defect.expected, defect.remedy, bad=False, lost=True)


def _mended(repair: Repair) -> Finding:
    expected = "user, assistant, user, assistant, …; a thought within <think>…</think>"
    return Finding(repair.where, "repaired", repair.reason, expected, "none if it is meant so", bad=False)


def _unused(path: str, key: str, count: int) -> Finding:
    found = f"{key}: {count} 行有而没有读 not used in {count} rows"
    return Finding(path, "unused", found, "keys of a known shape", "none if it is no text to learn", bad=False)


def _unreadable(problem: UserError) -> Finding:
    where, _, found = str(problem).partition(": ")
    return Finding(where, UNREADABLE, found, "a whole file in UTF-8", "repair it or check the path")


def _all_held_out(cfg: SFTConfig, problem: UserError) -> Finding:
    where, expected = f"--val_set_size {cfg.val_set_size:g}", "more rows than are held out"
    return Finding(where, "no training rows", str(problem), expected, "more rows, or --val_set_size 0")


def _cut(cfg: SFTConfig, where: str) -> Finding:
    found = "提问太长，中间或最早的轮次被截去 older turns or the question's middle are cut"
    return Finding(
        where, "cut", found, f"a prompt within --max_length_q {cfg.max_length_q}", "a larger --max_length_q", bad=False
    )


def _on_both_sides(first: str, second: str) -> Finding:
    found = f"训练与验证各有一份 in training and in validation: {first} and {second}"
    return Finding(second, "validation overlap", found, "each row on one side", "delete one of the two", bad=False)


def _said_by(files: Sequence[Tokenised]) -> Known:
    """What the rows of the files say that are not left out."""
    tables = []
    for file in files:
        lost = [number_of(row.where) for row in file.rejected]
        tables.append((file.source["path"], file.digests[~numpy.isin(file.digests[:, 0], lost)]))
    return Known(tables)


def _repeated(first: str, where: str) -> Finding:
    found = f"与 {first} 相同 the same row as {first}"
    return Finding(where, "duplicate", found, "each row once", "delete one of the two", bad=False)


def _typed(row: Typed) -> Finding:
    found = f"文字里有控制符 control tokens typed in the text: {' '.join(row.tokens)}"
    remedy = (
        "delete them if a template was applied before, write thoughts and calls as docs/data.md shows; "
        "as text they are kept"
    )
    return Finding(row.where, "control tokens", found, "text without a template", remedy, bad=False)


def _held_out_overlap(cfg: SFTConfig, known: Known) -> tuple[dict[str, int], list[Finding]]:
    """{held_out: equal rows, held_out_questions: equal questions}; Findings of equal and unusable held-out rows."""
    findings: list[Finding] = []
    same_rows = same_questions = 0
    for path in _paths(cfg.eval_data_path, findings):
        try:
            for row in dataset.conversations(path, cfg):
                if isinstance(row, Unusable):
                    findings.append(_left_out(row))
                    continue
                digest, question = digests_of(row.turns)
                same_questions += known.asks(question)
                twin = known.twin(digest)
                if twin:
                    same_rows += 1
                    said = f"也是留出数据 {row.where} also a held-out row: {row.where}"
                    findings.append(Finding(twin, "held-out overlap", said, "rows of one file only", "delete one"))
        except UserError as problem:
            findings.append(_unreadable(problem))
    return {"held_out": same_rows, "held_out_questions": same_questions}, findings


def _place(finding: Finding) -> tuple[str | int, ...]:
    """What findings are sorted by: the file, then line and part as numbers."""
    path, _, place = finding.where.rpartition(":")
    return (path, *map(int, place.split("."))) if PLACE.fullmatch(place) else (finding.where, 0)


def _samples(rows: TrainingData, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[dict[str, Any]]:
    """[{where, tokens: [[text, supervised], …]}] of the first row and others drawn with the seed."""
    count = len(rows.train)
    drawn = random.Random(seed).sample(range(1, count), min(SAMPLES, count) - 1)
    chosen = [rows.train[number] for number in [0, *drawn]]
    return [{"where": row["where"], "tokens": masked_tokens(tokenizer, row)} for row in chosen]


def masked_tokens(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[list]:
    """[[text, supervised]] of a row's ids, one entry an id; the bytes of one character stand together."""
    found: list[list] = []
    held: list[int] = []  # ids whose text is not whole yet
    state = None  # whether they are supervised
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


def rehearse(
    cfg: SFTConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Family,
    rows: TrainingData,
    parent: Path | None = None,
) -> tuple[Report, list[str]]:
    """({step, memory} of training on the heaviest micro batch of the run, what went wrong as a list of texts)."""
    try:
        cfg = tuning.fit_targets(cfg, base, parent)
        tokens = template_tokens.to_train(base, cfg, tokenizer, prompt, rows, parent)
        net = tuning.make_trainable(base, cfg, tokens, parent)
        return rehearsal.rehearse(net, rows, cfg, tokenizer), []
    except UserError as problem:
        return {}, [str(problem)]
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        return {}, [f"内存不足 out of memory on the heaviest micro batch; remedy: {OUT_OF_MEMORY}"]
