"""Scoring on held-out rows: base and tuned side by side, on the console, in all_results.json and in the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING, Any

from common import distributed, launch
from common.conversation.turns import Conversation, Turn, said
from common.data.accounts import show_repaired, show_unused
from common.data.formats import Notes
from common.errors import UserError
from common.evaluation import asking, intervals, metrics
from common.evaluation.records import (
    Answers,
    Progress,
    asked_as,
    key_of,
    predict,
    predictions,
    predictions_path,
    score_rows,
    shortest_first,
    show_cut,
    show_unanswered,
)
from common.evaluation.report import leave_report
from common.evaluation.results import add_scores, sampling_of
from common.evaluation.tables import (
    REST_NOTE,
    ROW_METRIC,
    WORST,
    changes,
    heads,
    metric_rows,
    overlap_text,
    row_score,
)
from common.inputs import files_of, show_files
from common.runs.adopted import find_manifest

if TYPE_CHECKING:
    from common.config import EvaluationFlags, SFTConfig
    from common.data.dataset import TrainingData

HeldOut = Sequence[tuple[str, Sequence[Turn]]]  # (file:line, turns that end with the reference answer) of each row


def held_out_rows(cfg: SFTConfig, rows: TrainingData | None = None) -> HeldOut:
    """The rows on which base and tuned are compared: `cfg.eval_data_path`, or else the validation rows."""
    if not cfg.eval_rows:
        return []
    if cfg.eval_data_path:
        return _read(cfg, cfg.eval_data_path, cfg.eval_rows)
    return list(islice(chain(*_validation_rows(cfg, rows)), cfg.eval_rows)) if rows is not None else []


def some_of_validation(cfg: SFTConfig, rows: TrainingData, count: int) -> HeldOut:
    """The first `count` validation rows that ask something, one of each file in turn."""
    in_turn = zip_longest(*_validation_rows(cfg, rows))
    return list(islice((row for turn in in_turn for row in turn if row), count))


def _validation_rows(cfg: SFTConfig, rows: TrainingData) -> list[Iterator[Conversation]]:
    """The validation rows of each file that ask something, read as they are wanted."""
    wanted = set(rows.validation["where"])
    paths = dict.fromkeys(path for path, _ in files_of(cfg.data_path)) if wanted else {}

    def of(path: str) -> Iterator[Conversation]:
        for row in asking.questions(path, cfg):
            if isinstance(row, Conversation) and row.where in wanted:
                yield row

    return [of(path) for path in paths]


def rows_to_score(cfg: SFTConfig, limit: int) -> HeldOut:
    """The rows of `--data_path` where given, or of the run's held-out files; `limit` of them at most (0: all)."""
    manifest = find_manifest(cfg.model_save_dir)
    specs = cfg.data_path if "data_path" in cfg.given else cfg.eval_data_path
    if manifest and not cfg.given & {"data_path", "eval_data_path"}:
        specs = manifest["config"]["eval_data_path"]
    if is_first():
        show_files(specs)
    rows = _read(cfg, specs, limit)
    if not rows:
        where = " ".join(specs) or cfg.model_save_dir  # a run on data of one's own has no held-out file
        raise UserError(f"{where}: 没有可评估的数据 there is no row to score; give a held-out file by --data_path")
    return rows


def _read(cfg: SFTConfig, specs: Sequence[str], limit: int) -> HeldOut:
    """The rows of held-out files, `limit` at most (0: all); prints what was not read of them, and what was left out."""
    notes = Notes()
    rows, left_out = asking.held_out(cfg, specs, limit, notes)
    if notes.unused or notes.repaired:
        print(f"留出数据 held-out {' '.join(specs)}:")
    show_unused(notes.unused)
    show_repaired(notes.repaired)
    for row in left_out:
        print(f"不评估 not scored: {row.where}: {row.reason}")
    return rows


def report(answer: Answers, rows: HeldOut, cfg: SFTConfig, flags: EvaluationFlags) -> None:
    """What evaluation.py does: score base, tuned or both, print, and leave the results.

    Under torchrun each process scores its share of the rows, and the first one prints and writes.
    """
    scores = {name: evaluate(answer, rows, cfg, name == "base") for name in models_of(flags)}
    if is_first():
        conclude(cfg, rows, scores)


