"""Scores as rows of text cells, for the console and for the report alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from common.evaluation import metrics
from common.evaluation.intervals import intervals
from common.evaluation.records import Record

if TYPE_CHECKING:
    from numpy import ndarray

HIDDEN = re.compile(r"(word-)?rouge-.-[rp]")  # kept in all_results.json; a table has F alone
LEADING = re.compile(r"entity-f1.*|attributes|novel-f1")  # neither a copied question nor a loop raises these
MANNERS = re.compile(r"stopped|copied|looping")  # how answers look, whatever they say
REST_NOTE = (
    "entity-f1, attributes, novel-f1 以外的指标 metrics other than these: 复述提问或重复循环也能得分 "
    "a copied question or a loop can raise them; copied, looping: 越低越好 lower is better; docs/evaluation.md"
)
ROW_METRIC = "novel-f1"  # by which rows are compared: each row has it
WORST = 10  # rows in the list of those that changed for the worse
Interval = list[float] | None  # [low, high]; None where one row alone has the metric
Scored = tuple[float, Interval]


def metric_names(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Names of the metrics that a table of {model: {metric: value}} has: those of all models, always in one order.

    First those of LEADING, then those of MANNERS.
    """
    first, *others = scores.values()
    shared = [name for name in first if not HIDDEN.fullmatch(name) and all(name in values for values in others)]
    return sorted(shared, key=_place)


def _place(name: str) -> tuple[int, int, str]:
    """Where a metric stands in tables: its group, its place there as metrics.NAMES has it, its name."""
    group = 0 if LEADING.fullmatch(name) else 1 if MANNERS.fullmatch(name) else 2
    return group, metrics.NAMES.index(name) if group == 2 and name in metrics.NAMES else -1, name


def metric_rows(results: Mapping[str, Any], models: Sequence[str], leading: bool | None = None) -> list[list[str]]:
    """[[metric, cell, …]] for the models and, where there are two, their change.

    leading: those of LEADING alone, or the others alone; None: both.
    """
    bounds = {name: results["intervals"].get(name, {}) for name in (*models, "change")}
    rows = []
    for metric in metric_names({name: results[name] for name in models}):
        if leading in (None, bool(LEADING.fullmatch(metric))):
            values = [results[name][metric] for name in models]
            cells = [cell(value, bounds[name].get(metric)) for name, value in zip(models, values, strict=True)]
            if len(models) == 2:
                cells.append(cell(values[1] - values[0], bounds["change"].get(metric), "+"))
            rows.append([metric, *cells])
    return rows


def cell(value: float, interval: Interval, sign: str = "") -> str:
    """A score and its interval, where it has one, as text."""
    shown = f"{value:{sign}.4f}"
    return shown if interval is None else f"{shown} [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def heads(models: Sequence[str]) -> list[str]:
    """Column heads of the models, and of their change where there are two."""
    return [*models, "change"] if len(models) == 2 else list(models)


def overlap_text(held_out: Mapping[str, Any]) -> str:
    """How many of the rows the training files hold, as far as is known."""
    found = held_out["overlap"]
    if found is None:
        return "与训练数据重合 overlap with training data: 未知 unknown, there is no manifest"
    unread = f"; 已变或不在 changed or gone: {', '.join(map(file_name, found['unread']))}" if found["unread"] else ""
    return (
        f"与训练数据重合 overlap with training data: {found['rows']} / {held_out['rows']} rows, "
        f"提问相同 same question {found['questions']}{unread}"
    )


def changes(base: Mapping[int, Record], tuned: Mapping[int, Record]) -> list[tuple[float, int]]:
    """[(change of ROW_METRIC, row number)] of the records of two models, the worst change first."""
    both = base.keys() & tuned.keys()
    return sorted((row_score(tuned[row]) - row_score(base[row]), row) for row in both)


def row_score(record: Record) -> float:
    """ROW_METRIC of a prediction; taken anew, for an earlier version's records lack it."""
    return metrics.novel_f1(record["answer"], record["reference"], record["question"])


def by_length(records: Mapping[str, Mapping[int, Record]], seed: int) -> list[tuple[str, int, dict[str, Scored]]]:
    """[(label, rows, {model: (mean of ROW_METRIC, [low, high])})] of up to four groups by the reference's length."""
    lengths = {row: len(record["reference"]) for row, record in next(iter(records.values())).items()}
    edges: ndarray = numpy.quantile(list(lengths.values()), [0.25, 0.5, 0.75])
    groups: dict[int, list[int]] = {}
    for row, length in sorted(lengths.items(), key=lambda item: item[1]):
        groups.setdefault(int(numpy.searchsorted(edges, length)), []).append(row)
    found = []
    for rows in groups.values():
        ends = sorted({lengths[rows[0]], lengths[rows[-1]]})
        scores = {name: [{ROW_METRIC: row_score(each[row])} for row in rows] for name, each in records.items()}
        means = {
            name: (float(numpy.mean([row[ROW_METRIC] for row in part])), intervals(part, seed).get(ROW_METRIC))
            for name, part in scores.items()
        }
        found.append(("–".join(map(str, ends)), len(rows), means))
    return found


def task_rows(tasks: Mapping[str, Any], models: Sequence[str]) -> list[list[str]]:
    """[[task or subject, questions, cell, …]] of the tasks all models have."""
    rows = []
    for task in [task for task in tasks[models[0]] if all(task in tasks[name] for name in models)]:
        found = [tasks[name][task] for name in models]
        cells = [cell(each["accuracy"], each["interval"]) for each in found]
        if len(found) == 2:
            cells.append(cell(found[1]["accuracy"] - found[0]["accuracy"], tasks["change"][task], "+"))
        rows.append([task, str(found[0]["questions"]), *cells])
        if all("loss" in each for each in found):
            rows.append([f"{task}: loss of right answers", "", *_plain([each["loss"] for each in found])])
        if len(found[0]["subjects"]) > 1:
            rows.append([f"{task}: mean of subjects", "", *_plain([each["average"] for each in found])])
            for subject, part in found[0]["subjects"].items():
                values = [each["subjects"][subject]["accuracy"] for each in found]
                rows.append([f"{task}: {subject}", str(part["questions"]), *_plain(values)])
    return rows


def _plain(values: list[float]) -> list[str]:
    change = [f"{values[1] - values[0]:+.4f}"] if len(values) == 2 else []
    return [f"{value:.4f}" for value in values] + change


def file_name(path: str) -> str:
    """A file's name (and line) without its folders."""
    return re.split(r"[/\\]", path)[-1]