def is_first() -> bool:
    """Whether this process is the one that prints and writes: the first of those that work together, or one alone."""
    return not (distributed.together() and launch.rank())


def models_of(flags: EvaluationFlags) -> tuple[str, ...]:
    """Names of the models that the flags ask for."""
    if flags.compare:
        return ("base", "tuned")
    return ("base",) if flags.base else ("tuned",)


def compare(answer: Answers, rows: HeldOut, cfg: SFTConfig, apart: bool = False) -> dict[str, Any]:
    """Score base and tuned on the same rows, print and leave the results; all of all_results.json.

    apart: the rows are the validation rows, kept out of training though they stand in its files.
    """
    scores = {name: evaluate(answer, rows, cfg, name == "base") for name in ("base", "tuned")}
    return conclude(cfg, rows, scores, apart)


def conclude(cfg: SFTConfig, rows: HeldOut, scores: dict[str, dict[str, float]], apart: bool = False) -> dict[str, Any]:
    """Keep {model: {metric: mean}} in all_results.json, write the report, print answers and table; all the results."""
    results = add_scores(cfg, rows, scores, apart)
    if len(scores) == 2:
        show_answers(cfg)
        show_worst(cfg)
    leave_report(cfg, results)
    show_table(results, list(scores))
    return results


def evaluate(answer: Answers, rows: HeldOut, cfg: SFTConfig, base: bool = False) -> dict[str, float]:
    """Score `answer` on the rows: {metric: mean}.

    Predictions go to predictions.jsonl (predictions_base.jsonl) in `cfg.model_save_dir`, a line each as they are made;
    a second call with the same model, rows and settings goes on after the last whole line.
    """
    sampling = sampling_of(cfg)
    hashed = [(where, said(turns)) for where, turns in rows]
    found = score_rows(
        predictions_path(cfg, base),
        key_of(cfg, base, [hashed, vars(sampling), metrics.signature(), *asked_as(answer)]),
        shortest_first([turns for _, turns in rows]),
        lambda numbers: predict(answer, [(number, *rows[number]) for number in numbers], sampling, base),
        cfg,
        Progress("评估基座 base" if base else "评估微调 tuned", "bleu-4", answer),
    )
    show_cut(found)
    show_unanswered(found)
    return metrics.average([record["scores"] for record in found])


def show_table(results: dict[str, Any], models: Sequence[str]) -> None:
    """Print a line a metric, a column a model and one for the change; first what no cheat raises."""
    print(f"\n留出数据 held-out rows: {results['held_out']['rows']}, {overlap_text(results['held_out'])}")
    first, others = (metric_rows(results, models, leading) for leading in (True, False))
    for name, *cells in [["metric", *heads(models)], *first, [f"[{REST_NOTE}]"], *others]:
        print(f"{name:<18}" + "".join(f"{cell:<26}" for cell in cells).rstrip())
    print(f"[95 % interval: {intervals.RESAMPLES} bootstrap resamples of the rows]")
    print(results["signature"])


def show_answers(cfg: SFTConfig, count: int = 3) -> None:
    """Print the first answers of base and tuned beside the reference."""
    base, tuned = predictions(cfg, base=True), predictions(cfg)
    for number in sorted(base.keys() & tuned.keys())[:count]:
        record = tuned[number]
        print(f"\n提问 question: {record['question']}")
        print(f"参考 reference: {record['reference']}")
        print(f"基座 base:      {base[number]['answer']}")
        print(f"微调 tuned:     {record['answer']}")


def show_worst(cfg: SFTConfig) -> None:
    """Print where the tuned model's answers lost most against the base's; eval_report.md has the texts."""
    base, tuned = predictions(cfg, base=True), predictions(cfg)
    print(f"\n变化最差的行 worst rows, by the change of {ROW_METRIC} (base → tuned):")
    for change, row in changes(base, tuned)[:WORST]:
        before, after = (row_score(each[row]) for each in (base, tuned))
        print(f"  {change:+.3f}  {before:.3f} → {after:.3f}  {tuned[row]['where']}")
